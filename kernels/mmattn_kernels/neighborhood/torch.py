"""Neighborhood attention in plain torch: the keys that a tile of queries spans are copied as a box.

Tiles whose windows look alike run together, in batches that stay in the cache; a mask is laid over a box
only where windows inside the tile differ. Boxes are strided views until they are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels.neighborhood.tiling import Run, cpu_tiles, runs
from mmattn_kernels.neighborhood.windows import Axis

_CACHE_BYTES = 1 << 21
"""Gathered keys of one batch: about half of what one core's share of the last cache holds."""


@dataclass(frozen=True)
class Cut:
    """Tiles of queries of one shape, everywhere in the grid, and their boxes of keys.

    Args:
        axes: the grid.
        runs: for every axis, where tiles lie.
        lead: batch items and key heads.
        extra_keys: keys in front of every box.
    """

    axes: tuple[Axis, ...]
    runs: tuple[Run, ...]
    lead: tuple[int, int]
    extra_keys: int

    @cached_property
    def tiles(self) -> tuple[int, ...]:
        """Sizes of the axes that count tiles: batch, key head, then tiles and classes of every axis."""
        return (*self.lead, *(n for run in self.runs for n in (run.count, len(run.residues))))

    @cached_property
    def rows(self) -> int:
        return prod(len(run.windows) for run in self.runs)

    @cached_property
    def keys(self) -> int:
        return prod(run.keys for run in self.runs)

    def boxes(self, x: Tensor, *, of_keys: bool) -> Tensor:
        """View ``x [B, Hkv, G, N, D]``, grid tokens, as ``[*tiles, G, *box, D]``; nothing is copied."""
        step = x.stride(3)
        offset = x.storage_offset()
        tiles: list[int] = []
        inside: list[int] = []
        sizes: list[int] = []
        for axis, run in zip(self.axes[::-1], self.runs[::-1], strict=True):
            first, stride = (run.k_first, run.k_step) if of_keys else (run.q_first, run.q_step)
            offset += (first * axis.dilation + run.residues.start) * step
            tiles = [stride * axis.dilation * step, step, *tiles]
            inside = [axis.dilation * step, *inside]
            sizes = [run.keys if of_keys else len(run.windows), *sizes]
            step *= axis.length
        b, h, group, _, d = x.stride()
        return x.as_strided(
            (*self.tiles, x.shape[2], *sizes, x.shape[4]),
            (b, h, *tiles, group, *inside, d),
            offset,
        )

    def gather(self, x: Tensor, chunk: tuple[slice, ...]) -> Tensor:
        """The extra keys and the boxes of ``x [B, Hkv, 1, K, D]``, copied: ``[P, E + n, D]``."""
        box = self.boxes(x[:, :, :, self.extra_keys :], of_keys=True)[chunk]
        tiles, d = box.shape[: len(self.tiles)], x.shape[4]
        if not self.extra_keys:
            return box.reshape(prod(tiles), -1, d)
        both = x.new_empty(*tiles, self.extra_keys + self.keys, d)
        always = x[chunk[0], chunk[1], 0][:, :, : self.extra_keys]
        always = always.reshape(*always.shape[:2], *(1,) * (len(tiles) - 2), *always.shape[2:])
        both[..., : self.extra_keys, :] = always
        both[..., self.extra_keys :, :].unflatten(-2, box.shape[len(tiles) + 1 : -1]).copy_(
            box.squeeze(len(tiles))
        )
        return both.flatten(0, len(tiles) - 1)

    def mask(self, group: int, device: torch.device) -> Tensor | None:
        """Which keys of its box a query of a tile sees, bool ``[G * r, E + n]``; None: all."""
        if all(run.full for run in self.runs):
            return None
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        for run in self.runs:
            bounds = torch.tensor(run.windows, device=device)
            keys = torch.arange(run.keys, device=device)
            seen = (keys >= bounds[:, :1]) & (keys < bounds[:, 1:])
            mask = (mask[:, None, :, None] & seen[None, :, None, :]).flatten(2).flatten(0, 1)
        return torch.cat([mask.new_ones(self.rows, self.extra_keys), mask], 1).repeat(group, 1)

    def chunks(self, bytes_per_tile: int) -> Iterator[tuple[slice, ...]]:
        """Parts of the axes that count tiles, as many tiles at once as fit the cache."""
        most = max(1, _CACHE_BYTES // bytes_per_tile)
        inner, at = 1, len(self.tiles)
        while at and inner * self.tiles[at - 1] <= most:
            at -= 1
            inner *= self.tiles[at]
        if not at:
            yield (slice(None),) * len(self.tiles)
            return
        step = max(1, most // inner)
        rest = (slice(None),) * (len(self.tiles) - at)
        for lead in product(*(range(n) for n in self.tiles[: at - 1])):
            single = tuple(slice(i, i + 1) for i in lead)
            for first in range(0, self.tiles[at - 1], step):
                yield (*single, slice(first, first + step), *rest)


def cuts(
    axes: tuple[Axis, ...], lead: tuple[int, int], group: int, extra_keys: int
) -> Iterator[Cut]:
    """Cut the grid so that every query is in one tile."""
    tile = cpu_tiles(axes, prod(lead), group, extra_keys)
    for places in product(*(runs(axis, size) for axis, size in zip(axes, tile, strict=True))):
        yield Cut(axes, places, lead, extra_keys)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention ``[P, r, D]`` over ``[P, n, D]`` with LSE ``[P, r]``; ``mask [r, n]`` keeps keys."""
    work = state_dtype(q)
    if q.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))[
                None, None
            ]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], 0.0, False, attn_mask=bias, scale=scale
        )
        return out[:, 0], lse[:, 0].to(work)
    scores = torch.bmm(q.to(work) * scale, k.to(work).transpose(1, 2))
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return torch.bmm(scores.sub_(lse[..., None]).exp_(), v.to(work)).to(q.dtype), lse


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
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``."""
    b, h, q_len, d = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    group, extra = h // kv_heads, q_len - prod(grid)
    axes = tuple(map(Axis, grid, window, stride, dilation, is_causal))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=state_dtype(q), device=q.device)
    if not q.numel():
        return out, lse
    queries, outs, lses = (
        x[:, :, extra:].unflatten(1, (kv_heads, group)) for x in (q, out, lse[..., None])
    )
    keys, values = k[:, :, None], v[:, :, None]
    for cut in cuts(axes, (b, kv_heads), group, extra_keys):
        mask = cut.mask(group, q.device)
        q_boxes, out_boxes, lse_boxes = (cut.boxes(x, of_keys=False) for x in (queries, outs, lses))
        pairs = 0 if q.device.type == "cpu" else 8 * group * cut.rows
        for chunk in cut.chunks((extra_keys + cut.keys) * (d * q.element_size() + pairs)):
            some = q_boxes[chunk]
            got, got_lse = attend(
                some.reshape(-1, group * cut.rows, d),
                cut.gather(keys, chunk),
                cut.gather(values, chunk),
                mask,
                scale,
            )
            out_boxes[chunk] = got.reshape(some.shape)
            lse_boxes[chunk] = got_lse.reshape(*some.shape[:-1], 1)
    if extra:
        got, got_lse = attend(
            q[:, :, :extra].reshape(b * kv_heads, -1, d),
            k.reshape(b * kv_heads, k_len, d),
            v.reshape(b * kv_heads, k_len, d),
            None,
            scale,
        )
        out[:, :, :extra] = got.reshape(b, h, extra, d)
        lse[:, :, :extra] = got_lse.reshape(b, h, extra)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    extra_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; probabilities are computed again from the LSE, in fp32, one batch at a time."""
    b, h, q_len, d = q.shape
    kv_heads, k_len, work = k.shape[1], k.shape[2], state_dtype(q)
    group, extra = h // kv_heads, q_len - prod(grid)
    axes = tuple(map(Axis, grid, window, stride, dilation, is_causal))
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    if not q.numel():
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    # dS = P (dP - delta), and an LSE hands its gradient to the scores as P.
    delta = (grad_out.to(work) * out.to(work)).sum(-1) - grad_lse.to(work)
    rows = [
        x.to(work).unflatten(1, (kv_heads, group))
        for x in (q, grad_out, lse[..., None], delta[..., None], dq)
    ]
    keys, values = (x.to(work)[:, :, None] for x in (k, v))
    places = torch.arange(b * kv_heads * k_len, device=q.device).view(b, kv_heads, 1, k_len, 1)
    flat_dk, flat_dv = dk.view(-1, d), dv.view(-1, d)

    def add(
        some: list[Tensor], some_keys: Tensor, some_values: Tensor, at: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Add to the gradients of keys, return those of queries."""
        some_queries, some_grads, some_lse, some_delta = some
        weights = torch.bmm(some_queries, some_keys.transpose(1, 2)).mul_(scale)
        weights = weights.sub_(some_lse).exp_()
        if mask is not None:
            weights.masked_fill_(~mask, 0.0)
        flat_dv.index_add_(0, at, torch.bmm(weights.transpose(1, 2), some_grads).view(-1, d))
        slope = torch.bmm(some_grads, some_values.transpose(1, 2))
        slope = slope.sub_(some_delta).mul_(weights).mul_(scale)
        flat_dk.index_add_(0, at, torch.bmm(slope.transpose(1, 2), some_queries).view(-1, d))
        return torch.bmm(slope, some_keys)

    for cut in cuts(axes, (b, kv_heads), group, extra_keys):
        mask = cut.mask(group, q.device)
        boxes = [cut.boxes(x[:, :, :, extra:], of_keys=False) for x in rows]
        n = extra_keys + cut.keys
        for chunk in cut.chunks(n * (3 * d + 2 * group * cut.rows) * dq.element_size()):
            some = [x[chunk].reshape(-1, group * cut.rows, x.shape[-1]) for x in boxes[:4]]
            at = cut.gather(places, chunk).flatten()
            got = add(some, cut.gather(keys, chunk), cut.gather(values, chunk), at, mask)
            boxes[4][chunk] = got.reshape(boxes[4][chunk].shape)
    # The extra queries see every key; in pieces, so that scores do not need memory for all pairs.
    step = max(1, (1 << 20) // (k_len * group))
    for i, j in product(range(b), range(kv_heads)):
        for first in range(0, extra, step):
            part = (i, j, slice(None), slice(first, min(first + step, extra)))
            some = [x[part].flatten(0, 1)[None] for x in rows[:4]]
            got = add(some, keys[i, j], values[i, j], places[i, j].flatten(), None)
            rows[4][part] = got.view(rows[4][part].shape)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
