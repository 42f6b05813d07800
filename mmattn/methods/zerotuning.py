"""ZeroTuning: multiply the attention to the first token by a factor and renormalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from mmattn_kernels import grouped_attention

from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(Method):
    """Scales the probability of a row's first token by `gamma` and lets the row sum to one again.

    The first token is a sink whose only work is to take attention up. Less of it there means sharper
    differences among the other keys, more means flatter ones, and their order stays as it is. In
    vision-language models the same lever frees attention for the image, or holds it back.

    Paper: "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without
    Training", arXiv 2505.11739; compared there with the plain models and with ACT on text tasks.
    Follows the authors' code (FeijiangHan/ZeroTuning @51df35b), which equals adding ``log(gamma)`` to one
    logit.

    Deviations: in a batch padded on the left every row's own first token is scaled, where the code scales
    a padding key and changes nothing. At ``gamma=0`` a row that sees the first token alone is left as it
    is, where the code divides by zero. Head choice is a call of its own, `profile_heads`, whose rule for
    heads that neither direction helps is ours.

    Args:
        gamma: factor on the probability, at least 0; above 1 holds attention at the first token. The
            authors' classification demo uses 4. At 1 nothing is changed, bitwise.
        head_list: pairs (layer, head), layers 0-based or negative from the end; None is all heads of
            `layers`.
        layers: decoder blocks, used when `head_list` is None; None is all, as in the authors' demo.
        start, end: keys to scale instead, from `start` to `end` inclusive, counted from the row's first
            token; 0 and 0 are that token alone.

    Shapes: attention ``[B, H, Q, K]`` is never held. In the report, ``before`` and ``after`` are the
    scaled keys' share of attention in the chosen heads.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a cache whose prompt was not seen, or a head that does not exist.
    """

    gamma: float = 4.0
    head_list: tuple[tuple[int, int], ...] | None = None
    layers: tuple[int, ...] | None = None
    start: int = 0
    end: int = 0

    name: ClassVar[str] = "zerotuning"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    paper: ClassVar[str] = (
        "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without "
        "Training, arXiv 2505.11739"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"gamma must be at least 0, got {self.gamma}")
        require(
            0 <= self.start <= self.end,
            f"start and end are keys from the first token on, start <= end; got {self.start}, {self.end}",
        )
        decoder.check_layers(self.layers)
        if self.head_list is not None:
            object.__setattr__(self, "head_list", decoder.pairs(self.head_list, "head_list"))

    @property
    def passive(self) -> bool:
        """True at ``gamma == 1``."""
        return self.gamma == 1

    def accepts(self, site: Site) -> str | None:
        """Causal decoder blocks with a chosen head."""
        return decoder.refusal(site, self.chosen(site.depth), image=False)

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.head_list is not None:
            return decoder.from_end((layer for layer, _ in self.head_list), depth)
        if self.layers is not None:
            return decoder.from_end(self.layers, depth)
        return set(range(depth))

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
        """Attention with the first token's share scaled in the chosen heads."""
        if self.passive:
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site, image=False)
        first = decoder.first_keys(keys, site)[:, None]
        at = torch.arange(k.shape[2], device=k.device)
        scaled = (at >= first + self.start) & (at <= first + self.end)
        chosen = torch.zeros(q.shape[1], 1, dtype=torch.bool, device=q.device)
        chosen[decoder.heads_of(self.head_list, site, q.shape[1])] = True

        def multipliers(masses: torch.Tensor) -> torch.Tensor:
            rest, here = masses.unbind(-1)
            size = rest + self.gamma * here
            use = chosen & (size > torch.finfo(size.dtype).tiny)
            size = torch.where(use, size, 1.0)
            factor = torch.where(use, self.gamma, 1.0)
            note = (keys.real[:, None] & chosen).expand_as(here)
            site.note("before", here[note])
            site.note("after", (here * factor / size)[note])
            return torch.stack([1 / size, factor / size], -1)

        out = grouped_attention(
            q,
            k,
            v,
            scaled.long(),
            multipliers,
            num_groups=2,
            mask=keys.mask,
            is_causal=keys.causal,
            scale=scale,
        )
        assert isinstance(out, torch.Tensor)
        return out


@dataclass(frozen=True)
class HeadProfile:
    """What scaling the first token in one head alone is worth.

    Args:
        layer, head: which head.
        up, down: score with the factor above and below 1.
        plain: score of the untouched model.
    """

    layer: int
    head: int
    up: float
    down: float
    plain: float

    @property
    def kind(self) -> str:
        """``up``, ``down``, or ``none`` where neither direction beats the untouched model."""
        if max(self.up, self.down) <= self.plain:
            return "none"
        return "up" if self.up >= self.down else "down"


def profile_heads(
    model: Any,
    score: Callable[[], float],
    *,
    up: float = 4.0,
    down: float = 0.25,
    method: ZeroTuning | None = None,
    candidates: Sequence[tuple[int, int]] | None = None,
) -> tuple[ZeroTuning | None, list[HeadProfile]]:
    """Sort heads by whether more or less attention to the first token helps, and take the larger kind.

    Every candidate head is scaled alone, up and down, and scored; the method that comes back scales only
    the heads of the more frequent kind, in their direction. That is two runs of `score` per head.

    Args:
        model: what `mmattn.attach` takes.
        score: runs `model` on held-out examples and returns a number, higher is better (accuracy, or the
            negative entropy of its answers where there are no labels).
        up, down: factors to try, above and below 1.
        method: settings other than the heads and the factor; None is ``ZeroTuning()``.
        candidates: pairs (layer, head); None tries every head of the blocks that `method` acts on.

    Returns:
        The method with its heads, None where no head helps, and all profiles.

    Raises:
        ConfigError: unless ``down < 1 < up``.
        NoSiteError: for a model without a causal decoder.
    """
    from mmattn.attaching import attach
    from mmattn.planning import plan

    require(0 <= down < 1 < up, f"down < 1 < up is needed, got down={down}, up={up}")
    method = ZeroTuning() if method is None else method
    if candidates is None:
        made = plan(model, method)
        made.raise_if_empty()
        sites = [row.site for row in made.rows if row.methods]
        candidates = [(site.index, h) for site in sites for h in range(site.heads or 0)]

    def scored(layer: int, head: int, gamma: float) -> float:
        with attach(model, replace(method, gamma=gamma, head_list=((layer, head),))):
            return float(score())

    plain = float(score())
    profiles = [
        HeadProfile(layer, head, scored(layer, head, up), scored(layer, head, down), plain)
        for layer, head in candidates
    ]
    kinds = {kind: [p for p in profiles if p.kind == kind] for kind in ("up", "down")}
    kind = max(kinds, key=lambda name: len(kinds[name]))
    if not kinds[kind]:
        return None, profiles
    heads = tuple((p.layer, p.head) for p in kinds[kind])
    return replace(method, gamma=up if kind == "up" else down, head_list=heads), profiles
