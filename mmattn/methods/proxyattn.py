"""ProxyAttn: groups of heads share one ranking of blocks, and every head has its own budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mmattn.errors import UnsupportedCall
from mmattn.methods._blocks import (
    BlockMethod,
    block_sums,
    largest,
    needed,
    probe_rows,
    probe_shares,
    scale_of,
)
from mmattn.methods._image_attention import Part
from mmattn.methods.base import require

_ENTRIES = 1 << 24
"""Largest strip of proxy probabilities made at once (entries over batch, groups, queries and keys)."""


@dataclass(frozen=True, kw_only=True)
class ProxyAttn(BlockMethod):
    """Block-sparse attention that ranks blocks once for many heads.

    Heads look at much the same places and differ in how many of them they need. So heads are averaged
    into `groups` proxies, every `stride`-th token of which gives exact attention whose maximum per pair
    of blocks ranks the blocks for all heads of the group; a few exact rows per head say how many blocks
    hold a share `gamma` of its attention. "ProxyAttn: Guided Sparse Attention via Representative Heads",
    arXiv 2509.24745. Compared in the tests with dense attention, with a choice written out in loops and,
    at equal density, with random blocks. Ranking costs ``groups / (stride**2 * H)`` of the scores.

    The paper is about causal language models, and this was written from its text, without its code.
    Deviations: nothing is causal; a budget is the mean over `probe_blocks` blocks spread over the image,
    where the paper takes the last block; the own block ranks first and counts in the budget, and the
    first block has no privilege (text keys, which every query sees, play its part); attention is counted
    among image keys. Left open by the paper and decided here: budgets are rounded up, and of equal
    scores the first wins.

    The average over heads means something where queries and keys are normalised, as in current video
    models. With an even `stride` and raster order, proxies may see every other column alone; a `tile`
    mends that. Diffusion needs its first steps most: consider ``dense_steps=0.2``.

    Args:
        gamma: share of the attention a head's budget must hold, in (0, 1]; 1 is dense attention
            (bitwise).
        groups: proxies; consecutive heads share one. Must divide the number of heads; None: every head
            is its own.
        stride: every how many tokens a proxy is sampled; must divide `block`.
        min_budget: least number of tokens per query, rounded up to blocks. As many as there are image
            tokens, or more, is dense attention (bitwise).
        probe_blocks: blocks of queries that are probed for the budget.
        probe_rows: query rows per probed block.
        block: image tokens per block.
        tile: ``(t, y, x)`` tokens of the cuboids that tokens are ordered by; None: raster order.
        dense_steps: first denoising steps that run dense, a number (int) or a share (float).
        dense_layers: first layers that run dense.

    Shapes:
        ``q, k, v [B, H, N, D]``; scores ``[B, groups, n, n]`` and choice ``[B, H, n, n]`` for n blocks of
        image tokens. In one group and block row, the sets of two heads are nested.

    Raises:
        UnsupportedCall: no grid, groups that do not divide the heads, or a mask that does more than hide
            text.
        ConfigError: knobs out of range, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "proxyattn"
    paper: ClassVar[str] = "ProxyAttn, arXiv 2509.24745"

    gamma: float = 0.95
    groups: int | None = 1
    stride: int = 4
    min_budget: int = 2048
    probe_blocks: int = 8
    probe_rows: int = 16

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require(0 < self.gamma <= 1, f"gamma lies in (0, 1], got {self.gamma}")
        require(
            self.groups is None or self.groups >= 1,
            f"groups must be at least 1, or None for one per head, got {self.groups}",
        )
        require(
            self.stride >= 1 and self.block % self.stride == 0,
            f"stride must divide block, got stride={self.stride} and block={self.block}",
        )
        require(self.min_budget >= 0, f"min_budget must not be negative, got {self.min_budget}")
        for knob in ("probe_blocks", "probe_rows"):
            value = getattr(self, knob)
            require(value >= 1, f"{knob} must be at least 1, got {value}")

    def keeps_all(self, tokens: int) -> str | None:
        """A sentence when every block is kept."""
        if self.gamma == 1 or -(-self.min_budget // self.block) >= -(-tokens // self.block):
            return "the settings keep every block"
        return super().keeps_all(tokens)

    def choose(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """The best blocks by the group's scores, as many as the head needs, bool ``[b, H, n, n]``."""
        heads, scale = q.shape[1], scale_of(part)
        groups = heads if self.groups is None else self.groups
        if heads % groups:
            raise UnsupportedCall(
                f"{heads} heads cannot be cut into {groups} equal groups; choose `groups` among the "
                "divisors, or None for one group per head."
            )
        scores = proxy_scores(q, k, groups, self.stride, self.block, scale)
        scores.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        budget = self.budgets(q, k, scale)[..., None]
        ranked = scores.repeat_interleave(heads // groups, dim=1)
        return largest(ranked, budget.expand(ranked.shape[:3]))

    def budgets(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Blocks per block of queries, ``[b, H]``."""
        n = -(-q.shape[2] // self.block)
        rows = probe_rows(q.shape[2], self.block, self.probe_blocks, self.probe_rows)
        shares = block_sums(probe_shares(q, k, rows, scale).mean(3), self.block)
        total = needed(shares, self.gamma).sum(-1)
        least = max(1, -(-self.min_budget // self.block))
        return (-(-total // len(rows))).clamp(min(least, n), n)


def proxy_scores(
    q: Tensor, k: Tensor, groups: int, stride: int, block: int, scale: float
) -> Tensor:
    """Greatest attention probability between sampled tokens of two blocks, ``[b, groups, n, n]`` fp32.

    Args:
        q, k: ``[b, H, S, D]``; averaged over the heads of a group, of which every `stride`-th token
            is taken, the first of each block among them.
    """
    queries, keys = (x[:, :, ::stride].unflatten(1, (groups, -1)).float().mean(2) for x in (q, k))
    per = block // stride
    b, s = keys.shape[0], keys.shape[2]
    n = -(-s // per)
    if n * per > s:
        # Repeating the last query changes no maximum, and makes all blocks equally long.
        queries = torch.cat([queries, queries[:, :, -1:].expand(-1, -1, n * per - s, -1)], dim=2)
    step = max(1, _ENTRIES // (b * groups * per * s)) * per
    strips = []
    for some in queries.split(step, dim=2):
        shares = (some * scale @ keys.transpose(2, 3)).softmax(-1)
        shares = F.pad(shares, (0, n * per - s)).unflatten(3, (n, per)).amax(-1)
        strips.append(shares.unflatten(2, (-1, per)).amax(3))
    return torch.cat(strips, dim=2)
