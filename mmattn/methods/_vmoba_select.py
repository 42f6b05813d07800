"""VMoBA's chunks and the choice of chunks per query, as pure functions.

Gate values are ``[B, H, S, C]``: S image queries, C chunks. Pools are taken per batch item, so that one
call with a batch of two gives the numbers of two calls (the official code pools over the whole batch).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn.layout import Grid

KINDS = ("query", "head", "overall", "block")
_EPS = 1e-6
_AXES = {"query": (3,), "head": (2, 3), "overall": (1, 2, 3), "block": (1, 2)}


def edge(size: int, most: int) -> int:
    """Edge of the pieces that cut `size` into at most `most`: equal ones unless those are too few."""
    shortest = -(-size // most)
    equal = min(d for d in range(shortest, size + 1) if size % d == 0)
    return equal if equal < 2 * shortest else shortest


def default_temporal(grid: Grid) -> float:
    """Frames per 1-D chunk: an eighth of the video, rounded up to frames; of an image, to rows."""
    t, y, _ = grid
    return -(-t // 8) if t > 1 else -(-y // 8) / y


def default_spatial(grid: Grid) -> tuple[int, int]:
    """Rows and columns of a 2-D chunk: at most eight windows along each axis."""
    return edge(grid[1], 8), edge(grid[2], 8)


def default_cuboid(grid: Grid) -> Grid:
    """A 3-D chunk: at most three pieces in time, six along rows and columns."""
    t, y, x = grid
    return edge(t, 3), edge(y, 6), edge(x, 6)


def chunk_of(
    pattern: int, grid: Grid, temporal: float, spatial: tuple[int, int], cuboid: Grid
) -> Grid | int:
    """What layer pattern 0, 1 or 2 cuts into: a run of tokens (1-D), or a box ``(t, y, x)``.

    Boxes are cut to the grid; where they do not divide it, the last ones along an axis are smaller.
    """
    t, y, x = grid
    if pattern == 0:
        return max(1, min(t * y * x, int(temporal * y * x + _EPS)))
    box = (t, *spatial) if pattern == 1 else cuboid
    return min(box[0], t), min(box[1], y), min(box[2], x)


def uneven(grid: Grid, chunk: Grid | int) -> bool:
    """Whether a box does not divide the grid (a shorter last run of frames is nothing special)."""
    return not isinstance(chunk, int) and any(n % c for n, c in zip(grid, chunk, strict=True))


def _pieces(grid: Grid, chunk: Grid) -> tuple[int, ...]:
    return tuple(-(-n // c) for n, c in zip(grid, chunk, strict=True))


def chunk_ids(grid: Grid, chunk: Grid | int, device: torch.device) -> Tensor:
    """Chunk number of every image token, ``[S]``, tokens in row-major ``(T, Y, X)`` order."""
    t, y, x = grid
    if isinstance(chunk, int):
        return torch.arange(t * y * x, device=device) // chunk
    _, rows, columns = _pieces(grid, chunk)
    at, ay, ax = (torch.arange(n, device=device) // c for n, c in zip(grid, chunk, strict=True))
    ids = (at[:, None, None] * rows + ay[:, None]) * columns + ax
    return ids.reshape(-1)


def count_chunks(grid: Grid, chunk: Grid | int) -> int:
    """Number of chunks."""
    t, y, x = grid
    if isinstance(chunk, int):
        return -(-t * y * x // chunk)
    a, b, c = _pieces(grid, chunk)
    return a * b * c


def gate(q: Tensor, k: Tensor, own: Tensor) -> Tensor:
    """``<q_i, mean of the keys of chunk c>`` in fp32, unscaled: ``[B, H, S, C]``.

    Args:
        own: bool ``[S, C]``, True where the token is in the chunk.
    """
    # A product and not a scatter: sums in one order on every device, so equal calls choose equally.
    member = own.float()
    means = (member / member.sum(0)).transpose(0, 1) @ k.float()
    return q.float() @ means.transpose(-1, -2)


def choose_topk(gate: Tensor, own: Tensor, kind: str, k: int) -> Tensor:
    """Own chunks and the best others, ``k`` per query on average over the pool; bool like `gate`."""
    b, h, s, c = gate.shape
    ranked = gate.masked_fill(own, float("inf"))
    k = min(k, c)
    flat = {"query": ranked, "head": ranked.flatten(2), "overall": ranked.flatten(1)}[kind]
    best = flat.topk(k * (flat.shape[-1] // c), dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view(b, h, s, c)


def choose_threshold(
    gate: Tensor, own: Tensor, kind: str, threshold: float, *, compat: bool = False
) -> Tensor:
    """Own chunks and the shortest list of best others whose normalised similarity reaches `threshold`.

    Similarities are min-max normalised over the pool and count as shares of the pool's sum. The list is
    never empty. Where the threshold cannot be reached everything is kept; `compat` keeps two instead in
    the pools ``query`` and ``block``, as the official code does.
    """
    axes = _AXES[kind]
    low, high = gate.amin(axes, keepdim=True), gate.amax(axes, keepdim=True)
    spread = high - low
    share = (gate - low) / torch.where(spread <= _EPS, 1.0, spread)
    own = own.expand_as(gate)
    total = share.sum(axes, keepdim=True) + _EPS
    inside = share.masked_fill(~own, 0).sum(axes, keepdim=True)
    need = (threshold - inside / total).clamp_min(0)

    order = (0, 3, 1, 2) if kind == "block" else (0, 1, 2, 3)
    keep = {"query": 3, "head": 2, "overall": 1, "block": 2}[kind]

    def flat(t: Tensor) -> Tensor:
        return t.permute(order).flatten(keep)

    values = flat(share.masked_fill(own, -1.0))
    total, need = flat(total), flat(need)
    values, rank = values.sort(dim=-1, descending=True, stable=True)
    reached = values.clamp_min(0).cumsum(-1) / total >= need
    # The first position that reaches the threshold, and all before it.
    prefix = (reached.long().cumsum(-1) == 0).roll(1, -1)
    prefix[..., 0] = True
    if compat and kind in ("query", "block"):
        prefix &= reached.any(-1, keepdim=True) | (
            torch.arange(values.shape[-1], device=gate.device) < 2
        )
    chosen = torch.zeros_like(prefix).scatter_(-1, rank, prefix)
    permuted = [gate.shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(4)]
    return chosen.view(permuted).permute(back) | own


def as_one_sequence(gate: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The batch as one sequence, ``[1, H, B * S, C]``: how the official code pools over its rows."""
    b, h, s, c = gate.shape
    return gate.transpose(0, 1).reshape(1, h, b * s, c), own.repeat(b, 1)


def density_of(chosen: Tensor, sizes: Tensor) -> Tensor:
    """Share of image query-key pairs kept by `chosen` ``[B, H, S, C]`` with chunk sizes ``[C]``."""
    kept = (chosen.to(torch.float32) @ sizes.to(torch.float32)).mean()
    return kept / sizes.sum()
