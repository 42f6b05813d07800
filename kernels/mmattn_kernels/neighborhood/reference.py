"""Neighborhood attention as its definition reads, one pair at a time; the oracle of the tests.

Shares no code with `windows`, so that a mistake there is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype


def sees(
    query: int, key: int, length: int, window: int, stride: int, dilation: int, causal: bool
) -> bool:
    """Whether a query sees a key on one axis, from their coordinates."""
    residue = query % dilation
    if key % dilation != residue:
        return False
    query, key = query // dilation, key // dilation
    length = ceil((length - residue) / dilation)
    group = query // stride
    if causal:
        leader = min(group * stride + stride - 1, length - 1)
        return max(leader - window + 1, 0) <= key <= query
    leader = min(group * stride + stride // 2, length - 1)
    first = leader - window // 2
    if first < 0:
        first = 0
    if first > length - window:
        first = length - window
    return first <= key <= first + window - 1


def coordinates(token: int, grid: Sequence[int]) -> list[int]:
    """Where a token lies in a row-major grid."""
    found = []
    for length in reversed(grid):
        found.append(token % length)
        token //= length
    return found[::-1]


def keys_of(
    row: int,
    q_len: int,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    extra_keys: int,
) -> list[int]:
    """The keys that row `row` of the queries sees."""
    tokens = prod(grid)
    token = row - (q_len - tokens)
    if token < 0:
        return list(range(extra_keys + tokens))
    here = coordinates(token, grid)
    found = list(range(extra_keys))
    for other in range(tokens):
        there = coordinates(other, grid)
        settings = zip(here, there, grid, window, stride, dilation, is_causal, strict=True)
        if all(sees(*axis) for axis in settings):
            found.append(extra_keys + other)
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    extra_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``, in fp32 (fp64 for fp64 inputs)."""
    b, h, q_len, _ = q.shape
    group, work = h // k.shape[1], state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.zeros((b, h, q_len), dtype=work, device=q.device)
    for row in range(q_len):
        keys = keys_of(row, q_len, grid, window, stride, dilation, is_causal, extra_keys)
        for i in range(b):
            for j in range(h):
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
    *geometry: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by automatic differentiation of `forward`."""
    work = state_dtype(q)
    with torch.enable_grad():
        leaves = [x.detach().to(work).requires_grad_() for x in (q, k, v)]
        again, again_lse = forward(*leaves, *geometry)  # type: ignore[arg-type]
        total = (again * grad_out.to(work)).sum() + (again_lse * grad_lse.to(work)).sum()
        grads = torch.autograd.grad(total, leaves)
    found = [g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)]
    return found[0], found[1], found[2]
