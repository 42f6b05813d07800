"""Attention whose probabilities are looked at: blocks of rows, so that no Q x K matrix is ever held.

Serves the plain-torch back ends of the ops that need more than SDPA returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype

_SCORES = 1 << 20
"""Scores held at once: enough to keep two cores busy, few enough for the last cache (4 MiB of fp32)."""


@dataclass(frozen=True)
class Masking:
    """Which keys a query may see, as every op here takes it.

    Shapes:
        ``mask [B|1, H|1, Q|1, K]``, bool (True: visible) or added to the scores; ``groups [B, K]``, where
        -1 hides a key. Causal: query i sees the keys up to ``i + K - Q``.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    groups: Tensor | None = None

    def apply(self, scores: Tensor, item: int, heads: slice, rows: slice, q_len: int) -> Tensor:
        """Mask ``scores [heads, rows, K]`` of one batch item in place."""
        k_len = scores.shape[2]
        if self.mask is not None:
            part = self.mask[item if self.mask.shape[0] > 1 else 0]
            part = part[heads if part.shape[0] > 1 else slice(None)]
            part = part[:, rows if part.shape[1] > 1 else slice(None)]
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, float("-inf"))
            else:
                scores.add_(part)
        if self.is_causal:
            last = torch.arange(rows.start, rows.stop, device=scores.device) + (k_len - q_len)
            key = torch.arange(k_len, device=scores.device)
            scores.masked_fill_(key > last[:, None], float("-inf"))
        if self.groups is not None:
            scores.masked_fill_(self.groups[item] < 0, float("-inf"))
        return scores


@dataclass(frozen=True)
class Part:
    """Some rows of some heads of one batch item."""

    item: int
    heads: slice
    kv_heads: Tensor | slice
    rows: slice

    @property
    def at(self) -> tuple[int, slice, slice]:
        """Where the rows are in a tensor ``[B, H, Q, ...]``."""
        return self.item, self.heads, self.rows


def parts(q: Tensor, k: Tensor) -> Iterator[Part]:
    """Cut ``q [B, H, Q, D]`` so that the scores of a part stay in the cache."""
    b, h, q_len, _ = q.shape
    group, k_len = h // k.shape[1], max(1, k.shape[2])
    heads = max(1, _SCORES // (k_len * q_len)) if q_len else 1
    rows = q_len if heads > 1 else max(16, _SCORES // k_len)
    for item in range(b):
        for first in range(0, h, heads):
            some = slice(first, min(first + heads, h))
            kv: Tensor | slice = some
            if group > 1:
                kv = torch.arange(some.start, some.stop, device=q.device) // group
            for start in range(0, q_len, rows):
                yield Part(item, some, kv, slice(start, min(start + rows, q_len)))


def scores_of(q: Tensor, k: Tensor, part: Part, masking: Masking, scale: float) -> Tensor:
    """Masked scores ``[heads, rows, K]``; q and k already have the dtype to compute in."""
    scores = torch.matmul(q[part.at], k[part.item, part.kv_heads].transpose(1, 2)).mul_(scale)
    return masking.apply(scores, part.item, part.heads, part.rows, q.shape[2])


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of ``scores [..., K]``; rows without keys give 0 and -inf."""
    peak = scores.amax(-1)
    weights = torch.softmax(scores, -1)
    # The largest probability is 1 / sum(exp(score - peak)).
    lse = peak - weights.amax(-1).log()
    empty = peak == float("-inf")
    if bool(empty.any()):
        weights.masked_fill_(empty[..., None], 0.0)
        lse.masked_fill_(empty, float("-inf"))
    return weights, lse


def lift(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype to compute in: fp32, or fp64 for fp64."""
    return [x.to(state_dtype(x)) for x in tensors]


def add_to_keys(total: Tensor, part: Part, value: Tensor) -> None:
    """Add ``value [heads, K, ...]`` to ``total [B, Hkv, K, ...]``, summing heads that share keys."""
    if isinstance(part.kv_heads, slice):
        total[part.item, part.kv_heads] += value
    else:
        total[part.item].index_add_(0, part.kv_heads, value)


def check_masking(
    op: str, q: Tensor, k: Tensor, mask: Tensor | None, groups: Tensor | None = None
) -> None:
    """Check that a mask, and groups, belong to queries and keys.

    Raises:
        ValueError: shapes that do not broadcast to ``[B, H, Q, K]``, or groups that are not ``[B, K]``.
        TypeError: groups that are not integers, or a mask that asks for a gradient.
    """
    want = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask is not None:
        fits = mask.ndim == 4 and all(
            have in (1, need) for have, need in zip(mask.shape[:3], want[:3], strict=True)
        )
        if not fits or mask.shape[3] != want[3]:
            raise ValueError(
                f"{op}: the mask {list(mask.shape)} must be [B|1, H|1, Q|1, K] for {list(want)}."
            )
        if mask.requires_grad:
            raise TypeError(f"{op}: a mask that asks for a gradient is not supported; detach it.")
    if groups is not None:
        if groups.is_floating_point() or groups.dtype == torch.bool:
            raise TypeError(f"{op}: groups must be integers, got {groups.dtype}.")
        if tuple(groups.shape) != (want[0], want[3]):
            raise ValueError(
                f"{op}: groups {list(groups.shape)} must be [B, K] = [{want[0]}, {want[3]}]."
            )
