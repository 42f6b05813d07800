"""Heatmaps: numbers on a token grid to an RGB picture, alone or laid over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmattn.errors import ConfigError

Picture = Image.Image | str | Path
_GAP = 4
_SIDE = 256

# Lightness rises evenly from dark violet to pale yellow, so equal steps look equal, also in grey.
_COLOURS = np.array(
    [
        (18, 10, 46),
        (54, 19, 99),
        (99, 26, 122),
        (144, 36, 122),
        (188, 52, 106),
        (224, 80, 79),
        (243, 120, 54),
        (250, 165, 58),
        (250, 210, 96),
        (253, 249, 178),
    ],
    dtype=np.float64,
)


def colour(values: np.ndarray) -> np.ndarray:
    """``[Y, X]`` in [0, 1] to ``[Y, X, 3]`` uint8."""
    place = values.clip(0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    part = (place - low)[..., None]
    mixed: np.ndarray = (1 - part) * _COLOURS[low] + part * _COLOURS[low + 1]
    return mixed.round().astype(np.uint8)


def render(
    values: torch.Tensor,
    image: Picture | Sequence[Picture] | None = None,
    *,
    alpha: float = 0.5,
) -> Image.Image:
    """One picture of ``values [T, Y, X]``: frames side by side, colours from the smallest to the largest.

    Args:
        image: what the map is laid over at `alpha`: one picture, or the frames of a video, of which those
            nearest in time are used. Without it a cell is drawn as large as fits 256 pixels.

    Raises:
        ConfigError: when the values are not finite or `image` is an empty list.
    """
    if not bool(torch.isfinite(values).all()):
        raise ConfigError("this attention map has values that are not finite; nothing to draw")
    frames = values.float().cpu().numpy()
    low, high = float(frames.min()), float(frames.max())
    frames = (frames - low) / (high - low) if high > low else np.zeros_like(frames)
    under = _pictures(image, len(frames))
    t, y, x = frames.shape
    factor = max(1, _SIDE // max(y, x))
    tiles = []
    for frame, picture in zip(frames, under, strict=True):
        size = (x * factor, y * factor) if picture is None else picture.size
        smooth = Image.fromarray(frame.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        tile = Image.fromarray(colour(np.asarray(smooth)))
        tiles.append(tile if picture is None else Image.blend(picture, tile, alpha))
    width = sum(tile.width for tile in tiles) + _GAP * (t - 1)
    strip = Image.new("RGB", (width, max(tile.height for tile in tiles)), "white")
    left = 0
    for tile in tiles:
        strip.paste(tile, (left, 0))
        left += tile.width + _GAP
    return strip


def _pictures(
    image: Picture | Sequence[Picture] | None, frames: int
) -> list[Image.Image] | list[None]:
    if image is None:
        return [None] * frames
    given = [image] if isinstance(image, Image.Image | str | Path) else list(image)
    if not given:
        raise ConfigError("image is an empty list; pass a picture, the frames of a video, or None")
    opened = [p.convert("RGB") if isinstance(p, Image.Image) else _open(p) for p in given]
    last = len(opened) - 1
    return [opened[round(i * last / max(frames - 1, 1))] for i in range(frames)]


def _open(path: str | Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
