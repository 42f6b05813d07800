"""FlexPrefill: each head keeps the columns and diagonals of blocks that its attention needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmattn.methods._blocks import (
    BlockMethod,
    block_means,
    block_sizes,
    block_sums,
    largest,
    needed,
    probe_rows,
    probe_shares,
    scale_of,
)
from mmattn.methods._image_attention import Part
from mmattn.methods.base import require


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(BlockMethod):
    """Block-sparse attention with a pattern and a budget per head, read off a few exact rows.

    Some query rows are attended to exactly. Columns of blocks that many of them look at, and diagonals
    (blocks at one distance: neighbors, the same place in the next frame), are kept until they hold a
    share `gamma` of what those rows look at. Where block means predict well what the rows look at, a head
    is "query-aware" instead: it keeps the best pairs of blocks by their means, and only `min_budget` of
    columns and diagonals. "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
    Long-Sequence Inference", arXiv 2502.20766. Compared in the tests with dense attention, with a choice
    written out in loops and, at equal density, with random blocks.

    The paper is about causal language models. Used unchanged on image and video models it is known to
    fail (arXiv 2502.18137), because its rows are the last ones of the sequence. This is a port to
    attention in all directions, and not the paper's algorithm to the letter. Rows come from
    `probe_blocks` blocks spread over the image. Diagonals have a sign. Columns and diagonals share one
    budget, and what both hold counts once: with rows from many places, every local head would otherwise
    need a column per probed block, and every head with a sink a diagonal. The decision averages over
    probed blocks. The own block is always kept, the first one is not (text keys, which every query sees,
    play its part). Attention is counted among image keys. There is no upper budget.

    Official quirks that are not repeated: budgets count blocks, where official code counts single tokens
    and divides by 128, as if they lay side by side; a distance that crosses two rows of blocks is seen in
    both; empty blocks give no NaN in the divergence; a short last block counts by its true size; the
    query-aware map reaches `gamma` instead of stopping before it.

    Diagonals are straight only in raster order, so a `tile` helps columns and query-aware heads alone.
    Diffusion needs its first steps most: consider ``dense_steps=0.2``.

    Args:
        gamma: share of the probed attention that columns and diagonals together, or the pairs of a
            query-aware head, must hold, in (0, 1]; 1 is dense attention (bitwise).
        tau: a head is query-aware if the root of the Jensen-Shannon divergence between attention
            predicted and measured is below, in [0, 1]; 0: never, 1: always.
        min_budget: least number of tokens in columns, and in diagonals, per query; rounded up to blocks.
            As many as there are image tokens, or more, is dense attention (bitwise).
        probe_blocks: blocks of queries that are probed, at least 2: one cannot tell columns from diagonals.
        probe_rows: query rows per probed block.
        block: image tokens per block.
        tile: ``(t, y, x)`` tokens of the cuboids that tokens are ordered by; None: raster order.
        dense_steps: first denoising steps that run dense, a number (int) or a share (float).
        dense_layers: first layers that run dense.

    Shapes:
        ``q, k, v [B, H, N, D]``; choice ``[B, H, n, n]`` for n blocks of image tokens; probes
        ``[B, H, probe_blocks, probe_rows, S]``.

    Raises:
        UnsupportedCall: no grid, or a mask that does more than hide text.
        ConfigError: knobs out of range, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "flexprefill"
    paper: ClassVar[str] = "FlexPrefill, arXiv 2502.20766"

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 512
    probe_blocks: int = 8
    probe_rows: int = 16

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require(0 < self.gamma <= 1, f"gamma lies in (0, 1], got {self.gamma}")
        require(0 <= self.tau <= 1, f"tau lies in [0, 1], got {self.tau}")
        require(self.min_budget >= 0, f"min_budget must not be negative, got {self.min_budget}")
        require(self.probe_blocks >= 2, f"probe_blocks must be at least 2, got {self.probe_blocks}")
        require(self.probe_rows >= 1, f"probe_rows must be at least 1, got {self.probe_rows}")

    def keeps_all(self, tokens: int) -> str | None:
        """A sentence when every block is kept."""
        if self.gamma == 1 or -(-self.min_budget // self.block) >= -(-tokens // self.block):
            return "the settings keep every block"
        return super().keeps_all(tokens)

    def choose(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """Columns and diagonals of blocks, and pairs where query-aware, bool ``[b, H, n, n]``."""
        scale, block = scale_of(part), self.block
        n = -(-q.shape[2] // block)
        rows = probe_rows(q.shape[2], block, self.probe_blocks, self.probe_rows)
        seen = block_sums(probe_shares(q, k, rows, scale).mean(3), block)
        pooled = block_means(k, block)
        aware = surprise(q, pooled, seen, rows, block, scale) < self.tau

        homes = [some[0] // block for some in rows]
        diagonals, columns = diagonal_means(seen, homes), seen.mean(2)
        along, down = lines(seen, diagonals, columns, homes, self.gamma)
        least = max(1, -(-self.min_budget // block))
        along = (along & ~aware[..., None]) | largest(diagonals, least)
        down = (down & ~aware[..., None]) | largest(columns, least)
        at = torch.arange(n, device=q.device)
        keep = down[:, :, None] | along[..., at - at[:, None] + n - 1] | (at == at[:, None])

        predicted = predict(block_means(q, block), pooled, q.shape[2], block, scale).flatten(2)
        best = largest(predicted, needed(predicted, self.gamma)).view(keep.shape)
        return keep | (best & aware[..., None, None])


def diagonal_means(seen: Tensor, homes: list[int]) -> Tensor:
    """Mean attention per distance in blocks, ``[b, H, P, n]`` -> ``[b, H, 2n - 1]``, from -(n - 1) on."""
    n = seen.shape[-1]
    means = seen.new_zeros(*seen.shape[:2], 2 * n - 1)
    for i, home in enumerate(homes):
        means[..., n - 1 - home : 2 * n - 1 - home] += seen[:, :, i]
    return means / len(homes)


def lines(
    seen: Tensor, diagonals: Tensor, columns: Tensor, homes: list[int], gamma: float
) -> tuple[Tensor, Tensor]:
    """The heaviest diagonals and columns that together hold a share `gamma` of `seen`, as bool.

    They are taken in order of weight, whatever they are; of equal ones diagonals come first.

    Args:
        seen: attention of the probed blocks of queries ``[b, H, P, n]``; `homes` are their numbers.
        diagonals, columns: ``[b, H, 2n - 1]`` and ``[b, H, n]``.
    """
    n = columns.shape[-1]
    weights = torch.cat([diagonals, columns], dim=-1)
    rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    at = torch.arange(n, device=seen.device)
    home = torch.tensor(homes, device=seen.device)[:, None]
    # A probed pair of blocks is held from the moment that its column or its diagonal is taken.
    held = torch.minimum(rank[..., 2 * n - 1 :][:, :, None], rank[..., at - home + n - 1]).flatten(
        2
    )
    order = held.argsort(dim=-1)
    mass = seen.flatten(2).double().gather(-1, order).cumsum(-1)
    last = (mass < gamma * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    taken = rank <= held.gather(-1, order).gather(-1, last)
    return taken[..., : 2 * n - 1], taken[..., 2 * n - 1 :]


def predict(queries: Tensor, keys: Tensor, tokens: int, block: int, scale: float) -> Tensor:
    """Attention of mean queries to blocks of keys given by their means, ``[b, H, P, n]``."""
    sizes = block_sizes(tokens, block, keys.device)
    return (queries @ keys.transpose(2, 3) * scale + sizes.log()).softmax(-1)


def surprise(
    q: Tensor, keys: Tensor, seen: Tensor, rows: list[list[int]], block: int, scale: float
) -> Tensor:
    """Root of the Jensen-Shannon divergence (nats) of predicted and measured attention, ``[b, H]``.

    Both are distributions over the blocks of keys, of the mean query and the mean over the rows of every
    probed block; the root is averaged over probed blocks.
    """
    index = torch.tensor(rows, device=q.device)
    means = q.index_select(2, index.flatten()).float().unflatten(2, index.shape).mean(3)
    p = predict(means, keys, q.shape[2], block, scale)
    middle = (p + seen) / 2
    apart = (torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, seen))
    return (sum(apart, torch.zeros_like(middle)) / 2).sum(-1).clamp(min=0).sqrt().mean(2)
