"""What a method kept, drawn: image tokens that stayed, tokens that merged, density by layer and step."""

from __future__ import annotations

import functools
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmattn.batch.writers import font
from mmattn.layout import Kept, Tile
from mmattn.methods._heatmap import colour
from mmattn.methods._pruning import Columns
from mmattn.methods.base import Dense, Method, Placed
from mmattn.report import Stats
from mmattn.session import Session
from mmattn.sites import Site

_NOTE = "demo:kept"
VIEW = 384
"""Longest side of a drawn overlay, in pixels."""


def watched(entry: Method | Placed) -> Method | Placed:
    """The same method, that also leaves a note in its site's memory about the tokens it kept.

    The note is for `kept_of` and `groups_of`. Results are those of the method itself.
    """
    if isinstance(entry, Placed):
        return Placed(_watched(entry.method), entry.sites)
    return _watched(entry)


def _watched(method: Method) -> Method:
    cls: Any = type(method)
    twin: Method = object.__new__(_watching(cls))
    twin.__dict__.update(method.__dict__)
    return twin


@functools.cache
def _watching(base: Any) -> Any:
    def features(self: Method, tile: Tile, *, site: Site) -> torch.Tensor | Kept:
        found: torch.Tensor | Kept = base.features(self, tile, site=site)
        indices = found.indices if isinstance(found, Kept) else found
        notes = site.state.setdefault(_NOTE, [])
        notes.append((tile.grid, indices.detach().cpu()))
        return found

    def attend(
        self: Method,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        out: torch.Tensor = base.attend(
            self, q, k, v, mask=mask, scale=scale, site=site, dense=dense
        )
        left = site.shared.get("left")
        if isinstance(left, dict) and left:
            left = left[max(left)]
        image = site.layout.image_mask
        if isinstance(left, Columns) and image is not None and left.keep.shape == image.shape:
            site.state[_NOTE] = [_within(left.keep[0], image[0])]
        return out

    def leave(self: Method, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        out: torch.Tensor = base.leave(self, x, site=site)
        source, prefix = site.shared.get("source"), site.shared.get("prefix")
        if isinstance(source, torch.Tensor) and isinstance(prefix, int):
            site.state[_NOTE] = [("groups", source[0, prefix:].detach().cpu())]
        return out

    members = {"features": features, "attend": attend, "leave": leave}
    return type(base.__name__, (base,), {**members, "__module__": base.__module__})


def _within(keep: torch.Tensor, image: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
    """Kept image tokens as a grid and indices in it; one line where the image is no square."""
    kept = keep[image].nonzero().flatten().cpu()
    total = int(image.sum())
    side = isqrt(total)
    return ((side, side) if side * side == total else (1, total)), kept


def _notes(session: Session) -> list[Any]:
    return [
        note
        for run in session.runs
        for site in run.sites
        for slot in range(len(run.methods))
        for (branch, _), state in sorted(run.states_of(site, slot).items())
        if branch == 0
        for note in state.get(_NOTE, ())
    ]


def kept_of(session: Session) -> tuple[tuple[int, int], torch.Tensor] | None:
    """Grid ``(Y, X)`` and kept indices of the first tile of the last picture; the smallest choice where
    layers differ; None when nothing was pruned. Call it before the session detaches."""
    found = [note for note in _notes(session) if note[0] != "groups"]
    return min(found, key=lambda note: len(note[1])) if found else None


def groups_of(session: Session) -> torch.Tensor | None:
    """For every image token of a ViT the merged token it went into, ``[N]``; None without merging."""
    found = [note for note in _notes(session) if note[0] == "groups"]
    return min((groups for _, groups in found), key=lambda g: len(g.unique()), default=None)


def _base(picture: Image.Image, grid: tuple[int, int]) -> tuple[Image.Image, int, int]:
    """The picture, enlarged so that every token is a whole number of pixels; and a token's size."""
    y, x = grid
    cell = max(4, VIEW // max(y, x))
    size = (x * cell, y * cell)
    how = Image.Resampling.NEAREST if max(picture.size) < VIEW else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, how), cell, cell


def kept_overlay(picture: Image.Image, grid: tuple[int, int], kept: torch.Tensor) -> Image.Image:
    """The picture with dropped tokens dimmed and a thin frame around every kept one."""
    view, wide, high = _base(picture, grid)
    stays = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    stays[kept] = True
    dim = Image.blend(view, Image.new("RGB", view.size, (24, 24, 32)), 0.78)
    pen = ImageDraw.Draw(view)
    for i, stay in enumerate(stays.tolist()):
        left, top = i % grid[1] * wide, i // grid[1] * high
        box = (left, top, left + wide, top + high)
        if stay:
            pen.rectangle((left, top, left + wide - 1, top + high - 1), outline=(255, 176, 46))
        else:
            view.paste(dim.crop(box), box)
    return view


def merged_overlay(
    picture: Image.Image, grid: tuple[int, int], groups: torch.Tensor
) -> Image.Image:
    """The picture with every merged group in its mean colour and lines between groups."""
    view, wide, high = _base(picture, grid)
    pixels = np.asarray(view, dtype=np.float32).copy()
    cells = groups.reshape(grid).numpy().repeat(high, 0).repeat(wide, 1)
    for group in np.unique(cells):
        inside = cells == group
        pixels[inside] = pixels[inside].mean(0)
    edge = np.zeros(cells.shape, bool)
    edge[1:] |= cells[1:] != cells[:-1]
    edge[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    pixels[edge] = (255, 255, 255)
    return Image.fromarray(pixels.round().astype(np.uint8))


def density_picture(stats: Stats) -> Image.Image | None:
    """Density by layer (rows) and denoising step (columns), dark where little was computed; None when
    the session kept no density by step."""
    rows = [site for site in stats.sites if site.steps]
    steps = sorted({step for site in rows for step in site.steps})
    if not rows or not steps:
        return None
    values = np.array([[site.steps.get(step, np.nan) for step in steps] for site in rows])
    wide = max(12, min(40, 480 // len(steps)))
    high, label, head = max(14, min(28, 420 // len(rows))), 250, 28
    sheet = Image.new(
        "RGB", (label + wide * len(steps) + 12, head + high * len(rows) + 34), "white"
    )
    pen = ImageDraw.Draw(sheet)
    face = font(12)
    pen.text((8, 6), "layer", (90, 90, 96), face)
    for i, site in enumerate(rows):
        top = head + i * high
        name = site.path.removeprefix("transformer.")
        pen.text((8, top + (high - 14) // 2), name[-38:], (32, 33, 36), face)
        for j, value in enumerate(values[i]):
            left = label + j * wide
            ink = (225, 226, 230) if np.isnan(value) else _ink(value)
            pen.rectangle((left, top, left + wide - 2, top + high - 2), fill=ink)
    every = max(1, -(-len(steps) * 18 // max(1, wide * len(steps))))
    for j, step in enumerate(steps):
        if j % every == 0:
            pen.text((label + j * wide + 2, head - 18), str(step), (90, 90, 96), face)
    bottom = head + len(rows) * high + 8
    for i in range(100):
        pen.line((label + i, bottom, label + i, bottom + 10), fill=_ink(i / 99))
    pen.text((label - 150, bottom - 2), "density, from 0 (dark) to 1", (90, 90, 96), face)
    return sheet


def _ink(value: float) -> tuple[int, int, int]:
    red, green, blue = colour(np.array([[value]]))[0, 0].tolist()
    return red, green, blue
