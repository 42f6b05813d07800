"""Neighborhood attention: each image token attends to a window around it on the token grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from mmattn_kernels import neighborhood_attention
from mmattn_kernels.neighborhood import simulate
from mmattn_kernels.neighborhood.windows import Axis, spans

from mmattn.layout import Grid
from mmattn.methods._image_attention import Part, Sparse
from mmattn.methods._sparse_method import SparseMethod
from mmattn.methods.base import require
from mmattn.sites import Site

Windows = float | Sequence[float | Sequence[float]]
Steps = int | Sequence[int | Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttention(SparseMethod):
    """Lets every image query see a box of keys around it, of the same size everywhere.

    At a border the box moves inward and keeps its size, so every query sees equally many keys. With
    `stride` above 1 that many queries per axis share the box of the one in their middle: kernels can then
    skip whole tiles, up to blocked attention at ``stride = window``. With `dilation` a box takes every
    second (third, ...) token. "Generalized Neighborhood Attention", arXiv 2504.16922, which runs FLUX,
    HunyuanVideo and Cosmos this way without training, after some dense steps; "Neighborhood Attention
    Transformer", arXiv 2204.07143; "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.

    Compared in the tests with dense attention, with masks written from the definition, with the paper's
    sparsities and simulated speed-ups, and at equal density with random keys and with `SlidingWindow`.
    There, with scores that fall with distance in the video and 20 % of the keys, it recalls about 93 % of
    the attention and errs by 0.6 % of the output's power; the 1-D window recalls 67 % and errs by 30 %,
    random keys err by 225 %. Where attention is not local it has nothing to offer; attach with
    ``probe=True`` to see the recall.

    Deviations: knobs that do not fit a grid are cut to it and the report says so, where the paper's
    library refuses, as it does windows of 1. The window is cut to the axis, `stride` to the window, and
    `dilation` until the dilated window fits. Text keys take part in the softmax itself instead of in a
    second attention merged afterwards, which is the same. Text queries, which the paper's library leaves
    to the caller, attend densely. The paper's quality numbers have not been repeated.

    Args:
        window: keys per axis: a number of tokens (int >= 1), a share of the axis (float in (0, 1),
            rounded), or one of these for each axis as ``(t, y, x)``. Several triples, as in
            ``((3, 7, 7), (0.5, 3, 3))``, are a schedule over the layers that starts again after the last
            one; a bare number in a schedule stands for all axes. A window that covers the grid is dense
            attention (bitwise).
        stride: queries per axis that share a window, an int >= 1, in the same forms.
        dilation: distance of neighboring keys of a window, an int >= 1, in the same forms.
        is_causal: True for keys up to the query's own position only, for all axes or as ``(t, y, x)``.
        dense_steps: first denoising steps that run dense, a number (int) or a share of them (float);
            0 needs no clock.
        dense_layers: first layers that run dense; they still count in a schedule.

    Shapes:
        ``q, k, v [B, H, N, D]``; an axis of length 1, such as T of a still image, has no window.

    Raises:
        UnsupportedCall: no grid, queries that are not the keys' tokens, a mask that does more than hide
            text, or any mask while a graph is traced.
        ConfigError: knobs out of range, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "neighborhood"
    paper: ClassVar[str] = "Generalized Neighborhood Attention, arXiv 2504.16922"

    window: Windows = 0.5
    stride: Steps = 1
    dilation: Steps = 1
    is_causal: bool | Sequence[bool] = False

    def __post_init__(self) -> None:
        """Check the knobs, and bring lists (as recipes have them) into the form of tuples."""
        super().__post_init__()
        for knob in ("window", "stride", "dilation"):
            value = _normalised(knob, getattr(self, knob), shares=knob == "window")
            object.__setattr__(self, knob, value)
        if not isinstance(self.is_causal, bool):
            causal = tuple(self.is_causal) if isinstance(self.is_causal, Sequence) else ()
            require(
                len(causal) == 3 and all(isinstance(c, bool) for c in causal),
                f"is_causal is a bool or three of them for (t, y, x), got {self.is_causal!r}",
            )
            object.__setattr__(self, "is_causal", causal)

    @classmethod
    def flux_4k(cls) -> Self:
        """FLUX.1-dev at 4096 x 4096 (grid 256 x 256): 90.2 % sparse, first 9 of 28 steps dense.

        The paper used it with adapters that were trained for 4K (URAE).
        """
        return cls(window=(1, 80, 80), stride=(1, 16, 16), dense_steps=9)

    @classmethod
    def hunyuan_720p(cls) -> Self:
        """HunyuanVideo at 1280 x 768, 117 frames (grid 30 x 48 x 80): 91 % sparse, first 15 of 50 dense."""
        return cls(window=(18, 24, 24), stride=(16, 8, 8), dense_steps=15)

    @classmethod
    def cosmos_720p(cls) -> Self:
        """Cosmos-7B at 720p, 5 s (grid 16 x 44 x 80): 56.4 % sparse, first 12 of 35 steps dense."""
        return cls(window=(16, 32, 48), stride=(1, 8, 16), dense_steps=12)

    @classmethod
    def wan_720p(cls) -> Self:
        """Wan 2.1 at 1280 x 720, 81 frames (grid 21 x 45 x 80): 90.9 % sparse, first 30 % of steps dense.

        The paper gives no numbers for Wan. These are this project's: the shares of HunyuanVideo's window
        and dense steps, in sizes that suit tiles (simulated speed-up 8.6 in tiles of 4 x 8 x 8 queries and
        4 x 4 x 4 keys). Nobody has published what they do to quality.
        """
        return cls(window=(12, 24, 24), stride=(4, 8, 8), dense_steps=0.3)

    @property
    def headwise(self) -> bool:
        """The window is the same for every head."""
        return True

    def role(self, site: Site) -> int | None:
        """First layer of the schedule with this layer's settings; None for the first layers, dense."""
        if site.index < self.dense_layers:
            return None
        cycle = lcm(*(_period(v) for v in (self.window, self.stride, self.dilation)))
        here = self.settings(site.index)
        return next(layer for layer in range(cycle) if self.settings(layer) == here)

    def settings(self, layer: int) -> tuple[tuple[Any, ...], ...]:
        """Window, stride and dilation of a layer, each as ``(t, y, x)``."""
        return tuple(_at(value, layer) for value in (self.window, self.stride, self.dilation))

    def dense_reason(self, site: Site, grid: Grid) -> str | None:
        """A sentence where the window covers the grid."""
        assert site.role is not None
        return covers(self._fit(grid, int(site.role)), site)

    def sparse(self, part: Part) -> Sparse:
        """Attention in the windows of this layer."""
        assert part.site.role is not None
        return attend_windows(self._fit(part.grid, int(part.site.role)), part)

    def density(self, grid: Grid, layer: int = 0) -> float:
        """Share of the pairs of image tokens that a layer keeps."""
        return self._fit(grid, layer).density

    def expected_speedup(self, grid: Grid, q_tile: Grid, k_tile: Grid, layer: int = 0) -> float:
        """Speed-up over dense attention in the same tiles, as the paper's simulator counts it.

        Args:
            q_tile, k_tile: queries and keys per tile and axis ``(t, y, x)``.
        """
        fit = self._fit(grid, layer)
        return simulate(
            fit.grid,
            window=fit.window,
            stride=fit.stride,
            dilation=fit.dilation,
            is_causal=fit.is_causal,
            q_tile=[n for n, length in zip(q_tile, grid, strict=True) if length > 1],
            k_tile=[n for n, length in zip(k_tile, grid, strict=True) if length > 1],
        ).speedup

    def _fit(self, grid: Grid, layer: int) -> Fit:
        fit: Fit = fit_windows(grid, *self.settings(layer), _at(self.is_causal, 0))
        return fit


