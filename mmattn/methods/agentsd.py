"""AgentSD: in Stable Diffusion UNets, merged tokens attend through far fewer merged tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.errors import UnsupportedCall
from mmattn.methods import _agentsd_match as matching
from mmattn.methods._calls import no_clock, run_dense
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class AgentSD(Method):
    """Agent attention on merged tokens, for the self-attention of diffusers UNets; nothing is trained.

    One token per `cell` x `cell` square is a destination, all others are ranked by how much they are like
    their best destination (cosine). The first `ratio` N of the ranking merge into theirs: the features F.
    The first `agent_ratio` N merge: the agents G, far fewer. Both are projected by the site's own weights,
    agents as queries, and
    ``V_A = softmax(G_q F_k^T s) F_v``; ``O = softmax(F_q G_q^T s^k_scale2) V_A + k_shortcut F_v``.
    Afterwards every token takes the output of the feature it became. Agents act in the first steps;
    later ones only merge, on finer cells. "Agent Attention: On the Integration of Softmax and Linear
    Attention", arXiv 2312.08874, its part on Stable Diffusion; merging is that of ToMe, arXiv 2303.17604.

    Two seams, unlike `AgentAttention`, which pools projected queries: agents are means of the *unmerged*
    tokens, so they are made before the projections (``tokens``), travel behind the features through them,
    and are split off again at the product (``attention``).

    Deviations. The published code matches on the hidden state before the norm; a processor is given the
    normed one, and that is the metric here. Its defaults (cells of 2, `ratio` 0.5, `agent_ratio` 0.8) never
    make an agent, because fewer than half as many agents as features are asked for; the defaults here
    are its recipe for 50 steps. The recipe's later steps ask for agents they never get, so here they have no
    such knob. It turns random places off in odd batches, lest the halves of guidance get different ones;
    here the draw depends on seed, site and step alone, so rows agree at any batch size, in one call
    or in two. A ratio that merges nothing is dense attention instead of an error. Means are taken in
    fp32; the products go through torch's SDPA, which needs no option for fp32 scores (Stable Diffusion 2).
    Published for the highest resolution of Stable Diffusion 1 and 2; SDXL (`max_downsample` 2) and DiTs
    without rotary positions are this project's extension. Compared in the tests with a loop-shaped
    reference, with dense attention, with ToMe and with a random ranking.

    Args:
        ratio: share of the tokens merged away, in [0, 1), at most all that are no destination; 0 is the
            untouched model, bitwise.
        agent_ratio: share of the tokens merged away to make agents, in [0, 1], clipped alike; with cells of
            4 the default leaves the destinations, N / 16 agents. Unless agents are fewer than half the
            features, the call only merges.
        cell: side of a square in the steps with agents, at least 2 tokens.
        late_cell: the same in the other steps.
        agent_steps: the first steps, where agents act; a float is a share of the run's steps, rounded
            down, an int a number of steps. 0 (merging only) and 1.0 need no step clock.
        k_scale2: exponent on the scale of the second softmax; 1 is the ordinary scale, smaller is sharper.
        k_shortcut: share of its own value added to every feature; constant values come back times 1.075.
        random: a random place in each square, anew in every step, instead of the top-left one. In a
            compiled graph the draw happens once, when the graph is made.
        max_downsample: act only where the latent grid is halved to at most 1/max_downsample of its rows;
            1 is the highest resolution only. SDXL has no attention there and needs 2.

    Shapes:
        hidden states ``[B, N, C]``; in ``attend`` the queries are ``[B, H, F + G, D]`` and the output is
        ``[B, H, F, D]``.

    Raises:
        UnsupportedCall: no token grid, or tokens that are not that grid.
        ConfigError: knobs out of range, or `agent_steps` without a step clock.
    """

    name: ClassVar[str] = "agentsd"
    seams: ClassVar[tuple[str, ...]] = ("attention", "tokens")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("diffusers",)
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "Agent Attention, arXiv 2312.08874"

    ratio: float = 0.4
    agent_ratio: float = 0.95
    cell: int = 4
    late_cell: int = 2
    agent_steps: float = 0.4
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    random: bool = True
    max_downsample: int = 1

    def __post_init__(self) -> None:
        """Check the knobs."""
        require(0 <= self.ratio < 1, f"ratio must lie in [0, 1), got {self.ratio}")
        require(
            0 <= self.agent_ratio <= 1, f"agent_ratio must lie in [0, 1], got {self.agent_ratio}"
        )
        for knob in ("cell", "late_cell"):
            side = getattr(self, knob)
            require(side >= 2, f"{knob} must be at least 2, got {side}")
        share = isinstance(self.agent_steps, float)
        require(
            0 <= self.agent_steps <= 1 if share else self.agent_steps >= 0,
            "agent_steps is a share of the steps (a float in [0, 1]) or a number of steps (int >= 0), "
            f"got {self.agent_steps!r}",
        )
        require(
            self.max_downsample >= 1,
            f"max_downsample must be at least 1, got {self.max_downsample}",
        )

    @property
    def passive(self) -> bool:
        """True when no feature would merge."""
        return self.ratio == 0

    def accepts(self, site: Site) -> str | None:
        """Not rotary sites, or attention that adds its input."""
        if "rotary" in site.tags:
            return "its rotary positions have one row per token, so tokens cannot be merged"
        if getattr(site.module, "residual_connection", False):
            return "the attention adds its own input, which would be merged as well"
        return None

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the steps with agents."""
        share = isinstance(self.agent_steps, float)
        if self.agent_steps == 0:
            return False
        if share and self.agent_steps == 1:
            return True
        if step is None or total is None:
            return None
        return step < (int(self.agent_steps * total + 1e-9) if share else self.agent_steps)

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Merge: ``[B, N, C]`` -> features, and behind them the agents, ``[B, F + G, C]``."""
        if self.passive:
            return x
        site.state.pop("merged", None)  # of a call that broke off
        if site.phase is None:
            raise no_clock(self.name, f"agent_steps={self.agent_steps}", "agent_steps to 1.0 or 0")
        found, r, agents_r = self._plan(x, site)
        n = x.shape[1]
        site.note("of", n)
        site.note("kept", n - r)
        site.note("agents", 0 if agents_r is None else n - agents_r)
        if found is None:
            return x
        features, agents = matching.merge(x, found, r, agents_r)
        count = 0 if agents is None else agents.shape[1]
        site.state["merged"] = _Merged(found, r, n, features.shape[1], count)
        return features if agents is None else torch.cat([features, agents], dim=1)

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
        """Features read the keys through the agents; the original attention where there are none."""
        if self.passive:
            return dense(q, k, v)
        merged: _Merged | None = site.state.get("merged")
        if merged is None:
            reason = "nothing merges at this resolution (max_downsample, ratio, cell)"
            return run_dense(q, k, v, site=site, dense=dense, reason=reason)
        f, n = merged.features, merged.tokens
        if not merged.agents:
            site.note("density", (f / n) ** 2)
            return dense(q, k, v)
        site.note("density", 2 * f * merged.agents / n**2)
        agents, q, k, v = q[:, :, f:], q[:, :, :f], k[:, :, :f], v[:, :, :f]
        s = q.shape[-1] ** -0.5 if scale is None else scale
        values = F.scaled_dot_product_attention(agents, k, v, scale=s)
        out = F.scaled_dot_product_attention(q, agents, values, scale=s**self.k_scale2)
        return out + self.k_shortcut * v

    def leave(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Unmerge: ``[B, F, C]`` -> ``[B, N, C]``."""
        merged: _Merged | None = None if self.passive else site.state.pop("merged", None)
        return x if merged is None else matching.spread(x, merged.found, merged.r)

    def _plan(self, x: torch.Tensor, site: Site) -> tuple[matching.Match | None, int, int | None]:
        """The ranking and how far down it features and agents merge; None, 0, None for not at all."""
        nothing = (None, 0, None)
        if x.ndim != 3:
            raise UnsupportedCall(f"AgentSD needs hidden states [B, N, C], got {list(x.shape)}.")
        n = x.shape[1]
        grid = site.layout.grid_for(n)
        t, y, x_ = grid
        if t * y * x_ != n:
            raise UnsupportedCall(
                f"AgentSD merges tokens of a grid alone; {n} tokens are not the grid {grid}."
            )
        assert site.layout.grid is not None
        full = site.layout.grid
        if ceil(sqrt((full[1] * full[2]) // (y * x_))) > self.max_downsample:
            return nothing
        cell = self.cell if site.phase else self.late_cell
        count = t * (y // cell) * (x_ // cell)
        r = min(n - count, int(n * self.ratio)) if count else 0
        if r == 0:
            return nothing
        offsets = _draw(site, count, cell * cell).to(x.device) if self.random else None
        found = matching.match(x, matching.destinations(grid, cell, offsets, x.device))
        agents_r = min(n - count, int(n * self.agent_ratio))
        acts = bool(site.phase) and 2 * (n - agents_r) < n - r
        return found, r, agents_r if acts else None


class _Merged(NamedTuple):
    """What `AgentSD.enter` did, for `attend` and `leave` of the same call; three counts of tokens."""

    found: matching.Match
    r: int
    tokens: int
    features: int
    agents: int


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _draw(site: Site, count: int, places: int) -> torch.Tensor:
    """`count` places below `places`; they depend on the session's seed, the site and the step alone."""
    assert site.run is not None
    step = site.run.clock.index or 0
    seed = (site.generator().initial_seed() * 9973 + step) % 2**63
    return torch.randint(0, places, (count,), generator=torch.Generator().manual_seed(seed))
