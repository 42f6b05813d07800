"""ACT: in chosen heads, take attention from sinks behind the first token and spread it over the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from mmattn_kernels import attention_with_column_mass, grouped_attention

from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_SPANS = ("all", "text", "image")


@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Scales attention to hidden sinks by `beta` and gives what they lose to all other keys.

    Besides the first token, other tokens become sinks in some heads: they draw much attention from every
    later token, whatever they mean. In heads where that does harm, such keys, found by the mean attention
    they receive, keep `beta` of their probability; the rest is spread over the other keys in proportion.
    Rows still sum to one.

    Paper: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
    Training through Attention Calibration", arXiv 2406.15765; compared there with the plain models on
    classification, multiple choice and question answering. Follows the authors' code
    (GATECH-EIC/ACT @a267af7) for prompts.

    Deviations: the code spares the first sink it finds, meaning the first token; here the first token of a
    row is spared and every other sink is not, also where the first token is none. Every row of a batch
    has its own sinks. In the code a decoded token takes every key with a weight above `threshold` for a
    sink and then attends to the first token alone; here the mean attention is carried on and a new row is
    treated like any other. With no `head_list`, all heads of the layers are calibrated, which the paper does
    not do: look for heads first with `search_heads`.

    Args:
        beta: share of their probability that sinks keep, in [0, 1]; the code's 0.4. At 1 nothing is
            changed, bitwise.
        threshold: mean attention received from which a key counts as a sink, above 0; the code's 0.1.
        head_list: pairs (layer, head) to calibrate, layers 0-based or negative from the end; None is all
            heads of `layers`.
        layers: decoder blocks, used when `head_list` is None. None leaves out the first two and the last
            of 32 blocks, as the code does, and of fewer blocks their share of the first, at least one, and
            the last.
        span: which keys may be sinks: ``all``, ``text`` or ``image``; the latter two are ours.

    Shapes: mean attention ``[B, heads, K]`` is kept while decoding; nothing of size Q x K is held. In the
    report, ``sinks`` is their number per chosen head and row of the batch, ``moved`` the probability that
    a query's sinks lose in a head that has some.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a cache whose prompt was not seen, or a head that does not exist.

    Cost: in chosen heads, three more passes over the keys of a prompt.
    """

    beta: float = 0.4
    threshold: float = 0.1
    head_list: tuple[tuple[int, int], ...] | None = None
    layers: tuple[int, ...] | None = None
    span: str = "all"

    name: ClassVar[str] = "act"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    paper: ClassVar[str] = (
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
        "Training through Attention Calibration, arXiv 2406.15765"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, f"beta must be in [0, 1], got {self.beta}")
        require(self.threshold > 0, f"threshold must be above 0, got {self.threshold}")
        require(self.span in _SPANS, f"span must be one of {_SPANS}, got {self.span!r}")
        decoder.check_layers(self.layers)
        if self.head_list is not None:
            object.__setattr__(self, "head_list", decoder.pairs(self.head_list, "head_list"))

    @property
    def passive(self) -> bool:
        """True at ``beta == 1``."""
        return self.beta == 1

    def accepts(self, site: Site) -> str | None:
        """Causal decoder blocks with a chosen head."""
        return decoder.refusal(site, self.chosen(site.depth), image=self.span != "all")

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.head_list is not None:
            return decoder.from_end((layer for layer, _ in self.head_list), depth)
        if self.layers is not None:
            return decoder.from_end(self.layers, depth)
        return decoder.middle_layers(depth, leave=1)

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
        """The original attention, with the chosen heads calibrated."""
        if self.passive:
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site, image=self.span != "all")
        heads = decoder.heads_of(self.head_list, site, q.shape[1])
        shared = q.shape[1] // k.shape[1]
        sinks = self._sinks(q[:, heads], k[:, [h // shared for h in heads]], keys, scale, site, k)
        site.note("sinks", sinks.sum(-1).float())
        out = dense(q, k, v)
        if not bool(sinks.any()):
            return out
        planes = list(out.unbind(1))
        for i, h in enumerate(heads):
            if not bool(sinks[:, i].any()):
                continue
            one = slice(h // shared, h // shared + 1)
            changed = grouped_attention(
                q[:, h : h + 1],
                k[:, one],
                v[:, one],
                sinks[:, i].long(),
                lambda masses: self._multipliers(masses, site),
                num_groups=2,
                mask=keys.head(h),
                is_causal=keys.causal,
                scale=scale,
            )
            assert isinstance(changed, torch.Tensor)
            planes[h] = changed[:, 0]
        return torch.stack(planes, 1)

    def _sinks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        keys: decoder.Keys,
        scale: float | None,
        site: Site,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """``[B, heads, K]``: keys with a mean attention above the threshold, not the first of a row."""
        order, spared = decoder.continued(cache, keys, site), decoder.first_keys(keys, site)
        _, _, mass = attention_with_column_mass(
            q.detach(),
            k.detach(),
            k.detach(),
            mask=keys.mask,
            is_causal=keys.causal,
            scale=scale,
            query_weights=keys.real.float(),
        )
        seeing = keys.seeing()
        if not keys.prompt:
            kept, seen = (
                decoder.widen(x[: mass.shape[0]] if order is None else x[order], k.shape[2])
                for x in site.state["received"]
            )
            mass, seeing = mass + kept, seeing + seen
        own = mass.shape[0] - site.layout.twins
        site.state["received"] = (mass[:own], seeing[:own])
        sinks = mass / seeing.clamp_min(1)[:, None] > self.threshold
        at = torch.arange(k.shape[2], device=k.device)
        eligible = at != spared[:, None]
        if self.span != "all":
            eligible &= keys.image if self.span == "image" else ~keys.image
        return sinks & eligible[:, None]

    def _multipliers(self, masses: torch.Tensor, site: Site) -> torch.Tensor:
        rest, sinks = masses.unbind(-1)
        # A row that sees nothing but sinks has nowhere to put their attention.
        somewhere = rest > torch.finfo(rest.dtype).tiny
        lost = torch.where(somewhere, (1 - self.beta) * sinks, 0.0)
        site.note("moved", lost)
        gain = 1 + lost / torch.where(somewhere, rest, 1.0)
        return torch.stack([gain, torch.where(somewhere, self.beta, 1.0)], -1)


class Trial(NamedTuple):
    """What calibrating one head alone is worth.

    Args:
        layer, head: which head.
        score: what `score` returned with this head calibrated.
    """

    layer: int
    head: int
    score: float


def search_heads(
    model: Any,
    score: Callable[[], float],
    *,
    method: ACT | None = None,
    candidates: Sequence[tuple[int, int]] | None = None,
) -> tuple[tuple[tuple[int, int], ...], float, list[Trial]]:
    """Find the heads that `ACT` should calibrate: those that help when calibrated alone.

    As in the paper: the untouched model is scored on held-out examples, then once more for every head of
    the candidate blocks; heads with a higher score than the untouched model are kept. That is one run of
    `score` per head.

    Args:
        model: what `mmattn.attach` takes.
        score: runs `model` on the held-out examples and returns a number, higher is better. It must give
            the same number when called twice.
        method: settings other than the heads; None is ``ACT()``.
        candidates: pairs (layer, head); None tries every head of the blocks that `method` acts on.

    Returns:
        The heads for ``ACT(head_list=...)``, possibly none; the untouched model's score; all trials.

    Raises:
        NoSiteError: for a model without a causal decoder.
    """
    from mmattn.attaching import attach
    from mmattn.planning import plan

    method = ACT() if method is None else method
    if candidates is None:
        made = plan(model, method)
        made.raise_if_empty()
        sites = [row.site for row in made.rows if row.methods]
        candidates = [(site.index, h) for site in sites for h in range(site.heads or 0)]
    plain = float(score())
    trials = []
    for layer, head in candidates:
        with attach(model, replace(method, head_list=((layer, head),))):
            trials.append(Trial(layer, head, float(score())))
    return tuple((t.layer, t.head) for t in trials if t.score > plain), plain, trials
