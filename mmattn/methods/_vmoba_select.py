"""VMoBA's chunks and the choice of chunks per query, as pure functions.

Gate values are ``[B, H, S, C]``: S image queries, C chunks. Pools are taken per batch item, so that one
call with a batch of two gives the numbers of two calls (the official code pools over the whole batch).
"""

from __future__ import annotations

import torch

from mmattn.errors import UnsupportedCall
from mmattn.layout import Grid

POOLS = ("query_head", "head_global", "overall", "block")
_EPS = 1e-6
_AXES = {"query_head": (3,), "head_global": (2, 3), "overall": (1, 2, 3), "block": (1, 2)}


def largest_count(size: int, most: int) -> int:
    """Edge of the equal pieces that cut `size` into as many as possible, at most `most`."""
    return min(d for d in range(1, size + 1) if size % d == 0 and size // d <= most)


def default_temporal(grid: Grid) -> float:
    """Frames per 1-D chunk: an eighth of the video, rounded up to frames; of an image, to rows."""
    t, y, _ = grid
    return -(-t // 8) if t > 1 else -(-y // 8) / y


def default_spatial(grid: Grid) -> tuple[int, int]:
    """Rows and columns of a 2-D chunk: at most eight windows along each axis."""
    return largest_count(grid[1], 8), largest_count(grid[2], 8)


def default_cuboid(grid: Grid) -> Grid:
    """A 3-D chunk: at most three pieces in time, six along rows and columns."""
    t, y, x = grid
    return largest_count(t, 3), largest_count(y, 6), largest_count(x, 6)


def cuboid_of(
    pattern: int, grid: Grid, temporal: float, spatial: tuple[int, int], cuboid: Grid
) -> Grid | int:
    """What layer pattern 0, 1 or 2 cuts into: a run of tokens (1-D), or a box ``(t, y, x)``.

    Raises:
        UnsupportedCall: when a 2-D or 3-D box does not divide the grid.
    """
    t, y, x = grid
    if pattern == 0:
        return max(1, min(t * y * x, int(temporal * y * x + _EPS)))
    box = (t, *spatial) if pattern == 1 else cuboid
    for axis, size, edge in zip("TYX", grid, box, strict=True):
        if size % edge:
            raise UnsupportedCall(
                f"VMoBA chunks of {box} do not divide the token grid {grid} along {axis}; choose "
                "another `spatial` or `cuboid`, or leave it None to have one derived from the grid."
            )
    return box


def chunk_ids(grid: Grid, chunk: Grid | int, device: torch.device) -> torch.Tensor:
    """Chunk number of every image token, ``[S]``, tokens in row-major ``(T, Y, X)`` order."""
    t, y, x = grid
    if isinstance(chunk, int):
        return torch.arange(t * y * x, device=device) // chunk
    _, cy, cx = chunk
    at, ay, ax = (torch.arange(n, device=device) // c for n, c in zip(grid, chunk, strict=True))
    ids = (at[:, None, None] * (y // cy) + ay[:, None]) * (x // cx) + ax
    return ids.reshape(-1)


def count_chunks(grid: Grid, chunk: Grid | int) -> int:
    """Number of chunks."""
    t, y, x = grid
    if isinstance(chunk, int):
        return -(-t * y * x // chunk)
    return (t // chunk[0]) * (y // chunk[1]) * (x // chunk[2])


def gate(q: torch.Tensor, k: torch.Tensor, onehot: torch.Tensor) -> torch.Tensor:
    """``<q_i, mean of the keys of chunk c>`` in fp32, unscaled: ``[B, H, S, C]``.

    Args:
        onehot: ``[S, C]`` fp32, 1 where the token is in the chunk.
    """
    sizes = onehot.sum(0)
    means = torch.einsum("sc,bhsd->bhcd", onehot / sizes, k.float())
    return q.float() @ means.transpose(-1, -2)


def choose_topk(gate: torch.Tensor, own: torch.Tensor, pool: str, k: int) -> torch.Tensor:
    """Own chunks and the best others, ``k`` per query on average over the pool; bool like `gate`."""
    b, h, s, c = gate.shape
    ranked = gate.masked_fill(own, float("inf"))
    k = min(k, c)
    flat = {
        "query_head": ranked,
        "head_global": ranked.flatten(2),
        "overall": ranked.flatten(1),
    }[pool]
    best = flat.topk(k * (flat.shape[-1] // c), dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view(b, h, s, c)


def choose_threshold(
    gate: torch.Tensor, own: torch.Tensor, pool: str, threshold: float, *, compat: bool = False
) -> torch.Tensor:
    """Own chunks and the shortest list of best others whose normalised similarity reaches `threshold`.

    Similarities are min-max normalised over the pool and count as shares of the pool's sum. The list is
    never empty. Where the threshold cannot be reached everything is kept; `compat` keeps two instead in
    the pools ``query_head`` and ``block``, as the official code does.
    """
    axes = _AXES[pool]
    low, high = gate.amin(axes, keepdim=True), gate.amax(axes, keepdim=True)
    spread = high - low
    share = (gate - low) / torch.where(spread <= _EPS, 1.0, spread)
    own = own.expand_as(gate)
    total = share.sum(axes, keepdim=True) + _EPS
    inside = share.masked_fill(~own, 0).sum(axes, keepdim=True)
    need = (threshold - inside / total).clamp_min(0)

    order = (0, 3, 1, 2) if pool == "block" else (0, 1, 2, 3)
    keep = {"query_head": 3, "head_global": 2, "overall": 1, "block": 2}[pool]

    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.permute(order).flatten(keep)

    values = flat(share.masked_fill(own, -1.0))
    total, need = flat(total), flat(need)
    values, rank = values.sort(dim=-1, descending=True, stable=True)
    reached = values.clamp_min(0).cumsum(-1) / total >= need
    # The first position that reaches the threshold, and all before it.
    prefix = (reached.long().cumsum(-1) == 0).roll(1, -1)
    prefix[..., 0] = True
    if compat and pool in ("query_head", "block"):
        prefix &= reached.any(-1, keepdim=True) | (
            torch.arange(values.shape[-1], device=gate.device) < 2
        )
    chosen = torch.zeros_like(prefix).scatter_(-1, rank, prefix)
    permuted = [gate.shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(4)]
    return chosen.view(permuted).permute(back) | own


def density_of(chosen: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Share of image query-key pairs kept by `chosen` ``[B, H, S, C]`` with chunk sizes ``[C]``."""
    kept = (chosen.to(torch.float32) @ sizes.to(torch.float32)).mean()
    return kept / sizes.sum()
