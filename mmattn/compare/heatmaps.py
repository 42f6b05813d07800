"""Attention heat-maps of one short call on the untouched model, through `AttentionMaps`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mmattn.attaching import attach
from mmattn.batch.writers import grid, write_image
from mmattn.compare.jobs import Job, relative
from mmattn.compare.results import Figure


def save_maps(target: Any, call: Callable[[], Any], folder: Path, image: Any = None) -> list[Path]:
    """Run `call` with `AttentionMaps` attached to `target`; the PNG files it left in `folder`."""
    from mmattn.methods.attention_maps import AttentionMaps

    method = AttentionMaps()
    if folder.is_dir():
        shutil.rmtree(folder)
    with attach(target, method) as session:
        call()
        method.save(session, folder, image=image)
    return sorted(folder.rglob("*.png"))


def heatmaps(job: Job, call: Callable[[], Any], image: Image.Image) -> list[Figure]:
    """One sheet with the picture and the map of every site."""
    files = save_maps(job.loaded.target, call, job.folder / "attention", image)
    if not files:
        return []
    pictures = [Image.open(path).convert("RGB") for path in files[:7]]
    size = (192, 192)
    tiles = [image.resize(size, Image.Resampling.NEAREST), *(p.resize(size) for p in pictures)]
    names = ["picture", *(path.stem for path in files[:7])]
    while len(tiles) % 4:
        tiles.append(Image.new("RGB", size, (255, 255, 255)))
        names.append("")
    rows = [tiles[i : i + 4] for i in range(0, len(tiles), 4)]
    notes = [names[i : i + 4] for i in range(0, len(names), 4)]
    sheet = grid(
        rows, columns=[""] * 4, labels=[""] * len(rows), notes=notes, scale=1, label_width=0
    )
    path = write_image(job.folder / "attention.png", sheet, {"model": job.name})
    return [
        Figure(
            "image",
            "Attention",
            "How much attention every image token receives, averaged over heads and queries, at "
            "several sites of the untouched model.",
            relative(path, job.settings),
        )
    ]
