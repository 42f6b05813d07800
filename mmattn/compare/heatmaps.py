"""Attention heat-maps of one short call on the untouched model, through `AttentionMaps`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmattn.attaching import attach
from mmattn.batch.writers import grid, write_image
from mmattn.compare.jobs import Job, relative
from mmattn.compare.results import Figure
from mmattn.methods._heatmap import render
from mmattn.methods.attention_maps import AttentionMaps

TILE = (192, 192)
SHOWN = 7


def save_maps(target: Any, call: Callable[[], Any], folder: Path, image: Any = None) -> list[Path]:
    """Run `call` with `AttentionMaps` attached to `target`; one PNG per site in `folder`."""
    with attach(target, AttentionMaps()) as session:
        call()
        return AttentionMaps.save(session, folder, image)


def site_maps(
    job: Job, call: Callable[[], Any], image: Image.Image, text: str, only: str = ""
) -> list[Figure]:
    """A sheet with the picture and the maps of up to seven sites whose path contains `only`."""
    with attach(job.loaded.target, AttentionMaps()) as session:
        call()
        maps = [one for one in AttentionMaps.maps(session) if only in one.path]
        AttentionMaps.save(session, job.folder / "attention", image)
    count = min(SHOWN, len(maps))
    chosen = [maps[i * (len(maps) - 1) // max(1, count - 1)] for i in range(count)]
    tiles = [(short(one.path), render(one.values, image)) for one in chosen]
    return _sheet(job, image, "the picture", tiles, text)


def word_maps(
    job: Job,
    call: Callable[[], Any],
    image: Image.Image,
    prompt: str,
    tokens: Sequence[tuple[str, int]],
) -> list[Figure]:
    """A sheet with one map per word of a prompt: where in the picture the model reads that word.

    Args:
        job: a job on a joint-attention model.
        call: draws the picture again.
        image: the picture.
        prompt: what was asked.
        tokens: words with their index among the text tokens, at most seven.
    """
    method = AttentionMaps(tokens=tuple(index for _, index in tokens))
    with attach(job.loaded.target, method) as session:
        call()
        maps = [one for one in AttentionMaps.maps(session) if one.branch == 0 and one.row == 0]
    tiles = []
    for word, index in tokens:
        values = [one.values / one.values.sum() for one in maps if one.token == index]
        tiles.append((word, render(sum(values[1:], values[0]) / len(values), image)))
    text = (
        f"One picture, “{prompt}”, drawn by the untouched model: how much each image token reads a word "
        "of the prompt, averaged over all sites and steps."
    )
    return _sheet(job, image, "the picture", tiles, text)


def short(path: str) -> str:
    """``layers.3`` for ``model.language_model.layers.3.self_attn``."""
    found = re.findall(r"\w+\.\d+", path)
    return found[-1] if found else path.rpartition(".")[2]


def _sheet(
    job: Job,
    image: Image.Image,
    name: str,
    maps: list[tuple[str, Image.Image]],
    text: str,
) -> list[Figure]:
    tiles: list[tuple[str, Image.Image | None]] = [
        (name, image.resize(TILE, Image.Resampling.NEAREST))
    ]
    tiles += [(label, one.convert("RGB").resize(TILE)) for label, one in maps]
    while len(tiles) % 4:
        tiles.append(("", None))
    rows = [tiles[i : i + 4] for i in range(0, len(tiles), 4)]
    sheet = grid(
        [[picture for _, picture in row] for row in rows],
        columns=[""] * 4,
        labels=[""] * len(rows),
        notes=[[label for label, _ in row] for row in rows],
        scale=1,
        label_width=0,
    )
    path = write_image(job.folder / "attention.png", sheet, {"model": job.name})
    return [Figure("image", "Attention", text, relative(path, job.settings))]
