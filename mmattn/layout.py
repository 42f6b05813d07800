"""What the tokens at a site are: video grid, text before or after it, image spans of a VLM.

A layout is read from the arguments of the model call that is running, never from config defaults, so
the resolution and the number of text tokens may change between two calls of one session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from mmattn.errors import UnsupportedCall

if TYPE_CHECKING:
    from mmattn.sites import Site

Grid = tuple[int, int, int]
"""Token grid ``(T, Y, X)`` after patchify; still images have ``T == 1``."""


_NO_GRID = "This site has no token grid, and the method needs one."


@dataclass(frozen=True)
class Layout:
    """Token layout of one forward call.

    Args:
        grid: ``(T, Y, X)`` of the image or video tokens, or None where there is no grid.
        text: where non-image tokens (text, class, register) sit relative to the image tokens.
        pyramid: True for UNets: the grid at a site is `grid` halved until its size matches.
        image_mask: ``[B, N]`` bool, True at image tokens; vision-language prompts only. It covers the
            keys of the prompt; keys that decoding appended later are text.
        past: tokens in the key/value cache when the call began, 0 at prefill; None where the host
            does not know of a cache.
        twins: how many rows at the end of the batch repeat its first rows without their image tokens
            (see `Method.twin`); 0 almost always.
        why: a sentence on why this call has no grid, where its model usually has one.
    """

    grid: Grid | None = None
    text: Literal["before", "after", "none"] = "none"
    pyramid: bool = False
    image_mask: torch.Tensor | None = None
    past: int | None = None
    twins: int = 0
    why: str = ""

    def grid_for(self, tokens: int) -> Grid:
        """The grid at a site whose sequence has `tokens` entries (text included).

        Raises:
            UnsupportedCall: when there is no grid, or it cannot hold that many tokens.
        """
        if self.grid is None:
            raise UnsupportedCall(f"{_NO_GRID} {self.why}".strip())
        if not self.pyramid:
            return self.grid
        for odd in (1, 0):  # a stride-2 convolution rounds odd sizes up or, unpadded, down
            t, y, x = self.grid
            while t * y * x > tokens and (y > 1 or x > 1):
                y, x = max((y + odd) // 2, 1), max((x + odd) // 2, 1)
            if t * y * x == tokens:
                return t, y, x
        raise UnsupportedCall(f"No halving of the latent grid {self.grid} has {tokens} tokens.")

    def image_slice(self, tokens: int) -> slice:
        """Where the image tokens are inside a sequence of `tokens` entries.

        Raises:
            UnsupportedCall: when the grid has more cells than the sequence has tokens, or the
                sequence has extra tokens that this layout does not know about.
        """
        t, y, x = self.grid_for(tokens)
        extra = tokens - t * y * x
        if extra < 0 or (extra and self.text == "none"):
            raise UnsupportedCall(
                f"The sequence has {tokens} tokens but the grid {(t, y, x)} has {t * y * x} cells"
                f" and the layout says text={self.text!r}."
            )
        return slice(extra, tokens) if self.text == "before" else slice(0, tokens - extra)


@dataclass(frozen=True)
class Tile:
    """One tile of one image on its way from the vision tower to the language model.

    Args:
        features: ``[M, C]`` in raster order of `grid`, after the projector.
        grid: ``(Y, X)`` with ``Y * X == M``.
        tiles: how many tiles share the budget of this image; 1 except for LLaVA-NeXT, Idefics3 and
            SmolVLM.
        tower: vision sites where the running method acts, shallow to deep; their `state` holds what
            the method's `attend` left there during this call.
        gather: turns what `attend` recorded per patch at one site, one ``[T, N]`` or ``[T, N, E]`` tensor
            per attention call, into ``[M]`` or ``[M, E]`` numbers, one per token of this tile.
        text: ``[L, C]`` embeddings of the text of the prompt that shows the image, padding left out.
        raw: ``[M, E]`` features before the projector, where it works token by token (LLaVA), else None.
        project: that projector, ``[K, E]`` -> ``[K, C]``.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    tiles: int
    tower: tuple[Site, ...]
    gather: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    text: torch.Tensor | None = None
    raw: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] | None = None


class Kept(NamedTuple):
    """What a features method may return in place of indices: the tokens of a tile to keep, and new ones.

    Args:
        indices: ``[K]`` ascending; the kept tokens stay at their places in the prompt.
        features: ``[K, C]`` what is shown there.
    """

    indices: torch.Tensor
    features: torch.Tensor
