"""AttentionMaps: records where attention looks, as small maps on the image grid, and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods._calls import no_clock
from mmattn.methods._heatmap import Picture, render
from mmattn.methods._weights import column_weights, mean_received, row_weights
from mmattn.methods.base import Dense, Method, require
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.session import Session


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One map: how much a token and the image tokens attend to each other at one site.

    Args:
        path: site path.
        token: the text token that image tokens attend to (joint and cross sites), or the query that
            attends to image tokens (self sites, language models); None is all text tokens together, or
            the mean over all image queries.
        row: row of the batch.
        branch, call: position of the model call in the step (0 conditional, 1 unconditional, when guidance
            makes two calls), and of the attention call in the module.
        head: None for the mean over heads.
        steps: denoising steps that went into the mean; empty without a clock.
        grid: ``(T, Y, X)``.
        values: ``[T, Y, X]`` fp32 on the CPU: attention probabilities, averaged over the calls of the run.
    """

    path: str
    token: int | None
    row: int
    branch: int
    call: int
    head: int | None
    steps: tuple[int, ...]
    grid: Grid
    values: torch.Tensor

    @property
    def file_name(self) -> str:
        """A name for this map that tells it from every other one of a session."""
        parts = [self.path, "all" if self.token is None else f"token{self.token}", f"row{self.row}"]
        parts += [f"branch{self.branch}"] if self.branch else []
        parts += [f"call{self.call}"] if self.call else []
        parts += [] if self.head is None else [f"head{self.head}"]
        return "_".join(parts) + ".png"


