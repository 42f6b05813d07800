"""Image sets: the panels of a row as one canvas, drawn by `mmattn_pipelines.in_context`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmattn.errors import ConfigError

if TYPE_CHECKING:
    from mmattn_pipelines.captions import SetCaption

    from mmattn.batch.guards import Guard
    from mmattn.batch.items import Item
    from mmattn.loading import Loaded

TAG = "IMAGE-SET"
SIDE, EMBEDDED_SIDE = 512, 64
"""Pixels of a panel that says nothing; the second for the embedded model."""


def caption_of(params: Mapping[str, Any]) -> SetCaption:
    """The caption of a set: ``prompt`` is what panels share, and may begin with ``[A-TAG]``.

    Raises:
        ConfigError: for texts that no caption can be made of, or given pictures that are not in front.
    """
    from mmattn_pipelines.captions import SetCaption
    from mmattn_pipelines.panels import PanelLayout

    panels = params["panels"]
    given = ["image" in panel for panel in panels]
    if given != sorted(given, reverse=True) or all(given):
        raise ConfigError(
            "panels with an image come first, and at least one panel is left to be drawn"
        )
    shared = str(params.get("prompt", ""))
    found = re.match(r"\s*\[([A-Z0-9-]+)\]\s*", shared)
    tag, overall = (found[1], shared[found.end() :]) if found else (TAG, shared)
    layout = PanelLayout.auto(len(panels), *_size(params, SIDE))
    return SetCaption.for_layout(layout, tag, overall, [panel["prompt"] for panel in panels])


def _size(params: Mapping[str, Any], side: int) -> tuple[int, int]:
    return params.get("height", side), params.get("width", side)


def draw_set(loaded: Loaded, item: Item, guard: Guard) -> tuple[Any, tuple[Any, ...]]:
    """The canvas ``[3, Y, X]`` in [0, 1] and its panels in reading order."""
    import torch
    from mmattn_pipelines.in_context import InContextPipeline
    from mmattn_pipelines.panels import PanelLayout

    from mmattn.batch.limits import open_picture
    from mmattn.calls import TEXT_LENGTH, guiding

    params, pipe = item.params, loaded.target
    known = inspect.signature(type(pipe).__call__).parameters
    extra = guiding(loaded, params.get("guidance"), params.get("negative_prompt", ""))
    if loaded.embedded:
        extra["max_sequence_length"] = TEXT_LENGTH
    panels = params["panels"]
    side = EMBEDDED_SIDE if loaded.embedded else SIDE
    with torch.no_grad():
        drawn: Any = InContextPipeline(pipe)(
            caption_of(params),
            layout=PanelLayout.auto(len(panels), *_size(params, side)),
            references=[open_picture(Path(p["image"])) for p in panels if "image" in p],
            num_inference_steps=params["steps"],
            generator=torch.Generator().manual_seed(item.seed),
            callback_on_step_end=guard if "callback_on_step_end" in known else None,
            output_type="pt",
            **extra,
        )
    return drawn.canvas.float().cpu(), tuple(image.float().cpu() for image in drawn.images)
