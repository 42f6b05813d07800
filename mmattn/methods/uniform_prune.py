"""UniformPrune: keep image tokens at even distances, a baseline that never leaves a hole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.layout import Tile
from mmattn.methods._pruning import budget_of, check_keep, keeps_all
from mmattn.methods.base import Method
from mmattn.sites import Site


@dataclass(frozen=True)
class UniformPrune(Method):
    """Drops image tokens before the language model so that the rest is spread evenly over the grid.

    About as many rows of the grid as columns are used, in proportion to its sides; the budget is shared
    by the rows, and within a row the tokens have even distances. It looks at nothing, costs nothing and
    is hard to beat where the answer may be anywhere in the picture. No paper.

    Args:
        keep: tokens per image: an int counts tokens (shared evenly by the tiles of LLaVA-NeXT, and of a
            prompt of Idefics3 and SmolVLM), a float in (0, 1] is a share; None keeps all.

    Raises:
        ConfigError: for a `keep` out of range.
    """

    keep: int | float | None = 192

    name: ClassVar[str] = "uniform-prune"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    kinds: ClassVar[tuple[str, ...]] = ()
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens", "grid"})
    paper: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor:
        """The same lattice for every tile of a size."""
        budget = budget_of(self.keep, tile.features.shape[0], tile.tiles)
        return torch.tensor(spread(tile.grid, budget), device=tile.features.device)


def spread(grid: tuple[int, int], count: int) -> list[int]:
    """`count` cells of a grid ``(Y, X)`` at even distances, as ascending raster indices."""
    height, width = grid
    lines = round((count * height / width) ** 0.5)
    lines = min(max(lines, -(-count // width), 1), height, count)
    cells = []
    for i in range(lines):
        y = (2 * i + 1) * height // (2 * lines)
        own = (i + 1) * count // lines - i * count // lines
        cells += [y * width + (2 * j + 1) * width // (2 * own) for j in range(own)]
    return cells
