"""A 1-D sliding window over flattened image tokens, the baseline for neighborhood attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.methods._calls import image_tokens, no_clock, run_dense
from mmattn.methods._warmup import check_dense_steps, is_sparse
from mmattn.methods.base import Dense, Method, require
from mmattn.methods.neighborhood import attend_windows, check_size, fit_windows
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Method):
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
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm", "torch")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "Longformer, arXiv 2004.05150"
    masks: ClassVar[bool] = True
    probes: ClassVar[bool] = True

    window: float = 0.25
    stride: int = 1
    dense_steps: float = 0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        """Check the knobs."""
        check_size("window", self.window, shares=True)
        check_size("stride", self.stride, shares=False)
        check_dense_steps(self.dense_steps)
        require(self.dense_layers >= 0, f"dense_layers must be >= 0, got {self.dense_layers}")

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the sparse steps, False in the dense first ones."""
        return is_sparse(self.dense_steps, step, total)

    def role(self, site: Site) -> bool:
        """False for the first layers that stay dense."""
        return site.index >= self.dense_layers

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        """Windows for image queries, dense attention for text queries."""
        if site.phase is None:
            raise no_clock(self.name, f"dense_steps={self.dense_steps}", "dense_steps=0")
        if not site.phase:
            reason = "one of the first steps (dense_steps)"
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)
        if not site.role:
            reason = "one of the first layers (dense_layers)"
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)
        (t, y, x), _, _ = image_tokens(site, q.shape[2], k.shape[2])
        fit = fit_windows((t * y * x,), (self.window,), (self.stride,), (1,), (False,))
        return attend_windows(fit, q, k, v, mask=mask, scale=scale, site=site, dense=dense)
