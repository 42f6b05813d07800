"""Routed attention as its definition reads, one row at a time; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, chunk_ids: Tensor, selected: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``, in fp32 (fp64 for fp64 inputs)."""
    b, h, q_len, _ = q.shape
    group, work = h // k.shape[1], state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.full((b, h, q_len), float("-inf"), dtype=work, device=q.device)
    chunks = chunk_ids.tolist()
    for i in range(b):
        for j in range(h):
            for row in range(q_len):
                chosen = selected[i, j, row].tolist()
                keys = [n for n, chunk in enumerate(chunks) if chunk < 0 or chosen[chunk]]
                if not keys:
                    continue
                scores = scale * (k[i, j // group, keys].to(work) @ q[i, j, row].to(work))
                lse[i, j, row] = torch.logsumexp(scores, 0)
                out[i, j, row] = torch.softmax(scores, 0) @ v[i, j // group, keys].to(work)
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk_ids: Tensor,
    selected: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by automatic differentiation of `forward`."""
    work = state_dtype(q)
    with torch.enable_grad():
        leaves = [x.detach().to(work).requires_grad_() for x in (q, k, v)]
        again, again_lse = forward(leaves[0], leaves[1], leaves[2], chunk_ids, selected, scale)
        finite = torch.isfinite(again_lse)
        total = (again * grad_out.to(work)).sum() + (
            again_lse[finite] * grad_lse.to(work)[finite]
        ).sum()
        if not total.requires_grad:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads = torch.autograd.grad(total, leaves)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv
