"""HiPrune: keep the image tokens that two attention maps of the vision tower point at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import attention_with_column_mass

from mmattn.errors import UnsupportedCall
from mmattn.layout import Tile
from mmattn.methods._pruning import (
    FAMILIES,
    budget_of,
    check_keep,
    keeps_all,
    recall,
    remember,
    top,
)
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class HiPrune(Method):
    """Drops image tokens before the language model, chosen by attention inside the vision tower.

    A middle block looks at objects: its most attended patches are *anchors*, and their four neighbours
    are *buffers*. Late blocks park global information in a few patches: the most attended of the rest
    are *registers* and fill the budget. Kept tokens stay in raster order. The language model itself is
    untouched, so any of its attention implementations will do.

    With `text_share` (the paper's HiPrune++) tokens that resemble the prompt's text are added on top.

    Paper: "HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs", arXiv 2508.00553;
    compared there with FastV, SparseVLM, VisionZip and others at equal budgets. `RandomPrune` is the
    baseline to beat here.

    Deviations: selected tokens are excluded from the registers with minus infinity, where the code
    subtracts 1 (see `compat`). Ties are broken by position. Every image has its own budget, where the
    code divides one budget among all images of a call, which would couple the rows of a batch.
    LLaVA-NeXT keeps the newline tokens and crops the padding, as transformers does; the paper's code has
    neither. HiPrune++ is in the paper only: of its two texts, the mean embedding of the language model
    is used, for no text encoder is paired with the tower here; every token of the prompt that is neither
    image nor padding counts, those of the chat template included. Models other than LLaVA's and Qwen's
    are not the paper's.

    Args:
        keep: tokens to keep per image; an int counts tokens (LLaVA; shared evenly by the tiles of
            LLaVA-NeXT, and by all tiles of a prompt of Idefics3 and SmolVLM, which do not say whose
            image a tile is), a float in (0, 1] is a share (Qwen); None keeps all.
        alpha: share of the budget spent on anchors and buffers, in [0, 1]; the paper's 0.1.
        object_layer: 1-based block of the anchors, or a float share of the depth. None takes the
            paper's: 0.375 of the depth (layer 9 of CLIP-L's 24), 0.5 for Qwen towers (16 of 32). It must
            be a block with full attention.
        wrap: True keeps the neighbours of the paper's code: flat indices, so that the right neighbour of
            a row's last token is the first of the next row, and clamped, so that a neighbour above the
            first row is token 0. False respects the edges of the grid.
        compat: True excludes as the paper's code does, by subtracting 1. Its scores of Qwen are sums over
            queries, 1 on average, so that a token far above that is selected twice and fewer than `keep`
            stay; with LLaVA's means nothing changes.
        text_share: HiPrune++: how many tokens to add, as a share of all tokens of the tile, by cosine to
            the prompt's mean text embedding, in [0, 1]; the paper's 0.1. They come on top of `keep`.

    Shapes: scores ``[M]`` per tile, from the attention ``[T, H, N, N]`` summed over heads and queries,
    which is never held: memory is linear in N.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a windowed object layer, videos, and calls in which the tower did not run.

    Cost: a second pass over queries and keys in two blocks of the tower.
    """

    keep: int | float | None = 192
    alpha: float = 0.1
    object_layer: int | float | None = None
    wrap: bool = True
    compat: bool = False
    text_share: float = 0.0

    name: ClassVar[str] = "hiprune"
    seams: ClassVar[tuple[str, ...]] = ("attention", "features")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens", "grid"})
    paper: ClassVar[str] = (
        "HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs, arXiv 2508.00553"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        require(0 <= self.text_share <= 1, f"text_share must be in [0, 1], got {self.text_share}")
        layer = self.object_layer
        fits = layer is None or (isinstance(layer, int) and layer >= 1)
        fits = fits or (isinstance(layer, float) and 0 < layer <= 1)
        require(
            fits,
            f"object_layer is a 1-based block number, a share of the depth in (0, 1], or None; got {layer}",
        )

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def accepts(self, site: Site) -> str | None:
        """The object block and the block that feeds the language model."""
        if "prunable" not in site.tags:
            return (
                "it is not in a vision tower that feeds a language model with known packing "
                f"({FAMILIES})"
            )
        if self._object(site) >= site.depth:
            return (
                f"object_layer={self.object_layer} is deeper than the tower's {site.depth} blocks"
            )
        if "output" in site.tags or site.index == self._object(site):
            return None
        return "its attention is not used"

    def _object(self, site: Site) -> int:
        layer = self.object_layer
        if layer is None:
            layer = 0.5 if "packed" in site.tags else 0.375
        return (layer if isinstance(layer, int) else max(1, round(layer * site.depth))) - 1

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
        """The tower's own attention; the mean attention of every key is remembered on the way."""
        if not self.passive:
            if "windowed" in site.tags and site.index == self._object(site):
                raise UnsupportedCall(
                    f"Block {site.index + 1} attends inside windows only, so its scores do not compare "
                    "across the image. Choose object_layer among the blocks with full attention."
                )
            scores = column_mean(q, k, scale, mask)
            sums = self.compat and "packed" in site.tags
            remember(site, columns=scores * q.shape[2] if sums else scores)
        return dense(q, k, v)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor:
        """Anchors, buffers and registers of one tile, and tokens like the text, in raster order."""
        total = tile.features.shape[0]
        budget = budget_of(self.keep, total, tile.tiles)
        if budget >= total:
            return torch.arange(total, device=tile.features.device)
        if not tile.tower:
            raise UnsupportedCall(
                "HiPrune saw no vision attention; leave the vision sites selected."
            )
        scores = [recall(tile, tower, "columns") for tower in tile.tower]
        by_object = next(
            (s for s, t in zip(scores, tile.tower, strict=True) if t.index == self._object(t)), None
        )
        if by_object is None or "output" not in tile.tower[-1].tags:
            raise UnsupportedCall(
                "HiPrune needs both the object block and the tower's output block; do not leave one "
                "of them out with sites=..."
            )
        kept, anchors, held = select(
            by_object,
            scores[-1],
            budget,
            self.alpha,
            tile.grid,
            wrap=self.wrap,
            compat=self.compat,
        )
        site.note("anchors", anchors)
        site.note("with_buffers", held)
        if self.text_share:
            kept = add_like_text(kept, tile, round(self.text_share * total))
        return kept


