"""VMoBA: each video query attends to its own chunk of tokens and to the chunks most like it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Self

import torch

from mmattn.errors import UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods import _vmoba_select as select
from mmattn.methods._chunk_attention import attend_chunks
from mmattn.methods._image_attention import Part, Sparse
from mmattn.methods._sparse_method import SparseMethod
from mmattn.methods.base import require
from mmattn.sites import Site

Chunks = tuple[float, tuple[int, int], tuple[int, int, int]]
"""Frames of a 1-D chunk, rows and columns of a 2-D chunk, and frames, rows and columns of a 3-D chunk."""


@dataclass(frozen=True, kw_only=True)
class VMoBA(SparseMethod):
    """Block-sparse attention whose chunks are runs of frames, windows and cuboids in turn.

    Layer ``l`` uses 1-D chunks (whole frames) when ``l % 3 == 0``, 2-D windows over all frames when it
    is 1, and 3-D cuboids when it is 2. A query scores a chunk by its dot product with the chunk's mean
    key, keeps its own chunk, and adds others: the `topk` best, or the fewest that reach `threshold`.
    "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858.

    The paper's training-free numbers use ``kind="query"`` with `topk` (`wan_480p`, `wan_720p`); its full
    method, ``kind="head"`` with ``threshold=0.25`` (`train_576p`, `train_480p`), was fine-tuned and makes
    videos tremble without training. The authors see a gain only above some 33 000 tokens. Compared with
    dense attention and, in the tests and in docs/video.md, with random choices of equal density.

    Deviations: pools are taken per batch item, so CFG in one batch equals two calls; ``topk=1`` means own
    chunks only (officially it silently runs dense); thresholds nobody can reach keep everything; boxes
    that do not divide the grid leave smaller chunks at its far sides, which the report mentions
    (officially an assertion). ``compat=True`` follows the official code in all four. Text tokens, which
    the paper's models do not have in the sequence, are not chunked: as keys every query sees them, as
    queries they stay dense, and padded text is taken out. Execution is exact, by `routed_attention`; on
    a CPU below 2048 tokens a mask is faster and takes its place. Gradients flow through the attention
    and not through the choice.

    Args:
        topk: chunks per query, own included, one value or one per pattern (1-D, 2-D, 3-D): an int is a
            number, a float below 1 a share of the chunks, rounded up. As many as there are chunks, or
            more, is dense attention (bitwise). With neither `topk` nor `threshold` it is 0.25: the
            paper's 2/6/18 of 7/24/72.
        threshold: share of min-max-normalised similarity to reach. Above 1 it is dense attention
            (bitwise).
        kind: over what chunks compete: ``query`` (each query of each head by itself), ``head``,
            ``overall``, or ``block`` (threshold only).
        chunks: ``(frames, (rows, columns), (frames, rows, columns))`` of the 1-D, 2-D and 3-D chunks, in
            tokens. The first may be a fraction of a frame. None derives them from the grid: about eight
            runs of frames, windows cut from each axis at most eight times, cuboids at most three times
            in time and six along rows and columns.
        dense_steps: first steps that run dense: a share of the run as a float (0.25 of 50 are 12), or a
            number of steps as an int; 0 needs no clock.
        dense_layers: first layers that run dense; they still count in the 1-D/2-D/3-D cycle.
        compat: follow the official code where it differs (above); for oracle tests.

    Shapes:
        ``q, k, v [B, H, N, D]``; gate and choice ``[B, H, S, C]`` for S image tokens and C chunks.

    Raises:
        UnsupportedCall: no grid, queries that are not the keys' tokens, a mask that hides image tokens,
            or with `compat` a box that does not divide the grid.
        ConfigError: contradicting knobs, or `dense_steps` without a step clock.
    """

    name: ClassVar[str] = "vmoba"
    paper: ClassVar[str] = "VMoBA, arXiv 2506.23858"
    takes_masks: ClassVar[bool] = True

    topk: float | tuple[float, float, float] | None = None
    threshold: float | None = None
    kind: str = "query"
    chunks: Chunks | None = None
    dense_steps: float = 0.25
    compat: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        if isinstance(self.topk, list):
            object.__setattr__(self, "topk", tuple(self.topk))
        require(
            self.topk is None or self.threshold is None,
            f"give topk or threshold, not both (got {self.topk} and {self.threshold})",
        )
        require(self.kind in select.KINDS, f"kind is one of {select.KINDS}, got {self.kind!r}")
        require(
            self.kind != "block" or self.threshold is not None,
            "kind='block' exists only with a threshold",
        )
        ks = self.topk if isinstance(self.topk, tuple) else (self.topk,) * 3
        require(
            len(ks) == 3 and all(k is None or _is_count(k) for k in ks),
            f"topk is a number >= 1 or a share below 1, or three of them, got {self.topk!r}",
        )
        require(
            self.threshold is None or self.threshold >= 0,
            f"threshold must not be negative, got {self.threshold}",
        )
        if self.chunks is not None:
            object.__setattr__(self, "chunks", _chunks(self.chunks))

    @classmethod
    def wan_480p(cls, **changes: Any) -> Self:
        """The paper's training-free setting for Wan 2.1 at 81 x 480 x 832 (grid 21 x 30 x 52)."""
        return cls(**{"topk": (2, 6, 18), "chunks": (3, (5, 13), (7, 5, 13)), **changes})

    @classmethod
    def wan_720p(cls, **changes: Any) -> Self:
        """The paper's training-free setting for Wan 2.1 at 81 x 720 x 1280 (grid 21 x 45 x 80)."""
        return cls(**{"topk": (2, 10, 9), "chunks": (3, (9, 10), (7, 15, 20)), **changes})

    @classmethod
    def train_576p(cls, **changes: Any) -> Self:
        """The paper's fine-tuning setting at 93 x 576 x 1024 (grid 24 x 36 x 64), sparse in every step."""
        knobs = {"threshold": 0.25, "kind": "head", "dense_steps": 0}
        return cls(**{**knobs, "chunks": (3, (6, 8), (8, 12, 8)), **changes})

    @classmethod
    def train_480p(cls, **changes: Any) -> Self:
        """The paper's fine-tuning setting at 141 x 480 x 832 (grid 36 x 30 x 52), sparse in every step."""
        knobs = {"threshold": 0.25, "kind": "head", "dense_steps": 0}
        return cls(**{**knobs, "chunks": (3, (5, 13), (12, 10, 13)), **changes})

    @property
    def headwise(self) -> bool:
        """Chunks are chosen per query or per head; other kinds let all heads compete."""
        return self.kind in ("query", "head")

    def role(self, site: Site) -> int | None:
        """0, 1 or 2 for 1-D, 2-D or 3-D chunks; None for the first layers that stay dense."""
        return None if site.index < self.dense_layers else site.index % 3

    def dense_reason(self, site: Site, grid: Grid) -> str | None:
        """A sentence where every chunk is kept."""
        assert site.role is not None
        count = select.count_chunks(grid, self.chunk(int(site.role), grid))
        return "the settings keep every chunk" if self._keeps_all(int(site.role), count) else None

    def sparse(self, part: Part) -> Sparse:
        """Attention over the chunks that each query chose."""
        assert part.site.role is not None
        pattern = int(part.site.role)
        chunk = self.chunk(pattern, part.grid)
        count = select.count_chunks(part.grid, chunk)
        if select.uneven(part.grid, chunk):
            if self.compat:
                raise UnsupportedCall(
                    f"VMoBA chunks of {chunk} do not divide the token grid {part.grid}, which the "
                    "official code requires; choose other `chunks`, or compat=False."
                )
            part.site.remark(
                f"chunks of {chunk} do not divide the grid {part.grid}; those at its far sides are smaller"
            )
        ids = select.chunk_ids(part.grid, chunk, part.q.device)
        own = ids[:, None] == torch.arange(count, device=ids.device)
        chosen = self.choose(part.q, part.image_keys, own, pattern)
        out, lse = attend_chunks(part, chosen, ids)
        return Sparse(out, select.density_of(chosen, own.sum(0)), lse)

    def chunk(self, pattern: int, grid: Grid) -> Grid | int:
        """The chunk of layer pattern 0 (1-D), 1 (2-D) or 2 (3-D): a box, or a number of tokens."""
        temporal, spatial, cuboid = self.chunks or (
            select.default_temporal(grid),
            select.default_spatial(grid),
            select.default_cuboid(grid),
        )
        return select.chunk_of(pattern, grid, temporal, spatial, cuboid)

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, own: torch.Tensor, pattern: int
    ) -> torch.Tensor:
        """Chunks each query attends to, bool ``[B, H, S, C]``.

        Args:
            q, k: image queries and keys ``[B, H, S, D]``.
            own: bool ``[S, C]``, True where the token is in the chunk.
            pattern: 0, 1 or 2 for 1-D, 2-D or 3-D chunks.
        """
        gate = select.gate(q, k, own)
        shape, batch = gate.shape, gate.shape[0]
        if self.compat and self.kind in ("head", "overall"):
            gate, own = select.as_one_sequence(gate, own)
        if self.threshold is None:
            chosen = select.choose_topk(gate, own, self.kind, self._k(pattern, own.shape[1]))
        else:
            chosen = select.choose_threshold(
                gate, own, self.kind, self.threshold, compat=self.compat
            )
        if chosen.shape != shape:
            chosen = chosen.view(shape[1], batch, *shape[2:]).transpose(0, 1)
        return chosen

    def _k(self, pattern: int, count: int) -> int:
        given = self.topk[pattern] if isinstance(self.topk, tuple) else self.topk
        if given is None:
            given = 0.25
        return given if isinstance(given, int) else ceil(given * count - 1e-9)

    def _keeps_all(self, pattern: int, count: int) -> bool:
        if count == 1:
            return True
        if self.threshold is None:
            k = self._k(pattern, count)
            return k >= count or (self.compat and k == 1)
        buggy = self.compat and self.kind in ("query", "block")
        return self.threshold > 1 and not buggy


def _is_count(k: float) -> bool:
    if isinstance(k, bool):
        return False
    return k >= 1 if isinstance(k, int) else isinstance(k, float) and 0 < k < 1


def _chunks(given: Any) -> Chunks:
    try:
        temporal, spatial, cuboid = given
        sizes = (*spatial, *cuboid)
        fits = len(spatial) == 2 and len(cuboid) == 3
        fits = fits and temporal > 0 and all(isinstance(n, int) and n >= 1 for n in sizes)
    except (TypeError, ValueError):
        fits = False
    require(
        fits,
        "chunks is (frames, (rows, columns), (frames, rows, columns)), such as (3, (5, 13), (7, 5, 13)), "
        f"got {given!r}",
    )
    return temporal, tuple(spatial), tuple(cuboid)
