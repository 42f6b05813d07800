"""How queries and keys of a grid are cut into boxes, and what a cut costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from mmattn_kernels.neighborhood.windows import Axis, check_geometry, spans


@dataclass(frozen=True)
class Strip:
    """Tiles along one axis that have the same shape and the same windows relative to their keys.

    Args:
        windows: for every query of a tile, the first key it sees and the end, from the tile's first key.
        keys: keys that the windows span together.
        starts: first query and first key of every tile, as positions in a class.
    """

    windows: tuple[tuple[int, int], ...]
    keys: int
    starts: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1024)
def strips(length: int, window: int, stride: int, causal: bool, tile: int) -> tuple[Strip, ...]:
    """Cut a class of an axis into tiles of `tile` queries and sort them by shape."""
    table = spans(length, window, stride, causal)
    found: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for start in range(0, length, tile):
        part = table[start : start + tile]
        first = part[0][0]
        found.setdefault(tuple((a - first, b - first) for a, b in part), []).append((start, first))
    return tuple(Strip(shape, shape[-1][1], tuple(starts)) for shape, starts in found.items())


@dataclass(frozen=True)
class Run:
    """Tiles of a `Strip` at equal distances, in the residue classes of one length.

    Args:
        windows, keys: as in `Strip`.
        q_first, q_step: first query of the first tile, and the distance of tiles; positions in a class.
        k_first, k_step: the same for the first key.
        count: tiles.
        residues: the classes.
    """

    windows: tuple[tuple[int, int], ...]
    keys: int
    q_first: int
    q_step: int
    k_first: int
    k_step: int
    count: int
    residues: range

    @property
    def full(self) -> bool:
        """Whether every query sees every key, so that no mask is needed."""
        return all(window == (0, self.keys) for window in self.windows)


@lru_cache(maxsize=1024)
def runs(axis: Axis, tile: int) -> tuple[Run, ...]:
    """All tiles of `tile` queries of an axis."""
    found = []
    for length, residues in axis.classes():
        for strip in strips(length, axis.window, axis.stride, axis.causal, tile):
            starts = list(strip.starts)
            while starts:
                (q, k), count = starts[0], 1
                q_step, k_step = 0, 0
                if len(starts) > 1:
                    q_step, k_step = starts[1][0] - q, starts[1][1] - k
                while count < len(starts) and starts[count] == (
                    q + count * q_step,
                    k + count * k_step,
                ):
                    count += 1
                found.append(Run(strip.windows, strip.keys, q, q_step, k, k_step, count, residues))
                starts = starts[count:]
    return tuple(found)


@dataclass(frozen=True)
class Simulation:
    """What tiles cost that can only be computed whole.

    Args:
        tiles: tiles of keys in the grid.
        most: tiles that the busiest tile of queries visits.
        mean: tiles that a tile of queries visits on average.
        full: whether no visited tile needs a mask.
    """

    tiles: int
    most: int
    mean: float
    full: bool

    @property
    def speedup(self) -> float:
        """Against dense attention in the same tiles, as far as the busiest tile of queries decides."""
        return self.tiles / self.most


def simulate(
    grid: Sequence[int],
    *,
    window: int | Sequence[int],
    q_tile: Sequence[int],
    k_tile: Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    dynamic: bool = False,
) -> Simulation:
    """Count the tiles of keys that neighborhood attention visits (the simulator of arXiv 2504.16922).

    Args:
        grid, window, stride, dilation, is_causal: as in `neighborhood_attention`.
        q_tile, k_tile: queries and keys per tile and axis.
        dynamic: tiles of keys start where the first window does, as NATTEN's do on Ampere; otherwise they
            lie at multiples of their size, as ours and NATTEN's on Hopper do.

    Raises:
        TypeError, ValueError: as `neighborhood_attention`, or tiles that do not fit the grid.
    """
    axes = check_geometry("simulate", grid, window, stride, dilation, is_causal)
    for name, tile in (("q_tile", q_tile), ("k_tile", k_tile)):
        if len(tile) != len(axes) or min(tile) < 1:
            raise ValueError(
                f"simulate: {name} {tuple(tile)} must hold {len(axes)} positive sizes."
            )
    counts = [
        visits(axis, q, k, dynamic=dynamic) for axis, q, k in zip(axes, q_tile, k_tile, strict=True)
    ]
    return Simulation(
        prod(-(-axis.longest // k) for axis, k in zip(axes, k_tile, strict=True)),
        prod(count.most for count in counts),
        prod(count.visited / count.tiles for count in counts),
        all(count.visited == count.full for count in counts),
    )


@dataclass(frozen=True)
class Visits:
    """Along one axis, over all classes: query tiles, key tiles they visit, those seen whole, the most."""

    tiles: int
    visited: int
    full: int
    most: int


@lru_cache(maxsize=16384)
def visits(axis: Axis, q_tile: int, k_tile: int, *, dynamic: bool = True) -> Visits:
    """Count visits of tiles of `q_tile` queries to tiles of `k_tile` keys; see `simulate`."""
    tiles = visited = full = most = 0
    for length, residues in axis.classes():
        for strip in strips(length, axis.window, axis.stride, axis.causal, q_tile):
            inside = (strip.windows[-1][0], strip.windows[0][1])
            lags = [0] * len(strip.starts)
            if not dynamic:
                lags = [first % k_tile for _, first in strip.starts]
            for lag in lags:
                count = -(-(strip.keys + lag) // k_tile)
                tiles += len(residues)
                visited += len(residues) * count
                full += len(residues) * sum(
                    i * k_tile - lag >= inside[0] and (i + 1) * k_tile - lag <= inside[1]
                    for i in range(count)
                )
                most = max(most, count)
    return Visits(tiles, visited, full, most)


_TILE_COST = 3.0
"""Loading queries and storing results of a tile, in visits."""
_MASK_COST = 0.3
"""What comparing positions adds to a visit; the compiled inner loop has about as many more instructions."""


@lru_cache(maxsize=1024)
def gpu_tiles(
    axes: tuple[Axis, ...], rows: int, columns: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tiles of `rows` queries and of `columns` keys, powers of two per axis, with the least work."""
    best: tuple[float, tuple[int, ...], tuple[int, ...]] = (float("inf"), (rows,), (columns,))
    for q_tile in _factorisations(rows, len(axes)):
        for k_tile in _factorisations(columns, len(axes)):
            counts = [
                visits(axis, a, b, dynamic=False)
                for axis, a, b in zip(axes, q_tile, k_tile, strict=True)
            ]
            visited = prod(count.visited for count in counts)
            partial = visited - prod(count.full for count in counts)
            cost = visited + _MASK_COST * partial + _TILE_COST * prod(c.tiles for c in counts)
            # At equal cost longer rows are better for loads: the last axes get the larger sizes.
            best = min(best, (cost, q_tile, k_tile))
    return best[1], best[2]


