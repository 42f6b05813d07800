"""Routed attention in plain torch: every chunk is multiplied with the queries that chose it.

The parts are joined by their log-sum-exp, so that the cost is the chosen pairs and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels.block_sparse.torch import dense_with_lse

_SCORES = 1 << 22
"""Scores held at once where they are written out (gradients)."""


def _parts(chunk_ids: Tensor, chunks: int) -> list[tuple[int, Tensor]]:
    """Chunk number and positions of its keys, without empty chunks; -1 comes first."""
    order = chunk_ids.argsort(stable=True)
    sizes = torch.bincount(chunk_ids.long() + 1, minlength=chunks + 1).tolist()
    pieces = order.split(sizes)
    return [(number - 1, piece) for number, piece in enumerate(pieces) if len(piece)]


def _takers(selected: Tensor, number: int) -> Tensor:
    """Queries ``[n]`` of one head that chose a chunk; all of them see chunk -1."""
    if number < 0:
        return torch.arange(selected.shape[0], device=selected.device)
    return selected[:, number].nonzero()[:, 0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, chunk_ids: Tensor, selected: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``."""
    b, h, q_len, _ = q.shape
    group, work = h // k.shape[1], state_dtype(q)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    lse = torch.full((b, h, q_len), float("-inf"), dtype=work, device=q.device)
    parts = _parts(chunk_ids, selected.shape[3])
    for i in range(b):
        for kv_head in range(k.shape[1]):
            pieces = [(n, k[i, kv_head, at][None], v[i, kv_head, at][None]) for n, at in parts]
            for j in range(kv_head * group, (kv_head + 1) * group):
                for number, keys, values in pieces:
                    rows = _takers(selected[i, j], number)
                    if len(rows):
                        got, got_lse = dense_with_lse(
                            q[i, j].index_select(0, rows)[None], keys, values, None, scale
                        )
                        _join(out[i, j], lse[i, j], rows, got[0].to(work), got_lse[0].to(work))
    return out.to(q.dtype), lse


def _join(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge one part into the rows of a running result ``[Q, D]``, ``[Q]``."""
    before = lse.index_select(0, rows)
    after = torch.logaddexp(before, part_lse)
    kept = out.index_select(0, rows).mul_((before - after).exp_()[:, None])
    kept.addcmul_(part, (part_lse - after).exp_()[:, None])
    out.index_copy_(0, rows, kept)
    lse.index_copy_(0, rows, after)


def _pairs(selected: Tensor, parts: list[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys that see each other, as blocks of bounded size, for one head."""
    for number, keys in parts:
        for rows in _takers(selected, number).split(max(1, _SCORES // len(keys))):
            if len(rows):
                yield rows, keys


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
    """Gradients; probabilities are computed again from the LSE, in fp32."""
    b, h = q.shape[:2]
    group, work = h // k.shape[1], state_dtype(q)
    delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse.to(work)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    parts = _parts(chunk_ids, selected.shape[3])
    for i in range(b):
        for j in range(h):
            at = (i, j // group)
            query, key, value = q[i, j].to(work), k[at].to(work), v[at].to(work)
            grad = grad_out[i, j].to(work)
            for rows, keys in _pairs(selected[i, j], parts):
                scores = (query[rows] @ key[keys].T).mul_(scale)
                weights = scores.sub_(lse[i, j, rows, None]).exp_()
                dv[at].index_add_(0, keys, weights.T @ grad[rows])
                slope = (grad[rows] @ value[keys].T).sub_(delta[i, j, rows, None])
                slope = slope.mul_(weights).mul_(scale)
                dq[i, j].index_add_(0, rows, slope @ key[keys])
                dk[at].index_add_(0, keys, slope.T @ query[rows])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