def column_mean(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over heads and queries of the attention each key gets: ``[B, H, Q, D]`` -> ``[B, K]``.

    The mean of a row's attention is 1 / K, so images of different sizes get comparable scores.
    """
    # The values do not matter here; what the tower computes with them is its own business.
    q, k = q.detach(), k.detach()
    _, _, mass = attention_with_column_mass(q, k, k, mask=mask, scale=scale)
    return mass.sum(1).float() / (q.shape[1] * q.shape[2])


def select(
    by_object: torch.Tensor,
    by_depth: torch.Tensor,
    budget: int,
    alpha: float,
    grid: tuple[int, int],
    *,
    wrap: bool = True,
    compat: bool = False,
) -> tuple[torch.Tensor, int, int]:
    """Choose exactly `budget` of M tokens, or at most so many with `compat`.

    Args:
        by_object, by_depth: ``[M]`` scores of the middle and of the output block.
        budget: tokens to keep, less than M.
        alpha: share of the budget for anchors and buffers.
        grid: ``(Y, X)``.
        wrap: whether neighbours run over the edges of the grid.
        compat: whether chosen tokens are excluded by subtracting 1 from their score.

    Returns:
        Kept indices ``[budget]`` ascending, the number of anchors, and how many anchors and buffers
        were held before registers filled the rest.
    """
    total, (_, width) = by_object.shape[0], grid
    count = round(alpha * budget / 5)
    anchors = top(by_object, count)
    left, right = anchors - 1, anchors + 1
    if not wrap:
        column = anchors % width
        left, right = left[column > 0], right[column < width - 1]
    near = torch.cat([anchors, left, right, anchors - width, anchors + width])
    held = near.clamp(0, total - 1) if wrap else near[(near >= 0) & (near < total)]
    held = torch.unique(held)
    if held.numel() > budget:  # only for alpha close to 1 and tiny budgets: anchors first
        ahead = torch.full_like(by_object, -torch.inf)
        ahead[held] = by_object[held]
        held = top(ahead, budget)
    rest = by_depth.clone()
    rest[held] = rest[held] - 1 if compat else -torch.inf
    registers = top(rest, budget - held.numel())
    return torch.unique(torch.cat([held, registers])), count, held.numel()


def add_like_text(kept: torch.Tensor, tile: Tile, count: int) -> torch.Tensor:
    """`kept` and the `count` other tokens whose features are most like the prompt's text, ascending.

    Raises:
        UnsupportedCall: when the prompt has no text.
    """
    if tile.text is None or not len(tile.text):
        raise UnsupportedCall("text_share compares with the prompt's text, and there is none.")
    mean = tile.text.float().mean(0)
    like = F.cosine_similarity(tile.features.float(), mean[None].to(tile.features.device), dim=1)
    like[kept] = -torch.inf
    count = min(count, like.shape[0] - kept.shape[0])
    return torch.cat([kept, top(like, count)]).sort().values
