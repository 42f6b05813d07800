"""FastV: from an early block of the decoder on, attend to half of the image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.methods._pruning import (
    Columns,
    attend_left,
    best,
    budget_of,
    check_keep,
    chosen,
    image_tokens_of,
    keeps_all,
    last_row,
    readable,
)
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class FastV(Method):
    """Drops the image tokens that the prompt's last token hardly attends to, inside the decoder.

    After two blocks a language model has read the image, and most image tokens get almost no attention
    any more. The image tokens are ranked by the attention that the prompt's last token gives them in
    block `layer`, mean over heads; only the best are attended to in the blocks after it, for the prompt
    and for all that is generated. Positions stay as they were.

    What the prompt's last token attends to is what the first words need. That suits questions; a long
    caption comes to parts of the image that were dropped, and on the embedded model it then names fewer
    of the objects than with tokens drawn at random.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", arXiv 2403.06764. `RandomPrune` is the baseline here, with the difference
    that it drops before the first block.

    Deviations: the result at every token that stays equals the authors' removal of tokens, and a mask
    over the dropped keys. The saving is not all of theirs: dropped tokens neither ask nor answer in
    attention after block `layer`, but their rows still go through the projections and the MLP, and
    their keys stay in the cache, from which the rest is gathered at every step. The choice is made
    once per prompt, where the authors' mask mode ranks again at every step. Several images of one prompt
    are ranked together. Ties are broken by position. Their random mask at layer 0 is not included.

    Args:
        keep: image tokens left per prompt: a float in (0, 1] is a share, one minus the paper's R (0.5); an
            int counts the tokens of all images of the prompt; None keeps all.
        layer: the paper's K: how many blocks see all tokens; 2 there, at least 1.

    Shapes: one row of attention ``[B, H, K]`` in one block; the choice is ``[B, N]``, per row.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts fed in chunks or padded on the right, masks that cannot be read (flash
            with padding, flex), and prompts whose image tokens the host cannot see.

    Cost: logits and hidden states at dropped image tokens mean nothing. Without a key/value cache every
    step is a prompt of its own, and tokens are chosen at each.
    """

    keep: int | float | None = 0.5
    layer: int = 2

    name: ClassVar[str] = "fastv"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models, arXiv 2403.06764"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(
            isinstance(self.layer, int) and self.layer >= 1,
            f"layer is how many blocks see all image tokens, at least 1; got {self.layer!r}",
        )

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks from the one that ranks on."""
        if "decoder" not in site.tags:
            return "it is not in a causal decoder"
        if "multimodal" not in site.tags:
            return (
                "its language model is not part of a model that puts image tokens into the prompt"
            )
        if self.layer >= site.depth:
            return f"layer={self.layer} leaves none of the decoder's {site.depth} blocks to save in"
        if site.index < self.layer - 1:
            return "it is before the block that ranks the tokens"
        return None

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
        """Rank in one block, and attend to what is left in those after it."""
        if self.passive:
            return dense(q, k, v)
        readable(mask, "FastV")
        image = image_tokens_of(site, "FastV")
        if site.index < self.layer:
            if site.layout.past == 0:
                site.shared["left"] = self._choose(q, k, mask, scale, image)
            return dense(q, k, v)
        columns = chosen(site.shared.get("left"), site, q.shape[0], "FastV", self.layer - 1)
        if site.layout.past == 0:
            site.note("of", image.sum() / len(image))
            site.note("kept", (columns.keep & image).sum() / len(image))
        return attend_left(columns, q, k, v, mask, site=site, dense=dense)

    def _choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        image: torch.Tensor,
    ) -> Columns:
        scores = last_row(q, k, mask, scale)
        budgets = [budget_of(self.keep, n, 1) if n else 0 for n in image.sum(1).tolist()]
        return Columns.of(~image | best(scores, image, budgets))
