"""RandomBlocks: every block of image queries sees random blocks of keys, the baseline for block methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmattn.errors import UnsupportedCall
from mmattn.methods._blocks import BlockMethod, largest
from mmattn.methods._image_attention import Part
from mmattn.methods.base import require


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(BlockMethod):
    """Block-sparse attention whose blocks are drawn at random, the own block always among them.

    A method that chooses blocks of keys is worth its name when it beats this at the same density. Every
    head and block of queries draws for itself; all rows of the batch share the draw. It depends on the
    session's seed, the layer and the denoising step alone, so guidance in one batch equals guidance in
    two calls, and every call without a step clock draws alike. Drawing anew in every step lets everything
    see everything in the course of a run, which alone is worth some 3 dB on the embedded video model;
    against a method whose pattern stays, ``redraw=False`` is the fairer baseline. Larger densities keep
    what smaller ones keep. The global generator is never consumed. No paper.

    Args:
        density: share of the key blocks that each block of queries keeps, in (0, 1], own block included,
            rounded down but at least one; 1 is dense attention (bitwise). Text keys come on top.
        redraw: draw anew in every denoising step; False keeps one draw per layer.
        block: image tokens per block.
        tile: ``(t, y, x)`` tokens of the cuboids that tokens are ordered by; None: raster order.
        dense_steps: first denoising steps that run dense, a number (int) or a share (float).
        dense_layers: first layers that run dense.

    Shapes:
        ``q, k, v [B, H, N, D]``; choice ``[1, H, n, n]`` for n blocks of image tokens.

    Raises:
        UnsupportedCall: no grid, a mask that does more than hide text, or a graph that is being traced,
            in which nothing can be drawn.
        ConfigError: knobs out of range, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "random-blocks"
    paper: ClassVar[str] = "none"

    density: float = 0.3
    redraw: bool = True

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require(0 < self.density <= 1, f"density lies in (0, 1], got {self.density}")

    def keeps_all(self, tokens: int) -> str | None:
        """A sentence when every block is kept."""
        if self.density == 1:
            return "the settings keep every block"
        return super().keeps_all(tokens)

    def choose(self, q: Tensor, k: Tensor, part: Part) -> Tensor:
        """Own block and random others, bool ``[1, H, n, n]``."""
        if torch.compiler.is_compiling():
            raise UnsupportedCall("Random blocks cannot be drawn while a graph is traced.")
        n = -(-q.shape[2] // self.block)
        # A copy that is seeded by the step, not one that moves on: a second model call in the same step
        # (guidance) must draw what a batch with both rows would have drawn.
        generator = part.site.generator(q.device).clone_state()
        step = part.site.run.step if self.redraw and part.site.run is not None else None
        seed = generator.initial_seed() * 1_009 + (0 if step is None else step + 1)
        generator.manual_seed(seed % (1 << 63))
        draw = torch.rand(1, q.shape[1], n, n, generator=generator, device=q.device)
        draw.diagonal(dim1=-2, dim2=-1).fill_(2.0)
        return largest(draw, max(1, int(n * self.density + 1e-9)))
