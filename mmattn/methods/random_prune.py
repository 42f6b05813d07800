"""RandomPrune: keep image tokens at random, the baseline for every pruning method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.layout import Tile
from mmattn.methods._pruning import budget_of, check_keep, keeps_all
from mmattn.methods.base import Method
from mmattn.sites import Site


@dataclass(frozen=True)
class RandomPrune(Method):
    """Drops image tokens before the language model uniformly at random.

    A pruning method is worth its name when it beats this at the same `keep`. Kept tokens stay in raster
    order; the choice comes from the session's seed, never from the global generator, and every image
    draws anew. `session.reset()` starts the sequence again. No paper.

    Args:
        keep: tokens per image: an int counts tokens (shared evenly by the tiles of LLaVA-NeXT, and of a
            prompt of Idefics3 and SmolVLM), a float in (0, 1] is a share; None keeps all.

    Raises:
        ConfigError: for a `keep` out of range.
    """

    keep: int | float | None = 192

    name: ClassVar[str] = "random-prune"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    kinds: ClassVar[tuple[str, ...]] = ()
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor:
        """A random subset of one tile's tokens, ascending."""
        total = tile.features.shape[0]
        budget = budget_of(self.keep, total, tile.tiles)
        order = torch.randperm(total, generator=site.generator())[:budget]
        return order.sort().values.to(tile.features.device)
