"""Neighborhood attention on the list kernels: tokens in the order of grid tiles, and lists of the tiles
that a tile of queries sees, whole or in part.

Tiles lie at multiples of their size, and dilation classes one after the other. Tables depend on the
geometry alone and are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels._aot import AotCase
from mmattn_kernels._backends import interpreting
from mmattn_kernels.block_sparse.triton import Lists, Tiles, attend, gradients
from mmattn_kernels.neighborhood.tiling import gpu_tiles
from mmattn_kernels.neighborhood.windows import Axis, spans

_OUTSIDE = -2
"""Code of a key outside the grid; everybody sees it."""
_NOTHING = -3
"""Code of a place in a tile that holds no key; nobody sees it."""


@dataclass(frozen=True)
class Order:
    """Tokens in tile order, and what the list kernels need to know about them.

    Shapes:
        ``queries [nq * rows]`` and ``keys [nk * columns]``: positions among the tokens of the call, 0 where
        a tile has no token. ``places [Q]``: where a query's output is found. ``key_places [K]`` alike.
        ``counts [1, 1, nq]``, ``indices [1, 1, nq, most]``, ``whole [1, 1, nq]``, and the same reversed.
        ``spans [2 * axes, nq * rows]``, ``codes [axes, nk * columns]``: empty if every tile is whole.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor
    key_places: Tensor
    counts: Tensor
    indices: Tensor
    whole: Tensor
    reverse_counts: Tensor
    reverse_indices: Tensor
    spans: Tensor
    codes: Tensor

    def lists(self, rows: int, columns: int, *, reverse: bool = False) -> Lists:
        """What the kernels read; `reverse` lists the query tiles of every key tile."""
        compared = self.codes.shape[0] > 0
        return Lists(
            self.reverse_counts if reverse else self.counts,
            self.reverse_indices if reverse else self.indices,
            rows,
            columns,
            spans=self.spans if compared else None,
            codes=self.codes if compared else None,
            whole=self.whole if compared else None,
        )


@dataclass(frozen=True)
class _AxisTiles:
    """One axis cut into tiles. ``coordinates [tiles, size]`` is -1 where a tile has no token.

    ``codes`` number positions class by class with a gap between classes, so that a window never reaches
    into another class.
    """

    coordinates: Tensor
    codes: Tensor


def _axis_tiles(axis: Axis, size: int) -> _AxisTiles:
    coordinates, codes = [], []
    for residue in range(axis.dilation):
        members = list(range(residue, axis.length, axis.dilation))
        numbers = [residue * (axis.longest + 1) + position for position in range(len(members))]
        short = -len(members) % size
        coordinates += members + [-1] * short
        codes += numbers + [_NOTHING] * short
    return _AxisTiles(
        torch.tensor(coordinates).view(-1, size),
        torch.tensor(codes, dtype=torch.int32).view(-1, size),
    )


def _axis_spans(axis: Axis) -> Tensor:
    """First and last code that every coordinate sees, int32 ``[2, length]``."""
    table = torch.empty(2, axis.length, dtype=torch.int32)
    for residue in range(axis.dilation):
        count = len(range(residue, axis.length, axis.dilation))
        base = residue * (axis.longest + 1)
        seen = torch.tensor(spans(count, axis.window, axis.stride, axis.causal), dtype=torch.int32)
        table[0, residue :: axis.dilation] = base + seen[:, 0]
        table[1, residue :: axis.dilation] = base + seen[:, 1] - 1
    return table


def _grid(parts: list[Tensor], combine: Any) -> Tensor:
    """Combine tables ``[tiles, size]`` per axis into one over the grid, ``[all tiles, all sizes]``."""
    rank = len(parts)
    grown = []
    for number, part in enumerate(parts):
        shape = [1] * (2 * rank)
        shape[number], shape[rank + number] = part.shape
        grown.append(part.view(shape))
    full: Tensor = combine(torch.broadcast_tensors(*grown))
    tiles = prod(part.shape[0] for part in parts)
    return full.reshape(tiles, -1)


def _tokens(axes: tuple[Axis, ...], parts: list[_AxisTiles], extra: int) -> Tensor:
    """Position of every place among the tokens, -1 for none, ``[tiles, size]``."""

    def position(coordinates: tuple[Tensor, ...]) -> Tensor:
        at = torch.zeros_like(coordinates[0])
        gone = torch.zeros_like(coordinates[0], dtype=torch.bool)
        for axis, coordinate in zip(axes, coordinates, strict=True):
            at = at * axis.length + coordinate.clamp(min=0)
            gone = gone | (coordinate < 0)
        return torch.where(gone, -1, at + extra)

    return _grid([part.coordinates for part in parts], position)


