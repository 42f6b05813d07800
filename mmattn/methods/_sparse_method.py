"""Base of the sparse methods for images and videos: dense warm-up, dense layers, and the shared frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmattn.layout import Grid
from mmattn.methods._calls import image_tokens, no_clock, run_dense
from mmattn.methods._image_attention import Part, Sparse, image_attention
from mmattn.methods._warmup import check_dense_steps, is_sparse
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """A method that decides which keys each image query sees; subclasses give `sparse`.

    Args:
        dense_steps: first denoising steps that run dense, a number (int) or a share (float); 0 needs no
            clock.
        dense_layers: first layers that run dense.
    """

    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm", "torch")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    masks: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    takes_masks: ClassVar[bool] = False
    """Whether `sparse` copes with `Part.mask`."""

    dense_steps: float = 0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        """Check the knobs that all sparse methods have."""
        check_dense_steps(self.dense_steps)
        require(self.dense_layers >= 0, f"dense_layers must be >= 0, got {self.dense_layers}")

    def phase(self, step: int | None, total: int | None) -> int | bool | None:
        """True in the sparse steps, False in the dense first ones."""
        return is_sparse(self.dense_steps, step, total)

    def role(self, site: Site) -> int | bool | None:
        """None for the first layers, which stay dense; True for the others unless a method has patterns."""
        return None if site.index < self.dense_layers else True

    def dense_reason(self, site: Site, grid: Grid) -> str | None:
        """Why these settings keep everything on `grid`, or None; looks at no data."""
        return None

    def sparse(self, part: Part) -> Sparse:
        """Attention of image queries over the image keys that are kept, and all text."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> Tensor:
        """Sparse attention for image queries, dense attention for text queries."""
        if site.phase is None:
            raise no_clock(self.name, f"dense_steps={self.dense_steps}", "dense_steps=0")
        if not site.phase:
            reason: str | None = "one of the first steps (dense_steps)"
        elif site.role is None:
            reason = "one of the first layers (dense_layers)"
        else:
            grid, _, _ = image_tokens(site, q.shape[2], k.shape[2])
            reason = self.dense_reason(site, grid)
        if reason is not None:
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)
        return image_attention(
            self.sparse,
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            site=site,
            dense=dense,
            takes_masks=self.takes_masks,
        )
