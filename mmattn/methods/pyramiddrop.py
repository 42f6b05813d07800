"""PyramidDrop: halve the image tokens again and again, the deeper the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.methods._pruning import (
    Columns,
    attend_left,
    best,
    chosen,
    image_tokens_of,
    last_row,
    readable,
)
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Drops image tokens in stages inside the decoder, by the attention of the prompt's last token.

    Shallow blocks need the whole image, deep ones little of it. At the first block of every stage the
    image tokens that are still there are ranked by the attention the prompt's last token gives them in
    that very block, mean over heads; the best stay, for this block and all after it, for the prompt
    and for all that is generated. As with `FastV`, that suits questions more than long captions.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", arXiv 2410.17247; compared there with FastV. With its settings the blocks of the decoder see
    0.469 of the image tokens on average.

    Deviations: tokens keep their positions, where the authors number what is left anew at every stage.
    The saving is not all of theirs: dropped tokens neither ask nor answer in attention, but their rows
    still go through the projections and the MLP, and their keys stay in the cache, from which the rest is
    gathered at every step. Several images of one prompt are ranked together. At least one image token
    stays. Ties are broken by position. Only the training-free use is covered.

    Args:
        layers: where stages begin: 0-based blocks, or float shares of the depth, ascending. The paper's 8,
            16 and 24 of 32.
        ratios: share of the prompt's image tokens left in each stage, in (0, 1], not increasing; the
            paper's.

    Shapes: one row of attention ``[B, H, K]`` per stage; the choices are ``[B, N]``, per row.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts fed in chunks or padded on the right, masks that cannot be read (flash
            with padding, flex), and prompts whose image tokens the host cannot see.

    Cost: logits and hidden states at dropped image tokens mean nothing. Without a key/value cache every
    step is a prompt of its own, and tokens are chosen at each.
    """

    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    name: ClassVar[str] = "pyramiddrop"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction, arXiv 2410.17247"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fits = all(
            (isinstance(i, int) and not isinstance(i, bool) and i >= 0)
            or (isinstance(i, float) and 0 <= i < 1)
            for i in self.layers
        )
        require(
            fits and len(self.layers) > 0,
            f"layers are block numbers or shares of the depth in [0, 1), got {self.layers!r}",
        )
        require(
            len(self.ratios) == len(self.layers),
            f"every stage needs a ratio: {len(self.layers)} layers and {len(self.ratios)} ratios",
        )
        falling = all(a >= b for a, b in zip((1.0, *self.ratios), self.ratios, strict=False))
        require(
            falling and min(self.ratios) > 0,
            f"ratios are shares in (0, 1] that do not increase, got {self.ratios!r}",
        )

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return min(self.ratios) == 1

    def starts(self, depth: int) -> list[int]:
        """First block of every stage in a decoder with `depth` blocks."""
        return [i if isinstance(i, int) else round(i * depth) for i in self.layers]

    def share(self, index: int, depth: int) -> float:
        """Share of the image tokens that block `index` of `depth` attends to."""
        past = [
            r for start, r in zip(self.starts(depth), self.ratios, strict=True) if start <= index
        ]
        return past[-1] if past else 1.0

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks from the first stage on."""
        if "decoder" not in site.tags:
            return "it is not in a causal decoder"
        if "multimodal" not in site.tags:
            return (
                "its language model is not part of a model that puts image tokens into the prompt"
            )
        starts = self.starts(site.depth)
        if sorted(set(starts)) != starts or starts[-1] >= site.depth:
            return (
                f"the stages would begin at blocks {starts} of a decoder with {site.depth}; name "
                "ascending ones with layers=..."
            )
        return None if site.index >= starts[0] else "all image tokens are there before stage 1"

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
        """Rank at the first block of a stage, and attend to what is left."""
        if self.passive:
            return dense(q, k, v)
        readable(mask, "PyramidDrop")
        image = image_tokens_of(site, "PyramidDrop")
        starts = self.starts(site.depth)
        stage = sum(start <= site.index for start in starts) - 1
        left: dict[int, Columns] = site.shared.setdefault("left", {})
        if site.layout.past == 0 and site.index == starts[0]:
            left.clear()
        if site.layout.past == 0 and site.index == starts[stage]:
            there = torch.ones_like(image)
            if stage:
                before = left.get(stage - 1)
                there = chosen(before, site, len(q), "PyramidDrop", starts[stage - 1]).keep
            scores = last_row(q, k, mask, scale, there)
            budgets = [max(1, int(n * self.ratios[stage])) for n in image.sum(1).tolist()]
            left[stage] = Columns.of(~image | best(scores, image & there, budgets))
        columns = chosen(left.get(stage), site, len(q), "PyramidDrop", starts[stage])
        if site.layout.past == 0:
            site.note("of", image.sum() / len(image))
            site.note("kept", (columns.keep & image).sum() / len(image))
        return attend_left(columns, q, k, v, mask, site=site, dense=dense)