def _lead(count: int, size: int) -> Tensor:
    """Tiles of leading tokens outside the grid, ``[tiles, size]``."""
    short = -count % size
    return torch.cat([torch.arange(count), torch.full((short,), -1)]).view(-1, size)


@lru_cache(maxsize=64)
def order(
    axes: tuple[Axis, ...],
    extra: int,
    dense_rows: bool,
    rows: int,
    columns: int,
    device: torch.device,
) -> Order:
    """Tables of a geometry; `dense_rows` if the extra tokens are queries as well."""
    q_tile, k_tile = gpu_tiles(axes, rows, columns)
    q_parts = [_axis_tiles(axis, size) for axis, size in zip(axes, q_tile, strict=True)]
    k_parts = [_axis_tiles(axis, size) for axis, size in zip(axes, k_tile, strict=True)]
    queries = _tokens(axes, q_parts, extra if dense_rows else 0)
    keys = _tokens(axes, k_parts, extra)
    seen, all_seen, limits, codes = [], [], [], []
    for number, axis in enumerate(axes):
        table = _axis_spans(axis)
        at = q_parts[number].coordinates
        low = torch.where(at < 0, 1, table[0][at.clamp(min=0)]).to(torch.int32)
        high = torch.where(at < 0, 0, table[1][at.clamp(min=0)]).to(torch.int32)
        code = k_parts[number].codes
        pairs = (code >= low[..., None, None]) & (code <= high[..., None, None])
        seen.append(pairs.any(1).any(-1))
        # A place without a query does not mind what it sees.
        all_seen.append((pairs | (at < 0)[..., None, None]).all(1).all(-1))
        limits += [_spread(low, q_parts, number), _spread(high, q_parts, number)]
        codes.append(_spread(code, k_parts, number))
    needed, whole = (
        _grid(parts, lambda full: torch.stack(full).all(0)) for parts in (seen, all_seen)
    )
    spans_table, codes_table = torch.stack(limits), torch.stack(codes)

    if extra:
        lead = _lead(extra, columns)
        keys = torch.cat([lead, keys])
        outside = torch.where(lead < 0, _NOTHING, _OUTSIDE).to(torch.int32).flatten()
        codes_table = torch.cat([outside.expand(len(axes), -1), codes_table], 1)
        lead_whole = (lead >= 0).all(1).expand(len(needed), -1)
        needed = torch.cat([torch.ones_like(lead_whole), needed], 1)
        whole = torch.cat([lead_whole, whole], 1)
    if dense_rows:
        lead = _lead(extra, rows)
        queries = torch.cat([lead, queries])
        bounds = torch.tensor([_OUTSIDE, 1 << 30] * len(axes), dtype=torch.int32)
        spans_table = torch.cat([bounds[:, None].expand(-1, lead.numel()), spans_table], 1)
        complete = (keys >= 0).all(1).expand(len(lead), -1)
        needed = torch.cat([torch.ones_like(complete), needed])
        whole = torch.cat([complete, whole])
    return _order(queries, keys, needed, whole & needed, spans_table, codes_table, device)


def _spread(table: Tensor, parts: list[_AxisTiles], number: int) -> Tensor:
    """A table of one axis ``[tiles, size]`` at every place of the grid's tiles, flat."""
    shapes = [part.coordinates for part in parts]
    grown = [table if i == number else torch.zeros_like(x) for i, x in enumerate(shapes)]
    return _grid(grown, lambda full: full[number]).flatten()


