"""LargePiG: mix the next token's distribution with a copy distribution read from attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods._streams import checked, contrast, plausible
from mmattn.methods.base import Dense, Method, require
from mmattn.methods.dola import (
    candidates,
    check_layers,
    early,
    keep,
    memory_of,
    most_different,
    reads,
)
from mmattn.runs import ModelCall
from mmattn.seams import Opaque
from mmattn.sites import Site

_SOURCES = ("image", "text", "prompt")
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class LargePiG(Method):
    """Copies words from the source, as far as the model's layers disagree about the next token.

    Where the last layer looks while it writes is a pointer into the prompt; the mass on equal tokens adds
    up to a distribution over the vocabulary. It is mixed in with a share ``p_copy = clip(scale * JS, 0,
    0.5)``, where JS is the largest disagreement between the last layer and an earlier one (see `DoLa`).
    Image tokens stand for the word whose embedding is nearest to theirs.

    Paper: "LargePiG for Hallucination-Free Query Generation: Your Large Language Model is Secretly a
    Pointer Generator", arXiv 2410.11366, and the authors' code; compared with the formula on attention
    weights and hidden states that transformers returns.

    Deviations, the first three being errors of the code: attention to image tokens counts, where the
    code's vision-language script replaces it by a constant on the image and zero on the text; every row
    masks its own tokens when `contrast` is on, where the code uses those of row 0; without `normalize`
    the mixture is renormalised, because probabilities that do not add up cannot be sampled from. Each row
    has its own ``p_copy``. The mixture is made before `generate` applies temperature and penalties, where
    the code mixes after. The optional masks for unlikely source tokens are left out. Nearest embeddings
    are exact, without an index. The prompt's last position is changed and everything after it, not the
    positions before.

    Args:
        scale: factor on the divergence, at least 0; the authors' 500, or 100 without `normalize`. The
            divergence is a mean over the vocabulary, so this goes with 32,000 tokens; for V tokens
            ``500 * V / 32000`` is equally strong. At 0 nothing is changed, bitwise.
        source: what may be copied: ``"image"``, ``"text"`` (of the prompt), ``"prompt"`` (both), or
            ``(start, end)``, columns counted from each row's first token.
        normalize: whether the pointer's weights add up to 1.
        layers: candidates for the divergence, as in `DoLa`; the paper's are the even layers of the second
            half.
        contrast: whether the model's part of the mixture is DoLa's contrast; off in all of the authors'
            scripts.
        words: ids of tokens that image tokens may stand for (see `words_of`); None allows all but the
            special ones.

    Shapes: attention of the newest rows ``[B, m, N]``, pointer ``[B, m, V]``.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: as `DoLa` does, and for masks that only the host can read (flash attention).

    Cost: one row of attention in the last block, and the head once more per candidate.
    """

    scale: float = 500.0
    source: str | tuple[int, int] = "image"
    normalize: bool = True
    layers: str | tuple[int, ...] = "high"
    contrast: bool = False
    words: tuple[int, ...] | None = None

    name: ClassVar[str] = "largepig"
    seams: ClassVar[tuple[str, ...]] = ("attention", "tokens", "logits")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    paper: ClassVar[str] = (
        "LargePiG for Hallucination-Free Query Generation: Your Large Language Model is Secretly a "
        "Pointer Generator, arXiv 2410.11366"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.scale >= 0, f"scale must be at least 0, got {self.scale}")
        check_layers(self.layers)
        fits = self.source in _SOURCES
        if isinstance(self.source, tuple):
            fits = len(self.source) == 2 and 0 <= self.source[0] < self.source[1]
        require(fits, f"source must be one of {_SOURCES} or (start, end), got {self.source!r}")

    @property
    def passive(self) -> bool:
        """True at ``scale == 0``."""
        return self.scale == 0

    def accepts(self, site: Site) -> str | None:
        """The first and the last decoder block, and those of the candidates."""
        reason = reads(site, candidates(self.layers, site.depth))
        if reason == "its layer is not a candidate" and site.index in (0, site.depth - 1):
            return None
        return reason

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
        """The stock attention; the last block also keeps where its newest rows look."""
        if site.index == site.depth - 1 and not self.passive and site.branch == 0:
            if isinstance(mask, Opaque):
                raise UnsupportedCall(
                    f"LargePiG has to read the mask, and this is {mask.what}; use eager or sdpa attention."
                )
            rows = q.shape[2] if site.layout.past else 1
            site.state["looks"] = newest_rows(q[:, :, -rows:], k, mask, scale)
        return dense(q, k, v)

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Keep the prompt's embeddings until the head has run, and layer 0."""
        if site.index == 0 and not self.passive:
            if not site.layout.past and site.branch == 0:
                site.state["embeddings"] = x
            keep(x, 0, site)
        return x

    def leave(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Keep the hidden states after a block."""
        if not self.passive:
            keep(x, site.index + 1, site)
        return x

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """The mixture, as log-probabilities, for the positions from which new tokens are drawn."""
        if self.passive:
            return logits
        call = checked(site)
        if call.past == 0:
            site.state["ids"] = self._source(call, site, len(logits))
        looks = memory_of(call, len(call.decoder) - 1, site).pop("looks", None)
        ids: torch.Tensor | None = site.state.get("ids")
        if looks is None or ids is None or len(ids) != len(logits):
            raise UnsupportedCall(
                "LargePiG has not seen the prompt that this call continues, or not its last decoder block. "
                "Feed the prompt while attached, and attach to all decoder blocks."
            )
        newest = logits[:, -1:] if call.past == 0 else logits
        final = newest.float().log_softmax(-1)
        divergence, premature, _ = most_different(final, early(call, self.layers, newest, site))
        share = (self.scale * divergence).clamp(0, 0.5)
        copied = pointer(
            looks[: len(ids), -newest.shape[1] :], ids, final.shape[-1], self.normalize
        )
        usable = (copied.sum(-1) > 0) & (share > 0)
        share = torch.where(usable, share, 0.0)
        site.note("copied", share)

        def rule(new: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
            own = final
            if self.contrast:
                kept = plausible(final, 0.1)
                own = (final - premature).masked_fill(~kept, -torch.inf).log_softmax(-1)
            mixed = share[..., None] * copied + (1 - share[..., None]) * own.exp()
            return torch.where(usable[..., None], mixed.log(), own if self.contrast else new)

        return contrast(logits, copied, rule, usable.new_ones(len(usable)))

    def _source(self, call: ModelCall, site: Site, rows: int) -> torch.Tensor:
        """``[B, N]`` ids of what may be copied, -1 elsewhere, by key of the last block."""
        given = call.arguments
        embeddings: torch.Tensor | None = memory_of(call, 0, site).pop("embeddings", None)
        if embeddings is None:
            raise UnsupportedCall(
                "LargePiG did not see the prompt enter the first decoder block; attach to all of them."
            )
        embeddings = embeddings[:rows]
        ids, image = given["input_ids"], call.decoder[0].layout.image_mask
        real = given.get("attention_mask")
        whole = embeddings.shape[1] == ids.shape[1]
        if not whole and (isinstance(self.source, tuple) or image is None):
            raise UnsupportedCall(
                "Another method changed the length of the prompt, so columns of it have no meaning; use "
                "source='image', 'text' or 'prompt'."
            )
        image = torch.zeros_like(ids, dtype=torch.bool) if image is None else image[:rows]
        weight = call.module.get_input_embeddings().weight  # type: ignore[operator]
        special = _special(call.module)
        if whole:
            tokens = ids.clone()
        else:  # what is left of the text is found again by its embeddings
            tokens = nearest(embeddings, weight, None)
        if bool(image.any()):
            tokens[image] = nearest(
                embeddings[image], weight, _allowed(weight, special, self.words)
            )
        source = self._columns(image, real if whole else None)
        return torch.where(source & ~torch.isin(tokens, special.to(tokens.device)), tokens, -1)

    def _columns(self, image: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        if self.source == "image":
            return image
        if self.source == "text":
            return ~image
        if self.source == "prompt":
            return torch.ones_like(image)
        assert isinstance(self.source, tuple)
        real = torch.ones_like(image, dtype=torch.long) if real is None else real.long()
        count = real.cumsum(1) - 1
        return (real > 0) & (count >= self.source[0]) & (count < self.source[1])


def words_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a tokenizer's tokens that are letters only, as the authors let image tokens stand for.

    Args:
        tokenizer: of transformers; a leading word boundary (``▁`` or ``Ġ``) does not count.
    """
    special = set(tokenizer.all_special_ids)
    pairs = tokenizer.get_vocab().items()
    found = (i for token, i in pairs if i not in special and token.lstrip("▁Ġ").isalpha())
    return tuple(sorted(found))


def newest_rows(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Attention weights of the last rows, averaged over heads: ``[B, m, K]``.

    Args:
        q: ``[B, H, m, D]``, the last m queries; k: ``[B, Hk, K, D]``.
        mask: ``[B, 1, Q, K]`` bool (True attends) or additive, or None for causal.
    """
    groups, m = q.shape[1] // k.shape[1], q.shape[2]
    keys = k.repeat_interleave(groups, 1).float()
    scores = q.float() @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        ends = torch.arange(k.shape[2] - m, k.shape[2], device=q.device)
        mask = torch.arange(k.shape[2], device=q.device) <= ends[:, None]
    else:
        mask = mask[:, :, -m:, : k.shape[2]]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean(1)


def pointer(
    looks: torch.Tensor, ids: torch.Tensor, size: int, normalize: bool = True
) -> torch.Tensor:
    """Copy distribution over the vocabulary, ``[B, m, V]``.

    Args:
        looks: attention of the newest rows, ``[B, m, K]``; keys after the prompt are ignored.
        ids: token of each key of the prompt, ``[B, N]``, -1 where nothing may be copied.
        size: vocabulary V.
        normalize: whether the weights of a row add up to 1, each a little above zero.
    """
    weights = looks[..., : ids.shape[1]]
    valid = (ids >= 0)[:, None].expand_as(weights)
    if normalize:
        weights = (weights + 1e-7) * valid
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    weights = weights * valid
    index = ids.clamp(min=0)[:, None].expand_as(weights)
    return weights.new_zeros(*weights.shape[:2], size).scatter_add_(-1, index, weights)


def nearest(x: torch.Tensor, weight: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Ids of the embeddings with the smallest distance to ``x [..., C]``, in chunks.

    Args:
        x: vectors; weight: ``[V, C]``.
        allowed: ids to choose from, or None for all.
    """
    table = (weight if allowed is None else weight[allowed]).float()
    flat = x.reshape(-1, x.shape[-1]).to(table.device).float()
    found = torch.cat([torch.cdist(part, table).argmin(-1) for part in flat.split(_CHUNK)])
    found = found if allowed is None else allowed[found]
    return found.reshape(x.shape[:-1]).to(x.device)


def _special(module: Any) -> torch.Tensor:
    """Ids that are never copied: begin, end, padding, and image placeholders."""
    text = module.config.get_text_config()
    found: set[int] = set()
    for holder in (module.config, text, getattr(module, "generation_config", None)):
        for name in ("bos", "eos", "pad", "image", "video"):
            value = getattr(holder, f"{name}_token_id", None)
            found.update(value if isinstance(value, list | tuple) else [value])  # type: ignore[list-item]
    return torch.tensor(sorted(i for i in found if i is not None), dtype=torch.long)


def _allowed(
    weight: torch.Tensor, special: torch.Tensor, words: tuple[int, ...] | None
) -> torch.Tensor:
    every = torch.arange(weight.shape[0], device=weight.device)
    if words is not None:
        every = torch.tensor(words, device=weight.device)
    return every[~torch.isin(every, special.to(weight.device))]
