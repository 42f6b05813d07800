"""What the heads of a vision transformer do: how much each one matters, and how far it looks.

importance = head_importance(model, images, labels)
importance.save("importance.png")
distance = attention_distance(model, images)
distance.values  # [layers, heads], in patches
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmattn.attaching import attach
from mmattn.errors import ConfigError, MissingExtraError, UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods._calls import image_tokens
from mmattn.methods._weights import row_weights
from mmattn.methods.base import Dense, Method
from mmattn.sites import Selector, Site

_ENTRIES = 1 << 22
"""Attention probabilities held at once."""


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """One number for every head of every chosen site.

    Args:
        what: name of the numbers, with their unit.
        paths: sites, in model order.
        values: ``[sites, heads]``; NaN where a site has fewer heads than others.
        baseline: accuracy of the untouched model, where it was measured.
    """

    what: str
    paths: tuple[str, ...]
    values: npt.NDArray[np.float64]
    baseline: float | None = None

    def ranking(self) -> list[tuple[str, int, float]]:
        """``(path, head, value)``, largest value first."""
        found = [
            (path, head, float(value))
            for path, row in zip(self.paths, self.values, strict=True)
            for head, value in enumerate(row)
            if not np.isnan(value)
        ]
        return sorted(found, key=lambda one: -one[2])

    def save(self, path: str | Path) -> Path:
        """Draw a PNG: a map of all heads, and the heads of every site from small to large.

        Raises:
            MissingExtraError: without matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("plots", "matplotlib", "eval") from error
        figure = Figure(figsize=(10, 1.5 + 0.3 * max(8, len(self.paths))), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        image = left.imshow(self.values, aspect="auto")
        left.set_yticks(range(len(self.paths)), self.paths, fontsize=7)
        left.set_xticks(range(self.values.shape[1]))
        left.set_xlabel("head")
        figure.colorbar(image, ax=left, label=self.what)
        layers = np.repeat(np.arange(len(self.paths)), self.values.shape[1])
        right.scatter(layers, np.sort(self.values, axis=1).ravel(), s=12)
        right.set_xlabel("layer")
        right.set_ylabel(self.what)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, format="png")
        return path


@dataclass(frozen=True)
class _WithoutHead(Method):
    """Zeroes the output of one head before the out-projection."""

    name: ClassVar[str] = "without-head"
    seams: ClassVar[tuple[str, ...]] = ("heads",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "window")

    head: int = 0

    def heads(self, out: Tensor, *, site: Site) -> Tensor:
        keep = torch.ones(out.shape[1], dtype=out.dtype, device=out.device)
        keep[self.head] = 0
        return out * keep[:, None, None]


@dataclass(frozen=True)
class _Distance(Method):
    """Adds up how far every head looks. Changes no result."""

    name: ClassVar[str] = "attention-distance"
    kinds: ClassVar[tuple[str, ...]] = ("self", "window")
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True

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
        grid, queries, keys = image_tokens(site, q.shape[2], k.shape[2])
        with torch.no_grad():
            total = _distances(q, k, mask, scale, grid, queries, keys)
        state = site.state
        state["sum"] = state.get("sum", 0.0) + total
        state["count"] = state.get("count", 0) + q.shape[0]
        return dense(q, k, v)