def _order(
    queries: Tensor,
    keys: Tensor,
    needed: Tensor,
    whole: Tensor,
    spans_table: Tensor,
    codes_table: Tensor,
    device: torch.device,
) -> Order:
    def listing(mask: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        rank = torch.where(first, 0, torch.where(mask, 1, 2))
        counts = mask.sum(1, dtype=torch.int32)
        most = max(1, int(counts.max()))
        indices = torch.argsort(rank, dim=1, stable=True)[:, :most].to(torch.int32)
        return counts[None, None].contiguous(), indices[None, None].contiguous()

    def places(tokens: Tensor) -> Tensor:
        real = tokens >= 0
        found = torch.empty(int(real.sum()), dtype=torch.int64)
        found[tokens[real]] = torch.arange(tokens.numel()).view(tokens.shape)[real]
        return found

    counts, indices = listing(needed, whole)
    reverse_counts, reverse_indices = listing(needed.T, whole.T)
    if bool((whole == needed).all()):
        spans_table, codes_table = spans_table[:0], codes_table[:0]
    found = Order(
        queries.clamp(min=0).flatten(),
        keys.clamp(min=0).flatten(),
        places(queries),
        places(keys),
        counts,
        indices,
        whole.sum(1, dtype=torch.int32)[None, None].contiguous(),
        reverse_counts,
        reverse_indices,
        spans_table.contiguous(),
        codes_table.contiguous(),
    )
    return Order(**{name: x.to(device) for name, x in found.__dict__.items()})


def _tiles(head_dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of output, gradient of queries, gradient of keys; they share rows and columns of a list."""
    if interpreting():
        return (Tiles(16, 16, 4, 1),) * 3
    if dtype == torch.float32:
        return (Tiles(64, 32, 4, 1),) * 3
    if head_dim > 128:
        return (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 1), Tiles(64, 64, 8, 1))
    return (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2))


def _prepare(
    q: Tensor,
    geometry: tuple[Any, ...],
    front: Tiles,
) -> Order:
    grid, window, stride, dilation, causal, extra = geometry
    axes = tuple(Axis(*each) for each in zip(grid, window, stride, dilation, causal, strict=True))
    dense_rows = q.shape[2] != prod(grid)
    return order(axes, extra, dense_rows, front.rows, front.columns, q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    extra_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and LSE."""
    front = _tiles(q.shape[3], q.dtype)[0]
    found = _prepare(q, (grid, window, stride, dilation, is_causal, extra_keys), front)
    q = q.index_select(2, found.queries)
    k, v = (x.index_select(2, found.keys) for x in (k, v))
    out, lse = attend(q, k, v, found.lists(front.rows, front.columns), scale, front)
    return out.index_select(2, found.places), lse.index_select(2, found.places)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    extra_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; deterministic, without atomics."""
    front, *back = _tiles(q.shape[3], q.dtype)
    found = _prepare(q, (grid, window, stride, dilation, is_causal, extra_keys), front)
    lists, reverse = (found.lists(front.rows, front.columns, reverse=r) for r in (False, True))
    real = torch.zeros(len(found.queries), dtype=torch.bool, device=q.device)
    real.index_fill_(0, found.places, True)
    grad_out, q, out = (x.index_select(2, found.queries) for x in (grad_out, q, out))
    grad_lse, lse = (x.index_select(2, found.queries) for x in (grad_lse, lse))
    # A place without a query shows token 0 again; an LSE of -inf keeps it from counting twice.
    lse = torch.where(real, lse, float("-inf"))
    k, v = (x.index_select(2, found.keys) for x in (k, v))
    dq, dk, dv = gradients(
        grad_out, grad_lse, q, k, v, out, lse, lists, reverse, scale, (back[0], back[1])
    )
    return (
        dq.index_select(2, found.places),
        dk.index_select(2, found.key_places),
        dv.index_select(2, found.key_places),
    )


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time: HunyuanVideo at 720p and smaller."""

    def launch(dim: int, aligned: bool, back: bool) -> Any:
        grid = [30, 48, 80] if aligned else [21, 30, 52]
        stride = [16, 8, 8] if aligned else [1, 1, 1]
        window = [18, 24, 24] if aligned else [9, 13, 13]
        q = torch.empty(1, 24, prod(grid), dim, dtype=torch.bfloat16, device="meta")
        geometry = (grid, window, stride, [1, 1, 1], [False] * 3, 0, 0.1)
        if back:
            lse = torch.empty(q.shape[:3], device="meta")
            return backward(q, lse, q, q, q, q, lse, *geometry)
        return forward(q, q, q, *geometry)

    return [
        AotCase("forward bf16 d128, whole tiles", partial(launch, 128, True, False)),
        AotCase("forward bf16 d128, stride 1", partial(launch, 128, False, False), quick=True),
        AotCase("forward bf16 d64, stride 1", partial(launch, 64, False, False)),
        AotCase("backward bf16 d128, stride 1", partial(launch, 128, False, True)),
        AotCase("backward bf16 d64, stride 1", partial(launch, 64, False, True)),
    ]
