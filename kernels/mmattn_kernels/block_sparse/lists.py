"""Which blocks of keys every block of queries sees: counts and sorted indices, per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Listing(NamedTuple):
    """Rows of a boolean matrix as lists: how many are True, and where."""

    counts: Tensor
    indices: Tensor


def list_true(mask: Tensor) -> Listing:
    """For every row of ``mask [..., n]``: the number of True, and their positions in rising order.

    Positions fill the first `counts` places of ``indices [..., n]`` (int32); the places behind hold no
    position and are never read. Nothing is sorted and nothing is copied to the host.
    """
    n = mask.shape[-1]
    place = mask.cumsum(-1, dtype=torch.int32)
    # The False ones are all written to one place more than there are, which is then cut off.
    target = torch.where(mask, place - 1, n).long()
    positions = torch.arange(n, dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = torch.zeros(*mask.shape[:-1], n + 1, dtype=torch.int32, device=mask.device)
    indices.scatter_(-1, target, positions)
    return Listing(mask.sum(-1, dtype=torch.int32), indices[..., :n].contiguous())


@dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks for `block_sparse_attention`; make them with `from_mask`.

    Shapes:
        ``counts [B|1, H|1, nq]`` int32, ``indices [B|1, H|1, nq, most]`` int32 in rising order, with
        ``nq = ceil(q_len / q_block)`` and key blocks numbered below ``nk = ceil(k_len / k_block)``.
        ``patterns [P, q_block, k_block]`` bool and ``pattern_of [B|1, H|1, nq, nk]`` int32 say which
        pairs a block keeps; -1 means all of them. Both are None when every listed block is kept whole.
    """

    counts: Tensor
    indices: Tensor
    q_len: int
    k_len: int
    q_block: int
    k_block: int
    patterns: Tensor | None = None
    pattern_of: Tensor | None = None

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        q_len: int,
        k_len: int,
        q_block: int,
        k_block: int,
        patterns: Tensor | None = None,
        pattern_of: Tensor | None = None,
    ) -> BlockLists:
        """Lists of the blocks that `mask` keeps.

        Args:
            mask: bool ``[B|1, H|1, nq, nk]``, True where a block of queries sees a block of keys.
            q_len, k_len: tokens; the last block of each may be shorter.
            q_block, k_block: tokens per block.
            patterns: bool ``[P, q_block, k_block]``, which pairs inside a block are kept.
            pattern_of: integers ``[B|1, H|1, nq, nk]``: the pattern of every block, -1 for none.

        Raises:
            ValueError: shapes that contradict each other, or one of `patterns` and `pattern_of` alone.
            TypeError: a mask that is not bool.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"BlockLists.from_mask needs a bool mask, got {mask.dtype}.")
        if min(q_len, k_len, q_block, k_block) < 1:
            raise ValueError(
                f"BlockLists: lengths and blocks must be positive, got q_len={q_len}, k_len={k_len}, "
                f"q_block={q_block}, k_block={k_block}."
            )
        want = (-(-q_len // q_block), -(-k_len // k_block))
        if mask.ndim != 4 or tuple(mask.shape[2:]) != want:
            raise ValueError(
                f"BlockLists: {q_len} queries in blocks of {q_block} and {k_len} keys in blocks of "
                f"{k_block} need a mask [B|1, H|1, {want[0]}, {want[1]}], got {list(mask.shape)}."
            )
        if (patterns is None) != (pattern_of is None):
            raise ValueError("BlockLists: patterns and pattern_of belong together; give both.")
        if patterns is not None and pattern_of is not None:
            if patterns.dtype != torch.bool or tuple(patterns.shape[1:]) != (q_block, k_block):
                raise ValueError(
                    f"BlockLists: patterns must be bool [P, {q_block}, {k_block}], got "
                    f"{patterns.dtype} {list(patterns.shape)}."
                )
            if pattern_of.ndim != 4 or tuple(pattern_of.shape[2:]) != want:
                raise ValueError(
                    f"BlockLists: pattern_of must be [B|1, H|1, {want[0]}, {want[1]}], got "
                    f"{list(pattern_of.shape)}."
                )
            pattern_of = pattern_of.to(torch.int32)
        counts, indices = list_true(mask)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            indices = indices[..., : max(1, int(counts.max()))].contiguous()
        return cls(counts, indices, q_len, k_len, q_block, k_block, patterns, pattern_of)

    @classmethod
    def from_token_mask(cls, mask: Tensor, *, q_block: int, k_block: int) -> BlockLists:
        """Lists for a mask of single pairs, bool ``[B|1, H|1, Q, K]``; for tests and small problems.

        A block is listed if any of its pairs is kept, with a pattern unless all of them are. Equal
        patterns are stored once.
        """
        q_len, k_len = mask.shape[2:]
        nq, nk = -(-q_len // q_block), -(-k_len // k_block)
        # Pairs outside the lengths count as kept, so that a whole boundary block needs no pattern.
        grown = F.pad(mask, (0, nk * k_block - k_len, 0, nq * q_block - q_len), value=True)
        inside = F.pad(mask, (0, nk * k_block - k_len, 0, nq * q_block - q_len), value=False)
        tiles = grown.unflatten(3, (nk, k_block)).unflatten(2, (nq, q_block)).transpose(3, 4)
        some = inside.unflatten(3, (nk, k_block)).unflatten(2, (nq, q_block)).transpose(3, 4)
        listed = some.flatten(4).any(-1)
        partial = listed & ~tiles.flatten(4).all(-1)
        patterns = pattern_of = None
        if bool(partial.any()):
            patterns, which = tiles[partial].unique(dim=0, return_inverse=True)
            pattern_of = torch.full(listed.shape, -1, dtype=torch.int32, device=mask.device)
            pattern_of[partial] = which.to(torch.int32)
        return cls.from_mask(
            listed,
            q_len=q_len,
            k_len=k_len,
            q_block=q_block,
            k_block=k_block,
            patterns=patterns,
            pattern_of=pattern_of,
        )

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.q_len // self.q_block), -(-self.k_len // self.k_block)

    def mask(self) -> Tensor:
        """The listed blocks as a mask, bool ``[B|1, H|1, nq, nk]``."""
        return mask_of(self.counts, self.indices, self.blocks[1])

    def token_mask(self) -> Tensor:
        """The kept pairs, bool ``[B|1, H|1, Q, K]``: quadratic in tokens, for tests and small problems."""
        kept = self.mask()
        grown = kept.repeat_interleave(self.q_block, 2).repeat_interleave(self.k_block, 3)
        if self.patterns is not None and self.pattern_of is not None:
            inside = self.patterns[self.pattern_of.clamp(min=0).long()]
            inside = inside | (self.pattern_of < 0)[..., None, None]
            inside = inside.transpose(3, 4).flatten(4, 5).flatten(2, 3)
            grown = grown & inside
        return grown[:, :, : self.q_len, : self.k_len]

    def density(self) -> Tensor:
        """Share of the pairs in listed blocks, a number on the lists' device; patterns are not
        counted, because a kernel computes those blocks whole."""
        nq, nk = self.blocks
        rows = torch.full((nq,), self.q_block, device=self.counts.device)
        rows[-1] = self.q_len - (nq - 1) * self.q_block
        columns = torch.full((nk,), self.k_block, device=self.counts.device)
        columns[-1] = self.k_len - (nk - 1) * self.k_block
        pairs = self.mask().double() @ columns.double() @ rows.double()
        return pairs.mean() / (self.q_len * self.k_len)

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""
        return BlockLists(
            self.counts.to(device),
            self.indices.to(device),
            self.q_len,
            self.k_len,
            self.q_block,
            self.k_block,
            None if self.patterns is None else self.patterns.to(device),
            None if self.pattern_of is None else self.pattern_of.to(device),
        )


def mask_of(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Lists back to a mask, bool ``[B|1, H|1, nq, blocks]``."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    mask = torch.zeros(*counts.shape, blocks, dtype=torch.bool, device=counts.device)
    # A scatter of False over True would lose blocks, so the places behind the counts go nowhere.
    target = torch.where(listed, indices.long(), torch.full_like(indices, blocks).long())
    grown = torch.cat([mask, mask[..., :1]], dim=-1)
    return grown.scatter_(-1, target, True)[..., :blocks]
