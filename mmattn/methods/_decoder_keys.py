"""What methods that re-weigh a decoder's attention ask about a call: masks, images, rows, layers.

They act on the probabilities of a causal language model with a key/value cache. Keys are counted from
the first column of the batch, padding included; keys that decoding appended after the prompt are text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods.base import require
from mmattn.sites import Site

_WHOLE = "Attach before the prompt is fed, and continue the cache of the last prompt only."


@dataclass(frozen=True)
class Keys:
    """One attention call of a decoder.

    Args:
        mask: ``[B or 1, H or 1, Q or 1, K]``, bool (True attends) or additive, or None.
        causal: query i sees the keys up to ``i + K - Q``; only where `mask` is None.
        past: keys that were in the cache before this call.
        real: ``[B, Q]``, False at queries that are padding.
        image: ``[B, K]``, True at image tokens.
    """

    mask: torch.Tensor | None
    causal: bool
    past: int
    real: torch.Tensor
    image: torch.Tensor

    @property
    def queries(self) -> int:
        """Q."""
        return self.real.shape[1]

    @property
    def prompt(self) -> bool:
        """Whether the cache was empty."""
        return self.past == 0

    def seeing(self) -> torch.Tensor:
        """How many queries that are no padding see each key, ``[B, K]``."""
        if self.mask is not None:
            counts: torch.Tensor = (_visible(self.mask)[:, 0] & self.real[..., None]).sum(1)
            return counts
        at = torch.arange(self.image.shape[1], device=self.image.device)
        if not self.causal:
            counts = (at < self.past + self.queries).long() * self.queries
        else:
            counts = (self.queries - (at - self.past).clamp_min(0)).clamp_min(0)
        return counts.expand(self.image.shape)

    def head(self, head: int) -> torch.Tensor | None:
        """The mask of one head."""
        if self.mask is None or self.mask.shape[1] == 1:
            return self.mask
        return self.mask[:, head : head + 1]

    def rows(self, start: int) -> torch.Tensor | None:
        """The mask of the queries from `start` on."""
        if self.mask is None or self.mask.shape[2] == 1:
            return self.mask
        return self.mask[:, :, start:]


def read(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, site: Site, *, image: bool = True
) -> Keys:
    """The facts of a call ``q [B, H, Q, D]``, ``k [B, Hk, K, D]`` of a decoder site.

    Args:
        image: whether the method needs to know the image tokens.

    Raises:
        UnsupportedCall: when the host does not know the cache or (with `image`) the image tokens, or the
            cache has dropped keys.
    """
    layout, (rows, queries, keys) = site.layout, (q.shape[0], q.shape[2], k.shape[2])
    name = type(site.module).__name__
    if layout.past is None:
        raise UnsupportedCall(
            f"{name} at {site.path}: how many tokens are in the cache is not known here (inside "
            "torch.compile, say); run the language model in eager mode."
        )
    if layout.image_mask is None and image:
        raise UnsupportedCall(
            f"{site.path} cannot tell which tokens are image tokens: pass input_ids to the "
            "vision-language model, not inputs_embeds."
        )
    if keys < layout.past + queries:
        raise UnsupportedCall(
            f"{site.path} keeps {keys} keys of {layout.past + queries} tokens (a sliding window), so "
            "keys cannot be told apart by their position; use a cache of full length."
        )
    given = mask if mask is None else mask[..., :keys]
    where = torch.zeros(rows, keys, dtype=torch.bool, device=q.device)
    if layout.image_mask is not None:
        known = layout.image_mask[:rows]
        if known.shape[1] > keys or known.shape[0] < rows:
            raise UnsupportedCall(
                f"{site.path} continues a cache of {layout.past} tokens in {rows} rows, and the prompt seen "
                f"last had {known.shape[1]} tokens in {known.shape[0]} rows. {_WHOLE}"
            )
        where[:, : known.shape[1]] = known
    real = torch.ones(rows, queries, dtype=torch.bool, device=q.device)
    if given is not None:
        real &= _own(given, layout.past, queries)
    return Keys(given, site.causal, layout.past, real, where)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _own(mask: torch.Tensor, past: int, queries: int) -> torch.Tensor:
    """``[B or 1, Q]``: whether a query sees itself, as all but padding do."""
    if mask.shape[2] == 1:
        return _visible(mask[:, 0, 0, past : past + queries])
    return _visible(mask[:, 0].diagonal(past, 1, 2))


# -- what is remembered from call to call -----------------------------------------------------------


def continued(k: torch.Tensor, keys: Keys, site: Site) -> torch.Tensor | None:
    """Which row of the last call each row of this one continues, or None if all kept their places.

    Beam search reorders the rows of the cache between two steps and tells nobody. Rows are recognised by
    their keys, of which one channel is remembered. Call it once in every call, before state is read.

    Raises:
        UnsupportedCall: when the cache is not the one of the last call plus nothing.
    """
    channel = k[:, 0, : keys.past + keys.queries, 0].detach().float().nan_to_num()
    own = channel[: channel.shape[0] - site.layout.twins]
    before: torch.Tensor | None = site.state.get("channel")
    site.state["channel"] = own.clone()
    if keys.prompt:
        return None
    if before is None or before.shape[1] != keys.past or before.shape[0] < own.shape[0]:
        found = (
            "nothing" if before is None else f"{before.shape[1]} tokens of {before.shape[0]} rows"
        )
        raise UnsupportedCall(
            f"{site.path} continues a cache of {keys.past} tokens in {own.shape[0]} rows, but what was "
            f"remembered is {found}. {_WHOLE}"
        )
    now = own[:, : keys.past]
    if torch.equal(before[: now.shape[0]], now):
        return None
    same = (before[None] == now[:, None]).all(-1)
    if not bool(same.any(1).all()):
        raise UnsupportedCall(
            f"{site.path}: some rows of the cache are not those of the last call. {_WHOLE}"
        )
    return same.int().argmax(1)


def first_keys(keys: Keys, site: Site) -> torch.Tensor:
    """``[B]`` column of the first token of each row that is no padding.

    Raises:
        UnsupportedCall: in a call onto a cache whose prompt was not seen.
    """
    if keys.prompt:
        first = keys.real.int().argmax(1)
        site.state["first"] = first[: len(first) - site.layout.twins]
        return first
    kept: torch.Tensor | None = site.state.get("first")
    if kept is None or kept.shape[0] < keys.real.shape[0]:
        raise UnsupportedCall(f"{site.path} did not see the prompt of this cache. {_WHOLE}")
    return kept[: keys.real.shape[0]]


def widen(x: torch.Tensor, size: int) -> torch.Tensor:
    """`x` with zeros at the end of its last axis, up to `size`."""
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


# -- a few rows, written out ------------------------------------------------------------------------


def row_scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Scores of a few queries, ``[B, H, R, K]`` fp32; keys are not repeated for their query heads."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.float().reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return (shared @ k.float().transpose(-1, -2)).view(*q.shape[:3], -1) * scale


def row_output(probabilities: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Output ``[B, H, R, D]`` of probabilities ``[B, H, R, K]``."""
    shared = probabilities.reshape(v.shape[0], v.shape[1], -1, v.shape[2]) @ v.float()
    return shared.view(*probabilities.shape[:3], -1).to(dtype)


