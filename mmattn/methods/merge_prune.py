"""MergePrune: merge the image tokens that resemble each other most until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.layout import Kept, Tile
from mmattn.methods._merging import average, match, sizes
from mmattn.methods._pruning import budget_of, check_keep, keeps_all
from mmattn.methods.base import Method
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class MergePrune(Method):
    """Shortens a prompt by ToMe's bipartite matching of the image tokens, after the vision tower.

    Tokens alternate between two sets; each of the first looks for the one of the second it resembles
    most by cosine, and the pairs most alike become their size-weighted mean. A round merges at most half
    of the tokens; rounds follow until `keep` are left. A merged token stands at the place of the partner
    it went to.

    "Token Merging: Your ViT But Faster", arXiv 2210.09461, here as the peer that pruning papers for
    vision-language models compare with. `RandomPrune` and `UniformPrune` are the baselines.

    Deviations: the paper merges in every block of the tower, by the mean of the keys, which saves time in
    the tower too; here all merging happens at once on the projected features, so the tower runs in full
    and any tower will do. `ToMe` is the paper's form for timm backbones.

    Args:
        keep: tokens per image: an int counts tokens (shared evenly by the tiles of an image), a float in
            (0, 1] is a share; None keeps all.

    Shapes: features ``[M, C]`` of a tile in raster order -> ``[K, C]``.

    Raises:
        ConfigError: for a `keep` out of range.
    """

    keep: int | float | None = 192

    name: ClassVar[str] = "merge-prune"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    kinds: ClassVar[tuple[str, ...]] = ()
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"

    def __post_init__(self) -> None:
        """Check the budget."""
        check_keep(self.keep)

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor | Kept:
        """Merged tokens of one tile, and where they stand."""
        total = tile.features.shape[0]
        budget = budget_of(self.keep, total, tile.tiles)
        if budget >= total:
            return torch.arange(total, device=tile.features.device)
        return Kept(*merged(tile.features, budget))


def merged(features: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds of matching until `budget` tokens are left: places ``[K]`` and features ``[K, C]``."""
    x = features[None]
    place = torch.arange(x.shape[1], device=x.device)[None]
    size = torch.ones(place.shape, device=x.device)
    while x.shape[1] > budget:
        n = x.shape[1]
        order = torch.arange(n, device=x.device)
        src, dst = order[::2], order[1::2]
        r = min(n - budget, n // 2)
        source = match(x, src, dst, r)
        left = n - r
        # A destination keeps its place; a source that went to it gives its own up.
        new_place = place.new_zeros(1, left)
        stays = source.new_zeros(1, left).scatter_add_(1, source, torch.ones_like(source))
        alone = stays.gather(1, source) == 1
        keeps = alone | (order % 2 == 1)[None]
        new_place.scatter_(1, source[keeps][None], place[keeps][None])
        x = average(x, source, size, left)
        size, place = sizes(source, size, left), new_place
    return place[0], x[0]
