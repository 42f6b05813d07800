"""What the kernel tests compare with: dense attention in fp64, and error budgets taken from SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_qkv(
    b: int,
    h: int,
    q_len: int,
    k_len: int,
    d: int,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q ``[B, H, Q, D]`` and k, v ``[B, Hkv, K, D]``."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((b, h, q_len, d), *((b, kv_heads or h, k_len, d),) * 2)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    q, k, v = (x.to(dtype).requires_grad_(grad) for x in (q, k, v))
    return q, k, v


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and probabilities of dense attention in fp64; empty rows give 0 and -inf.

    `mask` is bool (True: kept) or added to the scores; grouped-query heads are repeated.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        q.double(),
        k.double().repeat_interleave(group, 1),
        v.double().repeat_interleave(group, 1),
    )
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty[..., 0], float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return weights @ v, lse, weights


def sdpa_error(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> float:
    """Largest error of torch SDPA in the dtype of `q` against fp64; the measure for ours."""
    group = q.shape[1] // k.shape[1]
    got = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask
    )
    want = dense(q, k, v, mask)[0]
    kept = torch.isfinite(got)
    return float((got.double() - want).abs()[kept].max().detach())


def loss_of(*outputs: Tensor, seed: int = 3) -> Tensor:
    """A random weighting of outputs, so that every entry's gradient matters; -inf entries do not."""
    draw = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        weight = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
        finite = torch.isfinite(x)
        total = total + (torch.where(finite, x, torch.zeros_like(x)) * weight).sum().double()
    return total


def gradients(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of `total`; zeros where an input does not matter."""
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
