"""A-STAR: keeps the attention maps of named words apart, and keeps them from fading, by moving latents."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch

from mmattn.errors import ConfigError
from mmattn.methods._word_maps import Places, Watch
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_TINY = 1e-8


@dataclass(frozen=True)
class AStar(Method):
    """Draws several objects of a prompt by pulling the attention maps of their words apart, and keeping them.

    ``A^m`` is how much every image token attends to concept m, the mean over heads and sites. Two losses:
    segregation, ``sum_{m>n} sum min(A^m, A^n) / sum (A^m + A^n)``, is high where concepts overlap;
    retention, ``sum_m 1 - sum min(A^m, B^m) / sum (A^m + B^m)``, is high where a concept left the region
    ``B^m`` in which it was strong a step before. Before every step the latents go down the gradient of
    their sum: ``z - alpha_t grad``. "A-STAR: Test-time Attention Segregation and Retention for
    Text-to-image Synthesis", arXiv 2306.14544.

    Attention cannot move latents, so this method records the maps, and
    `mmattn_pipelines.attention_guidance.AttentionGuidance` runs the extra forward with gradients:
    ``AttentionGuidance(pipe, AStar(words=("circle", "square")))("a red circle left of a blue square")``.

    The paper gives neither ``alpha_t`` nor the threshold of ``B``; `alpha`, `unit` and `tau` are this
    project's, chosen on 64 prompts of the embedded model (docs/attention-guidance.md judges others). The fall
    of ``alpha_t`` is Attend-and-Excite's, whose own step is ``alpha=20, unit="gradient"``. Published for
    UNets with cross-attention maps of 16 x 16; transformers with joint attention are this project's
    extension, with the share that a word gets among all keys in place of the cross-attention map. Compared in
    the tests with the formulas in loops, with finite differences and with a loop by hand on a UNet;
    measured against random directions of equal size.

    Args:
        words: words or phrases of the prompt, one per concept; retention alone acts on a single one.
        tokens: text positions of every concept in place of `words`, for texts whose tokenizer is unknown.
        alpha: step size, at least 0. See `unit`; 0 is the untouched pipeline, bitwise.
        unit: ``"latents"``: the gradient is scaled to the length of the latents, so that `alpha` is the
            share by which a step moves them, whatever the model; ``"gradient"``: the gradient itself.
        tau: region ``B`` is where a map, scaled to [0, 1], was above this; in [0, 1).
        segregation, retention: weights of the two losses, at least 0.
        stop: share of the steps to guide, from the first one on; the paper guides all.
        resolution: most tokens a side of a map. UNets: the largest cross-attention grid that fits (16, as
            published); transformers: larger maps are averaged down.
        depth: transformers only: sites between these shares of the depth.
        over: ``"text"`` or ``"keys"``: among which keys of joint attention the share is taken.
        random: move in a random direction of the same length instead; the control of the measurements.

    Shapes:
        reads ``q [B, H, Q, D]``, ``k [B, H, K, D]``; maps are ``[B, concepts, T, Y, X]``.

    Raises:
        ConfigError: knobs out of range; or attached without `AttentionGuidance`.
        UnsupportedCall: no token grid, a text position outside the call, or only larger maps.
    """

    name: ClassVar[str] = "astar"
    kinds: ClassVar[tuple[str, ...]] = ("joint", "cross")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers",)
    needs: ClassVar[frozenset[str]] = frozenset({"grid", "clock"})
    paper: ClassVar[str] = (
        "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis, "
        "arXiv 2306.14544"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    words: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    alpha: float = 0.2
    unit: str = "latents"
    tau: float = 0.5
    segregation: float = 1.0
    retention: float = 1.0
    stop: float = 1.0
    resolution: int = 16
    depth: tuple[float, float] = (0.25, 0.6)
    over: str = "keys"
    random: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        object.__setattr__(self, "tokens", tuple(tuple(concept) for concept in self.tokens))
        require(
            not isinstance(self.words, str),
            f"words is a tuple of words, got the string {self.words!r}",
        )
        require(not (self.words and self.tokens), "give words or tokens, not both")
        require(all(self.tokens), "every concept in tokens needs at least one text position")
        require(self.alpha >= 0, f"alpha must be at least 0, got {self.alpha}")
        require(
            self.unit in ("gradient", "latents"),
            f"unit must be 'gradient' or 'latents', got {self.unit!r}",
        )
        require(0 <= self.tau < 1, f"tau must lie in [0, 1), got {self.tau}")
        require(
            min(self.segregation, self.retention) >= 0,
            f"segregation and retention must be at least 0, got {self.segregation}, {self.retention}",
        )
        require(0 <= self.stop <= 1, f"stop is a share of the steps in [0, 1], got {self.stop}")
        require(self.resolution >= 1, f"resolution must be at least 1, got {self.resolution}")
        require(
            len(self.depth) == 2 and 0 <= self.depth[0] < self.depth[1] <= 1,
            f"depth must be two rising shares in [0, 1], got {self.depth}",
        )
        require(self.over in ("text", "keys"), f"over must be 'text' or 'keys', got {self.over!r}")

    @property
    def passive(self) -> bool:
        """True when no step would move anything."""
        return self.alpha == 0 or self.stop == 0 or self.segregation == self.retention == 0

    def accepts(self, site: Site) -> str | None:
        """Not attention over frames alone."""
        return "it attends over frames, not over words" if "temporal" in site.tags else None

    def role(self, site: Site) -> bool:
        """Whether a site is among those that are watched."""
        assert site.run is not None
        own = [s for s in site.run.sites if any(m is self for _, m in s.attention)]
        if _is_pyramid(site):
            return True
        low, high = (share * len(own) for share in self.depth)
        chosen = [i for i in range(len(own)) if low <= i + 0.5 < high] or [int((low + high) / 2)]
        return own.index(site) in chosen

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the steps that are guided."""
        if step is None or total is None:
            return None
        return step < round(self.stop * total)

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
        """The original attention; maps are recorded on the side when a forward asks for them."""
        out = dense(q, k, v)
        if self.passive:
            return out
        if "watch" not in site.shared:
            raise ConfigError(
                "AStar only records maps; the latents are moved by a pipeline call through "
                "mmattn_pipelines.attention_guidance.AttentionGuidance(pipe, AStar(...))."
            )
        watch: Watch | None = site.shared["watch"]
        if watch is not None and site.role:
            watch.record(q, k, mask, scale, site)
        return out

    def loss(
        self, maps: torch.Tensor, regions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both losses per row, ``[B]`` each and unweighted; retention is 0 without regions."""
        kept = maps.new_zeros(maps.shape[0]) if regions is None else retention(maps, regions)
        return segregation(maps), kept

    def step_size(self, step: int, total: int) -> float:
        """``alpha_t``: alpha times the root of a scale that falls from 1 to 0.5 over the run."""
        return self.alpha * sqrt(1 - 0.5 * step / max(total - 1, 1))

    def watch(self, places: list[Places], rows: slice) -> Watch:
        """What a forward with gradients is to record."""
        return Watch(places, rows, self.over)


def _is_pyramid(site: Site) -> bool:
    return "UNet" in site.family


def segregation(maps: torch.Tensor) -> torch.Tensor:
    """Overlap of every two concepts, summed: ``[B, concepts, T, Y, X]`` -> ``[B]``, each pair in [0, 1/2]."""
    flat = maps.flatten(2)
    total = flat.new_zeros(flat.shape[0])
    for m in range(1, flat.shape[1]):
        for n in range(m):
            a, b = flat[:, m], flat[:, n]
            total = total + torch.minimum(a, b).sum(-1) / ((a + b).sum(-1) + _TINY)
    return total


def retention(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """How far concepts are from their regions, summed: two ``[B, concepts, T, Y, X]`` -> ``[B]``.

    Every concept costs 1/2 (a map equal to its region) to 1.
    """
    a, b = maps.flatten(2), regions.flatten(2).to(maps.dtype)
    return (1 - torch.minimum(a, b).sum(-1) / ((a + b).sum(-1) + _TINY)).sum(-1)


def regions(maps: torch.Tensor, tau: float) -> torch.Tensor:
    """Where each map, scaled to [0, 1], is above `tau`; nowhere in a constant one. Bool, like `maps`."""
    flat = maps.detach().flatten(2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    return ((flat - low) > tau * (high - low)).view(maps.shape)
