"""FlexAttention as a back end, for comparison on a GPU; it compiles for every new shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels._backends import Problem
from mmattn_kernels.block_sparse.lists import mask_of


def can_run(problem: Problem) -> str | None:
    """Why FlexAttention cannot run, None if it can."""
    if problem.device.type != "cuda":
        return (
            "on a CPU FlexAttention has neither gradient nor LSE and is half as fast as gathering"
        )
    if problem.extra.get("patterns"):
        return "patterns inside blocks would need a mask function of their own"
    return None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and LSE through a `BlockMask` of full blocks only."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-k.shape[2] // k_block)
    # BlockMask wants a full square of indices.
    from mmattn_kernels.block_sparse.lists import list_true

    listing = list_true(mask_of(counts, indices, blocks))
    none = torch.zeros_like(listing.counts)
    block_mask = BlockMask.from_kv_blocks(
        none,
        listing.indices,
        listing.counts,
        listing.indices,
        BLOCK_SIZE=(q_block, k_block),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    out, lse = _compiled()(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=scale,
        return_lse=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.contiguous(), lse
