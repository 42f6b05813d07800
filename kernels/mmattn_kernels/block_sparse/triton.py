"""Launches the Triton kernels over block lists, and chooses their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _triton
from mmattn_kernels._aot import AotCase
from mmattn_kernels._backends import interpreting
from mmattn_kernels.block_sparse import _kernels, _kernels_backward
from mmattn_kernels.block_sparse.lists import list_true, mask_of


@dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, and how the GPU runs one."""

    rows: int
    columns: int
    warps: int
    stages: int


def forward_tiles(head_dim: int, q_block: int, k_block: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the forward kernel; read off ahead-of-time compilation (no spills, fits shared memory)."""
    if interpreting():
        return Tiles(_fit(32, q_block), _fit(32, k_block), 4, 1)
    if dtype == torch.float32:
        return Tiles(_fit(64, q_block), _fit(32, k_block), 4, 1)
    rows = _fit(128, q_block)
    columns = _fit(128 if head_dim <= 64 else 64, k_block)
    return Tiles(rows, columns, 8 if rows == 128 else 4, 3 if head_dim <= 128 else 2)


def backward_tiles(
    head_dim: int, q_block: int, k_block: int, dtype: torch.dtype
) -> tuple[Tiles, Tiles]:
    """Tiles of the gradients of queries, and of keys and values."""
    if interpreting():
        tiles = Tiles(_fit(32, q_block), _fit(32, k_block), 4, 1)
        return tiles, tiles
    if dtype == torch.float32:
        return (
            Tiles(_fit(64, q_block), _fit(32, k_block), 8, 1),
            Tiles(_fit(32, q_block), _fit(64, k_block), 8, 1),
        )
    if head_dim > 128:
        return (
            Tiles(_fit(64, q_block), _fit(32, k_block), 4, 1),
            Tiles(_fit(64, q_block), _fit(64, k_block), 8, 1),
        )
    rows, columns = _fit(128, q_block), _fit(128, k_block)
    return (
        Tiles(rows, _fit(64, k_block), 8 if rows == 128 else 4, 2),
        Tiles(_fit(64 if head_dim <= 64 else 32, q_block), columns, 8 if columns == 128 else 4, 2),
    )


def _fit(size: int, block: int) -> int:
    """`size`, or the least power of two that holds a smaller block; at least 16."""
    return max(16, min(size, 1 << (block - 1).bit_length()))


@dataclass(frozen=True)
class Lists:
    """What a kernel reads to know which pairs to compute.

    `q_block` and `k_block` are those of the lists. In neighborhood attention `spans` (int32
    ``[axes * 2, Q]``, first and last code a query sees), `codes` (int32 ``[axes, K]``) and `whole` (int32
    like `counts`, how many tiles of a list come first that are seen whole) are given. In routed attention
    the lists name key tiles, and `starts`, `stops`, `owners` (int32 ``[tiles]``) and `bits` (int32
    ``[B, H, Q, words]``) are given.
    """

    counts: Tensor
    indices: Tensor
    q_block: int
    k_block: int
    patterns: Tensor | None = None
    pattern_of: Tensor | None = None
    starts: Tensor | None = None
    stops: Tensor | None = None
    owners: Tensor | None = None
    bits: Tensor | None = None
    spans: Tensor | None = None
    codes: Tensor | None = None
    whole: Tensor | None = None

    @property
    def routed(self) -> bool:
        return self.bits is not None

    @property
    def axes(self) -> int:
        """Axes of the grid whose windows are compared; 0 for none."""
        return 0 if self.codes is None else self.codes.shape[0]

    def bounded(self, k_len: int, columns: int) -> int:
        """How a kernel with `columns` keys per tile must look out for tiles that reach too far."""
        if self.routed or self.k_block % columns:
            return 2
        return 1 if k_len % columns else 0

    def tensors(self, like: Tensor) -> list[Tensor]:
        """The pointers, in the kernels' order; a tensor nobody reads stands for those not given."""
        given = (
            *(self.starts, self.stops, self.owners, self.bits, self.patterns, self.pattern_of),
            *(self.spans, self.codes, self.whole),
        )
        return [
            self.counts,
            self.indices,
            *(like if x is None else _bytes(x) for x in given),
        ]

    def numbers(self) -> list[int]:
        """Strides and widths, in the kernels' order."""
        words = 0 if self.bits is None else self.bits.shape[3]
        blocks = 0 if self.pattern_of is None else self.pattern_of.shape[3]
        pattern = (0, 0) if self.pattern_of is None else _steps(self.pattern_of[..., 0])
        return [*_steps(self.counts), *pattern, self.indices.shape[3], blocks, words]


def _bytes(x: Tensor) -> Tensor:
    """Triton reads a bool tensor as bytes."""
    return x.contiguous().view(torch.int8) if x.dtype == torch.bool else x.contiguous()


def _steps(x: Tensor) -> tuple[int, int]:
    """Distance between batch items and between heads of lists ``[B|1, H|1, n]``; 0 where shared."""
    b, h, n = x.shape
    return (h * n if b > 1 else 0), (n if h > 1 else 0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``."""
    b, h, q_len, dim = q.shape
    dtype = q.dtype
    out = torch.empty(q.shape, dtype=_triton.result_dtype(q), device=q.device)
    lse = torch.empty((b, h, q_len), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out.to(dtype), lse
    narrow, rest = _triton.split_dim(dim)
    q, k, v = (_triton.aligned(x) for x in (q, k, v))
    boxes: list[Any] = []
    for x, size in ((q, tiles.rows), (k, tiles.columns), (v, tiles.columns)):
        boxes += [_triton.descriptor(x, 1, 1, size, width) for width in (narrow, rest or narrow)]
    per_block = -(-lists.q_block // tiles.rows)
    q_blocks = lists.counts.shape[2]
    with _triton.on_device(q):
        _kernels.forward_kernel[(q_blocks * per_block, h, b)](
            *boxes,
            out,
            lse,
            *lists.tensors(q),
            scale * _triton.LOG2E,
            h,
            q_len,
            k.shape[2],
            q_blocks,
            *lists.numbers(),
            GROUP=h // k.shape[1],
            D=dim,
            D0=narrow,
            D1=rest,
            q_block=lists.q_block,
            k_block=lists.k_block,
            BM=tiles.rows,
            BN=tiles.columns,
            BOUNDED=lists.bounded(k.shape[2], tiles.columns),
            ROUTED=lists.routed,
            PATTERNS=lists.patterns is not None,
            WINDOW=lists.axes,
            UP=_triton.upcast(q),
            PRECISE=q.dtype == torch.float32,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out.to(dtype), lse


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    reverse: Lists,
    scale: float,
    tiles: tuple[Tiles, Tiles],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both backward kernels; `reverse` lists the query blocks of every key block or tile."""
    b, h, q_len, dim = q.shape
    k_len, kv_heads = k.shape[2], k.shape[1]
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
    row_lse = torch.where(lse == float("-inf"), float("inf"), lse) * _triton.LOG2E
    dtype = q.dtype
    dq, dk, dv = (
        torch.empty(x.shape, dtype=_triton.result_dtype(q), device=x.device) for x in (q, k, v)
    )
    if not q.numel() or not k.numel():
        return dq.to(dtype).zero_(), dk.to(dtype).zero_(), dv.to(dtype).zero_()
    width = _triton.padded_dim(dim)
    q, k, v, grad_out = (_triton.aligned(x) for x in (q, k, v, grad_out))
    constants = {
        "GROUP": h // kv_heads,
        "D": dim,
        "D0": width,
        "q_block": lists.q_block,
        "k_block": lists.k_block,
        "ROUTED": lists.routed,
        "PATTERNS": lists.patterns is not None,
        "WINDOW": lists.axes,
        "UP": _triton.upcast(q),
        "PRECISE": q.dtype == torch.float32,
    }
    jobs = (
        (_kernels_backward.backward_queries_kernel, lists, tiles[0], (dq,)),
        (_kernels_backward.backward_keys_kernel, reverse, tiles[1], (dk, dv)),
    )
    for kernel, given, shape, results in jobs:
        by_queries = len(results) == 1
        block, size = (lists.q_block, shape.rows) if by_queries else (lists.k_block, shape.columns)
        # Routed lists name key tiles themselves.
        per_block = 1 if lists.routed and not by_queries else -(-block // size)
        boxes = [
            _triton.descriptor(x, 1, 1, n, width)
            for x, n in (
                (q, shape.rows),
                (k, shape.columns),
                (v, shape.columns),
                (grad_out, shape.rows),
            )
        ]
        with _triton.on_device(q):
            kernel[(given.counts.shape[2] * per_block, h if by_queries else kv_heads, b)](
                *boxes,
                row_lse.contiguous(),
                delta.contiguous(),
                *results,
                *given.tensors(q),
                scale,
                h,
                q_len,
                k_len,
                *given.numbers(),
                **constants,
                BM=shape.rows,
                BN=shape.columns,
                BOUNDED=lists.bounded(k_len, shape.columns),
                num_warps=shape.warps,
                num_stages=shape.stages,
            )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


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
    """Output and LSE."""
    lists = Lists(counts.contiguous(), indices.contiguous(), q_block, k_block, patterns, pattern_of)
    return attend(q, k, v, lists, scale, forward_tiles(q.shape[3], q_block, k_block, q.dtype))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; deterministic, without atomics."""
    mask = mask_of(counts, indices, -(-k.shape[2] // k_block))
    reverse = list_true(mask.transpose(2, 3))
    lists, back = (
        Lists(c.contiguous(), i.contiguous(), q_block, k_block, patterns, pattern_of)
        for c, i in ((counts, indices), (reverse.counts, reverse.indices))
    )
    tiles = backward_tiles(q.shape[3], q_block, k_block, q.dtype)
    return gradients(grad_out, grad_lse, q, k, v, out, lse, lists, back, scale, tiles)


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time."""

    def launch(dim: int, dtype: torch.dtype, block: int, tail: int, back: bool) -> Any:
        n = 32768 - tail
        q = torch.empty(1, 12, n, dim, dtype=dtype, device="meta")
        blocks = -(-n // block)
        counts = torch.empty(1, 12, blocks, dtype=torch.int32, device="meta")
        indices = torch.empty(1, 12, blocks, blocks, dtype=torch.int32, device="meta")
        lists = (counts, indices, None, None, block, block, 0.1)
        if back:
            lse = torch.empty(q.shape[:3], device="meta")
            return backward(q, lse, q, q, q, q, lse, *lists)
        return forward(q, q, q, *lists)

    half = torch.bfloat16
    return [
        AotCase("forward bf16 d64", partial(launch, 64, half, 128, 0, False)),
        AotCase("forward bf16 d72", partial(launch, 72, half, 128, 0, False)),
        AotCase("forward bf16 d128", partial(launch, 128, half, 128, 0, False), quick=True),
        AotCase("forward bf16 d128 tail", partial(launch, 128, half, 128, 8, False)),
        AotCase("forward bf16 d128 blocks of 64", partial(launch, 128, half, 64, 0, False)),
        AotCase("forward bf16 d256", partial(launch, 256, half, 128, 8, False)),
        AotCase("forward fp32 d64", partial(launch, 64, torch.float32, 128, 8, False)),
        AotCase("backward bf16 d64", partial(launch, 64, half, 128, 8, True)),
        AotCase("backward bf16 d128", partial(launch, 128, half, 128, 8, True), quick=True),
        AotCase("backward bf16 d128 blocks of 64", partial(launch, 128, half, 64, 8, True)),
        AotCase("backward bf16 d256", partial(launch, 256, half, 128, 8, True)),
    ]
