"""Attention and column mass on Triton: a pass over keys for output and LSE, one over queries for the mass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _row_launch, _triton
from mmattn_kernels._aot import AotCase


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, Q, D]``, LSE ``[B, H, Q]``, mass ``[B, H, K]``."""
    out, lse, _ = _row_launch.rows(q, k, v, mask, is_causal, scale)
    assert out is not None
    # A row without keys, or with weight 0, is moved so far away that nothing of it is left.
    offset = torch.where(lse == float("-inf"), float("inf"), lse) * _triton.LOG2E
    if query_weights is not None:
        # log2(0) is -inf, so a row that does not count ends at +inf like one without keys.
        offset = offset - query_weights.float().log2()
    return out, lse, _row_launch.columns(q, k, offset, mask, is_causal, scale)


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time."""

    def launch(dim: int, heads: int, tokens: int, causal: bool, masked: bool) -> Any:
        q = torch.empty(1, heads, tokens, dim, dtype=torch.bfloat16, device="meta")
        mask = torch.empty(1, 1, 1, tokens, dtype=torch.bool, device="meta") if masked else None
        return forward(q, q, q, mask, None, causal, 0.1)

    return [
        AotCase("bf16 d64", partial(launch, 64, 16, 577, False, False)),
        AotCase("bf16 d128", partial(launch, 128, 24, 4608, False, False), quick=True),
        AotCase("bf16 d128 causal, padded", partial(launch, 128, 32, 2944, True, True)),
        AotCase("bf16 d256", partial(launch, 256, 16, 1024, False, False)),
    ]
