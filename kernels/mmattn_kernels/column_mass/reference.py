"""Attention and column mass as their definition reads, one row at a time; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype


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
    b, h, q_len, _ = q.shape
    k_len, group, work = k.shape[2], h // k.shape[1], state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.full((b, h, q_len), float("-inf"), dtype=work, device=q.device)
    mass = torch.zeros(b, h, k_len, dtype=work, device=q.device)
    if mask is not None:
        mask = mask.expand(b, h, q_len, k_len)
    for i in range(b):
        for j in range(h):
            for row in range(q_len):
                scores = scale * (k[i, j // group].to(work) @ q[i, j, row].to(work))
                if mask is not None:
                    line = mask[i, j, row]
                    if line.dtype == torch.bool:
                        line = torch.where(line, 0.0, float("-inf"))
                    scores = scores + line
                if is_causal:
                    visible = torch.arange(k_len, device=q.device) <= row + k_len - q_len
                    scores = torch.where(visible, scores, float("-inf"))
                if bool((scores == float("-inf")).all()):
                    continue
                weights = torch.softmax(scores, 0)
                out[i, j, row] = weights @ v[i, j // group].to(work)
                lse[i, j, row] = torch.logsumexp(scores, 0)
                if query_weights is not None:
                    weights = weights * query_weights[i, j, row].to(work)
                mass[i, j] += weights
    return out.to(q.dtype), lse, mass
