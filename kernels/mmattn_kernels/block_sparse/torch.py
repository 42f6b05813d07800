"""Block-sparse attention in plain torch: the listed blocks are gathered, then attended densely.

Blocks of queries with equally long lists run as one batch, sized to stay in the cache: a batch that
spills to memory is slower than dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._scratch import Scratch

_CACHE_BYTES = 1 << 22
"""Gathered keys of one batch: large enough to keep two cores busy, small enough for the last cache."""


@dataclass(frozen=True)
class Batch:
    """P (head, query block) pairs with equally long lists.

    Shapes:
        ``head [P]`` counts batch and query heads together, ``block [P]``; all blocks have `rows` rows.
        ``columns [P, n]`` are the listed key blocks, of which the first `tokens` tokens are real.
        ``mask [P, rows, tokens]`` bool, or None.
    """

    head: Tensor
    block: Tensor
    rows: int
    columns: Tensor
    tokens: int
    mask: Tensor | None


def batches(
    heads: tuple[int, int],
    q_len: int,
    k_len: int,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    token_bytes: int,
) -> Iterator[Batch]:
    """Cut the lists of all ``heads = (B, H)`` into batches; blocks with empty lists are in none."""
    b, h = heads
    nq, nk = -(-q_len // q_block), -(-k_len // k_block)
    counts = counts.expand(b, h, nq).reshape(-1)
    most = indices.shape[-1]
    indices = indices.expand(b, h, nq, most).reshape(-1, most)
    last_key = indices.gather(1, (counts[:, None] - 1).clamp(min=0).long())[:, 0]
    short_k = nk * k_block - k_len
    short_q = nq * q_block - q_len
    # Lists are in rising order, so a short last block is always at the end of its list.
    cut = (
        ((last_key == nk - 1) & (counts > 0))
        if short_k
        else torch.zeros_like(counts, dtype=torch.bool)
    )
    at = torch.arange(b * h * nq, device=counts.device)
    short = ((at % nq) == nq - 1) if short_q else torch.zeros_like(cut)
    if pattern_of is not None:
        pattern_of = pattern_of.expand(b, h, nq, nk).reshape(-1, nk)
        which = pattern_of.gather(1, indices.long())
        listed = torch.arange(most, device=counts.device) < counts[:, None]
        patterned = ((which >= 0) & listed).any(1)
    else:
        patterned = torch.zeros_like(cut)
    key = ((counts * 2 + cut) * 2 + short) * 2 + patterned
    order = torch.argsort(key, stable=True)
    values, sizes = torch.unique_consecutive(key[order], return_counts=True)
    start = 0
    for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
        members, start = order[start : start + size], start + size
        count, has_cut, is_short, has_pattern = (
            value >> 3,
            value >> 2 & 1,
            value >> 1 & 1,
            value & 1,
        )
        if count == 0:
            continue
        tokens = count * k_block - (short_k if has_cut else 0)
        rows = q_block - short_q if is_short else q_block
        step = max(1, _CACHE_BYTES // (count * k_block * token_bytes))
        for chunk in members.split(step):
            columns = indices[chunk, :count].long()
            mask = None
            if has_pattern and patterns is not None and pattern_of is not None:
                which = pattern_of[chunk].gather(1, columns)
                inside = patterns[which.clamp(min=0).long()] | (which < 0)[..., None, None]
                mask = inside.transpose(1, 2).flatten(2)[:, :rows, :tokens]
            yield Batch(chunk // nq, chunk % nq, rows, columns, tokens, mask)


def blocked(x: Tensor, block: int) -> Tensor:
    """``[B, H, N, D]`` as blocks ``[B * H * n, block, D]``, the last one padded with zeros."""
    n, d = x.shape[2:]
    if n % block:
        x = F.pad(x, (0, 0, 0, -n % block))
    return x.reshape(-1, block, d)


def dense_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention ``[P, rows, D]`` over ``[P, n, D]`` with LSE ``[P, rows]``.

    Rows whose mask is empty give 0 and -inf.
    """
    if q.device.type == "cpu" and mask is None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], 0.0, False, scale=scale
        )
        return out[:, 0], lse[:, 0]
    work = state_dtype(q)
    scores = torch.bmm(q.to(work) * scale, k.to(work).transpose(1, 2))
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    peak.masked_fill_(peak == float("-inf"), 0.0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, v.to(work)) / total.clamp(min=torch.finfo(work).tiny)
    return out.to(q.dtype), (peak + total.log())[..., 0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``."""
    b, h, q_len, d = q.shape
    nq, nk = -(-q_len // q_block), -(-k.shape[2] // k_block)
    group = h // k.shape[1]
    queries, keys, values = blocked(q, q_block), blocked(k, k_block), blocked(v, k_block)
    out = torch.zeros_like(queries)
    lse = torch.full(queries.shape[:2], float("-inf"), dtype=state_dtype(q), device=q.device)
    token_bytes = d * q.element_size()
    room_k, room_v = Scratch(keys), Scratch(values)
    for part in batches(
        (b, h),
        q_len,
        k.shape[2],
        counts,
        indices,
        patterns,
        pattern_of,
        q_block,
        k_block,
        token_bytes,
    ):
        rows = part.head * nq + part.block
        columns = ((part.head // group)[:, None] * nk + part.columns).flatten()
        p = len(rows)
        some_keys, some_values = (
            torch.index_select(x, 0, columns, out=room.take(len(columns), k_block, d)).view(
                p, -1, d
            )[:, : part.tokens]
            for x, room in ((keys, room_k), (values, room_v))
        )
        some_queries = queries.index_select(0, rows)[:, : part.rows]
        got, got_lse = dense_with_lse(some_queries, some_keys, some_values, part.mask, scale)
        out[:, : part.rows].index_copy_(0, rows, got)
        lse[:, : part.rows].index_copy_(0, rows, got_lse.to(lse.dtype))
    out = out.view(b, h, nq * q_block, d)[:, :, :q_len].contiguous()
    return out, lse.view(b, h, nq * q_block)[:, :, :q_len].contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; probabilities are computed again from the LSE, in fp32, one batch at a time."""
    b, h, q_len, d = q.shape
    k_len, work = k.shape[2], state_dtype(q)
    nq, nk = -(-q_len // q_block), -(-k_len // k_block)
    group = h // k.shape[1]
    # dS = P (dP - delta), and an LSE hands its gradient to the scores as P.
    delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse.to(work)
    queries, keys, values = (
        blocked(x.to(work), n) for x, n in ((q, q_block), (k, k_block), (v, k_block))
    )
    grads = blocked(grad_out.to(work), q_block)
    deltas = blocked(delta[..., None], q_block)
    # Rows without keys have LSE -inf; +inf makes their probabilities 0 instead of NaN.
    lse = torch.where(lse == float("-inf"), float("inf"), lse).to(work)
    lses = blocked(lse[..., None], q_block)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    token_bytes = 3 * d * dq.element_size()
    for part in batches(
        (b, h), q_len, k_len, counts, indices, patterns, pattern_of, q_block, k_block, token_bytes
    ):
        rows = part.head * nq + part.block
        columns = ((part.head // group)[:, None] * nk + part.columns).flatten()
        p, n = len(rows), part.tokens
        some_keys = keys.index_select(0, columns).view(p, -1, d)
        some_values = values.index_select(0, columns).view(p, -1, d)
        some_queries, some_grads = queries[rows, : part.rows], grads[rows, : part.rows]
        scores = torch.bmm(some_queries, some_keys.transpose(1, 2)).mul_(scale)
        weights = scores.sub_(lses[rows, : part.rows]).exp_()
        weights[..., n:] = 0.0
        if part.mask is not None:
            weights[..., :n].masked_fill_(~part.mask, 0.0)
        dv.index_add_(
            0, columns, torch.bmm(weights.transpose(1, 2), some_grads).view(-1, k_block, d)
        )
        slope = torch.bmm(some_grads, some_values.transpose(1, 2))
        slope = slope.sub_(deltas[rows, : part.rows]).mul_(weights).mul_(scale)
        dq[rows, : part.rows] = torch.bmm(slope, some_keys)
        dk.index_add_(
            0, columns, torch.bmm(slope.transpose(1, 2), some_queries).view(-1, k_block, d)
        )

    def joined(x: Tensor, like: Tensor) -> Tensor:
        heads, length = like.shape[1], like.shape[2]
        return x.view(b, heads, -1, d)[:, :, :length].to(like.dtype).contiguous()

    return joined(dq, q), joined(dk, k), joined(dv, v)
