"""Fixtures of the kernel tests; this folder goes on the path, so that they can import `oracles`.

`tests/conftest.py` turns Triton's interpreter on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an output nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
