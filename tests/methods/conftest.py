"""Puts tests/hosts and this folder on the path: method tests use the model zoos and shared oracles."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "hosts"), str(Path(__file__).parent)]