class Fit(NamedTuple):
    """Windows as they run on one grid.

    Args:
        grid: axes longer than one token.
        window, stride, dilation, is_causal: one value per axis of `grid`.
        density: share of the pairs of tokens that is kept.
        remark: a sentence on what had to be cut to the grid, or nothing.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    density: float
    remark: str


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fit_windows(
    grid: Sequence[int],
    window: Sequence[float],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Fit:
    """Cut the settings, one per axis of `grid`, to a grid whose axes of length 1 are left out."""
    axes, cut = [], False
    for n, w, s, d, causal in zip(grid, window, stride, dilation, is_causal, strict=True):
        if n == 1:
            continue
        tokens = max(1, round(w * n)) if isinstance(w, float) else int(w)
        kept = min(tokens, n)
        axis = Axis(n, kept, min(s, kept), min(d, n // kept), causal)
        cut = cut or (axis.window, axis.stride, axis.dilation) != (tokens, s, d)
        axes.append(axis)
    lengths = tuple(axis.length for axis in axes)
    fit = Fit(
        lengths,
        tuple(axis.window for axis in axes),
        tuple(axis.stride for axis in axes),
        tuple(axis.dilation for axis in axes),
        tuple(axis.causal for axis in axes),
        prod(map(_pairs, axes)) / prod(lengths) ** 2,
        "",
    )
    if not cut:
        return fit
    return fit._replace(
        remark=f"cut to the grid: window {fit.window}, stride {fit.stride}, dilation {fit.dilation} on the "
        f"axes of {lengths} tokens"
    )


def _pairs(axis: Axis) -> int:
    """Pairs of query and key of one axis that see each other."""
    if not axis.causal:
        return axis.length * axis.window
    return sum(
        len(residues) * sum(b - a for a, b in spans(length, axis.window, axis.stride, True))
        for length, residues in axis.classes()
    )


def covers(fit: Fit, site: Site) -> str | None:
    """Put the remark of `fit` into the report; a sentence where the window covers the grid."""
    if fit.remark:
        site.remark(fit.remark)
    return "the window covers the whole grid" if fit.density == 1 else None


def attend_windows(fit: Fit, part: Part) -> Sparse:
    """Attention of image queries in the windows of `fit`."""
    found = neighborhood_attention(
        part.q,
        part.k,
        part.v,
        fit.grid,
        window=fit.window,
        stride=fit.stride,
        dilation=fit.dilation,
        is_causal=fit.is_causal,
        extra_keys=part.text,
        scale=part.scale,
        return_lse=True,
    )
    return Sparse(found[0], fit.density, found[1])


def check_size(knob: str, value: Any, *, shares: bool) -> None:
    """Raise `ConfigError` unless `value` is a number of tokens, or with `shares` a share of them."""
    if shares and isinstance(value, float):
        require(
            0 < value < 1,
            f"{knob} as a float is a share of the tokens in (0, 1), got {value}; for a number of tokens, "
            "or all of them, give an int",
        )
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= 1, f"{knob} counts tokens, an int >= 1, got {value!r}")


def _normalised(knob: str, value: Any, *, shares: bool) -> Any:
    """A number, a triple, or a tuple of triples.

    Raises:
        ConfigError: for anything else, or numbers out of range.
    """
    if not isinstance(value, list | tuple):
        check_size(knob, value, shares=shares)
        return value
    if any(isinstance(entry, list | tuple) for entry in value):
        return tuple(_triple(knob, entry, shares) for entry in value)
    return _triple(knob, value, shares)


def _triple(knob: str, value: Any, shares: bool) -> tuple[Any, ...]:
    entries = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    require(
        len(entries) == 3,
        f"{knob} has one value per axis (t, y, x), got {value!r}; a schedule over layers is a list of such "
        "triples",
    )
    for entry in entries:
        check_size(knob, entry, shares=shares)
    return entries


def _period(value: Any) -> int:
    scheduled = isinstance(value, tuple) and isinstance(value[0], tuple)
    return len(value) if scheduled else 1


def _at(value: Any, layer: int) -> tuple[Any, ...]:
    """The triple of a layer."""
    if not isinstance(value, tuple):
        return (value,) * 3
    return value[layer % len(value)] if isinstance(value[0], tuple) else value
