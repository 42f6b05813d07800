"""Regions of subjects on a token grid, and where the tokens of one go when it is laid over another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

Box = tuple[float, float, float, float]
"""``(top, left, bottom, right)`` as shares of the picture."""


class Moved(NamedTuple):
    """Tokens of a reference that stand in the scene, as raster indices of one grid.

    Args:
        source: ``[L]`` where each comes from.
        target: ``[L]`` where it goes.
    """

    source: torch.Tensor
    target: torch.Tensor


def boxed(boxes: Sequence[Box], grid: tuple[int, int]) -> torch.Tensor:
    """Cells whose centre lies in each box, ``[n, Y, X]`` bool; at least the cell in the middle of it."""
    y, x = grid
    rows = (torch.arange(y) + 0.5) / y
    columns = (torch.arange(x) + 0.5) / x
    regions = []
    for top, left, bottom, right in boxes:
        inside_y, inside_x = (rows > top) & (rows < bottom), (columns > left) & (columns < right)
        if not inside_y.any():
            inside_y[min(int((top + bottom) / 2 * y), y - 1)] = True
        if not inside_x.any():
            inside_x[min(int((left + right) / 2 * x), x - 1)] = True
        regions.append(inside_y[:, None] & inside_x)
    return torch.stack(regions)


def resized(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Masks ``[n, Y, X]`` on another grid: bilinear, scaled to [0, 1], above one half. Empty ones stay so.

    Antialiased, because plain bilinear samples step over small subjects.
    """
    soft = F.interpolate(masks[None].float(), grid, mode="bilinear", antialias=True)[0]
    flat = soft.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    low = torch.where(low == high, torch.zeros_like(low), low)
    span = torch.where(high > low, high - low, torch.ones_like(low))
    return (soft - low[:, None, None]) / span[:, None, None] > 0.5


def without_overlaps(regions: torch.Tensor) -> torch.Tensor:
    """Regions ``[n, Y, X]`` less the cells that more than one of them claims."""
    return regions & (regions.sum(0) < 2)


def moved(source: torch.Tensor, target: torch.Tensor) -> Moved:
    """Crop the box of `source` ``[Y, X]`` and lay it, by nearest neighbours, over the box of `target`.

    Cells of the crop outside `source` are left out. Both regions must have a cell.
    """
    y0, y1, x0, x1 = _box(source)
    ty0, ty1, tx0, tx1 = _box(target)
    height, width = ty1 - ty0, tx1 - tx0
    rows = y0 + torch.arange(height) * (y1 - y0) // height
    columns = x0 + torch.arange(width) * (x1 - x0) // width
    across = source.shape[1]
    kept = source[rows][:, columns].flatten()
    start = (rows[:, None] * across + columns).flatten()
    end = (torch.arange(ty0, ty1)[:, None] * across + torch.arange(tx0, tx1)).flatten()
    return Moved(start[kept], end[kept])


def _box(region: torch.Tensor) -> tuple[int, int, int, int]:
    rows, columns = region.any(1).nonzero().flatten(), region.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
