"""Isolation and reposition: a scene takes its subjects from reference pictures, and keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods._calls import no_clock
from mmattn.methods._regions import Box, Moved, boxed, moved, resized, without_overlaps
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

_MOVABLE = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel")


@dataclass(frozen=True)
class IsolationReposition(Method):
    """Draws a scene whose subjects look like those of reference pictures, drawn in the same batch.

    The batch is groups of n references and then the scene, ``[ref_1, .., ref_n, scene]``. In the scene
    alone: *isolation* keeps the tokens of one subject from attending to another subject's, in every
    self-attention; *reposition*, from `start_layer` on, lets the tokens of subject i attend to reference
    i as well, cut out and laid over the place of subject i; *mutual* cross-attention lets them read the
    text of reference i. "Improving Multi-Subject Consistency in Open-Domain Image Generation with
    Isolation and Reposition Attention", arXiv 2411.19261. References are as if drawn alone.

    Every attachment, step and layer count is the paper's, on UNets: hidden states are repositioned before
    the projections there, which, token by token, is the same as repositioning keys and values here.
    Deviations: keys outside the subject's outline are left out instead of masked; cells that two
    subjects of the scene claim belong to neither (the published code masks them twice); masks are -inf and
    not the lowest number, which is safe because a token always sees itself.

    Transformers are this project's extension: reposition acts on image tokens; text is background, which
    sees and is seen by everything; rotary positions move along (FLUX, FLUX.2, Chroma), other rotary
    models are left alone; their text is in the same attention, so `reference_text` takes the place of
    `mutual`. Compared in the tests with a loop-shaped reference on UNets and with stock rotary
    embeddings, and measured in docs/attention-guidance.md.

    Args:
        sources: one box ``(top, left, bottom, right)`` per subject, shares of its reference picture.
        targets: one box per subject, shares of the scene. Masks of any outline go through
            `mmattn_pipelines.subject_consistency.SubjectConsistency`.
        isolate: whether subjects of the scene are kept apart.
        reposition: whether they see their references.
        start_step: first denoising step with reposition; 0 needs no step clock.
        start_layer: first self-attention layer with reposition: a share of the layers (a float in [0, 1];
            36 of SDXL's 70 in the published script) or a layer (int).
        dropout: share of the subject's tokens that do not see the reference, drawn anew in every step and
            never all, in [0, 1].
        ref_bias: added to the scores of references before the softmax.
        mutual: weight of the references' text in cross-attention, in [0, 1].
        reference_text: joint attention only: subjects see the text of their references as well.

    Shapes:
        ``q, k, v [G (n + 1), H, N, D]`` for G scenes.

    Raises:
        ConfigError: knobs out of range, or `start_step` without a step clock.
        UnsupportedCall: no token grid, a clip, a batch that is not groups of n + 1, a mask in
            self-attention, or a traced graph.
    """

    name: ClassVar[str] = "isolation-reposition"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers",)
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    paper: ClassVar[str] = (
        "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and "
        "Reposition Attention, arXiv 2411.19261"
    )
    masks: ClassVar[bool] = True

    sources: tuple[Box, ...] = ()
    targets: tuple[Box, ...] = ()
    isolate: bool = True
    reposition: bool = True
    start_step: int = 0
    start_layer: float = 36 / 70
    dropout: float = 0.5
    ref_bias: float = 0.0
    mutual: float = 0.9
    reference_text: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        for field in ("sources", "targets"):
            boxes = tuple(tuple(box) for box in getattr(self, field))
            object.__setattr__(self, field, boxes)
            for box in boxes:
                require(
                    len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1,
                    f"{field}: a box is (top, left, bottom, right) in shares of the picture, got {box}",
                )
        require(
            len(self.sources) == len(self.targets),
            f"as many sources as targets are needed, got {len(self.sources)} and {len(self.targets)}",
        )
        require(self.start_step >= 0, f"start_step must be at least 0, got {self.start_step}")
        share = isinstance(self.start_layer, float)
        require(
            0 <= self.start_layer <= 1 if share else self.start_layer >= 0,
            "start_layer is a share of the layers (a float in [0, 1]) or a layer (int >= 0), got "
            f"{self.start_layer!r}",
        )
        require(0 <= self.dropout <= 1, f"dropout must lie in [0, 1], got {self.dropout}")
        require(0 <= self.mutual <= 1, f"mutual must lie in [0, 1], got {self.mutual}")

    @property
    def passive(self) -> bool:
        """True when nothing is isolated, repositioned or read from another row's text."""
        return not (self.isolate or self.reposition or self.mutual)

    def accepts(self, site: Site) -> str | None:
        """Not attention over frames alone, nor rotary positions that cannot be moved."""
        if "temporal" in site.tags:
            return "it attends over frames alone"
        if "rotary" in site.tags and site.family not in _MOVABLE:
            return f"the rotary positions of {site.family} cannot be moved with their tokens"
        if site.kind == "cross" and not self.mutual:
            return "mutual=0 leaves cross-attention alone"
        return None

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the steps with reposition."""
        if self.start_step == 0:
            return True
        return None if step is None else step >= self.start_step

    def role(self, site: Site) -> bool:
        """Whether a self-attention layer has reposition."""
        share = isinstance(self.start_layer, float)
        first = round(self.start_layer * site.depth) if share else self.start_layer
        return site.kind != "cross" and site.index >= first

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
        """The original attention for references; the scene attends to what it may see."""
        if self.passive:
            return dense(q, k, v)
        if torch.compiler.is_compiling():
            raise UnsupportedCall("Regions cannot be laid out while a graph is traced.")
        scene = self._scene(site, q, k)
        if scene is None:
            return dense(q, k, v)
        if q.shape[0] % (scene.subjects + 1):
            raise UnsupportedCall(
                f"The batch has {q.shape[0]} rows, which are not groups of {scene.subjects + 1}: "
                f"{scene.subjects} references and then the scene."
            )
        if site.kind == "cross":
            return self._read_references(q, k, v, mask, scene, dense)
        if mask is not None:
            raise UnsupportedCall("A self-attention mask cannot be joined with regions here.")
        if site.phase is None:
            raise no_clock(self.name, f"start_step={self.start_step}", "start_step to 0")
        edited = self.reposition and bool(site.phase) and bool(site.role)
        if not edited and not self.isolate:
            return dense(q, k, v)
        own = torch.arange(q.shape[0], device=q.device) % (scene.subjects + 1) == scene.subjects
        out = torch.empty_like(q)
        out[~own] = dense(q[~own], k[~own], v[~own])
        out[own] = self._subjects(q, k, v, own, scene, site, edited, dense)
        return out

    def _subjects(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        own: torch.Tensor,
        scene: _Scene,
        site: Site,
        edited: bool,
        dense: Dense,
    ) -> torch.Tensor:
        """Attention of the scenes, the rows `own`: isolated, and with references in front of their keys."""
        queries = q.shape[2]
        seen = torch.ones(queries, queries, dtype=torch.bool, device=q.device)
        if self.isolate:
            seen = _isolation(scene, q)
        keys, values = k[own], v[own]
        if edited:
            made = (self._bank(i, scene, k, v, site) for i in range(scene.subjects))
            banks = [bank for bank in made if bank is not None]
            keys = torch.cat([*(bank.k for bank in banks), keys], 2)
            values = torch.cat([*(bank.v for bank in banks), values], 2)
            columns = [bank.queries[:, None].expand(-1, bank.k.shape[2]) for bank in banks]
            seen = torch.cat([*columns, seen], 1)
            site.note("references", keys.shape[2] - queries)
        site.note("density", seen.float().mean())
        allowed = seen
        if edited and self.ref_bias:
            allowed = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
            allowed[:, :-queries] = self.ref_bias
            allowed = allowed.masked_fill(~seen, float("-inf"))
        return dense(q[own], keys, values, mask=allowed[None, None])

    def _scene(self, site: Site, q: torch.Tensor, k: torch.Tensor) -> _Scene | None:
        """The regions on the grid of this call; None where there is no subject."""
        tokens = q.shape[2]
        t, y, x = site.layout.grid_for(tokens)
        if t != 1:
            raise UnsupportedCall(
                f"Subjects are placed in still pictures; this call has {t} frames."
            )
        given = site.shared.get("masks")
        known: dict[Any, _Scene] = site.shared.setdefault("scenes", {})
        key = (y, x, tokens)
        if key not in known:
            if given is None:
                if not self.sources:
                    return None
                source, target = boxed(self.sources, (y, x)), boxed(self.targets, (y, x))
            else:
                source, target = (resized(masks, (y, x)) for masks in given)
            image = site.layout.image_slice(tokens)
            known[key] = _Scene(source, without_overlaps(target), image, tokens)
        return known[key]

    def _bank(
        self, i: int, scene: _Scene, k: torch.Tensor, v: torch.Tensor, site: Site
    ) -> _Bank | None:
        """Keys and values of reference i in the scene, and which queries see them."""
        where = scene.moved(i)
        if where is None:
            return None
        rows = slice(i, None, scene.subjects + 1)
        image = scene.image
        pick = where.source.to(k.device) + image.start
        keys, values = k[rows][:, :, pick], v[rows][:, :, pick]
        if "rotary" in site.tags:
            keys = _rotated(keys, where, scene.target.shape[2], site)
        if self.reference_text and site.kind == "joint":
            text = [*range(image.start), *range(image.stop, k.shape[2])]
            keys = torch.cat([k[rows][:, :, text], keys], 2)
            values = torch.cat([v[rows][:, :, text], values], 2)
        queries = scene.queries(i)
        if self.dropout:
            queries = _thinned(queries, self.dropout, i, site)
        return _Bank(keys, values, queries.to(k.device))

    def _read_references(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scene: _Scene,
        dense: Dense,
    ) -> torch.Tensor:
        """Mutual cross-attention: subjects of the scene read the text of their references."""
        out = dense(q, k, v).clone()
        size, n = scene.subjects + 1, scene.subjects
        own = out[n::size]
        total, count = torch.zeros_like(own), torch.zeros(q.shape[2], 1, device=q.device)
        for i in range(n):
            inside = scene.queries(i).to(q.device)[:, None]
            text = mask if mask is None or mask.shape[0] == 1 else mask[i::size]
            read = dense(q[n::size], k[i::size], v[i::size], mask=text)
            total = torch.where(inside, total + read, total)
            count = count + inside
        mixed = (1 - self.mutual) * own + self.mutual * total / count.clamp_min(1)
        out[n::size] = torch.where(count > 0, mixed.to(out.dtype), own)
        return out


class _Bank(NamedTuple):
    """What a reference adds: ``k, v [G, H, L, D]``, and the queries that see it, ``[Q]`` bool."""

    k: torch.Tensor
    v: torch.Tensor
    queries: torch.Tensor


class _Scene:
    """Regions of all subjects on one grid: ``source, target [n, Y, X]`` bool."""

    def __init__(
        self, source: torch.Tensor, target: torch.Tensor, image: slice, tokens: int
    ) -> None:
        self.source, self.target, self.image, self.tokens = source, target, image, tokens
        self._moved: dict[int, Moved | None] = {}

    @property
    def subjects(self) -> int:
        return self.source.shape[0]

    def queries(self, i: int) -> torch.Tensor:
        """Which tokens of the call are subject i of the scene, ``[Q]``; text is none."""
        inside = torch.zeros(self.tokens, dtype=torch.bool)
        inside[self.image] = self.target[i].flatten()
        return inside

    def moved(self, i: int) -> Moved | None:
        """Where tokens of reference i go; None when either region is empty."""
        if i not in self._moved:
            some = bool(self.source[i].any()) and bool(self.target[i].any())
            self._moved[i] = moved(self.source[i], self.target[i]) if some else None
        return self._moved[i]


def _isolation(scene: _Scene, q: torch.Tensor) -> torch.Tensor:
    """Which scene token may see which, ``[Q, Q]`` bool: not those of another subject."""
    inside = torch.stack([scene.queries(i) for i in range(scene.subjects)]).to(q.device)
    subject = torch.where(inside.any(0), inside.float().argmax(0), -1)
    either = (subject[:, None] < 0) | (subject < 0)
    return either | (subject[:, None] == subject)


def _thinned(queries: torch.Tensor, dropout: float, i: int, site: Site) -> torch.Tensor:
    """Fewer queries, the same in every layer and branch of a step; at least one if there was one."""
    assert site.run is not None
    step = site.run.clock.index or 0
    seed = ((site.run.seed * 9973 + step) * 101 + i) % 2**63
    drawn = torch.rand(queries.shape, generator=torch.Generator().manual_seed(seed))
    kept = queries & (drawn >= dropout)
    if not kept.any():
        kept = queries & (drawn >= drawn[queries].max())
    return kept


def _rotated(keys: torch.Tensor, where: Moved, columns: int, site: Site) -> torch.Tensor:
    """Keys ``[G, H, L, D]`` with the rotary positions of their targets.

    A rotation by an angle that is linear in the position: the rotation by the difference does it.
    """
    assert site.run is not None
    embed: Any = site.run.root.module.pos_embed
    ids = torch.zeros(len(where.source), len(embed.axes_dim))
    ids[:, 1] = where.target // columns - where.source // columns
    ids[:, 2] = where.target % columns - where.source % columns
    cos, sin = (part.to(keys.device) for part in embed(ids.to(keys.device)))
    real, imaginary = keys.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    rotated: torch.Tensor = keys.float() * cos + turned * sin
    return rotated.to(keys.dtype)
