"""What pruning methods share: budgets, notes taken in the vision tower, and dropping keys in a decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmattn.errors import UnsupportedCall
from mmattn.layout import Tile
from mmattn.methods.base import Dense, require
from mmattn.seams import Opaque
from mmattn.sites import Site

FAMILIES = "LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM, InstructBLIP"
"""Models with a features seam, for messages."""


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


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores; equal ones by position."""
    return torch.argsort(scores, descending=True, stable=True)[:count]


# What `attend` sees in the vision tower is used when the language model starts.


def remember(site: Site, **values: torch.Tensor) -> None:
    """Keep numbers of this attention call for `recall`, one list for all calls of a forward.

    Qwen towers make one call per image or window; all of them are `site.call` 0, 1, ... of one forward.

    Args:
        site: the vision site.
        values: ``[T, N]`` or ``[T, N, E]`` per patch.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedCall(
            "Attention scores cannot be carried out of a compiled tower; compile the language model's "
            "layers instead."
        )
    call, site.call = site.call, 0
    for name, value in values.items():
        kept: list[torch.Tensor] = site.state.setdefault(name, [])
        if call == 0:
            kept.clear()
        kept.append(value)
    site.call = call


def recall(tile: Tile, site: Site, name: str) -> torch.Tensor:
    """What `remember` kept at a vision site, for the tokens of one tile: ``[M]`` or ``[M, E]``.

    Raises:
        UnsupportedCall: when the site recorded nothing.
    """
    values = site.state.get(name)
    if not values:
        raise UnsupportedCall(
            f"{site.path} recorded no attention in this call; run the vision tower with the language "
            "model."
        )
    return tile.gather(values)


# Key dropping inside a decoder.


@dataclass(frozen=True)
class Columns:
    """The tokens of a prompt that are left, row by row.

    Args:
        index: ``[B, K]`` ascending per row.
        pad: ``[B, K]`` True where a row has fewer than K tokens left; such entries come first and point
            at dropped tokens.
        keep: ``[B, N]`` True at tokens that are left.
        whole: whether all are.
    """

    index: torch.Tensor
    pad: torch.Tensor
    keep: torch.Tensor
    whole: bool

    @classmethod
    def of(cls, keep: torch.Tensor) -> Columns:
        """From ``keep [B, N]`` bool."""
        order = torch.argsort(keep.int(), dim=1, stable=True)
        index = order[:, keep.shape[1] - int(keep.sum(1).max()) :]
        return cls(index, ~keep.gather(1, index), keep, bool(keep.all()))

    def first(self, rows: int) -> Columns:
        """The first `rows` rows; those after them were twins, which belong to the prompt's call only."""
        return Columns(self.index[:rows], self.pad[:rows], self.keep[:rows], self.whole)

    @property
    def prompt(self) -> int:
        """Length of the whole prompt."""
        return self.keep.shape[1]


def image_tokens_of(site: Site, method: str) -> torch.Tensor:
    """``[B, N]`` True at the image tokens of the running prompt.

    Raises:
        UnsupportedCall: when the host does not know them.
    """
    image = site.layout.image_mask
    if image is None or site.layout.past is None:
        raise UnsupportedCall(
            f"{method} drops image tokens, but {site.path} cannot tell which tokens are image tokens: "
            "pass input_ids to the vision-language model, not inputs_embeds, and compile the decoder "
            "layers' MLPs only, if anything."
        )
    return image


