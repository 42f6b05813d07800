"""PAI: raise the last query's scores at image tokens before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Adds ``alpha |s|`` to the last query's score s at every image token.

    Language models pay little attention to the image once the answer is under way. The token that is about
    to be predicted looks harder at the image when its scores there are raised in proportion to their size,
    in every head, at the prompt's end and at every generated token.

    Paper: "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
    LVLMs", arXiv 2407.21771; compared there with OPERA and VCD on CHAIR and POPE. Follows the authors' code
    (LALBJ/PAI @9bbd8bd) for this part.

    Deviations: this is the paper's change of attention alone. Its second half, guidance away from the
    answer to the prompt without image, changes logits and is not included.

    Args:
        alpha: how much of a score's size is added, at least 0; the code's 0.2. The effect depends on how
            large a model's scores are. At 0 nothing is changed, bitwise.
        layers: decoder blocks, 0-based, negative from the end. None takes all but the first two of 32
            blocks; fewer blocks leave out their share, at least one.

    Shapes: one row of scores ``[B, H, 1, K]`` per call. In the report, ``won`` is the probability that the
    image tokens won.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts padded on the right, and where image tokens are not known.

    A prompt that is fed in parts has the last query of every part changed.
    """

    alpha: float = 0.2
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "pai"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs, "
        "arXiv 2407.21771"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"alpha must be at least 0, got {self.alpha}")
        decoder.check_layers(self.layers)

    @property
    def passive(self) -> bool:
        """True at ``alpha == 0``."""
        return self.alpha == 0

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks among `layers`."""
        return decoder.refusal(site, self.chosen(site.depth), image=True)

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.layers is not None:
            return decoder.from_end(self.layers, depth)
        return decoder.middle_layers(depth)

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
        """The original attention but for the last query."""
        if self.passive:
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site)
        if not bool(keys.image.any()):
            return dense(q, k, v)
        last, won = decoder.lifted_last_row(q, k, v, scale, keys, self.alpha * keys.image)
        site.note("won", won[keys.image.any(1)])
        return last if keys.queries == 1 else torch.cat([dense(q, k, v)[:, :, :-1], last], 2)
