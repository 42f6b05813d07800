"""What the tokens at a site are: video grid, text before or after it, image spans of a VLM.

A layout is read from the arguments of the model call that is running, never from config defaults, so
the resolution and the number of text tokens may change between two calls of one session.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mmattn.errors import UnsupportedCall

Grid = tuple[int, int, int]
"""Token grid ``(T, Y, X)`` after patchify; still images have ``T == 1``."""


@dataclass(frozen=True)
class Layout:
    """Token layout of one forward call.

    Args:
        grid: ``(T, Y, X)`` of the image or video tokens, or None where there is no grid.
        text: where non-image tokens (text, class, register) sit relative to the image tokens.
        pyramid: True for UNets: the grid at a site is `grid` halved until its size matches.
        image_mask: ``[B, N]`` bool, True at image tokens; vision-language prompts only.
    """

    grid: Grid | None = None
    text: Literal["before", "after", "none"] = "none"
    pyramid: bool = False
    image_mask: torch.Tensor | None = None

    def grid_for(self, tokens: int) -> Grid:
        """The grid at a site whose sequence has `tokens` entries (text included).

        Raises:
            UnsupportedCall: when there is no grid, or it cannot hold that many tokens.
        """
        if self.grid is None:
            raise UnsupportedCall("This site has no token grid, and the method needs one.")
        t, y, x = self.grid
        if self.pyramid:
            while t * y * x > tokens and (y > 1 or x > 1):
                y, x = -(-y // 2), -(-x // 2)
            if t * y * x != tokens:
                raise UnsupportedCall(
                    f"No halving of the latent grid {self.grid} has {tokens} tokens."
                )
        return t, y, x

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
