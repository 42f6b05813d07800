"""AgentAttention: a few pooled queries stand between the queries and the keys."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.layout import Grid
from mmattn.methods._calls import around, image_tokens, key_mask, mask_rows, no_clock
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class AgentAttention(Method):
    """Lets image queries read the keys through a small grid of pooled queries (agents).

    ``A = pool(q)``; ``V_A = softmax(A K^T s) V``; ``O = softmax(q A^T s^k_scale2) V_A + k_shortcut v``.
    Cost falls from ``Q K`` to ``n (Q + K)`` pairs for n agents. "Agent Attention: On the Integration of
    Softmax and Linear Attention", arXiv 2312.08874; the two constants are those of its training-free
    part, AgentSD.

    What is published and what is not: AgentSD runs in the highest-resolution blocks of Stable Diffusion
    UNets, on tokens merged by ToMe, with merged tokens as agents, for the first 20 of 50 steps
    (``stop=0.4`` here). Pooling the query map of the site's own grid is how the paper's *trained*
    backbones make agents. Using that without training on DiT grids is this project's extension; nobody
    has published quality numbers for it, and it changes images visibly. On rotary models the agents are
    means of already rotated queries. Biases and the depthwise convolution of the trained version are not
    used. Compared in the tests with dense attention and with agents taken at random.

    Text and class tokens keep dense attention as queries and stay visible to the agents as keys.

    Args:
        agents: agents per frame, a square number p*p; p is clipped to the rows and columns of the grid.
        agent_frames: frames of agents for a video; None keeps one set per latent frame.
        k_scale2: exponent on the scale of the second softmax; 1 is the ordinary scale, smaller is sharper.
        k_shortcut: share of its own value added to every image token.
        strength: 0 is dense attention (bitwise), 1 is agent attention, between them a mix of both outputs.
        start, stop: shares of the denoising steps between which agents act, ``start <= step/total < stop``;
            the defaults need no step clock.

    Shapes:
        ``q, k, v [B, H, N, D]``, N the tokens of the site; agents ``[B, H, pt*py*px, D]``.

    Raises:
        UnsupportedCall: no grid, queries that are not the keys' tokens, a mask in which image queries differ.
        ConfigError: ``start``/``stop`` set and no step clock.
    """

    name: ClassVar[str] = "agent-attention"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "window")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "Agent Attention, arXiv 2312.08874"
    masks: ClassVar[bool] = True

    agents: int = 49
    agent_frames: int | None = None
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    strength: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Check the knobs."""
        square = self.agents > 0 and isqrt(self.agents) ** 2 == self.agents
        require(square, f"agents must be a square number like 49, got {self.agents}")
        frames = self.agent_frames
        require(frames is None or frames > 0, f"agent_frames must be positive, got {frames}")
        require(0 <= self.strength <= 1, f"strength must lie in [0, 1], got {self.strength}")
        require(
            0 <= self.start < self.stop <= 1,
            f"start and stop must satisfy 0 <= start < stop <= 1, got {self.start} and {self.stop}",
        )

    @property
    def passive(self) -> bool:
        """True at strength 0."""
        return self.strength == 0

    @property
    def _timed(self) -> bool:
        return (self.start, self.stop) != (0.0, 1.0)

    def accepts(self, site: Site) -> str | None:
        """Not language models and text encoders."""
        if site.tags & {"decoder", "text"}:
            return "text has no image grid to pool queries on"
        return None

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the steps where agents act."""
        if not self._timed:
            return True
        if step is None or total is None:
            return None
        return ceil(self.start * total) <= step < ceil(self.stop * total)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        """Agent attention for image queries, dense attention for the rest."""
        if self.passive:
            return dense(q, k, v)
        if site.phase is None:
            raise no_clock(self.name, f"start={self.start}, stop={self.stop}", "start=0, stop=1")
        if not site.phase:
            site.meter.fell_back("this step lies outside start..stop")
            site.note("density", 1.0)
            return dense(q, k, v)
        grid, image, image_keys = image_tokens(site, q.shape[2], k.shape[2])
        keys = key_mask(mask_rows(mask, image))
        agents = self.pool(q[:, :, image], grid)

        s = q.shape[-1] ** -0.5 if scale is None else scale
        values = F.scaled_dot_product_attention(agents, k, v, attn_mask=keys, scale=s)
        out = F.scaled_dot_product_attention(q[:, :, image], agents, values, scale=s**self.k_scale2)
        out = out + self.k_shortcut * v[:, :, image_keys]

        queries, total = q.shape[2], k.shape[2]
        inside, n = image.stop - image.start, agents.shape[2]
        pairs = n * (total + inside) + (queries - inside) * total
        site.note("density", pairs / (queries * total) + float(self.strength < 1))
        if self.strength < 1:
            full = dense(q, k, v)
            mixed = torch.lerp(full[:, :, image], out.to(full.dtype), self.strength)
            return torch.cat([full[:, :, : image.start], mixed, full[:, :, image.stop :]], dim=2)
        return around(out, q, k, v, image, mask, dense)

    def pool(self, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Agents ``[B, H, n, D]``: means of the query map over a ``(pt, py, px)`` grid of cells."""
        t, y, x = grid
        side = isqrt(self.agents)
        size = (min(self.agent_frames or t, t), min(side, y), min(side, x))
        volume = q.transpose(2, 3).reshape(-1, q.shape[-1], t, y, x)
        pooled = F.adaptive_avg_pool3d(volume, size)
        return pooled.flatten(2).transpose(1, 2).reshape(*q.shape[:2], -1, q.shape[-1])
