"""Attention over chosen chunks: masked blocks of queries, or queries gathered per chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

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
    if gather and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
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
    """For each chunk and head, only the queries that chose it; softmax parts merged on the way (fp32)."""
    b, h, s, d = q.shape
    scale = d**-0.5 if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(work).reshape(b * h, s, d)
    keys, values = k.to(work).flatten(0, 1) * scale, v.to(work).flatten(0, 1)
    order = ids.argsort(stable=True)
    total = k.shape[2]
    text = [*range(image.start), *range(image.stop, total)]
    groups = list(
        (order + image.start).split(torch.bincount(ids, minlength=chosen.shape[3]).tolist())
    )
    out = torch.empty(b * h, s, v.shape[-1], dtype=work)
    for head in range(b * h):
        state = _Merge(s, v.shape[-1], work)
        if text:
            state.add(slice(0, s), rows[head], keys[head, text], values[head, text])
        for number, group in enumerate(groups):
            takers = chosen[head // h, head % h, :, number].nonzero()[:, 0]
            if len(takers):
                state.add(takers, rows[head, takers], keys[head, group], values[head, group])
        out[head] = state.result()
    return out.view(b, h, s, -1).to(q.dtype)


class _Merge:
    """Running softmax over groups of keys, for ``[S, D]`` outputs of one head."""

    def __init__(self, s: int, d: int, dtype: torch.dtype) -> None:
        self.out = torch.zeros(s, d, dtype=dtype)
        self.mass = torch.zeros(s, 1, dtype=dtype)
        self.peak = torch.full((s, 1), float("-inf"), dtype=dtype)

    def add(
        self, at: torch.Tensor | slice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Let the queries at `at` see one more group of (already scaled) keys."""
        scores = q @ k.T
        before = self.peak[at]
        peak = torch.maximum(scores.amax(-1, keepdim=True), before)
        weights, fade = (scores - peak).exp_(), (before - peak).exp()
        self.out[at] = self.out[at] * fade + weights @ v
        self.mass[at] = self.mass[at] * fade + weights.sum(-1, keepdim=True)
        self.peak[at] = peak

    def result(self) -> torch.Tensor:
        """Normalised outputs."""
        return self.out / self.mass