def last_row(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a prompt's last query, mean over heads, in fp32: ``[B, Q]``.

    One row per head is computed, whatever the length of the prompt.

    Args:
        q: ``[B, H, Q, D]``; k: ``[B, Hk, K, D]``, the prompt's Q keys first.
        mask: ``[B or 1, 1, Q, K]`` bool (True attends) or additive, or None for a last query that sees
            everything.
        keep: ``[B, Q]``, keys that are left; None for all.

    Raises:
        UnsupportedCall: for a prompt that is padded on the right.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, heads, _, _ = q.shape
    last = q[:, :, -1].float().view(rows, k.shape[1], -1, q.shape[-1])
    k = k[:, :, : q.shape[2]]  # a static cache is longer than the prompt
    scores = (last @ k.float().transpose(-1, -2) * scale).view(rows, heads, 1, -1)
    if mask is not None:
        line = mask[:, :, -1:, : k.shape[2]]
        seen = line if line.dtype == torch.bool else line > torch.finfo(line.dtype).min / 2
        if not bool(seen[..., -1].all()):
            raise UnsupportedCall(
                "The prompt is padded on the right, so its last token is not in the last column. Pad on "
                "the left, as for generation."
            )
        scores = scores.masked_fill(~seen, -torch.inf)
        scores = scores if line.dtype == torch.bool else scores + line.masked_fill(~seen, 0)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    return scores.softmax(-1).mean((1, 2))


def best(scores: torch.Tensor, among: torch.Tensor, budgets: list[int]) -> torch.Tensor:
    """Per row, the `budgets` highest scores among some tokens: ``[B, N]`` bool. Ties by position.

    Args:
        scores: ``[B, N]``.
        among: ``[B, N]`` bool.
        budgets: one count per row.
    """
    order = torch.argsort(
        scores.masked_fill(~among, -torch.inf), dim=1, descending=True, stable=True
    )
    rank = torch.argsort(order, dim=1)
    return among & (rank < rank.new_tensor(budgets)[:, None])


def chosen(columns: Columns | None, site: Site, rows: int, method: str, layer: int) -> Columns:
    """What was left of the running prompt, in its own call or in one that continues it.

    Args:
        columns: what the method remembers.
        site: where.
        rows: of this call.
        method: its name, for messages.
        layer: the block that was to choose.

    Raises:
        UnsupportedCall: when nothing was, or the call does not belong to that prompt.
    """
    past, image = site.layout.past, image_tokens_of(site, method)
    if columns is None:
        raise UnsupportedCall(
            f"{method} chooses at block {layer + 1} of a prompt that is fed while attached, and nothing "
            f"was chosen before {site.path} ran. Leave that block among the sites, and feed the whole "
            "prompt after attaching."
        )
    if past == 0:
        return columns
    if rows > columns.index.shape[0] or image.shape != (rows, columns.prompt):
        raise UnsupportedCall(
            f"{method} chose among {columns.prompt} tokens of {columns.index.shape[0]} rows, and "
            f"this call continues a prompt of {image.shape[1]} tokens with {rows} rows. Feed the prompt "
            "at once, without prefill_chunk_size, and generate one prompt after the other."
        )
    return columns if rows == columns.index.shape[0] else columns.first(rows)


def readable(mask: object, method: str) -> None:
    """Raise for a mask that only the host can read.

    Raises:
        UnsupportedCall: for flash's 2-D masks and the like.
    """
    if isinstance(mask, Opaque):
        raise UnsupportedCall(
            f"{method} has to read the mask, and this is {mask.what}; use eager or sdpa attention."
        )


def attend_left(
    columns: Columns,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    site: Site,
    dense: Dense,
) -> torch.Tensor:
    """Attention among the tokens that are left, and those that came after the prompt.

    In the prompt's own call the dropped tokens do not ask either, so the attention shrinks to K x K and a
    causal call stays a causal call. Their rows of the output are zeros, which nothing reads: as keys they
    are dropped from here on.

    Args:
        columns: of the prompt.
        q: ``[B, H, Q, D]``; k, v: ``[B, Hk, N + later, D]``.
        mask: as the host made it, for all keys.
        site: where.
        dense: the attention.

    Raises:
        UnsupportedCall: for a cache that has forgotten a part of the prompt (sliding windows).
    """
    if columns.whole:
        site.note("density", 1.0)
        return dense(q, k, v)
    if k.shape[2] < columns.prompt:
        raise UnsupportedCall(
            f"The cache of {site.path} holds {k.shape[2]} keys of a prompt of {columns.prompt} tokens (a "
            "sliding window?), so the dropped ones cannot be told from the rest."
        )
    index, pad = columns.index, columns.pad
    later = torch.arange(columns.prompt, k.shape[2], device=q.device).expand(len(index), -1)
    keys = torch.cat([index, later], 1)
    hidden = torch.cat([pad, torch.zeros_like(later, dtype=torch.bool)], 1)
    prompt = site.layout.past == 0
    site.note(
        "density", keys.shape[1] / k.shape[2] * (index.shape[1] / q.shape[2] if prompt else 1)
    )
    if mask is not None:
        mask = mask[..., : k.shape[2]].expand(len(index), -1, -1, -1)
        if prompt and mask.shape[2] > 1:
            rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, rows)
        mask = mask.gather(3, keys[:, None, None].expand(-1, *mask.shape[1:3], -1))
        gone = hidden[:, None, None]
        if mask.dtype == torch.bool:
            mask = mask & ~gone
        else:
            mask = mask.masked_fill(gone, torch.finfo(mask.dtype).min)
    elif bool(pad.any()):
        mask = ~hidden[:, None, None]
        if site.causal:
            size = keys.shape[1]
            asked = index.shape[1] if prompt else q.shape[2]
            mask = mask & mask.new_ones(asked, size).tril(size - asked)
    k, v = (
        x.gather(2, keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)
    )
    if not prompt:
        return dense(q, k, v, mask=mask)
    rows = index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    out = dense(q.gather(2, rows), k, v, mask=mask).masked_fill(pad[:, None, :, None], 0)
    whole = out.new_zeros(*q.shape[:3], out.shape[3])
    return whole.scatter(2, rows[..., : out.shape[3]], out)
