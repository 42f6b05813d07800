"""Puts this folder on the path: tests of image sets share tiny pipelines."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
