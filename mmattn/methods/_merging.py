"""Bipartite soft matching of tokens, and the maps that merge and unmerge them. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.layout import Grid


def match(metric: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, r: int) -> torch.Tensor:
    """Merge the `r` source tokens that are most like some destination token, each row on its own.

    Args:
        metric: ``[B, N, D]``, compared by cosine.
        src, dst: positions ``[S]`` and ``[E]``; all other tokens stay as they are.

    Returns:
        ``source [B, N]``, the new position of every old token. Survivors keep their order.
    """
    b, n, _ = metric.shape
    unit = F.normalize(metric.float(), dim=-1)
    similarity = unit[:, src] @ unit[:, dst].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    gone = best.argsort(dim=-1, descending=True, stable=True)[:, :r]

    merged = torch.zeros(b, n, dtype=torch.bool, device=metric.device)
    merged.scatter_(1, src[gone], True)
    target = torch.arange(n, device=metric.device).expand(b, n).clone()
    target.scatter_(1, src[gone], dst[partner.gather(1, gone)])
    position = (~merged).long().cumsum(1) - 1
    return position.gather(1, target)


def average(x: torch.Tensor, source: torch.Tensor, size: torch.Tensor, kept: int) -> torch.Tensor:
    """Size-weighted means ``[B, kept, C]`` of the tokens ``[B, N, C]`` that share a new position."""
    weight = size.to(x.dtype).unsqueeze(-1)
    index = source.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(x.shape[0], kept, x.shape[2]).scatter_add_(1, index, x * weight)
    return total / sizes(source, size, kept).to(x.dtype).unsqueeze(-1)


def sizes(source: torch.Tensor, size: torch.Tensor, kept: int) -> torch.Tensor:
    """How many original tokens each new token stands for, ``[B, kept]``."""
    return size.new_zeros(size.shape[0], kept).scatter_add_(1, source, size)


def spread(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Every old token ``[B, N, C]`` gets the value of the new token it became."""
    return x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def cells(grid: Grid, offsets: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Bool ``[N]``: one destination token in every full 2 x 2 cell of every frame.

    Args:
        offsets: ``[T * (Y // 2) * (X // 2)]`` numbers 0..3, the corner of each cell; None is top-left.
    """
    t, y, x = grid
    cy, cx = y // 2, x // 2
    frame = torch.arange(t, device=device)[:, None, None]
    row = 2 * torch.arange(cy, device=device)[None, :, None]
    column = 2 * torch.arange(cx, device=device)[None, None, :]
    where = ((frame * y + row) * x + column).reshape(-1)
    if offsets is not None:
        where = where + (offsets // 2) * x + offsets % 2
    chosen = torch.zeros(t * y * x, dtype=torch.bool, device=device)
    chosen[where] = True
    return chosen
