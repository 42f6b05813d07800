"""Routed attention on the list kernels: keys in chunk order, tiles of queries over the union of their
chunks, and a word of bits per query that says which of them it chose.

The work is the union over a tile of queries, so neighbouring queries should choose alike: give them in
an order in which they lie in the same chunk.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,misc,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmattn_kernels import _triton
from mmattn_kernels._aot import AotCase
from mmattn_kernels._backends import interpreting
from mmattn_kernels.block_sparse.lists import list_true
from mmattn_kernels.block_sparse.triton import Lists, Tiles, attend, gradients


@triton.jit
def pack_kernel(
    selected,
    bits,
    union,
    q_len,
    chunks,
    words,
    tiles,
    step_b,
    step_h,
    step_q,
    step_c,
    heads,
    BM: tl.constexpr,
):
    """Pack 32 chunks of a tile of queries into words, and say which of them any query chose.

    Chunk number `chunks`, behind those in `selected`, is the one that everybody sees.
    """
    tile = tl.program_id(0)
    word = tl.program_id(1)
    bh = tl.program_id(2)
    rows = tile * BM + tl.arange(0, BM)
    numbers = word * 32 + tl.arange(0, 32)
    legal = (rows < q_len)[:, None]
    at = (bh // heads).to(tl.int64) * step_b + (bh % heads).to(tl.int64) * step_h
    at = at + rows.to(tl.int64)[:, None] * step_q + numbers[None, :] * step_c
    chosen = tl.load(selected + at, mask=legal & (numbers < chunks)[None, :], other=0)
    chosen = ((chosen != 0) | (numbers == chunks)[None, :]) & legal
    chosen = chosen.to(tl.int32)
    packed = tl.sum(chosen << tl.arange(0, 32)[None, :], 1)
    row_at = bh.to(tl.int64) * q_len + rows
    tl.store(bits + row_at * words + word, packed, mask=rows < q_len)
    tile_at = (bh.to(tl.int64) * tiles + tile) * (words * 32)
    tl.store(union + tile_at + numbers, (tl.sum(chosen, 0) > 0).to(tl.int8))


@dataclass(frozen=True)
class Routes:
    """Keys in chunk order, and which tiles of them every tile of queries needs.

    Shapes:
        ``order [K]`` positions of the keys in chunk order; ``needed [B, H, query tiles, key tiles]`` bool.
    """

    order: Tensor
    needed: Tensor
    starts: Tensor
    stops: Tensor
    owners: Tensor
    bits: Tensor


def routes(chunk_ids: Tensor, selected: Tensor, rows: int, columns: int) -> Routes:
    """Cut chunks into tiles of `columns` keys and queries into tiles of `rows`, on the device."""
    b, h, q_len, chunks = selected.shape
    device, k_len = chunk_ids.device, len(chunk_ids)
    ids = torch.where(chunk_ids < 0, chunks, chunk_ids.long())
    order = torch.argsort(ids, stable=True)
    sizes = torch.zeros(chunks + 1, dtype=torch.int64, device=device)
    sizes.scatter_add_(0, ids, torch.ones_like(ids))
    ends = sizes.cumsum(0)
    tile_ends = ((sizes + columns - 1) // columns).cumsum(0)
    # How many tiles there are is known on the device only; this is the most there can be.
    most = -(-k_len // columns) + chunks + 1
    number = torch.arange(most, device=device)
    owner = torch.searchsorted(tile_ends, number, right=True)
    real = owner <= chunks
    owner = owner.clamp(max=chunks)
    begin = ends[owner] - sizes[owner]
    before = tile_ends[owner] - (sizes[owner] + columns - 1) // columns
    starts = begin + (number - before) * columns

    words = (chunks + 1 + 31) // 32
    tiles = -(-q_len // rows)
    bits = torch.empty((b, h, q_len, words), dtype=torch.int32, device=device)
    union = torch.empty((b, h, tiles, words * 32), dtype=torch.int8, device=device)
    flags = selected.view(torch.int8)
    with _triton.on_device(selected):
        pack_kernel[(tiles, words, b * h)](
            flags, bits, union, q_len, chunks, words, tiles, *flags.stride(), h, BM=rows
        )
    needed = (union[..., owner] != 0) & real
    return Routes(
        order,
        needed,
        starts.to(torch.int32),
        torch.where(real, ends[owner], 0).to(torch.int32),
        owner.to(torch.int32),
        bits,
    )


def _lists(found: Routes, needed: Tensor, rows: int, columns: int) -> Lists:
    counts, indices = list_true(needed)
    return Lists(
        counts,
        indices,
        rows,
        columns,
        starts=found.starts,
        stops=found.stops,
        owners=found.owners,
        bits=found.bits,
    )


def _tiles(head_dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of output, gradient of queries, gradient of keys; they share the keys per tile."""
    if interpreting():
        return (Tiles(32, 16, 4, 1),) * 3
    if dtype == torch.float32:
        return (Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))
    if head_dim > 128:
        return (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1), Tiles(64, 32, 8, 1))
    return (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, chunk_ids: Tensor, selected: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and LSE."""
    tiles = _tiles(q.shape[3], q.dtype)[0]
    found = routes(chunk_ids, selected, tiles.rows, tiles.columns)
    lists = _lists(found, found.needed, tiles.rows, tiles.columns)
    k, v = (x.index_select(2, found.order) for x in (k, v))
    return attend(q, k, v, lists, scale, tiles)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk_ids: Tensor,
    selected: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; deterministic, without atomics."""
    front, *tiles = _tiles(q.shape[3], q.dtype)
    found = routes(chunk_ids, selected, front.rows, front.columns)
    lists = _lists(found, found.needed, front.rows, front.columns)
    reverse = _lists(found, found.needed.transpose(2, 3), front.rows, front.columns)
    k, v = (x.index_select(2, found.order) for x in (k, v))
    dq, dk, dv = gradients(
        grad_out, grad_lse, q, k, v, out, lse, lists, reverse, scale, (tiles[0], tiles[1])
    )
    back = torch.empty_like(found.order)
    back.scatter_(0, found.order, torch.arange(len(back), device=back.device))
    return dq, dk.index_select(2, back), dv.index_select(2, back)


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time: Wan 480p with 72 chunks."""

    def launch(dim: int, dtype: torch.dtype, back: bool) -> Any:
        q = torch.empty(1, 12, 32760, dim, dtype=dtype, device="meta")
        chunk_ids = torch.empty(32760, dtype=torch.int64, device="meta")
        selected = torch.empty(1, 12, 32760, 72, dtype=torch.bool, device="meta")
        if back:
            lse = torch.empty(q.shape[:3], device="meta")
            return backward(q, lse, q, q, q, q, lse, chunk_ids, selected, 0.1)
        return forward(q, q, q, chunk_ids, selected, 0.1)

    return [
        AotCase("forward bf16 d64", partial(launch, 64, torch.bfloat16, False)),
        AotCase("forward bf16 d128", partial(launch, 128, torch.bfloat16, False), quick=True),
        AotCase("forward bf16 d256", partial(launch, 256, torch.bfloat16, False)),
        AotCase("backward bf16 d64", partial(launch, 64, torch.bfloat16, True)),
        AotCase("backward bf16 d128", partial(launch, 128, torch.bfloat16, True)),
        AotCase(
            "backward bf16 d256", partial(launch, 256, torch.bfloat16, True), tensor_cores="mma"
        ),
    ]