def hide(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores with the mask of their rows."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask


def lifted_last_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    keys: Keys,
    gain: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last query with ``s + gain |s|`` in place of its scores s.

    Args:
        gain: ``[B, K]``, zero for keys to leave alone.

    Returns:
        Output ``[B, H, 1, D]``, and the probability ``[B, H]`` that keys with a gain won.

    Raises:
        UnsupportedCall: for prompts padded on the right, whose last token is not in the last column.
    """
    if not bool(keys.real[:, -1].all()):
        raise UnsupportedCall(
            "The prompt is padded on the right, so its last token is not in the last column. Pad on "
            "the left, as for generation."
        )
    mask = keys.rows(keys.queries - 1)
    scores = row_scores(q[:, :, -1:], k, scale)
    lifted = scores + gain[:, None, None].float() * scores.abs()
    before, after = hide(scores, mask).softmax(-1), hide(lifted, mask).softmax(-1)
    won = ((after - before) * (gain != 0)[:, None, None]).sum(-1)[..., 0]
    return row_output(after, v, q.dtype), won


# -- layers -----------------------------------------------------------------------------------------


def middle_layers(depth: int, *, skip: int = 2, leave: int = 0) -> set[int]:
    """All blocks but the first `skip` and the last `leave` of a decoder with 32 of them.

    Shallower ones leave out their share of the first (at least one), and keep at least one block.
    """
    first = skip if depth >= 32 else max(1, round(skip / 32 * depth)) if skip else 0
    first = min(first, depth - 1)
    return set(range(first, max(first + 1, depth - leave)))


def check_layers(layers: Iterable[int] | None) -> None:
    """Raise unless `layers` are block numbers or None.

    Raises:
        ConfigError: otherwise.
    """
    fits = layers is None or all(isinstance(i, int) for i in layers)
    require(fits, f"layers must be block numbers, got {layers!r}")


def from_end(layers: Iterable[int], depth: int) -> set[int]:
    """Block numbers with the negative ones counted from the end."""
    return {i + depth if i < 0 else i for i in layers}


def refusal(site: Site, layers: set[int], *, image: bool) -> str | None:
    """Why a method for decoders leaves `site` alone, or None; for `Method.accepts`."""
    if "decoder" not in site.tags:
        return "it is not in a causal decoder"
    if image and "multimodal" not in site.tags:
        return "its language model is not part of a model that puts image tokens into the prompt"
    return None if site.index in layers else "its layer is not among `layers`"


def pairs(heads: object, what: str) -> tuple[tuple[int, int], ...]:
    """`heads` as ``((layer, head), ...)``; lists of lists come from files.

    Raises:
        ConfigError: for anything else.
    """
    try:
        found = tuple((layer, head) for layer, head in heads)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        found = ()
    fits = bool(found) and all(type(n) is int for pair in found for n in pair)
    require(fits, f"{what} must be pairs (layer, head), at least one, or None; got {heads!r}")
    return found


def heads_of(heads: tuple[tuple[int, int], ...] | None, site: Site, count: int) -> list[int]:
    """The heads of `heads` at this site; None is all `count`.

    Raises:
        UnsupportedCall: for a head that the site does not have.
    """
    if heads is None:
        return list(range(count))
    found = sorted({h for layer, h in heads if site.index in from_end((layer,), site.depth)})
    if (found and found[-1] >= count) or any(h < 0 for h in found):
        raise UnsupportedCall(f"{site.path} has {count} heads, and heads names {found}.")
    return found
