"""Parts of the attention probabilities, without ever holding ``[B, H, Q, K]``. fp32, for observers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ENTRIES = 1 << 20
"""Scores held at once on a CPU, where blocks should stay in the cache; 64 times as many elsewhere."""


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | slice,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Masked scores ``[B, H, R, K]`` before the softmax."""
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q[:, :, rows].float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        part = part[..., : k.shape[2]]
        scores = (
            scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        )
    if causal:
        position = torch.arange(q.shape[2], device=q.device)[rows]
        later = torch.arange(k.shape[2], device=q.device) > position[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys; a query that may see nothing attends to nothing."""
    return scores.softmax(-1).nan_to_num(0.0)


def _blocks(q: torch.Tensor, k: torch.Tensor, rows: slice) -> list[slice]:
    budget = _ENTRIES if q.device.type == "cpu" else _ENTRIES * 64
    step = max(1, budget // (q.shape[0] * q.shape[1] * k.shape[2]))
    edges = range(rows.start, rows.stop, step)
    return [slice(a, min(a + step, rows.stop)) for a in edges]


def _heads(weights: torch.Tensor, per_head: bool) -> torch.Tensor:
    return weights if per_head else weights.mean(1, keepdim=True)


def row_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: Sequence[int],
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    per_head: bool,
) -> torch.Tensor:
    """What the queries `rows` attend to: ``[B, 1 or H, len(rows), K]``."""
    index = torch.tensor(rows, device=q.device)
    return _heads(_probabilities(_scores(q, k, index, mask, causal, scale)), per_head)


def column_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: slice,
    columns: Sequence[int],
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    per_head: bool,
) -> torch.Tensor:
    """How much the queries `rows` attend to the keys `columns`: ``[B, 1 or H, len(columns), rows]``."""
    index = torch.tensor(columns, device=q.device)
    parts = []
    for block in _blocks(q, k, rows):
        scores = _scores(q, k, block, mask, causal, scale)
        share = (scores[..., index] - scores.logsumexp(-1, keepdim=True)).exp().nan_to_num(0.0)
        parts.append(_heads(share, per_head))
    return torch.cat(parts, dim=2).transpose(2, 3)


def mean_received(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    per_head: bool,
) -> torch.Tensor:
    """Attention each key gets, averaged over the queries: ``[B, 1 or H, 1, K]``."""
    rows = slice(0, q.shape[2])
    total = sum(
        _heads(_probabilities(_scores(q, k, block, mask, causal, scale)), per_head).sum(
            2, keepdim=True
        )
        for block in _blocks(q, k, rows)
    )
    assert isinstance(total, torch.Tensor)
    return total / q.shape[2]
