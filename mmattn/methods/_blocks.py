"""What methods that choose blocks of keys share: the order of tokens, sums per block, the attention.

Image tokens are cut into blocks of consecutive tokens, either in raster order or tile by tile, so that a
block is a small cuboid of the video. A method looks at queries and keys in that order and says which
blocks of keys each block of queries sees. No N x N tensor is made here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels.block_sparse import BlockLists, block_sparse_attention
from torch import Tensor

from mmattn.layout import Grid
from mmattn.methods._image_attention import Part, Sparse
from mmattn.methods._sparse_method import SparseMethod
from mmattn.methods.base import require
from mmattn.sites import Site

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class BlockMethod(SparseMethod):
    """Base of the methods that choose blocks of keys; they override `choose` and `keeps_all`.

    Args:
        block: image tokens per block of queries and of keys; GPU kernels prefer 64 or 128.
        tile: ``(t, y, x)`` tokens of the cuboids that tokens are ordered by; None: raster order.
    """

    block: int = 128
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Check the knobs that all block methods have."""
        super().__post_init__()
        require(
            isinstance(self.block, int) and self.block >= 1,
            f"block is a number of tokens, at least 1, got {self.block!r}",
        )
        if isinstance(self.tile, list):
            object.__setattr__(self, "tile", tuple(self.tile))
        require(
            self.tile is None
            or (len(self.tile) == 3 and all(isinstance(e, int) and e >= 1 for e in self.tile)),
            f"tile is three positive sizes (t, y, x) or None, got {self.tile!r}",
        )

    def choose(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """Blocks to keep, bool ``[b or 1, H, nq, nk]``, from image tokens ``[b, H, S, D]`` in order."""
        raise NotImplementedError

    def keeps_all(self, tokens: int) -> str | None:
        """Why these settings keep every block of so many image tokens, or None."""
        return "all image tokens fit in one block" if tokens <= self.block else None

    def dense_reason(self, site: Site, grid: Grid) -> str | None:
        """What `keeps_all` says of the tokens of `grid`."""
        return self.keeps_all(grid[0] * grid[1] * grid[2])

    def sparse(self, part: Part) -> Sparse:
        """Attention over the blocks that `choose` keeps."""
        order = token_order(part.grid, self.tile, part.q.device)
        q = part.q if order is None else part.q.index_select(2, order)
        k, v = (image_first(x, part.text, order) for x in (part.k, part.v))
        with torch.no_grad():
            keep = self.choose(q, k[:, :, : q.shape[2]], part)
        found = attend_blocks(
            q, k, v, keep, block=self.block, scale=part.scale, want_lse=part.want_lse
        )
        return found if order is None else in_raster_order(found, order)


def scale_of(part: Part) -> float:
    """Factor of the scores of this call."""
    return float(part.q.shape[-1] ** -0.5) if part.scale is None else part.scale


# Order of tokens


def token_order(grid: Grid, tile: Grid | None, device: torch.device) -> Tensor | None:
    """Raster positions of the tokens, tile by tile and in raster order inside each, ``[S]``.

    Tiles at the far sides are smaller where `tile` does not divide the grid. None: raster order.
    """
    if tile is None:
        return None
    t, y, x = (torch.arange(n, device=device) for n in grid)
    _, across_y, across_x = (-(-n // edge) for n, edge in zip(grid, tile, strict=True))
    t, y, x = t[:, None, None], y[:, None], x
    which = (t // tile[0] * across_y + y // tile[1]) * across_x + x // tile[2]
    inside = (t % tile[0] * tile[1] + y % tile[1]) * tile[2] + x % tile[2]
    place: Tensor = which * (tile[0] * tile[1] * tile[2]) + inside
    return place.flatten().argsort()


def image_first(x: Tensor, text: int, order: Tensor | None) -> Tensor:
    """Keys or values ``[b, H, text + S, D]`` with the image tokens first, in `order`, then the text.

    Blocks of image tokens then begin at the same places whatever the length of the text.
    """
    if order is not None:
        words = torch.arange(text, device=x.device)
        return x.index_select(2, torch.cat([order + text, words]))
    return torch.cat([x[:, :, text:], x[:, :, :text]], dim=2) if text else x


def in_raster_order(found: Sparse, order: Tensor) -> Sparse:
    """The result of queries in `order`, back in raster order."""
    back = order.argsort()
    lse = None if found.lse is None else found.lse.index_select(2, back)
    return found._replace(out=found.out.index_select(2, back), lse=lse)


# Numbers per block


def block_sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    """Tokens of every block, ``[n]`` fp32; the last one may be smaller."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block).float()


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums over blocks along the last axis, ``[..., S]`` -> ``[..., n]``."""
    grown = F.pad(x, (0, -x.shape[-1] % block))
    return grown.view(*x.shape[:-1], -1, block).sum(-1)


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean token of every block in fp32, ``[b, H, S, D]`` -> ``[b, H, n, D]``, by true counts."""
    sizes = block_sizes(x.shape[2], block, x.device)
    return block_sums(x.float().transpose(2, 3), block).transpose(2, 3) / sizes[:, None]


def probe_rows(tokens: int, block: int, blocks: int, rows: int) -> list[list[int]]:
    """Query positions to look at: `rows` in each of `blocks` evenly spread blocks, no random numbers.

    Rows are evenly spaced inside a block; from block to block they shift by the golden ratio, so that
    together they do not fall on a lattice of the grid. A short last block may give a row twice.
    """
    n = -(-tokens // block)
    blocks = min(blocks, n)
    positions = []
    for i in range(blocks):
        start = (2 * i + 1) * n // (2 * blocks) * block
        size = min(block, tokens - start)
        shift = (0.5 + _GOLDEN * i) % 1.0
        positions.append([start + int((j + shift) * size / rows) for j in range(rows)])
    return positions


def probe_shares(q: Tensor, k: Tensor, rows: list[list[int]], scale: float) -> Tensor:
    """Exact attention of the probe rows over image keys, ``[b, H, blocks, rows, S]`` in fp32."""
    index = torch.tensor(rows, device=q.device)
    some = q.index_select(2, index.flatten()).float() * scale
    shares = (some @ k.float().transpose(2, 3)).softmax(-1)
    return shares.view(*q.shape[:2], *index.shape, -1)


# Selection


def needed(mass: Tensor, share: float) -> Tensor:
    """How many of the largest entries hold `share` of the sum, along the last axis; at least 1."""
    ranked = mass.sort(dim=-1, descending=True).values.double().cumsum(-1)
    short = (ranked < share * ranked[..., -1:]).sum(-1)
    return (short + 1).clamp(max=mass.shape[-1])


def largest(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` largest entries along the last axis as bool; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if isinstance(count, Tensor):
        count = count[..., None]
    taken = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, taken.expand(order.shape))


# Attention


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    block: int,
    scale: float | None = None,
    want_lse: bool = False,
) -> Sparse:
    """Image queries over the blocks of image keys that `keep` names, and over all text keys.

    Args:
        q: ``[b, H, S, D]``.
        k, v: ``[b, H, S + text, D]``, image tokens first (see `image_first`).
        keep: bool ``[b or 1, H or 1, n, n]`` over blocks of image tokens.
        block: tokens per block.

    The block in which image keys end and text keys begin is kept for every query, so up to ``block - 1``
    image keys more than `keep` asks for are seen where text follows a short last block; the density
    counts them.
    """
    tokens, total = q.shape[2], k.shape[2]
    n, blocks = keep.shape[-1], -(-total // block)
    if total > tokens:
        text = torch.arange(blocks, device=keep.device) >= tokens // block
        keep = F.pad(keep, (0, blocks - n)) | text
    lists = BlockLists.from_mask(keep, q_len=tokens, k_len=total, q_block=block, k_block=block)
    found = block_sparse_attention(q, k, v, lists, scale=scale, return_lse=want_lse)
    out, lse = found if isinstance(found, tuple) else (found, None)
    sizes = block_sizes(tokens, block, keep.device).double()
    kept = (keep[..., :n].double() @ sizes * sizes).sum(-1).mean()
    return Sparse(out, kept / tokens**2, lse)
