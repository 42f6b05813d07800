"""Attention and column mass in plain torch: one pass over blocks of rows, each looked at while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._row_blocks import Masking, add_to_keys, lift, parts, scores_of, softmax


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=work, device=q.device)
    mass = torch.zeros(*q.shape[:2], k.shape[2], dtype=work, device=q.device)
    query, key, value = lift(q, k, v)
    for part in parts(q, k):
        weights, lse[part.at] = softmax(scores_of(query, key, part, masking, scale))
        out[part.at] = torch.matmul(weights, value[part.item, part.kv_heads]).to(q.dtype)
        seen = mass[part.item, part.heads]
        if query_weights is None:
            seen += weights.sum(1)
        else:
            share = query_weights[part.at].to(work)
            seen += torch.matmul(share[:, None], weights)[:, 0]
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
    finite = torch.where(lse == float("-inf"), float("inf"), lse)
    for part in parts(q, k):
        weights = scores_of(query, key, part, masking, scale)
        weights = weights.sub_(finite[part.at][..., None]).exp_()
        keys, values = key[part.item, part.kv_heads], value[part.item, part.kv_heads]
        worth = torch.matmul(grad[part.at], values.transpose(1, 2))
        line = grad_mass[part.item, part.heads][:, None]
        if query_weights is None:
            worth += line
        else:
            worth += query_weights[part.at].to(work)[..., None] * line
            dw[part.at] = (weights * line).sum(-1)
        delta = (weights * worth).sum(-1) - grad_lse[part.at]
        slope = worth.sub_(delta[..., None]).mul_(weights).mul_(scale)
        dq[part.at] = torch.matmul(slope, keys)
        add_to_keys(dk, part, torch.matmul(slope.transpose(1, 2), query[part.at]))
        add_to_keys(dv, part, torch.matmul(weights.transpose(1, 2), grad[part.at]))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dw
