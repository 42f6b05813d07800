"""Grouped attention in plain torch, over blocks of rows that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._row_blocks import Masking, Part, add_to_keys, lift, parts, scores_of, softmax


def _masking(mask: Tensor | None, is_causal: bool, groups: Tensor) -> Masking:
    """The masks of a call; groups hide keys only where one is -1, and looking at scores takes time."""
    return Masking(mask, is_causal, groups if bool((groups < 0).any()) else None)


def _members(groups: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Which group a key is in, as numbers 0 and 1: ``[B, G, K]``."""
    return (groups[:, None] == torch.arange(count, device=groups.device)[:, None]).to(dtype)


def masses(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    num_groups: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """LSE ``[B, H, Q]`` and probability per group ``[B, H, Q, G]``."""
    masking, work = _masking(mask, is_causal, groups), state_dtype(q)
    members = _members(groups, num_groups, work)
    lse = torch.empty(q.shape[:3], dtype=work, device=q.device)
    found = torch.empty(*q.shape[:3], num_groups, dtype=work, device=q.device)
    query, key = lift(q, k)
    for part in parts(q, k):
        weights, lse[part.at] = softmax(scores_of(query, key, part, masking, scale))
        found[part.at] = torch.matmul(weights, members[part.item].T)
    return lse, found


def masses_backward(
    grad_lse: Tensor,
    grad_masses: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    masking, work = _masking(mask, is_causal, groups), state_dtype(q)
    members = _members(groups, grad_masses.shape[3], work)
    query, key = lift(q, k)
    dq, dk = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k))
    finite = torch.where(lse == float("-inf"), float("inf"), lse)
    for part in parts(q, k):
        weights = _weights(query, key, part, masking, scale, finite)
        worth = torch.matmul(grad_masses[part.at].to(work), members[part.item])
        delta = (weights * worth).sum(-1) - grad_lse[part.at]
        slope = worth.sub_(delta[..., None]).mul_(weights).mul_(scale)
        dq[part.at] = torch.matmul(slope, key[part.item, part.kv_heads])
        add_to_keys(dk, part, torch.matmul(slope.transpose(1, 2), query[part.at]))
    return dq.to(q.dtype), dk.to(k.dtype)


def _weights(
    query: Tensor, key: Tensor, part: Part, masking: Masking, scale: float, lse: Tensor
) -> Tensor:
    """Probabilities again, from an LSE that is +inf for rows without keys."""
    return scores_of(query, key, part, masking, scale).sub_(lse[part.at][..., None]).exp_()


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """``sum_j c_ig(j) P_ij v_j``, ``[B, H, Q, D]``."""
    masking, work = _masking(mask, is_causal, groups), state_dtype(q)
    members = _members(groups, coefficients.shape[3], work)
    query, key, value = lift(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    empty = (lse == float("-inf"))[..., None]
    for part in parts(q, k):
        # The LSE is what normalises these rows; torch's softmax finds it again in less time than it
        # takes to subtract it and exponentiate.
        weights = torch.softmax(scores_of(query, key, part, masking, scale), -1)
        weights *= torch.matmul(coefficients[part.at].to(work), members[part.item])
        out[part.at] = torch.matmul(weights, value[part.item, part.kv_heads]).to(q.dtype)
    return out.masked_fill_(empty, 0.0)


def apply_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the coefficients and of the LSE, which count as inputs of their own."""
    masking, work = _masking(mask, is_causal, groups), state_dtype(q)
    members = _members(groups, coefficients.shape[3], work)
    query, key, value, grad = lift(q, k, v, grad_out)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    dc = torch.empty(coefficients.shape, dtype=work, device=q.device)
    dl = torch.empty(lse.shape, dtype=lse.dtype, device=q.device)
    finite = torch.where(lse == float("-inf"), float("inf"), lse)
    for part in parts(q, k):
        weights = _weights(query, key, part, masking, scale, finite)
        keys, values = key[part.item, part.kv_heads], value[part.item, part.kv_heads]
        slope = torch.matmul(grad[part.at], values.transpose(1, 2)).mul_(weights)
        dc[part.at] = torch.matmul(slope, members[part.item].T)
        factors = torch.matmul(coefficients[part.at].to(work), members[part.item])
        slope *= factors
        dl[part.at] = -slope.sum(-1)
        slope *= scale
        dq[part.at] = torch.matmul(slope, keys)
        add_to_keys(dk, part, torch.matmul(slope.transpose(1, 2), query[part.at]))
        add_to_keys(dv, part, torch.matmul((weights * factors).transpose(1, 2), grad[part.at]))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dc.to(coefficients.dtype), dl
