"""Grouped attention in plain torch, over blocks of rows that stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._row_blocks import (
    Masking,
    Part,
    Workspace,
    add_to_keys,
    all_scores,
    is_small,
    lift,
    parts,
    weighted,
)

_MOST_RUNS = 64
"""Up to so many runs, multiplying run by run is cheaper than a product with the members."""


@dataclass(frozen=True)
class Members:
    """Who is in which group.

    Attributes:
        table: numbers 0 and 1, ``[B, G, K]``.
        runs: for every batch item, neighbouring keys of one group as (first, stop, group), without the
            hidden keys; None where there are too many, or where finding them would wait for a GPU.
    """

    table: Tensor
    runs: list[list[tuple[int, int, int]] | None]

    @classmethod
    def of(cls, groups: Tensor, count: int, dtype: torch.dtype) -> Members:
        """Read ``groups [B, K]``."""
        return cls(member_table(groups, count, dtype), [_runs(line) for line in groups])

    def sums(self, weights: Tensor, part: Part) -> Tensor:
        """Sum per group ``[P, n, G]`` of weights ``[P, n, keys]``."""
        table = self.table[part.item, :, : part.keys]
        return torch.nn.functional.linear(weights, table)

    def multiply(self, weights: Tensor, factors: Tensor, part: Part) -> Tensor:
        """Multiply weights ``[P, n, keys]`` in place by the factors ``[P, n, G]`` of their groups.

        Weights of hidden keys must be 0 already.
        """
        runs = self.runs[part.item]
        if runs is None:
            return weights.mul_(torch.matmul(factors, self.table[part.item, :, : part.keys]))
        for start, stop, group in runs:
            if start < part.keys:
                weights[..., start : min(stop, part.keys)].mul_(factors[..., group, None])
        return weights


def member_table(groups: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers 0 and 1, ``[B, G, K]``: whether a key of ``groups [B, K]`` is in a group."""
    names = torch.arange(count, device=groups.device)[:, None]
    return (groups[:, None] == names).to(dtype)


def _runs(line: Tensor) -> list[tuple[int, int, int]] | None:
    if line.device.type != "cpu":
        return None
    names, lengths = torch.unique_consecutive(line, return_counts=True)
    if len(names) > _MOST_RUNS:
        return None
    stops = lengths.cumsum(0)
    found = zip((stops - lengths).tolist(), stops.tolist(), names.tolist(), strict=True)
    return [run for run in found if run[2] >= 0]


def _masking(mask: Tensor | None, is_causal: bool, groups: Tensor) -> Masking:
    """The masks of a call; groups hide keys only where one is -1, and looking at scores takes time."""
    some = groups.device.type != "cpu" or bool((groups < 0).any())
    return Masking(mask, is_causal, groups if some else None)


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
    query, key = lift(q, k)
    room = Workspace(query)
    if is_small(q, k):
        weights, lse = room.softmax(all_scores(query, key, masking, scale))
        table = member_table(groups, num_groups, work)
        return lse, weights @ table[:, None].transpose(-1, -2)
    members = Members.of(groups, num_groups, work)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=work, device=q.device)
    found = torch.zeros(*q.shape[:3], num_groups, dtype=work, device=q.device)
    for part in parts(q, k, is_causal):
        weights, row_lse = room.softmax(room.scores(query, key, part, masking, scale))
        part.put(lse, row_lse)
        part.put(found, members.sums(weights, part))
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
    members = Members.of(groups, grad_masses.shape[3], work)
    query, key = lift(q, k)
    dq, dk = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k))
    room = Workspace(query)
    for part in parts(q, k, is_causal):
        scores = room.scores(query, key, part, masking, scale)
        weights = room.weights(scores, part.take(lse))
        worth = part.take(grad_masses).to(work)
        mean = (members.sums(weights, part) * worth).sum(-1) - part.take(grad_lse)
        slope = members.multiply(weights, (worth - mean[..., None]) * scale, part)
        part.put(dq, torch.bmm(slope, key[part.columns]))
        add_to_keys(dk, part, slope, part.take(query))
    return dq.to(q.dtype), dk.to(k.dtype)


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
    query, key, value = lift(q, k, v)
    room = Workspace(query)
    if is_small(q, k):
        weights, _ = room.softmax(all_scores(query, key, masking, scale))
        table = member_table(groups, coefficients.shape[3], work)
        weights = weights * (coefficients.to(work) @ table[:, None])
        return weighted(weights, value).to(q.dtype)
    members = Members.of(groups, coefficients.shape[3], work)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for part in parts(q, k, is_causal):
        scores = room.scores(query, key, part, masking, scale)
        weights = room.weights(scores, part.take(lse))
        members.multiply(weights, part.take(coefficients).to(work), part)
        part.put(out, torch.bmm(weights, value[part.columns]))
    return out


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
    members = Members.of(groups, coefficients.shape[3], work)
    query, key, value, grad = lift(q, k, v, grad_out)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    dc = torch.zeros(coefficients.shape, dtype=work, device=q.device)
    dl = torch.zeros(lse.shape, dtype=lse.dtype, device=q.device)
    room = Workspace(query)
    for part in parts(q, k, is_causal):
        scores = room.scores(query, key, part, masking, scale)
        weights = room.weights(scores, part.take(lse))
        own, factors = part.take(grad), part.take(coefficients).to(work)
        slope = torch.bmm(own, value[part.columns].transpose(1, 2)).mul_(weights)
        sums = members.sums(slope, part)
        part.put(dc, sums)
        part.put(dl, -(sums * factors).sum(-1))
        members.multiply(slope, factors * scale, part)
        part.put(dq, torch.bmm(slope, key[part.columns]))
        add_to_keys(dk, part, slope, part.take(query))
        add_to_keys(dv, part, members.multiply(weights, factors, part), own)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dc.to(coefficients.dtype), dl
