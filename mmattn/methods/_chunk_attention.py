"""Attention over chosen chunks: routed, or for short sequences on a CPU with a token mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import attention_with_column_mass, routed_attention
from torch import Tensor

from mmattn.methods._calls import mask_rows, masked_like
from mmattn.methods._image_attention import Part

_MASK_ENTRIES = 1 << 24
"""Largest token mask built at once (entries over batch, heads, queries and keys)."""

_GATHER_FROM = 2048
"""Image tokens from which gathering pays on a CPU; below, its many small products cost more than a mask."""


def attend_chunks(part: Part, chosen: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Image queries over the chunks they chose and over all text; output and LSE.

    Args:
        chosen: bool ``[b, H, S, C]``.
        ids: chunk of every image token, ``[S]``.
    """
    short = part.q.device.type == "cpu" and part.q.shape[2] < _GATHER_FROM
    if short or part.mask is not None:
        return masked(part, chosen, ids)
    keys = F.pad(ids, (part.text, 0), value=-1)
    found = routed_attention(
        part.q, part.k, part.v, keys, chosen, scale=part.scale, return_lse=True
    )
    assert isinstance(found, tuple)
    return found


def masked(part: Part, chosen: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """SDPA with the choice spelled out as a token mask, for a bounded block of queries at a time."""
    b, h, s, _ = part.q.shape
    step = max(1, _MASK_ENTRIES // (b * h * part.k.shape[2]))
    outs, lses = [], []
    for start in range(0, s, step):
        rows = slice(start, min(start + step, s))
        allowed = chosen[:, :, rows].index_select(3, ids)
        allowed = F.pad(allowed, (part.text, 0), value=True)
        mask = masked_like(allowed, mask_rows(part.mask, rows), part.q.dtype)
        call = (part.q[:, :, rows], part.k, part.v)
        if part.want_lse:
            out, lse, _ = attention_with_column_mass(*call, mask=mask, scale=part.scale)
            lses.append(lse)
        else:
            out = F.scaled_dot_product_attention(*call, attn_mask=mask, scale=part.scale)
        outs.append(out)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if lses else None
