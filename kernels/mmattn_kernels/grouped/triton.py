"""Grouped attention on Triton: a pass over the keys alone for the masses, one over keys and values."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _row_launch
from mmattn_kernels._aot import AotCase


def masses(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    num_groups: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """LSE ``[B, H, Q]`` and probability per group ``[B, H, Q, G]``."""
    _, lse, found = _row_launch.rows(
        q, k, None, mask, is_causal, scale, groups=groups, num_groups=num_groups
    )
    assert found is not None
    return lse, found


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """``sum_j c_ig(j) P_ij v_j``, ``[B, H, Q, D]``."""
    out, _, _ = _row_launch.rows(
        q,
        k,
        v,
        mask,
        is_causal,
        scale,
        groups=groups,
        num_groups=coefficients.shape[3],
        coefficients=coefficients,
        lse=lse.contiguous(),
    )
    assert out is not None
    return out


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time."""

    def launch(dim: int, count: int, causal: bool) -> Any:
        q = torch.empty(1, 32, 2944, dim, dtype=torch.bfloat16, device="meta")
        groups = torch.empty(1, 2944, dtype=torch.int64, device="meta")
        lse, found = masses(q, q, groups, None, count, causal, 0.1)
        return apply(q, q, q, found, lse, groups, None, causal, 0.1)

    return [
        AotCase("bf16 d64, 3 groups", partial(launch, 64, 3, True)),
        AotCase("bf16 d128, 3 groups", partial(launch, 128, 3, True), quick=True),
        AotCase("bf16 d128, 8 groups", partial(launch, 128, 8, False)),
    ]
