"""VMoBA: each video query attends to its own chunk of tokens and to the chunks most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.layout import Grid
from mmattn.methods import _vmoba_select as chunks
from mmattn.methods._calls import around, image_tokens, mask_rows, no_clock
from mmattn.methods._chunk_attention import attend_chunks
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site


@dataclass(frozen=True)
class VMoBA(Method):
    """Block-sparse attention whose chunks are runs of frames, windows and cuboids in turn.

    Layer ``l`` uses 1-D chunks (whole frames) when ``l % 3 == 0``, 2-D windows over all frames when it
    is 1, and 3-D cuboids when it is 2. A query scores a chunk by its dot product with the chunk's mean
    key, keeps its own chunk, and adds others: the `topk` best, or the fewest that reach `threshold`.
    "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858.

    The paper's training-free numbers use ``pool="query_head", select="topk"``; its full method,
    ``head_global`` with ``threshold=0.25``, was fine-tuned and makes videos tremble without training.
    The authors see a gain only above some 33 000 tokens. Compared with dense attention and, in the
    tests, with random chunks of equal density.

    Deviations: pools are taken per batch item, so CFG in one batch equals two calls; ``topk=1`` means own
    chunks only (officially it silently runs dense); thresholds nobody can reach keep everything. The last
    two follow the official code with ``compat=True``. Text tokens, which the paper's models do not have
    in the sequence, are not chunked: as keys every query sees them, as queries they stay dense. Execution
    is exact: on a CPU from 2048 tokens on, each chunk is multiplied with the queries that chose it (one
    core, density 0.2 to 0.25, choice included: 1.0 to 3.4 times the speed of dense SDPA at 4096 tokens);
    everywhere else it is SDPA with a mask over blocks of queries, which bounds memory and saves no time.

    Args:
        temporal: frames per 1-D chunk, a fraction of a frame allowed; None: an eighth of the video,
            rounded up to whole frames (rows for an image). The last chunk may be shorter.
        spatial: rows and columns of a 2-D chunk; must divide the grid. None: the smallest divisors that
            cut each axis into at most 8.
        cuboid: frames, rows and columns of a 3-D chunk; must divide the grid. None: at most 3 pieces in
            time and 6 along rows and columns.
        select: ``"topk"`` or ``"threshold"``; None follows whichever value is given, threshold otherwise.
        pool: over what chunks compete: ``query_head``, ``head_global``, ``overall``, or ``block``
            (threshold only).
        topk: chunks per query, own included, one number or one per pattern (1-D, 2-D, 3-D); None:
            a quarter of the chunks, rounded up, which is the paper's 2/6/18 of 7/24/72. As many as there
            are chunks, or more, is dense attention (bitwise).
        threshold: share of min-max-normalised similarity to reach; None: 0.25. Above 1 it is dense
            attention (bitwise).
        dense_share: first share of the steps that run dense, ``step < floor(dense_share * total)``;
            0 needs no clock.
        dense_layers: first layers that run dense; they still count in the 1-D/2-D/3-D cycle.
        compat: reproduce two quirks of the official code (above); for oracle tests.

    Shapes:
        ``q, k, v [B, H, N, D]``; gate and choice ``[B, H, S, C]`` for S image tokens and C chunks.

    Raises:
        UnsupportedCall: no grid, a box that does not divide it, or queries that are not the keys' tokens.
        ConfigError: contradicting knobs, or `dense_share` without a step clock.
    """

    name: ClassVar[str] = "vmoba"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm", "torch")
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = "VMoBA, arXiv 2506.23858"
    masks: ClassVar[bool] = True

    temporal: float | None = None
    spatial: tuple[int, int] | None = None
    cuboid: tuple[int, int, int] | None = None
    select: str | None = None
    pool: str = "head_global"
    topk: int | tuple[int, int, int] | None = None
    threshold: float | None = None
    dense_share: float = 0.25
    dense_layers: int = 0
    compat: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        require(
            self.select in (None, "topk", "threshold"),
            f"select is 'topk' or 'threshold', got {self.select!r}",
        )
        given = [n for n in ("topk", "threshold") if getattr(self, n) is not None]
        require(
            not given or given == [self.select or given[0]],
            f"select={self.select!r} contradicts the values given for {given}; give the one you want",
        )
        require(self.pool in chunks.POOLS, f"pool is one of {chunks.POOLS}, got {self.pool!r}")
        require(
            self.pool != "block" or self.selection == "threshold",
            "pool='block' exists only with select='threshold'",
        )
        ks = self.topk if isinstance(self.topk, tuple) else (self.topk,) * 3
        require(
            len(ks) == 3 and all(k is None or k >= 1 for k in ks),
            f"topk is a number >= 1 or three of them, got {self.topk!r}",
        )
        require(
            self.threshold is None or self.threshold >= 0,
            f"threshold must not be negative, got {self.threshold}",
        )
        for knob, count in (("spatial", 2), ("cuboid", 3)):
            box = getattr(self, knob)
            require(
                box is None or (len(box) == count and all(e >= 1 for e in box)),
                f"{knob} is {count} positive sizes, got {box!r}",
            )
        require(
            self.temporal is None or self.temporal > 0,
            f"temporal must be positive, got {self.temporal}",
        )
        require(0 <= self.dense_share <= 1, f"dense_share lies in [0, 1], got {self.dense_share}")
        require(self.dense_layers >= 0, f"dense_layers must be >= 0, got {self.dense_layers}")

    @property
    def selection(self) -> str:
        """``topk`` or ``threshold``, after `select` is resolved."""
        return self.select or ("topk" if self.topk is not None else "threshold")

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the sparse steps, False in the dense first ones."""
        if self.dense_share == 0:
            return True
        if step is None or total is None:
            return None
        return step >= int(self.dense_share * total + 1e-9)

    def role(self, site: Site) -> int | None:
        """0, 1 or 2 for 1-D, 2-D or 3-D chunks; None for the first layers that stay dense."""
        return None if site.index < self.dense_layers else site.index % 3

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
        """Sparse attention for image queries, dense attention for text queries."""
        if site.phase is None:
            raise no_clock(self.name, f"dense_share={self.dense_share}", "dense_share=0")
        if not site.phase:
            return self._dense(q, k, v, site, dense, "one of the first steps (dense_share)")
        if site.role is None:
            return self._dense(q, k, v, site, dense, "one of the first layers (dense_layers)")
        pattern = int(site.role)
        grid, image, image_keys = image_tokens(site, q.shape[2], k.shape[2])
        chunk = self.chunk(pattern, grid)
        count = chunks.count_chunks(grid, chunk)
        if self._keeps_all(pattern, count):
            return self._dense(q, k, v, site, dense, "the settings keep every chunk")

        ids = chunks.chunk_ids(grid, chunk, q.device)
        own = ids[:, None] == torch.arange(count, device=q.device)
        chosen = self.choose(q[:, :, image], k[:, :, image_keys], own, pattern)
        pairs, inside = q.shape[2] * k.shape[2], ids.shape[0] ** 2
        kept = chunks.density_of(chosen, own.sum(0)) * inside
        site.note("density", (kept + pairs - inside) / pairs)

        out = attend_chunks(
            q[:, :, image], k, v, chosen, ids, image_keys, mask_rows(mask, image), scale
        )
        return around(out, q, k, v, image, mask, dense)

    def chunk(self, pattern: int, grid: Grid) -> Grid | int:
        """The chunk of layer pattern 0 (1-D), 1 (2-D) or 2 (3-D): a box, or a number of tokens."""
        return chunks.cuboid_of(
            pattern,
            grid,
            chunks.default_temporal(grid) if self.temporal is None else self.temporal,
            chunks.default_spatial(grid) if self.spatial is None else self.spatial,
            chunks.default_cuboid(grid) if self.cuboid is None else self.cuboid,
        )

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, own: torch.Tensor, pattern: int
    ) -> torch.Tensor:
        """Chunks each query attends to, bool ``[B, H, S, C]``.

        Args:
            q, k: image queries and keys ``[B, H, S, D]``.
            own: bool ``[S, C]``, True where the token is in the chunk.
            pattern: 0, 1 or 2 for 1-D, 2-D or 3-D chunks.
        """
        scores = chunks.gate(q, k, own.float())
        if self.selection == "topk":
            k_chunks = self._k(pattern, own.shape[1])
            return chunks.choose_topk(scores, own, self.pool, k_chunks)
        threshold = 0.25 if self.threshold is None else self.threshold
        return chunks.choose_threshold(scores, own, self.pool, threshold, compat=self.compat)

    def _k(self, pattern: int, count: int) -> int:
        if self.topk is None:
            return -(-count // 4)
        return self.topk[pattern] if isinstance(self.topk, tuple) else self.topk

    def _keeps_all(self, pattern: int, count: int) -> bool:
        if count == 1:
            return True
        if self.selection == "topk":
            k = self._k(pattern, count)
            return k >= count or (self.compat and k == 1 and self.pool == "query_head")
        buggy = self.compat and self.pool in ("query_head", "block")
        return self.threshold is not None and self.threshold > 1 and not buggy

    def _dense(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        site: Site,
        dense: Dense,
        reason: str,
    ) -> torch.Tensor:
        site.meter.fell_back(reason)
        site.note("density", 1.0)
        return dense(q, k, v)
