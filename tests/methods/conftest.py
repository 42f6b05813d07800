"""Puts tests/hosts on the path, so that method tests can use its model zoos."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))
