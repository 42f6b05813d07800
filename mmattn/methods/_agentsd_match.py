"""One ranking of alike tokens, read twice: how far features merge and how far agents do. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mmattn.layout import Grid


class Match(NamedTuple):
    """The source tokens of every row, those most like a destination first.

    Shapes:
        `src` ``[B, S]`` positions of the sources in that order, `into` ``[B, S]`` which destination each
        would merge into, `dst` ``[D]`` positions of the destinations; ``S + D`` are all tokens.
    """

    src: Tensor
    into: Tensor
    dst: Tensor


def destinations(grid: Grid, cell: int, offsets: Tensor | None, device: torch.device) -> Tensor:
    """Positions ``[D]`` of one token in every full `cell` x `cell` square of every frame.

    Args:
        offsets: ``[D]`` numbers below ``cell * cell``, the place in each square; None is top-left.
    """
    t, y, x = grid
    frame = torch.arange(t, device=device)[:, None, None] * y
    row = cell * torch.arange(y // cell, device=device)[None, :, None]
    column = cell * torch.arange(x // cell, device=device)[None, None, :]
    where = ((frame + row) * x + column).reshape(-1)
    return where if offsets is None else where + (offsets // cell) * x + offsets % cell


def match(metric: Tensor, dst: Tensor) -> Match:
    """Rank all tokens that are no destination by the cosine to the destination most like them.

    Args:
        metric: ``[B, N, C]``; every row is ranked on its own.
        dst: positions ``[D]``, at least one.
    """
    metric = metric.detach()
    source = torch.ones(metric.shape[1], dtype=torch.bool, device=metric.device)
    source[dst] = False
    # A sort and not `nonzero`: the number of sources is known, and a graph must not depend on values.
    src = (~source).to(torch.uint8).argsort(stable=True)[: metric.shape[1] - dst.shape[0]]
    unit = F.normalize(metric.to(_wide(metric)), dim=-1)
    best, into = (unit[:, src] @ unit[:, dst].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    return Match(src[order], into.gather(1, order), dst)


def merge(x: Tensor, found: Match, r: int, agents_r: int | None) -> tuple[Tensor, Tensor | None]:
    """Features and agents: `x` with the first `r`, and with the first `agents_r`, sources merged.

    Both are the sources left over, in ranked order, then the destinations, each the plain mean of itself
    and of the tokens that merged into it.

    Args:
        x: ``[B, N, C]``.
        r: sources that merge in the features.
        agents_r: sources that merge in the agents, more than `r`; None makes no agents.

    Returns:
        ``[B, N - r, C]``, and ``[B, N - agents_r, C]`` or None.
    """
    gone = r if agents_r is None else agents_r
    b, d, c = x.shape[0], found.dst.shape[0], x.shape[2]
    ranked = x.gather(1, found.src.unsqueeze(-1).expand(-1, -1, c))
    # Sums of up to thousands of tokens, in fp32: half precision would stop counting.
    total = x[:, found.dst].to(_wide(x)).flatten(0, 1)
    count = total.new_ones(b * d, 1)
    place = found.into[:, :gone] + d * torch.arange(b, device=x.device)[:, None]

    def upto(start: int, stop: int) -> Tensor:
        nonlocal total, count
        index = place[:, start:stop].reshape(-1)
        rows = ranked[:, start:stop].reshape(-1, c).to(total.dtype)
        total = total.index_add(0, index, rows)
        count = count.index_add(0, index, count.new_ones(index.shape[0], 1))
        means = (total / count).to(x.dtype).unflatten(0, (b, d))
        return torch.cat([ranked[:, stop:], means], dim=1)

    features = upto(0, r)
    return features, None if agents_r is None else upto(r, agents_r)


def spread(y: Tensor, found: Match, r: int) -> Tensor:
    """Every token ``[B, N, C]`` gets the feature ``[B, N - r, C]`` that it stayed or became."""
    b, s = found.src.shape
    d = found.dst.shape[0]
    left = torch.arange(s - r, device=y.device).expand(b, -1)
    own = torch.arange(s - r, s - r + d, device=y.device).expand(b, -1)
    where = torch.cat([found.into[:, :r] + (s - r), left, own], dim=1)
    position = torch.empty_like(where).scatter_(
        1, torch.cat([found.src, found.dst.expand(b, -1)], dim=1), where
    )
    return y.gather(1, position.unsqueeze(-1).expand(-1, -1, y.shape[-1]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
