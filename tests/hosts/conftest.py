"""Puts this folder on the path, so that its tests can import `host_contract` and their model zoos."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
