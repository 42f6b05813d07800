"""Attention and column mass in plain torch: one pass over blocks of rows, each looked at while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._row_blocks import (
    Masking,
    Workspace,
    add_to_keys,
    all_scores,
    is_small,
    lift,
    parts,
    weighted,
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, Q, D]``, LSE ``[B, H, Q]``, mass ``[B, H, K]``."""
    masking, work = Masking(mask, is_causal), state_dtype(q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=work, device=q.device)
    mass = torch.zeros(*q.shape[:2], k.shape[2], dtype=work, device=q.device)
    query, key, value = lift(q, k, v)
    room = Workspace(query)
    if is_small(q, k):
        weights, lse = room.softmax(all_scores(query, key, masking, scale))
        if query_weights is None:
            mass = weights.sum(2)
        else:
            mass = (query_weights.to(work)[:, :, None] @ weights)[:, :, 0]
        return weighted(weights, value).to(q.dtype), lse, mass
    for part in parts(q, k, is_causal):
        weights, row_lse = room.softmax(room.scores(query, key, part, masking, scale))
        part.put(lse, row_lse)
        part.put(out, torch.bmm(weights, value[part.columns]))
        seen = mass[part.item, part.heads, : part.keys]
        if query_weights is None:
            seen += part.by_head(weights).sum(1)
        else:
            share = query_weights[part.at].to(work)
            seen += torch.bmm(share[:, None], part.by_head(weights))[:, 0]
    return out, lse, mass


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the query weights (empty without any).

    A probability is worth what its value brings to the output and its share of the key's mass,
    ``dP_ij = dO_i . v_j + w_i dm_j``.
    """
    masking, work = Masking(mask, is_causal), state_dtype(q)
    query, key, value, grad = lift(q, k, v, grad_out)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    rows = q.shape[:3] if query_weights is not None else (0,)
    dw = torch.zeros(rows, dtype=work, device=q.device)
    room = Workspace(query)
    for part in parts(q, k, is_causal):
        scores = room.scores(query, key, part, masking, scale)
        weights = room.weights(scores, part.take(lse))
        own = part.take(grad)
        worth = torch.bmm(own, value[part.columns].transpose(1, 2))
        line = grad_mass[part.item, part.heads, None, : part.keys]
        if query_weights is None:
            part.by_head(worth).add_(line)
        else:
            part.by_head(worth).addcmul_(query_weights[part.at].to(work)[..., None], line)
            dw[part.at] = torch.bmm(part.by_head(weights), line.transpose(1, 2))[..., 0]
        delta = (weights * worth).sum(-1) - part.take(grad_lse)
        slope = worth.sub_(delta[..., None]).mul_(weights).mul_(scale)
        part.put(dq, torch.bmm(slope, key[part.columns]))
        add_to_keys(dk, part, slope, part.take(query))
        add_to_keys(dv, part, weights, own)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dw
