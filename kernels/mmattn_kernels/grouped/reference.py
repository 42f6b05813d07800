"""Grouped attention as its definition reads, one row at a time; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype


def _probabilities(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    at: tuple[int, int, int],
) -> tuple[Tensor, Tensor] | None:
    """Probabilities ``[K]`` and LSE of one row, None if it sees no key."""
    i, j, row = at
    (b, h, q_len, _), k_len, work = q.shape, k.shape[2], state_dtype(q)
    scores = scale * (k[i, j // (h // k.shape[1])].to(work) @ q[i, j, row].to(work))
    visible = groups[i] >= 0
    if mask is not None:
        line = mask.expand(b, h, q_len, k_len)[i, j, row]
        if line.dtype == torch.bool:
            visible = visible & line
        else:
            scores = scores + line
    if is_causal:
        visible = visible & (torch.arange(k_len, device=q.device) <= row + k_len - q_len)
    scores = torch.where(visible, scores, float("-inf"))
    if bool((scores == float("-inf")).all()):
        return None
    return torch.softmax(scores, 0), torch.logsumexp(scores, 0)


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
    b, h, q_len, _ = q.shape
    work = state_dtype(q)
    lse = torch.full((b, h, q_len), float("-inf"), dtype=work, device=q.device)
    found = torch.zeros(b, h, q_len, num_groups, dtype=work, device=q.device)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (b, h, q_len))).tolist():
        row = _probabilities(q, k, groups, mask, is_causal, scale, tuple(at))
        if row is not None:
            lse[tuple(at)] = row[1]
            for g in range(num_groups):
                found[(*at, g)] = row[0][groups[at[0]] == g].sum()
    return lse, found


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
    b, h, q_len, _ = q.shape
    work = state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (b, h, q_len))).tolist():
        row = _probabilities(q, k, groups, mask, is_causal, scale, tuple(at))
        if row is not None:
            weights = row[0] * coefficients[tuple(at)].to(work)[groups[at[0]].clamp(min=0)]
            out[tuple(at)] = weights @ v[at[0], at[1] // (h // k.shape[1])].to(work)
    return out.to(q.dtype)
