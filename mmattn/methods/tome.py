"""ToMe: merges tokens that look alike, so that attention (in ViTs: every later layer) sees fewer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods import _merging as merging
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class ToMe(Method):
    """Token merging by bipartite soft matching, for timm ViTs and for diffusers self-attention.

    ViTs ("Token Merging: Your ViT But Faster", arXiv 2210.09461): after each block, image tokens at even
    positions propose to their most similar token at an odd position (cosine of the mean over heads of the
    keys), and the `r` best pairs merge by size-weighted mean. Class and register tokens are protected, and
    attention adds ``log(size)`` to the scores of merged keys.

    diffusers ("Token Merging for Fast Stable Diffusion", arXiv 2303.17604): before self-attention, one
    token per 2 x 2 cell is a destination, the best `ratio` of all tokens merge into them by plain mean;
    afterwards each token takes the output of the one it went into. Cross attention and MLP see all tokens.

    Deviations. ViTs: merging comes after the MLP instead of between attention and MLP, so the saving
    starts one MLP later; after the last chosen block the tokens are spread out again, so the model
    returns as many tokens as ever, and mean- or attention-pooled models weigh merged tokens by their size.
    diffusers: the metric is the normed input of the attention, not the hidden state before the norm.
    Rotary models are left alone: their position tables have one row per token. Compared in the tests with
    merging random pairs.

    Args:
        ratio: diffusers, share of the tokens merged away at each site, up to 3/4; ViTs, share of the image
            tokens gone after all blocks, spread evenly, used when `r` is None. 0 is the untouched model.
        r: ViTs, tokens merged after each block; at most half of those left.
        proportional: ViTs, add ``log(size)`` to the scores.
        random: diffusers, a random corner of each cell (anew in every step, the same for all rows and for
            both halves of classifier-free guidance) instead of the top-left one. In a compiled graph the
            draw happens once, when the graph is made.
        max_downsample: diffusers UNets, act only where the latent grid is halved to at most 1/max_downsample
            of its rows; 1 is the highest resolution only. SDXL has no attention there and needs 2.

    Shapes:
        hidden states ``[B, N, C]``, keys ``[B, H, N, D]``.

    Raises:
        UnsupportedCall: no token grid, or tokens that are not that grid.
    """

    name: ClassVar[str] = "tome"
    seams: ClassVar[tuple[str, ...]] = ("attention", "tokens")
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461 and 2303.17604"

    ratio: float = 0.5
    r: int | None = None
    proportional: bool = True
    random: bool = True
    max_downsample: int = 1

    def __post_init__(self) -> None:
        """Check the knobs."""
        require(0 <= self.ratio <= 0.75, f"ratio must lie in [0, 0.75], got {self.ratio}")
        require(self.r is None or self.r >= 0, f"r must not be negative, got {self.r}")
        require(
            self.max_downsample >= 1,
            f"max_downsample must be at least 1, got {self.max_downsample}",
        )

    @property
    def passive(self) -> bool:
        """True when nothing would be merged, on any host."""
        return self.ratio == 0 and not self.r

    def accepts(self, site: Site) -> str | None:
        """Not rotary sites, sites without a block of their own, or attention that adds its input."""
        if "rotary" in site.tags:
            return "its rotary positions have one row per token, so tokens cannot be merged"
        if site.host == "timm":
            if site.kind != "self":
                return "merging needs plain self-attention"
            if site.token_module is None or "no-tokens" in site.tags:
                return "its block does not carry hidden states [B, N, C]"
            return None
        if getattr(site.module, "residual_connection", False):
            return "the attention adds its own input, which would be merged as well"
        return None

    def role(self, site: Site) -> int | None:
        """How many sites merge, and whether this is the first or the last of them."""
        assert site.run is not None
        sites = [s for s in site.run.sites if any(m is self for _, m in s.token_methods)]
        if site not in sites:
            return None
        return 4 * len(sites) + 2 * (site is sites[-1]) + (site is sites[0])

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
        """ViTs: remember the keys and weigh merged ones by size. diffusers: the original attention."""
        if self.passive or site.host != "timm":
            return dense(q, k, v)
        site.state["metric"] = k.mean(dim=1)
        size = site.shared.get("size")
        if size is None or not self.proportional:
            return dense(q, k, v)
        return dense(q, k, v, mask=size.log().to(q.dtype)[:, None, None, :])

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """ViTs: a forward begins at the first site. diffusers: merge."""
        if self.passive:
            return x
        if site.host == "timm":
            if _first(site):
                site.shared.clear()
            return x
        return self._merge_grid(x, site)

    def leave(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """ViTs: merge after the block, spread out after the last. diffusers: unmerge."""
        if self.passive:
            return x
        if site.host == "timm":
            return self._after_block(x, site)
        source = site.state.pop("source", None)
        return x if source is None else merging.spread(x, source)

    # -- ViTs ----------------------------------------------------------------------------------------

    def _after_block(self, x: torch.Tensor, site: Site) -> torch.Tensor:
        shared = site.shared
        metric = site.state.pop("metric")
        b, n, _ = x.shape
        if "size" not in shared:
            image = site.layout.image_slice(n)
            if image.stop != n:
                raise UnsupportedCall(
                    f"{n - image.stop} tokens follow the image tokens; ToMe expects them in front."
                )
            shared["prefix"], shared["tokens"] = image.start, n
            shared["size"] = x.new_ones(b, n, dtype=torch.float32)
            shared["source"] = torch.arange(n, device=x.device).expand(b, n)
        prefix, tokens = shared["prefix"], shared["tokens"]
        site.note("of", tokens)
        site.note("kept", n)
        if _last(site):
            x = merging.spread(x, shared["source"])
            shared.clear()
            return x
        wanted = int(self.ratio * (tokens - prefix) / _count(site)) if self.r is None else self.r
        src = torch.arange(prefix + prefix % 2, n, 2, device=x.device)
        dst = torch.arange(prefix + 1 - prefix % 2, n, 2, device=x.device)
        r = min(wanted, src.shape[0], (n - prefix) // 2)
        if r == 0:
            return x
        source = merging.match(metric, src, dst, r)
        x = merging.average(x, source, shared["size"], n - r)
        shared["size"] = merging.sizes(source, shared["size"], n - r)
        shared["source"] = source.gather(1, shared["source"])
        return x

    # -- diffusers -----------------------------------------------------------------------------------

    def _merge_grid(self, x: torch.Tensor, site: Site) -> torch.Tensor:
        if x.ndim != 3:
            raise UnsupportedCall(f"ToMe needs hidden states [B, N, C], got {list(x.shape)}.")
        b, n, _ = x.shape
        grid = site.layout.grid_for(n)
        t, y, x_ = grid
        image = site.layout.image_slice(n)
        assert site.layout.grid is not None
        full = site.layout.grid
        site.note("of", n)
        if ceil(sqrt((full[1] * full[2]) // (y * x_))) > self.max_downsample:
            site.note("kept", n)
            return x
        offsets = None
        if self.random:
            offsets = _draw(site, t * (y // 2) * (x_ // 2)).to(x.device)
        is_dst = merging.cells(grid, offsets, x.device)
        dst_count = t * (y // 2) * (x_ // 2)
        order = (~is_dst).to(torch.uint8).argsort(stable=True)
        dst, src = order[:dst_count], order[dst_count:]
        r = min(int(self.ratio * len(order)), len(src)) if dst_count else 0
        site.note("kept", n - r)
        if r == 0:
            return x
        source = merging.match(x, src + image.start, dst + image.start, r)
        site.state["source"] = source
        return merging.average(x, source, x.new_ones(b, n, dtype=torch.float32), n - r)


def _first(site: Site) -> bool:
    return bool(int(site.role or 0) & 1)


def _last(site: Site) -> bool:
    return bool(int(site.role or 0) & 2)


def _count(site: Site) -> int:
    return int(site.role or 0) // 4


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _draw(site: Site, count: int) -> torch.Tensor:
    """`count` corners 0..3 that depend on the session's seed, the site and the step, and nothing else."""
    assert site.run is not None
    step = site.run.clock.index or 0
    seed = (site.generator().initial_seed() * 9973 + step) % 2**63
    return torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
