"""A 1-D sliding window over flattened image tokens, the baseline for neighborhood attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmattn.layout import Grid
from mmattn.methods._image_attention import Part, Sparse
from mmattn.methods._sparse_method import SparseMethod
from mmattn.methods.neighborhood import Fit, attend_windows, check_size, covers, fit_windows
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(SparseMethod):
    """Lets every image query see the tokens nearest to it in raster order.

    This is what neighborhood attention is not: the window is 1-D, over the flattened image or video, so
    it holds a query's whole row and little of the rows and frames next to it. It is here as a baseline,
    to be compared with `NeighborhoodAttention` at equal density. Sliding windows are those of
    "Longformer: The Long-Document Transformer", arXiv 2004.05150; text tokens have the part of its global
    tokens, which every query sees and which see everything.

    Compared in the tests with dense attention, with masks written from the definition and with
    neighborhood attention. Deviation from the paper: at both ends the window moves inward and keeps its
    size instead of being cut off, so density is the same for every query.

    Args:
        window: keys per query, a number of tokens (int >= 1) or a share of the image tokens (float in
            (0, 1), rounded). An even number reaches one further back than ahead. As many as there are
            tokens, or more, is dense attention (bitwise).
        stride: consecutive queries that share the window of the one in their middle, an int >= 1; cut to
            the window, and the report says so.
        dense_steps: first denoising steps that run dense, a number (int) or a share of them (float);
            0 needs no clock.
        dense_layers: first layers that run dense.

    Shapes:
        ``q, k, v [B, H, N, D]``.

    Raises:
        UnsupportedCall: no grid (it tells image from text), queries that are not the keys' tokens, a mask
            that does more than hide text, or any mask while a graph is traced.
        ConfigError: knobs out of range, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "sliding-window"
    paper: ClassVar[str] = "Longformer, arXiv 2004.05150"

    window: float = 0.25
    stride: int = 1

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        check_size("window", self.window, shares=True)
        check_size("stride", self.stride, shares=False)

    @property
    def headwise(self) -> bool:
        """The window is the same for every head."""
        return True

    def dense_reason(self, site: Site, grid: Grid) -> str | None:
        """A sentence where the window covers all tokens."""
        return covers(self._fit(grid), site)

    def sparse(self, part: Part) -> Sparse:
        """Attention in a window of the flattened sequence."""
        return attend_windows(self._fit(part.grid), part)

    def _fit(self, grid: Grid) -> Fit:
        t, y, x = grid
        fit: Fit = fit_windows((t * y * x,), (self.window,), (self.stride,), (1,), (False,))
        return fit
