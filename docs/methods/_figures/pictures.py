"""Pictures and clips: the untouched model above, the method below, and what it looks at."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from methods._figures.probe import RED, Seen, bare, made, model, save, show, watched
from torch import Tensor

import mmattn
from mmattn.calls import draw
from mmattn.sites import Site

STEPS = 20
CLIP = "a red circle moving right on a white background"
STILLS = (
    "a big red circle on the left on a white background",
    "a red circle left of a blue square on a white background",
    "three green squares on a white background",
)


@functools.cache
def _dense(kind: str) -> Tensor:
    return _call(kind)


def _call(kind: str) -> Tensor:
    prompts = [CLIP] if kind == "t2v" else list(STILLS)
    return draw(model(kind), prompts, list(range(3, 3 + len(prompts))), steps=STEPS)


def _tiles(kind: str, drawn: Tensor) -> list[Tensor]:
    return [drawn[0][:, t] for t in (0, 5, 10, 16)] if kind == "t2v" else list(drawn)


def drawn(use: str, path: Path) -> None:
    """Equal noise without and with the method; beside it what one query sees, and all pairs of one head."""
    method = made(use)
    kind = "t2i" if isinstance(method, mmattn.AgentAttention) else "t2v"
    log: list[Seen] = []
    layer, step = 2, STEPS - 2

    def wanted(site: Site) -> bool:
        assert site.run is not None
        here = site.kind in ("self", "joint") and site.index == sites[layer].index
        return here and site.run.clock.index == step and site.branch == 0 and not log

    with mmattn.attach(model(kind).target, watched(method, wanted, log)) as session:
        sites = [s for s in session.runs[0].sites if s.kind in ("self", "joint")]
        after = _call(kind)
    seen = log[0]
    grid = seen.site.layout.grid_for(seen.dense.shape[-1])
    image = seen.site.layout.image_slice(seen.dense.shape[-1])
    weights = [w[:, image, image].float() for w in (seen.dense, seen.method)]
    sparse = bool((weights[1] == 0).any())
    count = len(_tiles(kind, after))
    figure, axes = plt.subplots(
        2,
        count + 1 + sparse,
        figsize=(8.6, 2.75) if sparse else (6.0, 2.75),
        width_ratios=[1] * count + ([1.9, 1.3] if sparse else [1]),
        layout="constrained",
    )
    rows = (("untouched", _dense(kind), "all keys"), (method.name, after, "with the method"))
    for row, (label, result, title) in enumerate(rows):
        for axis, tile in zip(axes[row], _tiles(kind, result), strict=False):
            show(axis, tile)
        axes[row][0].set_ylabel(label)
        _query(axes[row][count], weights[row], grid, f"one query, {title}")
        if sparse:
            _pairs(axes[row][count + 1], weights[row])
    save(figure, path)


def _query(axis: Any, weights: Tensor, grid: tuple[int, int, int], title: str) -> None:
    """The weights of the query in the middle, frame beside frame."""
    t, y, x = grid
    at = (t // 2, y // 2, x // 3)
    query = (at[0] * y + at[1]) * x + at[2]
    values = weights[0, query].reshape(grid).abs().sqrt()
    strip = torch.full((y, t * (x + 1) - 1), torch.nan)
    for frame in range(t):
        strip[:, frame * (x + 1) : frame * (x + 1) + x] = values[frame]
    show(axis, torch.where(strip == 0, torch.nan, strip), title, cmap="viridis")
    axis.set_facecolor("#e4e4e4")
    for frame in range(t):  # unseen keys are grey, gaps between frames white
        if frame:
            axis.axvspan(frame * (x + 1) - 1.5, frame * (x + 1) - 0.5, color="white", lw=0)
    left = at[0] * (x + 1) + at[2]
    axis.add_patch(plt.Rectangle((left - 0.5, at[1] - 0.5), 1, 1, fill=False, ec=RED, lw=1.6))


def _pairs(axis: Any, weights: Tensor) -> None:
    """Which pairs of tokens one head computes."""
    kept = (weights[0] != 0).float()
    title = f"pairs, one head: {100 * float(kept.mean()):.0f} %"
    show(axis, 1 - kept * 0.75, title, cmap="gray", vmin=0, vmax=1)


def canvas(use: str, path: Path) -> None:
    """Two panels on one canvas, which see each other and which do not, and the pairs among tokens."""
    method = made(use)
    results, logs = [], []
    prompts = ["a red circle on a white background"]
    for one in (mmattn.PanelAttention(rows=1, cols=2, visibility="full"), method):
        log: list[Seen] = []

        def wanted(site: Site, log: list[Seen] = log) -> bool:
            return not log

        with mmattn.attach(model("t2i").target, watched(one, wanted, log)):
            results.append(draw(model("t2i"), prompts, [0], steps=STEPS, width=128)[0])
        logs.append(log[0])
    figure, axes = plt.subplots(2, 2, figsize=(5.4, 3.1), width_ratios=[2, 1], layout="constrained")
    for row, label in enumerate(("full", method.visibility)):
        show(axes[row][0], results[row]).set_ylabel(label)
        kept = (logs[row].method[0] != 0).float()
        show(axes[row][1], 1 - kept * 0.75, "pairs of tokens", cmap="gray", vmin=0, vmax=1)
    bare(axes[0][0], "one canvas, two panels, equal noise")
    save(figure, path)
