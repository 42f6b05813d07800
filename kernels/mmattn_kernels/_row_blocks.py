"""Attention whose probabilities are looked at: blocks of rows, so that no Q x K matrix is ever held.

Serves the plain-torch back ends of the ops that need more than SDPA returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels._scratch import Scratch

_SCORES = 1 << 21
"""Scores held at once: enough to keep two cores busy, few enough for the last cache (8 MiB of fp32)."""
_GPU_SCORES = 1 << 25
_LEAST_ROWS = 16
_CAUSAL_ROWS = 128
"""With causality every row of a part computes the keys of its last row; short parts waste less."""


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

    def apply(self, scores: Tensor, part: Part, q_len: int, k_len: int) -> Tensor:
        """Mask the scores ``[heads, rows, keys]`` of a part in place."""
        if self.mask is not None:
            given = self.mask[part.item if self.mask.shape[0] > 1 else 0]
            given = given[part.heads if given.shape[0] > 1 else slice(None)]
            given = given[:, part.rows if given.shape[1] > 1 else slice(None), : part.keys]
            if given.dtype == torch.bool:
                scores.masked_fill_(~given, float("-inf"))
            else:
                scores.add_(given)
        if self.is_causal:
            last = torch.arange(part.rows.start, part.rows.stop, device=scores.device)
            last = last + (k_len - q_len)
            # Keys that the first row sees are seen by all.
            seen = max(0, part.rows.start + k_len - q_len + 1)
            key = torch.arange(seen, part.keys, device=scores.device)
            scores[..., seen:].masked_fill_(key > last[:, None], float("-inf"))
        if self.groups is not None:
            scores.masked_fill_(self.groups[part.item, : part.keys] < 0, float("-inf"))
        return scores


@dataclass(frozen=True)
class Part:
    """Some rows of some heads of one batch item; they see at most the first `keys` keys.

    The G query heads that share a key head are next to each other, so that they and their R rows are
    ``[P, G * R]`` rows for P key heads, and keys need no copy per query head.
    """

    item: int
    kv_heads: slice
    group: int
    rows: slice
    keys: int

    @property
    def heads(self) -> slice:
        """The query heads."""
        return slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)

    @property
    def at(self) -> tuple[int, slice, slice]:
        """Where the rows are in a tensor ``[B, H, Q, ...]``."""
        return self.item, self.heads, self.rows

    @property
    def columns(self) -> tuple[int, slice, slice]:
        """Where the keys are in a tensor ``[B, Hkv, K, ...]``."""
        return self.item, self.kv_heads, slice(0, self.keys)

    def take(self, x: Tensor) -> Tensor:
        """Rows ``[P, G * R, ...]`` of ``x [B, H, Q, ...]``."""
        rows: Tensor = x[self.at].unflatten(0, (-1, self.group)).flatten(1, 2)
        return rows

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write rows ``[P, G * R, ...]`` into ``x [B, H, Q, ...]``."""
        place = x[self.at]
        place.copy_(value.reshape(place.shape))

    def by_head(self, x: Tensor) -> Tensor:
        """``[P, G * R, ...]`` as ``[heads, R, ...]``."""
        return x.view(-1, self.rows.stop - self.rows.start, *x.shape[2:])


