"""Panels of a canvas in the forms that pipelines return: PIL, NumPy ``[Y, X, 3]``, torch ``[3, Y, X]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmattn_pipelines.panels import PanelLayout

KINDS = ("pil", "np", "pt", "latent")


def panels_of(canvas: Any, layout: PanelLayout, kind: str) -> list[Any]:
    """The panels of one canvas: a PIL picture, an array ``[Y, X, 3]`` or a tensor ``[3, Y, X]``."""
    if kind == "pil":
        return list(layout.split(canvas))
    if kind == "np":
        return [canvas[top:bottom, left:right] for left, top, right, bottom in layout.boxes]
    return [canvas[:, top:bottom, left:right] for left, top, right, bottom in layout.boxes]


def canvas_of(panels: Sequence[Any], layout: PanelLayout, kind: str) -> Any:
    """One canvas of panels, in their form."""
    if kind == "pil":
        return layout.join(panels)
    rows = [panels[start : start + layout.cols] for start in range(0, layout.count, layout.cols)]
    if kind == "np":
        return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def as_kind(image: Image.Image, kind: str) -> Any:
    """A picture in the form that pipelines return; numbers are in [0, 1]."""
    if kind == "pil":
        return image
    numbers = np.asarray(image, dtype=np.float32) / 255
    return numbers if kind == "np" else torch.from_numpy(numbers).permute(2, 0, 1)
