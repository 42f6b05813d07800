"""The frame that sparse methods for images and videos share: sparse among image tokens, dense around.

Text keys are visible to every image query, text queries attend densely, and text that the call masks
as padding is taken out before the sparse part runs. What is left to a method is attention among the
image tokens of a grid, as one function of `Part`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmattn.errors import UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods._calls import around, image_tokens, key_mask, mask_rows
from mmattn.methods._recall import note_recall
from mmattn.methods.base import Dense
from mmattn.sites import Site


class Part(NamedTuple):
    """Some rows of the batch, ready for sparse attention: text keys first, padding taken out.

    Shapes:
        ``q [b, H, S, D]`` image queries in row-major order of `grid`; ``k, v [b, H, text + S, D]``:
        `text` keys that everybody sees, then the image keys in the same order as the queries.
        `mask`, broadcastable to ``[b, H, S, text + S]``, is None unless the method `takes_masks` and the
        mask does more than hide text, or cannot be read because a graph is being traced.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    text: int
    grid: Grid
    scale: float | None
    want_lse: bool
    rows: slice
    site: Site
    mask: Tensor | None = None

    @property
    def image_keys(self) -> Tensor:
        """Keys of the image tokens alone, ``[b, H, S, D]``."""
        return self.k[:, :, self.text :]


class Sparse(NamedTuple):
    """What a method returns for a `Part`.

    Args:
        out: ``[b, H, S, D]``.
        density: share of the ``S * S`` pairs among image tokens that was kept.
        lse: natural log-sum-exp of every query's kept scores, text included, ``[b, H, S]`` in fp32; may
            be None unless `Part.want_lse`.
    """

    out: Tensor
    density: Tensor | float
    lse: Tensor | None = None


def image_attention(
    attend: Callable[[Part], Sparse],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float | None,
    site: Site,
    dense: Dense,
    takes_masks: bool = False,
) -> Tensor:
    """Run `attend` on the image tokens of a call and note its density; ``[B, H, Q, D]``.

    Rows of the batch with different text padding are run one after the other, so a row's result never
    depends on the others.

    Raises:
        UnsupportedCall: no grid; queries that are not the keys' tokens; a mask that hides image tokens,
            weighs keys, differs between image queries, or cannot be read because a graph is traced.
    """
    grid, image, image_keys = image_tokens(site, q.shape[2], k.shape[2])
    given, kept = mask_rows(mask, image), None
    try:
        groups = _groups(given, image_keys, k.shape[2], q.shape[0], q.device)
    except UnsupportedCall:
        if not takes_masks:
            raise
        assert given is not None
        kept = _text_first(given.transpose(2, 3), image_keys, None).transpose(2, 3)
        groups = _groups(None, image_keys, k.shape[2], q.shape[0], q.device)
    parts, probing = [], site.probing
    pairs, inside = q.shape[2] * k.shape[2], (image.stop - image.start) ** 2
    for rows, text in groups:
        part = Part(
            q[rows, :, image],
            _text_first(k[rows], image_keys, text),
            _text_first(v[rows], image_keys, text),
            k.shape[2] - (image_keys.stop - image_keys.start) if text is None else text.shape[0],
            grid,
            scale,
            probing,
            rows,
            site,
            kept,
        )
        found = attend(part)
        parts.append(found.out)
        site.note("density", (found.density * inside + pairs - inside) / pairs)
        if probing:
            assert found.lse is not None
            note_recall(site, found.lse, part.q, part.k, part.v, mask=kept, scale=scale)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return around(out, q, k, v, image, mask, dense)


def _text_first(x: Tensor, image: slice, text: Tensor | None) -> Tensor:
    """Keys or values ``[b, H, K, D]`` with the text in front; `text` are the positions to keep."""
    if text is not None:
        return torch.cat([x.index_select(2, text), x[:, :, image]], dim=2)
    if image.stop == x.shape[2]:
        return x
    return torch.cat([x[:, :, : image.start], x[:, :, image.stop :], x[:, :, image]], dim=2)


def _groups(
    mask: Tensor | None, image: slice, keys: int, batch: int, device: torch.device
) -> list[tuple[slice, Tensor | None]]:
    """Rows of the batch that see the same text, and the positions of that text (None: all of it)."""
    whole: list[tuple[slice, Tensor | None]] = [(slice(0, batch), None)]
    if mask is None:
        return whole
    if torch.compiler.is_compiling():
        raise UnsupportedCall(
            "The attention mask cannot be read while a graph is traced, and sparse attention takes "
            "masked text out beforehand."
        )
    seen = _visible(key_mask(mask), keys)
    if bool(seen.all()):
        return whole
    if not bool(seen[:, image].all()):
        raise UnsupportedCall(
            "The attention mask hides image tokens; only text can be masked here."
        )
    outside = torch.cat(
        [torch.arange(image.start, device=device), torch.arange(image.stop, keys, device=device)]
    )
    if seen.shape[0] == 1 or bool((seen == seen[:1]).all()):
        return [(slice(0, batch), outside[seen[0, outside]])]
    return [(slice(i, i + 1), outside[seen[i, outside]]) for i in range(batch)]


def _visible(mask: Tensor | None, keys: int) -> Tensor:
    """A mask of whole keys ``[B or 1, H or 1, 1, K]`` as bool ``[B or 1, K]``."""
    assert mask is not None
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        raise UnsupportedCall("The attention mask differs from head to head.")
    mask = mask[:, 0, 0]
    if mask.shape[-1] != keys:
        raise UnsupportedCall(f"The attention mask covers {mask.shape[-1]} of {keys} keys.")
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise UnsupportedCall("The attention mask weighs keys; only hiding them can be honoured.")
    return ~hidden