def parts(q: Tensor, k: Tensor, is_causal: bool) -> Iterator[Part]:
    """Cut ``q [B, H, Q, D]`` so that the scores of a part stay in the cache.

    Rows that causality leaves without keys need not be in any part.
    """
    b, h, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    if not (q_len and k_len):
        return
    group = h // kv_heads
    most = _SCORES if q.device.type == "cpu" else _GPU_SCORES
    rows = min(q_len, max(1, _LEAST_ROWS // group, most // (group * k_len)))
    if is_causal:
        rows = min(rows, _CAUSAL_ROWS)
    rows = -(-q_len // -(-q_len // rows))
    heads = min(kv_heads, max(1, most // (rows * group * k_len)))
    for item in range(b):
        for first in range(0, kv_heads, heads):
            some = slice(first, min(first + heads, kv_heads))
            for start in range(0, q_len, rows):
                stop = min(start + rows, q_len)
                keys = min(k_len, stop + k_len - q_len) if is_causal else k_len
                if keys > 0:
                    yield Part(item, some, group, slice(start, stop), keys)


def is_small(q: Tensor, k: Tensor) -> bool:
    """Whether the scores of all rows together are no more than one part may hold.

    Decoding and short prompts are: one product for the whole batch then beats a loop over its items.
    """
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return q.device.type == "cpu" and 0 < size <= _SCORES


def all_scores(q: Tensor, k: Tensor, masking: Masking, scale: float) -> Tensor:
    """Masked scores ``[B, H, Q, K]`` of a small problem; q and k already have the dtype to compute in."""
    (b, h, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    rows = (q * scale).reshape(b, kv_heads, h // kv_heads * q_len, -1)
    scores = (rows @ k.transpose(-1, -2)).view(b, h, q_len, k_len)
    if masking.mask is not None:
        if masking.mask.dtype == torch.bool:
            scores.masked_fill_(~masking.mask, float("-inf"))
        else:
            scores.add_(masking.mask)
    if masking.is_causal:
        last = torch.arange(k_len - q_len, k_len, device=q.device)
        late = torch.arange(k_len, device=q.device) > last[:, None]
        scores.masked_fill_(late, float("-inf"))
    if masking.groups is not None:
        scores.masked_fill_((masking.groups < 0)[:, None, None], float("-inf"))
    return scores


def weighted(weights: Tensor, x: Tensor) -> Tensor:
    """``[B, H, Q, K]`` times ``x [B, Hkv, K, D]`` of the heads' own key heads, ``[B, H, Q, D]``."""
    b, h, q_len, k_len = weights.shape
    rows = weights.reshape(b, x.shape[1], -1, k_len)
    return (rows @ x).view(b, h, q_len, x.shape[3])


class Workspace:
    """Memory for the scores and the probabilities of one part after the other."""

    def __init__(self, like: Tensor) -> None:
        self._scores, self._weights = Scratch(like), Scratch(like)

    def scores(self, q: Tensor, k: Tensor, part: Part, masking: Masking, scale: float) -> Tensor:
        """Masked scores ``[P, G * R, keys]``, until the next call; q and k already have the dtype to
        compute in.
        """
        rows, keys = part.take(q) * scale, k[part.columns]
        room = self._scores.take(*rows.shape[:2], part.keys)
        scores = torch.bmm(rows, keys.transpose(1, 2), out=room)
        masking.apply(part.by_head(scores), part, q.shape[2], k.shape[2])
        return scores

    def weights(self, scores: Tensor, lse: Tensor) -> Tensor:
        """Probabilities of ``scores [P, n, keys]``, until the next call; 0 in rows whose LSE is -inf.

        Not exp(score - LSE): beside a mask of the least finite number an LSE loses log(keys), and torch
        finds the normaliser again in less time than it takes to subtract it.
        """
        weights = torch.softmax(scores, -1, out=self._weights.take(*scores.shape))
        empty = lse == float("-inf")
        if bool(empty.any()):
            weights.masked_fill_(empty[..., None], 0.0)
        return weights

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, until the next call, and LSE; rows without keys give 0 and -inf."""
        peak = scores.amax(-1)
        weights = self.weights(scores, peak)
        # The largest probability is 1 / sum(exp(score - peak)), and 0 in a row without keys.
        lse = torch.where(peak == float("-inf"), peak, peak - weights.amax(-1).log())
        return weights, lse


def lift(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype to compute in: fp32, or fp64 for fp64."""
    return [x.to(state_dtype(x)) for x in tensors]


def add_to_keys(total: Tensor, part: Part, weights: Tensor, rows: Tensor) -> None:
    """Add ``weights^T rows`` to the keys of a part in ``total [B, Hkv, K, D]``."""
    total[part.columns].baddbmm_(weights.transpose(1, 2), rows)


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