def _distances(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None,
    grid: Grid,
    queries: slice,
    keys: slice,
) -> Tensor:
    """Mean distance of every head, summed over the batch, ``[H]``."""
    axes = [torch.arange(n, device=q.device, dtype=torch.float32) for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    count = queries.stop - queries.start
    step = max(1, _ENTRIES // (q.shape[0] * q.shape[1] * k.shape[2]))
    total = q.new_zeros(q.shape[1], dtype=torch.float64)
    for start in range(0, count, step):
        some = range(start, min(start + step, count))
        weight = row_weights(
            q,
            k,
            [queries.start + i for i in some],
            mask=mask,
            causal=False,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            per_head=True,
        )[..., keys]
        # Attention to class and register tokens has no distance; the rest is scaled up to 1.
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
        apart = torch.cdist(place[some.start : some.stop], place)
        total += (weight * apart).sum(-1).double().sum((0, 2))
    mean: Tensor = total / count
    return mean


@torch.no_grad()
def head_importance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    sites: Selector | None = None,
    batch: int = 64,
) -> HeadProfile:
    """What is lost when one head is silent: every head of every site is zeroed in turn.

    With labels the numbers are drops in top-1 accuracy (negative where the model gets better); without,
    relative changes of the class scores, ``|changed - untouched| / |untouched|``. One head at a time:
    heads that stand in for each other all look unimportant ("Are Sixteen Heads Really Better than One?",
    arXiv 1905.10650, measures the same way). Costs as many passes over the images as there are heads.

    Args:
        model: classifier with attention sites, put into eval mode meanwhile.
        images: ``[B, 3, Y, X]``, preprocessed, on the model's device.
        labels: ``[B]`` class indices.
        sites: which attention sites; all of them by default.
        batch: images per call.

    Raises:
        NoSiteError, SelectorError: no site to look at.
        ConfigError: a site that does not say how many heads it has, or labels of another length.
    """
    if labels is not None and len(labels) != len(images):
        raise ConfigError(
            f"{len(images)} images came with {len(labels)} labels; give one per image."
        )
    with _evaluating(model):
        before = _scores(model, images, batch)
        truth = None if labels is None else labels.to(before.device)
        right = None if truth is None else _accuracy(before, truth)
        found = _sites(model, _WithoutHead(), sites)
        rows = []
        for path, heads in found:
            row = []
            for head in range(heads):
                with attach(model, _WithoutHead(head), sites=lambda s, at=path: s.path == at):
                    after = _scores(model, images, batch)
                if truth is None or right is None:
                    row.append(float((after - before).norm() / before.norm()))
                else:
                    row.append(right - _accuracy(after, truth))
            rows.append(row)
    what = "relative change of the scores" if right is None else "drop in accuracy"
    return HeadProfile(what, tuple(path for path, _ in found), _table(rows), right)


@torch.no_grad()
def attention_distance(
    model: nn.Module, images: Tensor, *, sites: Selector | None = None, batch: int = 64
) -> HeadProfile:
    """Mean distance, in patches, from a query to what it attends to, per head.

    ``sum_j p_ij |position_i - position_j|``, averaged over image queries and images; attention to class
    and register tokens is left out and the rest scaled up to 1. As in "An Image is Worth 16x16 Words",
    arXiv 2010.11929, figure 11, there in pixels. In window attention distances are within the window.

    Args:
        model, images, sites, batch: as for `head_importance`.

    Raises:
        NoSiteError, SelectorError: no site to look at.
        UnsupportedCall: where the grid of image tokens is not known.
    """
    with _evaluating(model), attach(model, _Distance(), sites=sites) as session:
        for part in images.split(batch):
            model(part)
        paths, rows = [], []
        for run in session.runs:
            for site in run.sites:
                states = list(run.states_of(site, 0).values())
                if not states:
                    raise UnsupportedCall(f"{site.path} was not reached by this model's forward.")
                total = sum(s["sum"] for s in states)
                rows.append((total / sum(s["count"] for s in states)).tolist())
                paths.append(site.path)
    return HeadProfile("attention distance in patches", tuple(paths), _table(rows))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _sites(model: nn.Module, method: Method, sites: Selector | None) -> list[tuple[str, int]]:
    with attach(model, method, sites=sites) as session:
        chosen = [site for run in session.runs for site in run.sites]
    silent = [site.path for site in chosen if site.heads is None]
    if silent:
        raise ConfigError(
            f"These sites do not say how many heads they have: {silent[:4]}. Leave them out with sites=."
        )
    return [(site.path, int(site.heads or 0)) for site in chosen]


def _scores(model: Any, images: Tensor, batch: int) -> Tensor:
    parts = [model(part) for part in images.split(batch)]
    return torch.cat([getattr(part, "logits", part) for part in parts]).float()


def _accuracy(scores: Tensor, truth: Tensor) -> float:
    return float((scores.argmax(-1) == truth).double().mean())


def _table(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
