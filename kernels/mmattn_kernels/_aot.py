"""What an op hands to `kernels/bench/aot.py`: launches to compile for a GPU that need not be present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class AotCase:
    """One call of a Triton launcher, on tensors of the device ``meta``.

    Nothing runs: the bench replaces the launch of a kernel by its compilation, so the tiles, warps,
    stages and specialisations looked at are those that the launcher would choose. A launcher must
    therefore not read data on the host.

    Args:
        name: unique in its op, such as ``"forward bf16 d128"``.
        launch: makes meta tensors, calls the launcher and returns whatever it returns.
        quick: whether the default test suite compiles it; one or two cases of an op.
        tensor_cores: what 16-bit products must compile to: ``"wgmma"``, or ``"mma"`` where a tile has
            fewer than the 64 rows that wgmma needs.
    """

    name: str
    launch: Callable[[], Any]
    quick: bool = False
    tensor_cores: Literal["wgmma", "mma"] = "wgmma"