@dataclass(frozen=True)
class AttentionMaps(Method):
    """Watches attention and keeps, per chosen token, one number per image token. Changes no result.

    At joint and cross sites a map says how much each image query attends to a text token; at self sites
    (and in language models) how much a query token attends to each image key. Attention probabilities as
    heatmaps are common practice ("What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
    arXiv 2210.04885, for UNets). Differences from DAAM: no sum over sites and no upsampling before the
    sum; every site keeps its own map. Maps of text tokens, and the mean over queries, cost
    one to two more attentions per recorded call, computed over blocks of queries; chosen queries cost next
    to nothing. Memory is O(N) per token.

    Maps belong to the last run: a diffusers run with its step clock, otherwise the last call; a language
    model's prompt and the tokens it generated after it are one run (with beams, rows are beams).

    Args:
        tokens: text token indices (joint, cross; counted within the text) or query indices (self sites,
            counted within the whole sequence; negative counts from the end of each call). None: all text
            tokens together (joint), the first class token or else the mean over all image queries (self
            sites of vision models), the last query of each call (language models). Cross sites need it.
        steps: denoising steps to record; None records all and needs no clock.
        per_head: one map per head instead of the mean.

    Shapes:
        reads ``q [B, H, Q, D]``, ``k [B, Hk, K, D]``; keeps ``[B, 1 or H, tokens, N]``.

    Raises:
        UnsupportedCall: no image grid or image positions, or a token index outside the call.
        ConfigError: `steps` without a step clock.
    """

    name: ClassVar[str] = "attention-maps"
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = "common practice; DAAM, arXiv 2210.04885, for UNets"
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    tokens: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    per_head: bool = False

    def __post_init__(self) -> None:
        """Check the knobs."""
        require(
            self.tokens is None or len(self.tokens) > 0, "tokens is empty; pass None or indices"
        )
        require(
            self.steps is None or (len(self.steps) > 0 and min(self.steps) >= 0),
            f"steps must be step indices from 0, got {self.steps}",
        )

    def accepts(self, site: Site) -> str | None:
        """Not text encoders; cross sites only when `tokens` says which."""
        if "text" in site.tags:
            return "a text encoder has no image tokens"
        if site.kind == "cross" and self.tokens is None:
            return "cross-attention maps need tokens=, because all text tokens together give 1 everywhere"
        return None

    def phase(self, step: int | None, total: int | None) -> bool | None:
        """True in the steps to record."""
        if self.steps is None:
            return True
        return None if step is None else step in self.steps

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
        """The original attention; the map is computed on the side."""
        if site.phase is None:
            raise no_clock(self.name, f"steps={self.steps}", "steps=None")
        out = dense(q, k, v)
        if site.phase:
            with torch.no_grad():
                self._record(q.detach(), k.detach(), mask, scale, site)
        return out

    def _record(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
    ) -> None:
        layout, state = site.layout, site.state
        common: dict[str, Any] = {
            "mask": mask,
            "causal": site.causal,
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "per_head": self.per_head,
        }
        queries, keys = q.shape[2], k.shape[2]
        fresh = site.run is None or not site.run.timed
        names: tuple[int | None, ...] = self.tokens or (None,)
        if layout.image_mask is not None:
            rows = q.shape[0] - layout.twins
            past = layout.past or 0
            wanted = self.tokens or (-1,)
            names = wanted
            at = [queries + i if i < 0 else i - past for i in wanted]
            if any(not 0 <= i < queries for i in at):
                return
            q, k = q[:rows], k[:rows]
            seen = layout.image_mask[:rows].to(q.device)
            if common["mask"] is not None and common["mask"].shape[0] > rows:
                common["mask"] = common["mask"][:rows]
            values = row_weights(q, k, at, **common)[..., : seen.shape[1]]
            fresh = past == 0
            state["seen"], state["grid"] = seen, None
        elif site.kind == "self":
            grid, image = layout.grid_for(keys), layout.image_slice(keys)
            if self.tokens is None and image.start == 0:
                values = mean_received(q[:, :, image], k, **common)[..., image]
            else:
                wanted = self.tokens or (0,)
                names = wanted
                at = [_index(i, queries, "query") for i in wanted]
                values = row_weights(q, k, at, **common)[..., image]
            state["grid"] = grid
        else:
            grid, image = layout.grid_for(queries), layout.image_slice(queries)
            columns = list(range(keys))
            if site.kind == "joint":
                pixels = layout.image_slice(keys)
                columns = columns[: pixels.start] + columns[pixels.stop :]
            if self.tokens is None:
                values = column_weights(q, k, image, columns, **common).sum(2, keepdim=True)
            else:
                at = [columns[_index(i, len(columns), "text")] for i in self.tokens]
                values = column_weights(q, k, image, at, **common)
            state["grid"] = grid
        state["tokens"] = names
        _accumulate(state, values, site, fresh=fresh)

    @staticmethod
    def maps(session: Session) -> list[AttentionMap]:
        """Every map of the last run, in model order.

        Raises:
            ConfigError: when no `AttentionMaps` is attached in `session`, or nothing was recorded yet.
        """
        methods = session.plan.methods
        slots = [i for i, m in enumerate(methods) if isinstance(m, AttentionMaps)]
        if not slots:
            raise ConfigError(
                f"this session has no AttentionMaps among its methods {[m.name for m in methods]}"
            )
        found = [
            one
            for run in session.runs
            for site in run.sites
            for (branch, call), state in sorted(run.states_of(site, slots[0]).items())
            if "sum" in state
            for one in _unpack(site.path, branch, call, state)
        ]
        if not found:
            raise ConfigError(
                "no attention map was recorded yet; run the model while the session is attached"
                " (in one of the `steps`, if you gave any)"
            )
        return found

    @staticmethod
    def save(
        session: Session,
        folder: str | Path,
        image: Picture | Sequence[Picture] | None = None,
    ) -> list[Path]:
        """Write every map of the last run as a PNG heatmap and return the paths.

        Args:
            folder: made when missing.
            image: picture, or frames of a video, to lay the maps over.

        Raises:
            ConfigError: like `maps`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for one in AttentionMaps.maps(session):
            path = folder / one.file_name
            render(one.values, image).save(path)
            paths.append(path)
        return paths


def _index(index: int, length: int, what: str) -> int:
    if not -length <= index < length:
        raise UnsupportedCall(f"There is no {what} token {index}; this call has {length}.")
    return index % length


def _accumulate(state: dict[str, Any], values: torch.Tensor, site: Site, *, fresh: bool) -> None:
    old = state.get("sum")
    one = torch.ones((), device=values.device)
    if fresh or old is None or old.shape != values.shape:
        state["sum"], state["count"], state["steps"] = values, one, ()
    else:
        state["sum"], state["count"] = old + values, state["count"] + one
    if not torch.compiler.is_compiling() and site.run is not None and site.run.timed:
        state["steps"] = (*state["steps"], site.run.clock.index)


def _unpack(path: str, branch: int, call: int, state: dict[str, Any]) -> list[AttentionMap]:
    mean = (state["sum"] / state["count"]).float().cpu()
    rows, heads, _, _ = mean.shape
    found = []
    for row in range(rows):
        seen = state["seen"][row].cpu() if state["grid"] is None else None
        grid = state["grid"] if seen is None else _grid_of(seen)
        for head in range(heads):
            for i, token in enumerate(state["tokens"]):
                values = mean[row, head, i] if seen is None else mean[row, head, i][seen]
                found.append(
                    AttentionMap(
                        path=path,
                        token=token,
                        row=row,
                        branch=branch,
                        call=call,
                        head=head if heads > 1 else None,
                        steps=tuple(state["steps"]),
                        grid=grid,
                        values=values.reshape(grid),
                    )
                )
    return found


def _grid_of(seen: torch.Tensor) -> Grid:
    """Grid of the image tokens of one prompt: equal square runs become frames, else one line."""
    edges = torch.diff(seen.int(), prepend=seen.new_zeros(1).int(), append=seen.new_zeros(1).int())
    lengths = (edges == -1).nonzero().flatten() - (edges == 1).nonzero().flatten()
    if len(lengths) and bool((lengths == lengths[0]).all()):
        side = isqrt(int(lengths[0]))
        if side * side == int(lengths[0]):
            return len(lengths), side, side
    return 1, 1, int(seen.sum())
