"""The geometry of neighborhood attention: which keys a query sees, one axis at a time.

A query sees a key when it does so on every axis, so tables per axis describe everything. Dilation cuts an
axis into residue classes that ignore each other; `spans` speaks of positions in one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: tokens, keys per window, queries that share a window, step, direction."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def classes(self) -> list[tuple[int, range]]:
        """Lengths of the residue classes, and the residues that have each; at most two lengths."""
        long = self.length % self.dilation
        short = self.length // self.dilation
        found = [(short + 1, range(long)), (short, range(long, self.dilation))]
        return [(length, residues) for length, residues in found if residues]

    @property
    def longest(self) -> int:
        """Length of the longest class."""
        return -(-self.length // self.dilation)


@lru_cache(maxsize=4096)
def spans(length: int, window: int, stride: int, causal: bool) -> list[tuple[int, int]]:
    """For every position of a class, the first key it sees and the one after the last.

    Both rise with the position. The queries of a stride group share the window of their leader: the one
    right of the middle, or the last one of a causal group.
    """
    found = []
    for position in range(length):
        group = position // stride * stride
        if causal:
            leader = min(group + stride - 1, length - 1)
            found.append((max(leader - window + 1, 0), position + 1))
        else:
            leader = min(group + stride // 2, length - 1)
            first = min(max(leader - window // 2, 0), length - window)
            found.append((first, first + window))
    return found


def check_geometry(
    op: str,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> tuple[Axis, ...]:
    """One `Axis` for every entry of `grid`; a single value serves all axes.

    Raises:
        TypeError: entries that are not integers, or booleans for `is_causal`.
        ValueError: other than 1 to 3 axes, or values out of the ranges that `neighborhood_attention`
            documents.
    """
    lengths = _per_axis(op, "grid", grid, len(grid), int)
    rank = len(lengths)
    if not 1 <= rank <= 3:
        raise ValueError(f"{op}: grid {tuple(grid)} has {rank} axes; 1 to 3 are supported.")
    windows = _per_axis(op, "window", window, rank, int)
    strides = _per_axis(op, "stride", stride, rank, int)
    dilations = _per_axis(op, "dilation", dilation, rank, int)
    causal = _per_axis(op, "is_causal", is_causal, rank, bool)
    axes = tuple(
        Axis(*values) for values in zip(lengths, windows, strides, dilations, causal, strict=True)
    )
    for number, axis in enumerate(axes):
        where = f"{op}: axis {number} has {axis.length} tokens, window {axis.window}"
        if axis.length < 1:
            raise ValueError(f"{op}: grid {lengths} has an axis without tokens.")
        if axis.dilation < 1 or axis.window < 1:
            raise ValueError(f"{where}, dilation {axis.dilation}; both must be at least 1.")
        if axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"{where}, dilation {axis.dilation}; window * dilation may not exceed the tokens."
            )
        if not 1 <= axis.stride <= axis.window:
            raise ValueError(f"{where}, stride {axis.stride}; 1 to the window is allowed.")
    return axes


def _per_axis(op: str, name: str, value: Any, rank: int, kind: type) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * rank
    if len(values) != rank:
        raise ValueError(f"{op}: {name} has {len(values)} entries for a grid of {rank} axes.")
    for entry in values:
        if not isinstance(entry, kind) or (kind is int and isinstance(entry, bool)):
            raise TypeError(f"{op}: {name} {value!r} must hold {kind.__name__} values.")
    return values
