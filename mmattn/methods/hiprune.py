"""HiPrune: keep the image tokens that two attention maps of the vision tower point at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.layout import Tile
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_ROWS = 64


@dataclass(frozen=True)
class HiPrune(Method):
    """Drops image tokens before the language model, chosen by attention inside the vision tower.

    A middle block looks at objects: its most attended patches are *anchors*, and their four neighbours
    are *buffers*. Late blocks park global information in a few patches: the most attended of the rest
    are *registers* and fill the budget. Kept tokens stay in raster order. The language model itself is
    untouched, so any of its attention implementations will do.

    Paper: "HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs", arXiv 2508.00553;
    compared there with FastV, SparseVLM, VisionZip and others at equal budgets. `RandomPrune` is the
    baseline to beat here.

    Deviations: selected tokens are excluded from the registers with minus infinity, where the code
    subtracts 1 (with scores summed over queries, as in the paper's Qwen code, that can select a token
    twice and keep fewer than asked). Ties are broken by position. Every image has its own budget, where
    the code divides one budget among all images of a call. LLaVA-NeXT keeps the newline tokens and
    crops the padding, as transformers does; the paper's code has neither. HiPrune++ (text-guided
    additions) is not included.

    Args:
        keep: tokens to keep per image; an int counts tokens (LLaVA, shared evenly by the tiles of
            LLaVA-NeXT), a float in (0, 1] is a share (Qwen); None keeps all.
        alpha: share of the budget spent on anchors and buffers, in [0, 1]; the paper's 0.1.
        object_layer: 1-based block of the anchors, or a float share of the depth. None takes the
            paper's: 0.375 of the depth (layer 9 of CLIP-L's 24), 0.5 for Qwen towers (16 of 32). It must
            be a block with full attention.
        wrap: True keeps the neighbours of the paper's code: flat indices, so that the right neighbour of
            a row's last token is the first of the next row, and clamped, so that a neighbour above the
            first row is token 0. False respects the edges of the grid.

    Shapes: scores ``[M]`` per tile, from attention ``[T, H, N, N]`` summed over heads and queries in
    chunks, never held whole.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a windowed object layer, videos, and calls in which the tower did not run.
    """

    keep: int | float | None = 192
    alpha: float = 0.1
    object_layer: int | float | None = None
    wrap: bool = True

    name: ClassVar[str] = "hiprune"
    seams: ClassVar[tuple[str, ...]] = ("attention", "features")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens", "grid"})
    paper: ClassVar[str] = (
        "HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs, arXiv 2508.00553"
    )
    observes: ClassVar[bool] = True
    grouped: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
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
                "it is not in a vision tower that feeds a language model with known packing (LLaVA, "
                "LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL)"
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
            if torch.compiler.is_compiling():
                raise UnsupportedCall(
                    "Attention scores cannot be carried out of a compiled tower; compile the language "
                    "model's layers instead."
                )
            if "windowed" in site.tags and site.index == self._object(site):
                raise UnsupportedCall(
                    f"Block {site.index + 1} attends inside windows only, so its scores do not compare "
                    "across the image. Choose object_layer among the blocks with full attention."
                )
            call, site.call = (
                site.call,
                0,
            )  # one list for all calls of a forward (Qwen: one per image)
            columns: list[torch.Tensor] = site.state.setdefault("columns", [])
            if call == 0:
                columns.clear()
            columns.append(column_mean(q, k, scale))
            site.call = call
        return dense(q, k, v)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor:
        """Anchors, buffers and registers of one tile, in raster order."""
        total = tile.features.shape[0]
        budget = budget_of(self.keep, total, tile.tiles)
        if budget >= total:
            return torch.arange(total, device=tile.features.device)
        if not tile.tower:
            raise UnsupportedCall(
                "HiPrune saw no vision attention; leave the vision sites selected."
            )
        scores = [self._scores(tower, tile.gather) for tower in tile.tower]
        by_object = next(
            (s for s, t in zip(scores, tile.tower, strict=True) if t.index == self._object(t)), None
        )
        if by_object is None or "output" not in tile.tower[-1].tags:
            raise UnsupportedCall(
                "HiPrune needs both the object block and the tower's output block; do not leave one "
                "of them out with sites=..."
            )
        kept, anchors, held = select(
            by_object, scores[-1], budget, self.alpha, tile.grid, wrap=self.wrap
        )
        site.note("anchors", anchors)
        site.note("with_buffers", held)
        return kept

    @staticmethod
    def _scores(
        tower: Site, gather: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        columns: Any = tower.state.get("columns")
        if not columns:
            raise UnsupportedCall(
                f"{tower.path} recorded no attention in this call; run the vision tower with the "
                "language model."
            )
        return gather(columns)


def column_mean(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Mean over heads and queries of the attention each key gets: ``[B, H, Q, D]`` -> ``[B, K]``.

    Float32 softmax over `_ROWS` queries at a time. The mean of a row's attention is 1 / K, so images of
    different sizes get comparable scores.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.float().transpose(-1, -2)
    total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
    for rows in q.float().split(_ROWS, dim=2):
        total += (rows @ keys * scale).softmax(-1).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


def select(
    by_object: torch.Tensor,
    by_depth: torch.Tensor,
    budget: int,
    alpha: float,
    grid: tuple[int, int],
    *,
    wrap: bool = True,
) -> tuple[torch.Tensor, int, int]:
    """Choose exactly `budget` of M tokens.

    Args:
        by_object, by_depth: ``[M]`` scores of the middle and of the output block.
        budget: tokens to keep, less than M.
        alpha: share of the budget for anchors and buffers.
        grid: ``(Y, X)``.
        wrap: whether neighbours run over the edges of the grid.

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
    rest[held] = -torch.inf
    registers = top(rest, budget - held.numel())
    return torch.cat([held, registers]).sort().values, count, held.numel()


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores; equal ones by position."""
    return torch.argsort(scores, descending=True, stable=True)[:count]


def check_keep(keep: int | float | None) -> None:
    """Raise unless `keep` is a positive count, a share in (0, 1], or None.

    Raises:
        ConfigError: otherwise.
    """
    fits = keep is None or (isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1)
    fits = fits or (isinstance(keep, float) and 0 < keep <= 1)
    require(fits, f"keep is a token count >= 1, a share in (0, 1], or None for all; got {keep!r}")


def keeps_all(keep: int | float | None) -> bool:
    """Whether `keep` names every token whatever the image."""
    return keep is None or (isinstance(keep, float) and keep == 1)


def budget_of(keep: int | float | None, tokens: int, tiles: int) -> int:
    """Tokens to keep of a tile with `tokens` of them, of an image with `tiles` tiles.

    Raises:
        UnsupportedCall: when the budget leaves a tile without a single token.
    """
    if keep is None:
        return tokens
    budget = round(tokens * keep) if isinstance(keep, float) else keep // tiles
    if budget < 1:
        raise UnsupportedCall(
            f"keep={keep} leaves no token for a tile of {tokens} (the image has {tiles} tiles); raise it."
        )
    return min(budget, tokens)
