"""SparseD: the blocks that mattered in the last dense step are the ones seen in all later steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmattn.errors import ConfigError
from mmattn.methods._blocks import (
    BlockMethod,
    block_sizes,
    block_sums,
    largest,
    token_order,
)
from mmattn.methods._calls import image_tokens, run_dense
from mmattn.methods._image_attention import Part, image_attention
from mmattn.methods.base import Dense, require
from mmattn.sites import Site

_EARLY, _CHOOSE, _SPARSE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class SparseD(BlockMethod):
    """Block-sparse attention that chooses its blocks once per run, exactly, and reuses them.

    Where a head looks changes from head to head but little from one denoising step to the next. So the
    first steps run dense; in the last of them every head and block of queries takes the blocks of keys
    that receive most attention, and all later steps see those only. "SparseD: Sparse Attention for
    Diffusion Language Models", arXiv 2509.24014. Compared in the tests with dense attention, with a
    choice written out in loops and, at equal density, with random blocks.

    Deviations: made for image and video models, where text takes the place the paper gives to generated
    tokens: text keys are always seen, text queries are dense, and probabilities that rank image blocks
    are taken among image keys. The paper's E = int(steps * skip) + 1 leaves two dense steps more than
    `dense_steps` does. Means divide by the true size of a short last block, which official code pads with
    zeros and so ranks too low. Scores are scaled as in the attention itself. ``select=1`` is dense, where
    official code fails. Where a run begins after its dense steps (image-to-image), or the grid or batch
    size changes during a run, that call is dense and chooses anew; the report counts it.

    A choice takes n * n bytes per head, layer and row of the batch, for n blocks of image tokens, until
    the next run: 90 MB for 32 000 tokens in 30 layers of 24 heads and two rows with blocks of 128.

    Args:
        select: share of the key blocks that each block of queries keeps, in (0, 1]: ``int(n * select) + 1``
            of n, at most all. 1 is dense attention (bitwise).
        block: image tokens per block.
        tile: ``(t, y, x)`` tokens of the cuboids that tokens are ordered by; None: raster order.
        dense_steps: first denoising steps that run dense, a number (int) or a share (float, rounded
            down), but never fewer than one, because a dense step makes the choice.
        dense_layers: first layers that run dense all the time.

    Shapes:
        ``q, k, v [B, H, N, D]``; choice ``[B, H, n, n]``.

    Raises:
        UnsupportedCall: no grid, no step clock, or a mask that does more than hide text.
        ConfigError: knobs out of range.
    """

    name: ClassVar[str] = "sparsed"
    needs: ClassVar[frozenset[str]] = frozenset({"grid", "clock"})
    paper: ClassVar[str] = "SparseD, arXiv 2509.24014"

    select: float = 0.3
    dense_steps: float = 0.2

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require(0 < self.select <= 1, f"select lies in (0, 1], got {self.select}")

    @property
    def headwise(self) -> bool:
        """Every head keeps its own blocks."""
        return True

    def phase(self, step: int | None, total: int | None) -> int | None:
        """0 in early steps, 1 in the dense step that chooses, 2 afterwards; None without a clock."""
        if step is None or total is None:
            return None
        count = self.dense_steps
        dense = int(count * total + 1e-9) if isinstance(count, float) else count
        last = max(1, dense) - 1
        return _EARLY if step < last else _CHOOSE if step == last else _SPARSE

    def keeps_all(self, tokens: int) -> str | None:
        """A sentence when every block is kept."""
        n = -(-tokens // self.block)
        return "the settings keep every block" if self.count(n) == n else None

    def count(self, n: int) -> int:
        """Blocks that each block of queries keeps, of `n`."""
        return n if self.select == 1 else min(n, int(n * self.select + 1e-9) + 1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> Tensor:
        """Dense in early steps, then the blocks chosen in the last of them."""
        if site.phase is None:
            raise ConfigError(
                "sparsed chooses its blocks in one denoising step and reuses them in later ones, but no "
                "step clock is running. Attach to a pipeline with a scheduler, or call "
                "session.step(index, total) in your own loop."
            )
        grid, image, image_keys = image_tokens(site, q.shape[2], k.shape[2])
        reason = None
        if site.role is None:
            reason = "one of the first layers (dense_layers)"
        elif site.phase == _EARLY:
            reason = "one of the first steps (dense_steps)"
        else:
            reason = self.keeps_all(image.stop - image.start)
        if reason is not None:
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)

        state, call = site.state, (grid, q.shape[0])
        if site.phase == _SPARSE and state.get("call") == call:
            return image_attention(
                self.sparse, q, k, v, mask=mask, scale=scale, site=site, dense=dense
            )
        if site.phase == _CHOOSE:
            reason = "the dense step that chooses the blocks"
        elif "call" in state:
            reason = "the grid or the batch size changed during the run; blocks are chosen anew"
        else:
            reason = "the run began after its dense steps; blocks are chosen now"
        with torch.no_grad():
            order = token_order(grid, self.tile, q.device)
            queries, keys = q[:, :, image], k[:, :, image_keys]
            if order is not None:
                queries, keys = queries.index_select(2, order), keys.index_select(2, order)
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            shares = block_shares(queries, keys, self.block, factor)
            state["keep"] = largest(shares, self.count(shares.shape[-1]))
            state["call"] = call
        return run_dense(q, k, v, site=site, dense=dense, reason=reason)

    def choose(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """What the dense step chose for these rows of the batch, bool ``[b, H, n, n]``."""
        keep: Tensor = part.site.state["keep"][part.rows]
        return keep


def block_shares(q: Tensor, k: Tensor, block: int, scale: float) -> Tensor:
    """Mean attention probability of every pair of blocks in fp32, ``[B, H, n, n]``.

    One row of the batch and one block of queries at a time, so a strip of probabilities is all that
    exists at once.
    """
    sizes = block_sizes(k.shape[2], block, k.device)
    rows = []
    for queries, keys in zip(q, k, strict=True):
        keys = keys.float().transpose(1, 2)
        strips = [
            block_sums((strip.float() * scale @ keys).softmax(-1).mean(1), block) / sizes
            for strip in queries.split(block, dim=1)
        ]
        rows.append(torch.stack(strips, dim=1))
    return torch.stack(rows)
