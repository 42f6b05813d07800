"""Block-sparse attention as its definition reads, one row at a time; the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype


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
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``, in fp32 (fp64 for fp64 inputs)."""
    b, h, q_len, _ = q.shape
    group, k_len = h // k.shape[1], k.shape[2]
    work = state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.full((b, h, q_len), float("-inf"), dtype=work, device=q.device)
    for i in range(b):
        for j in range(h):
            for row in range(q_len):
                block = row // q_block
                at = (min(i, counts.shape[0] - 1), min(j, counts.shape[1] - 1), block)
                keys: list[int] = []
                for place in range(int(counts[at])):
                    column = int(indices[(*at, place)])
                    which = -1
                    if pattern_of is not None:
                        lead = (min(i, pattern_of.shape[0] - 1), min(j, pattern_of.shape[1] - 1))
                        which = int(pattern_of[(*lead, block, column)])
                    for offset in range(k_block):
                        key = column * k_block + offset
                        kept = which < 0 or (
                            patterns is not None and bool(patterns[which, row % q_block, offset])
                        )
                        if key < k_len and kept:
                            keys.append(key)
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
    *lists: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by automatic differentiation of `forward`."""
    work = state_dtype(q)
    with torch.enable_grad():
        leaves = [x.detach().to(work).requires_grad_() for x in (q, k, v)]
        again, again_lse = forward(*leaves, *lists)  # type: ignore[arg-type]
        finite = torch.isfinite(again_lse)
        total = (again * grad_out.to(work)).sum() + (
            again_lse[finite] * grad_lse.to(work)[finite]
        ).sum()
        if not total.requires_grad:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [
        torch.zeros_like(x) if g is None else g.to(x.dtype)
        for g, x in zip(grads, (q, k, v), strict=True)
    ]
    return found[0], found[1], found[2]