def _factorisations(size: int, rank: int) -> list[tuple[int, ...]]:
    """Every way to write a power of two as a product of `rank` of them."""
    if rank == 1:
        return [(size,)]
    powers = [1 << i for i in range(size.bit_length())]
    return [(first, *rest) for first in powers for rest in _factorisations(size // first, rank - 1)]


@dataclass(frozen=True)
class _Load:
    """What one axis contributes to the cost of a cut, over all tiles of all classes."""

    pairs: int
    keys: int
    tiles: int
    kinds: int
    rows: int
    most: int
    masked: bool


@lru_cache(maxsize=4096)
def _load(axis: Axis, tile: int) -> _Load:
    pairs = keys = tiles = kinds = rows = most = 0
    masked = False
    for run in runs(axis, tile):
        times = len(run.residues) * run.count
        pairs += times * len(run.windows) * run.keys
        keys += times * run.keys
        tiles += times
        kinds += 1
        rows, most = max(rows, len(run.windows)), max(most, run.keys)
        masked = masked or not run.full
    return _Load(pairs, keys, tiles, kinds, rows, most, masked)


_MASK_ELEMENTS = 1 << 22
"""The largest mask of a tile."""


@lru_cache(maxsize=1024)
def cpu_tiles(axes: tuple[Axis, ...], heads: int, group: int, extra: int) -> tuple[int, ...]:
    """Queries per tile and axis with the least time on a CPU.

    Costs are in pairs of query and key, measured: gathering a key with its value costs 4, a narrow
    product as much as 4 more queries, a tile about 800, and a kind of tile 60,000 for the few torch
    calls it takes.

    Args:
        axes: the grid.
        heads: batch items times key heads, which share the calls of a kind of tile.
        group: query heads per key head, which share a gathered key.
        extra: keys that every tile sees.
    """
    options = [[_load(axis, tile) for tile in _sizes(axis)] for axis in axes]
    best = (float("inf"), tuple(axis.longest for axis in axes))
    for choice in product(*options):
        tiles = prod(load.tiles for load in choice)
        keys = prod(load.keys for load in choice) + extra * tiles
        pairs = prod(load.pairs for load in choice)
        rows = prod(load.rows for load in choice)
        mask = group * rows * (extra + prod(load.most for load in choice))
        if any(load.masked for load in choice) and mask > _MASK_ELEMENTS and rows > 1:
            continue
        cost = float(group * pairs + 8 * keys + 800 * tiles)
        cost += 60_000 * prod(load.kinds for load in choice) / heads
        best = min(best, (cost, tuple(load.rows for load in choice)))
    return best[1]


def _sizes(axis: Axis) -> list[int]:
    """Tile sizes worth trying."""
    length, stride = axis.longest, axis.stride
    tried = {1 << i for i in range(length.bit_length())}
    tried |= {stride, 2 * stride, 4 * stride, axis.window, length}
    return sorted(size for size in tried if size <= length)
