"""VASparse: decode on the keys that matter to the query and the image, with a penalty on sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from mmattn_kernels import attention_with_column_mass, grouped_attention

from mmattn.errors import UnsupportedCall
from mmattn.methods import _decoder_keys as decoder
from mmattn.methods._density_peaks import density_peaks
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class VASparse(Method):
    """Three changes to decoding: sparse visual-aware keys, sharper scores beside sinks, and a contrast.

    A generated token attends, per head, to the share `keep` of the keys with the largest
    ``(q . k)^2 + lambda P``, where P is high for tokens that themselves attended to the image, so that
    the cache is thinned without losing what the image says. Scores are raised by ``1 + beta (1 - w)``,
    where w, a softmax over the attention every key has received, is close to one for the strongest sink
    alone, so that every other key gains on it. And the next token's logits are contrasted with those the
    output layer gives to the last token's bare embedding, which know nothing of the image.

    Paper: "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token
    Sparsification", arXiv 2501.06553; compared there with VCD, DoLa, OPERA and HALC on CHAIR, POPE
    and MME. This is the paper's algorithm: the released code runs neither the penalty nor the selection.

    The paper clusters the keys that are not selected by the density of their nearest neighbours, and puts one
    key and one value in the place of each cluster, the sums of its members; `clusters` does that. It gives
    neither the number of clusters nor of neighbours, so both are yours to choose, and by default the keys
    are left out.

    Deviations: keys that are not selected stay in the cache, so that they may come back at the next token,
    and clusters are made anew for it; nothing gets faster here by leaving keys out. The penalty is that of
    each member of a cluster. w and P are those of the layer and, as the paper does not say which, of
    attention before the penalty. The random masking of image tokens before the contrast is not
    there, as the embedding of the last token does not depend on it.

    Args:
        keep: share of the visible keys that a generated token attends to, in (0, 1]; the paper's 0.9,
            rounded down, at least one.
        saliency: the paper's lambda, at least 0; its 0.1.
        clusters: how many keys stand for those that were not selected, as a share of their number, in
            [0, 1], rounded down, at least one. 0 leaves them out, at 1 each stands for itself.
        neighbours: how many nearest neighbours the density of a key is taken from, at least 1.
        beta: strength of the penalty on sinks, at least 0; the paper's 0.1.
        alpha: strength of the contrast, at least 0; the paper's 0.1.
        plausible: with the contrast, tokens less likely than this share of the likeliest are ruled out,
            in [0, 1]; 0.1.
        layers: decoder blocks, 0-based, negative from the end; None is all.

    With ``keep=1, beta=0, alpha=0`` nothing is changed, bitwise.

    Shapes: received attention ``[B, H, K]`` and P ``[B, K]`` are kept while decoding. In the report,
    ``density`` is the share of keys attended to while decoding, clusters included, ``penalty`` the
    largest w.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for a cache whose prompt was not seen, where image tokens are not known, and for
            the contrast without an output layer or without the first block among the attached sites.
    """

    keep: float = 0.9
    saliency: float = 0.1
    clusters: float = 0.0
    neighbours: int = 5
    beta: float = 0.1
    alpha: float = 0.1
    plausible: float = 0.1
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "vasparse"
    seams: ClassVar[tuple[str, ...]] = ("attention", "tokens", "logits")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token "
        "Sparsification, arXiv 2501.06553"
    )
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"keep must be in (0, 1], got {self.keep}")
        require(0 <= self.clusters <= 1, f"clusters must be in [0, 1], got {self.clusters}")
        fits = type(self.neighbours) is int and self.neighbours >= 1
        require(fits, f"neighbours must be a whole number >= 1, got {self.neighbours}")
        for knob in ("saliency", "beta", "alpha"):
            require(
                getattr(self, knob) >= 0, f"{knob} must be at least 0, got {getattr(self, knob)}"
            )
        require(0 <= self.plausible <= 1, f"plausible must be in [0, 1], got {self.plausible}")
        decoder.check_layers(self.layers)

    @property
    def passive(self) -> bool:
        """True when no part is in use."""
        return self._plain and self.alpha == 0

    @property
    def _plain(self) -> bool:
        return self.keep == 1 and self.beta == 0

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks among `layers`, and the first for the contrast."""
        layers = self.chosen(site.depth)
        return decoder.refusal(site, layers | {0} if self.alpha else layers, image=True)

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        return set(range(depth)) if self.layers is None else decoder.from_end(self.layers, depth)

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """What enters the first block are the embeddings of the contrast; they pass unchanged."""
        if self.alpha and site.index == 0:
            site.state["embedded"] = x[: x.shape[0] - site.layout.twins]
        return x

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
        """Prompts with the penalty, generated tokens with the penalty and on selected keys."""
        if self._plain or site.index not in self.chosen(site.depth):
            return dense(q, k, v)
        keys = decoder.read(q, k, mask, site)
        order = decoder.continued(k, keys, site)
        if keys.prompt or keys.queries > 1:
            return self._prompt(q, k, v, scale, keys, order, site, dense)
        return self._step(q, k, v, scale, keys, order, site)

    def _prompt(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        keys: decoder.Keys,
        order: torch.Tensor | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        _, _, mass = attention_with_column_mass(
            q.detach(),
            k.detach(),
            k.detach(),
            mask=keys.mask,
            is_causal=keys.causal,
            scale=scale,
            query_weights=keys.real.float(),
        )
        factor = self._remember(
            mass, keys.seeing() > 0, _looking(q, k, scale, keys), keys, order, site
        )
        if self.beta == 0:
            return dense(q, k, v)
        shared = q.shape[1] // k.shape[1]
        each = k.repeat_interleave(shared, 1) if shared > 1 else k
        value = v.repeat_interleave(shared, 1) if shared > 1 else v
        return dense(q, (each * factor[..., None]).to(k.dtype), value)

    def _step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        keys: decoder.Keys,
        order: torch.Tensor | None,
        site: Site,
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        products = decoder.row_scores(q, k, 1.0)
        row = decoder.hide(products * scale, keys.mask).softmax(-1)[:, :, 0]
        looking = (row[:, -1] * keys.image).sum(-1, keepdim=True)
        visible = keys.seeing() > 0
        factor = self._remember(row, visible, looking, keys, order, site)
        plain = products * scale * factor[:, :, None]
        scores = decoder.hide(plain, keys.mask)
        if self.keep < 1:
            salient = site.state["looking"].masked_fill(~site.state["visible"], -torch.inf)
            kept = select(products[:, :, 0], salient.softmax(-1), self.keep, self.saliency, visible)
            scores = scores.masked_fill(~kept[:, :, None], -torch.inf)
            left = visible[:, None] & ~kept
            if self.clusters and bool(left.any()):
                shared = q.shape[1] // k.shape[1]
                each, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
                scores, v, centres = self._merged(each, v, plain, scores, left)
                kept = kept | centres
            site.note("density", kept.sum(-1) / visible.sum(-1, keepdim=True))
        return decoder.row_output(scores.softmax(-1), v, q.dtype)

    def _merged(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        plain: torch.Tensor,
        scores: torch.Tensor,
        left: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One key and one value for each cluster of the keys in ``left [B, H, K]``, at its centre's place.

        The score of a sum of keys is the sum of their scores.

        Args:
            k, v: ``[B, H, K, D]``.
            plain: ``[B, H, 1, K]`` scores before masks.
            scores: ``[B, H, 1, K]``, minus infinity in `left`.
        """
        home = torch.arange(k.shape[2], device=k.device).repeat(*k.shape[:2], 1)
        for row in range(len(k)):  # rows leave different numbers of keys
            count = left[row].sum(-1)
            number = (self.clusters * count.double()).floor().clamp_min(1)
            if bool(count.any()):
                home[row] = density_peaks(k[row], left[row], number, self.neighbours)
        members = torch.where(left, plain[:, :, 0], 0.0)
        sums = torch.zeros_like(members).scatter_add(-1, home, members)
        centres = left & (home == torch.arange(k.shape[2], device=k.device))
        scores = torch.where(centres[:, :, None], sums[:, :, None], scores)
        where = home.unsqueeze(-1).expand_as(v)
        v = torch.zeros_like(v, dtype=torch.float32).scatter_add(2, where, v.float()).to(v.dtype)
        return scores, v, centres

    def _remember(
        self,
        mass: torch.Tensor,
        visible: torch.Tensor,
        looking: torch.Tensor,
        keys: decoder.Keys,
        order: torch.Tensor | None,
        site: Site,
    ) -> torch.Tensor:
        """Carry attention received and paid to the image; returns the factor of the keys ``[B, H, K]``."""
        rows, size, state = mass.shape[0], mass.shape[2], site.state
        if not keys.prompt:
            kept = {name: state[name][:rows] for name in ("received", "looking", "visible")}
            if order is not None:
                kept = {name: x[order] for name, x in kept.items()}
            mass = mass + decoder.widen(kept["received"], size)
            visible = visible | decoder.widen(kept["visible"], size)
            looking = torch.cat([kept["looking"][:, : keys.past], looking], 1)
        own = rows - site.layout.twins
        state["received"], state["visible"] = mass[:own], visible[:own]
        state["looking"] = decoder.widen(looking[:own], size)
        sink = mass.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        site.note("penalty", sink.amax(-1))
        return 1 + self.beta * (1 - sink)

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Contrast with the output layer's opinion of each token's own embedding."""
        if self.alpha == 0:
            return logits
        head = getattr(site.module, "get_output_embeddings", lambda: None)()
        embedded = _embedded(site)
        if head is None or embedded is None:
            lacks = "an output layer" if head is None else "the first block of its decoder"
            raise UnsupportedCall(
                f"The contrast of VASparse needs {lacks}, and {type(site.module).__name__} shows none "
                "here. Attach to the whole model at all sites, or set alpha=0."
            )
        plain = head(embedded[:, -logits.shape[1] :])
        cut = math.log(self.plausible) if self.plausible else -torch.inf
        return contrast(logits, plain, self.alpha, cut)


def _embedded(site: Site) -> torch.Tensor | None:
    """What entered the first block of the decoder behind the logits at `site`, taken out of its state."""
    call = site.run.call if site.run is not None else None
    first = call.decoder[0] if call is not None and call.decoder else None
    if first is None or first.run is None:
        return None
    states = first.run.states_of(first, site.slot)
    found: torch.Tensor | None = states.get((first.run.branch, 0), {}).pop("embedded", None)
    return found


def _looking(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, keys: decoder.Keys
) -> torch.Tensor:
    """Attention of every query of the last head to the image, ``[B, Q]``."""
    found = grouped_attention(
        q[:, -1:].detach(),
        k[:, -1:].detach(),
        k[:, -1:].detach(),
        keys.image.long(),
        torch.ones_like,
        num_groups=2,
        mask=keys.head(q.shape[1] - 1),
        is_causal=keys.causal,
        scale=scale,
        return_masses=True,
    )
    assert isinstance(found, tuple)
    return found[1][:, 0, :, 1]


def select(
    products: torch.Tensor,
    salience: torch.Tensor,
    keep: float,
    weight: float,
    visible: torch.Tensor,
) -> torch.Tensor:
    """The keys of one row that a head attends to.

    This choice maximises ``sum (q . k)^2 + weight * salience`` over all sets of its size.

    Args:
        products: ``[B, H, K]``, q . k without scaling.
        salience: ``[B, K]``, P.
        keep: share of the visible keys.
        weight: lambda.
        visible: ``[B, K]``.

    Returns:
        ``[B, H, K]`` bool; of equal keys the earlier ones.
    """
    gain = (products.square() + weight * salience[:, None]).masked_fill(
        ~visible[:, None], -torch.inf
    )
    rank = torch.argsort(gain, dim=-1, descending=True, stable=True).argsort(-1)
    size = (keep * visible.sum(-1).double()).floor().clamp_min(1)
    kept: torch.Tensor = rank < size[:, None, None]
    return kept


def contrast(logits: torch.Tensor, plain: torch.Tensor, alpha: float, cut: float) -> torch.Tensor:
    """``(1 + alpha) logits - alpha plain``, minus infinity where `logits` fall `cut` below their peak.

    Args:
        logits, plain: ``[B, N, V]``.
        cut: at most 0.
    """
    mixed = (1 + alpha) * logits - alpha * plain.to(logits.dtype)
    return mixed.masked_fill(logits < logits.amax(-1, keepdim=True) + cut, -torch.inf)
