"""Attention over chosen chunks: masked blocks of queries, or queries gathered per chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import routed_attention

from mmattn.methods._calls import mask_rows, masked_like

_MASK_ENTRIES = 1 << 24
"""Largest token mask built at once (entries over batch, heads, queries and keys)."""

_GATHER_FROM = 2048
"""Image tokens from which gathering pays on a CPU; below, its many small products cost more than a mask."""


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    image: slice,
    given: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Image queries ``[B, H, S, D]`` over the chunks they chose and over all keys outside `image`.

    Args:
        k, v: ``[B, H, K, D]``, image tokens at `image`.
        chosen: bool ``[B, H, S, C]``.
        ids: chunk of every image token, ``[S]``.
        given: mask of the call for these queries, ``[B or 1, H or 1, S or 1, K]``, or None.
    """
    # Gathering needs shapes that depend on the data, and small matrix products: right for a CPU only.
    gather = q.device.type == "cpu" and given is None and not torch.compiler.is_compiling()
    gather = gather and q.shape[2] >= _GATHER_FROM
    if gather:
        return routed(q, k, v, chosen, ids, image, scale)
    return masked(q, k, v, chosen, ids, image, given, scale)


def masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    image: slice,
    given: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """SDPA with the choice spelled out as a token mask, for a bounded block of queries at a time."""
    b, h, s, _ = q.shape
    total = k.shape[2]
    step = max(1, _MASK_ENTRIES // (b * h * total))
    parts = []
    for start in range(0, s, step):
        block = slice(start, min(start + step, s))
        allowed = chosen[:, :, block].index_select(3, ids)
        allowed = F.pad(allowed, (image.start, total - image.stop), value=True)
        mask = masked_like(allowed, mask_rows(given, block), q.dtype)
        parts.append(
            F.scaled_dot_product_attention(q[:, :, block], k, v, attn_mask=mask, scale=scale)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def routed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    image: slice,
    scale: float | None,
) -> torch.Tensor:
    """`mmattn_kernels.routed_attention`, with keys outside `image` visible to all."""
    everyone = torch.full((k.shape[2],), -1, dtype=ids.dtype, device=ids.device)
    everyone[image] = ids
    out = routed_attention(q, k, v, everyone, chosen, scale=scale)
    assert isinstance(out, torch.Tensor)
    return out
