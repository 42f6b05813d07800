"""VisionZip: keep the image tokens the tower looks at, and fold the rest into a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.errors import UnsupportedCall
from mmattn.layout import Kept, Tile
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
from mmattn.methods.hiprune import column_mean
from mmattn.sites import Site


@dataclass(frozen=True)
class VisionZip(Method):
    """Drops image tokens before the language model: the most attended stay, some of the rest absorb others.

    In the block that feeds the language model the class token attends to few patches, where the tower
    has gathered what it knows: these are *dominant* and stay as they are. Of the others, every n-th
    becomes a *contextual* token, to which the remaining ones are added, each to the one whose key it
    resembles most.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467;
    compared there with FastV and SparseVLM. `RandomPrune` and `UniformPrune` are the baselines here.

    Deviations: the authors keep the class token as one of the dominant tokens; transformers drops it
    before the projector, so one more patch is dominant instead. Contextual tokens stand at the place of
    the patch they grew from, where the authors append them after the dominant ones. LLaVA-NeXT keeps
    its newline tokens. As in the authors' code, a contextual feature is the sum of its own and the mean
    of what joined it. In LLaVA this happens before the projector, as there; Qwen's and Idefics' tokens
    are merged after the layer that makes one token of several patches. Towers without a class token
    (Qwen, SigLIP) are scored by the mean attention that a patch receives. Ties are broken by position.

    Args:
        keep: tokens to keep per image, contextual ones included; an int counts tokens (LLaVA's 64, 128
            and 192; shared evenly by the tiles of LLaVA-NeXT, and of a prompt of Idefics3 and SmolVLM), a
            float in (0, 1] is a share; None keeps all.
        contextual: share of the kept tokens that are contextual, in [0, 1]; the authors' 10 of 64 and 30
            of 192. At 0 nothing is merged.
        class_token: False scores by the mean attention a patch receives in towers with a class token too.
            Where the class token was dropped in training and the features come out of the last block,
            as in the embedded model, nothing ever taught its last row of attention where to look, and
            its choice is worse than chance.

    Shapes: scores ``[M]`` and keys ``[M, D]`` (mean over heads) per tile; new features ``[K, C]``.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for videos, and calls in which the tower did not run.

    Cost: one row of attention in one block of the tower (without a class token a second pass over its
    queries and keys), and a product of keys ``[M, D] x [D, contextual tokens]``.
    """

    keep: int | float | None = 192
    contextual: float = 10 / 64
    class_token: bool = True

    name: ClassVar[str] = "visionzip"
    seams: ClassVar[tuple[str, ...]] = ("attention", "features")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(0 <= self.contextual <= 1, f"contextual must be in [0, 1], got {self.contextual}")

    @property
    def passive(self) -> bool:
        """True when every token is kept."""
        return keeps_all(self.keep)

    def accepts(self, site: Site) -> str | None:
        """The block that feeds the language model."""
        if "prunable" not in site.tags:
            return (
                "it is not in a vision tower that feeds a language model with known packing "
                f"({FAMILIES})"
            )
        if "output" in site.tags:
            return None
        return "its attention is not used"

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
        """The tower's own attention; what the class token sees, and the keys, are remembered."""
        if not self.passive:
            grid = site.layout.grid
            patches = q.shape[2] if grid is None else grid[1] * grid[2]
            if self.class_token and q.shape[2] > patches:
                scores = class_row(q, k, scale, mask)
            else:
                scores = column_mean(q, k, scale, mask)
            remember(site, scores=scores, keys=k.detach().float().mean(1))
        return dense(q, k, v)

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor | Kept:  # type: ignore[override]
        """Dominant and contextual tokens of one tile, in raster order."""
        total = tile.features.shape[0]
        budget = budget_of(self.keep, total, tile.tiles)
        if budget >= total:
            return torch.arange(total, device=tile.features.device)
        if not tile.tower or "output" not in tile.tower[-1].tags:
            raise UnsupportedCall(
                "VisionZip saw no vision attention; leave the tower's output block selected."
            )
        merged = round(budget * self.contextual)
        scores = recall(tile, tile.tower[-1], "scores")
        site.note("contextual", merged)
        if not merged:
            return top(scores, budget).sort().values
        dominant = top(scores, budget - merged).sort().values
        inputs = tile.features if tile.raw is None else tile.raw
        keys = recall(tile, tile.tower[-1], "keys")
        places, sums = absorb(inputs, keys, dominant, merged)
        grown = sums if tile.project is None else tile.project(sums)
        order = torch.cat([dominant, places]).argsort()
        kept = torch.cat([dominant, places])[order]
        shown = torch.cat([tile.features[dominant], grown.to(tile.features.dtype)])[order]
        return Kept(kept, shown)


def class_row(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the first token attends to, mean over heads: ``[B, H, Q, D]`` -> ``[B, K]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first = q[:, :, :1].detach().float()
    k = k.detach().float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = first @ k.transpose(-1, -2) * scale
    if mask is not None:
        line = mask[:, :, :1]
        scores = (
            scores.masked_fill(~line, -torch.inf) if line.dtype == torch.bool else scores + line
        )
    return scores.softmax(-1).mean((1, 2))


def absorb(
    features: torch.Tensor, keys: torch.Tensor, dominant: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold all tokens that are not dominant into `count` of them.

    Args:
        features: ``[M, E]``.
        keys: ``[M, D]``, whose direction says which tokens are alike.
        dominant: ``[d]`` indices.
        count: tokens to make, at most M - d.

    Returns:
        Their places ``[count]``, ascending, and features ``[count, E]``.
    """
    free = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
    free[dominant] = False
    rest = free.nonzero().flatten()
    step = max(1, rest.shape[0] // count)
    target = torch.zeros_like(rest, dtype=torch.bool)
    target[::step] = True
    target &= target.cumsum(0) <= count
    places, others = rest[target], rest[~target]
    unit = F.normalize(keys.float(), dim=-1)
    nearest = (unit[others] @ unit[places].T).argmax(1)
    joined = features.new_zeros(count, features.shape[1], dtype=torch.float32)
    joined.index_add_(0, nearest, features[others].float())
    size = torch.bincount(nearest, minlength=count).clamp(min=1)
    sums = features[places].float() + joined / size[:, None]
    return places, sums.to(features.dtype)
