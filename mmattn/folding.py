"""Attention calls with extra or missing axes, as the ``[B, H, N, D]`` that methods are written for.

| call | who | becomes |
|---|---|---|
| ``[B, H, W, N, D]`` | Hiera, NesT: W windows | ``[B * W, H, N, D]`` |
| ``[B, W, H, N, D]`` | Twins; sites tagged `WINDOWS_FIRST` | ``[B * W, H, N, D]`` |
| ``[B * H, N, D]`` | SAM | ``[B, H, N, D]`` |
| ``[B, N, D]`` | single-head modules | ``[B, 1, N, D]`` |
"""

from __future__ import annotations

import torch

from mmattn.sites import Site

WINDOWS_FIRST = "windows-first"


class Fold:
    """Brings the tensors of one call to four axes and back.

    Args:
        query: the query of the call; its axes before the last two say how to come back.
        site: says how many heads there are, and by its tag on which axis.
    """

    def __init__(self, query: torch.Tensor, site: Site) -> None:
        self.lead = query.shape[:-2]
        self.windows_first = WINDOWS_FIRST in site.tags
        self.heads = 1
        if query.ndim == 3 and site.heads is not None and query.shape[0] % site.heads == 0:
            self.heads = site.heads

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """`t` as ``[B, H, N, D]``."""
        if t.ndim == 2:
            return t[None, None]
        if t.ndim == 3:
            return t.reshape(-1, self.heads, *t.shape[-2:])
        if self.windows_first:
            return t.flatten(0, -4)
        return t.flatten(2, -3).movedim(2, 1).flatten(0, 1)

    def back(self, t: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        if len(self.lead) > 2 and not self.windows_first:
            t = t.unflatten(0, (self.lead[0], -1)).movedim(1, 2)
        return t.reshape(*self.lead, *t.shape[-2:])

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of the call; broadcast over the leading axes unless it has only two axes."""
        if mask is None or mask.ndim == 2:
            return mask
        return self(mask.expand(*self.lead, *mask.shape[-2:]))
