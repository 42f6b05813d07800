"""One call of a model for items that can share it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmattn.batch.guards import Guard, NonFiniteError, tiled_decoding
from mmattn.batch.imagesets import draw_set
from mmattn.batch.items import Item
from mmattn.batch.limits import open_picture
from mmattn.batch.writers import to_pixels
from mmattn.calls import answer, draw

if TYPE_CHECKING:
    from mmattn.loading import Loaded
    from mmattn.session import Session


@dataclass(frozen=True)
class Seat:
    """What one item of a call got.

    Args:
        drawn: picture ``[3, Y, X]`` or clip ``[3, T, Y, X]`` in [0, 1].
        panels: of an image set whose canvas `drawn` is.
        answer: words of a caption.
        counters: what the methods did in the whole call.
        peak_mb: peak memory of the call on a GPU, in MiB; None elsewhere.
        notes: what was done so that it could be made.
        error: why there is nothing.
    """

    drawn: torch.Tensor | None = None
    panels: tuple[torch.Tensor, ...] = ()
    answer: str | None = None
    counters: Mapping[str, Any] = field(default_factory=dict)
    peak_mb: float | None = None
    notes: tuple[str, ...] = ()
    error: Exception | None = None

    def content_sha256(self) -> str:
        """SHA-256 of the 8-bit pixels before encoding, or of the words."""
        if self.drawn is None:
            return hashlib.sha256((self.answer or "").encode()).hexdigest()
        seen = hashlib.sha256()
        frames = [self.drawn] if self.drawn.ndim == 3 else self.drawn.unbind(1)
        for frame in frames:
            seen.update(to_pixels(frame).tobytes())
        return seen.hexdigest()


@dataclass
class Made:
    """What a call gave: a seat per item, and the rows that are not finite with the reason."""

    seats: list[Seat]
    bad: dict[int, str] = field(default_factory=dict)


def make(
    loaded: Loaded,
    items: Sequence[Item],
    session: Session | None,
    device: torch.device,
    *,
    tiled: bool = False,
) -> Made:
    """Make `items` in one call.

    Args:
        loaded: the model that serves them.
        items: of one group.
        session: what is attached, for its numbers.
        device: where the model runs; one that is offloaded says that it is elsewhere.
        tiled: decode in tiles, to save memory.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if items[0].kind == "caption":
        made = _captions(loaded, items)
    else:
        made = _pictures(loaded, items, tiled=tiled)
    counters = {} if session is None else _counters(session)
    peak = None
    if device.type == "cuda":
        peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    made.seats = [
        replace(seat, counters={**seat.counters, **counters}, peak_mb=peak) for seat in made.seats
    ]
    return made


def _captions(loaded: Loaded, items: Sequence[Item]) -> Made:
    params = items[0].params
    words = answer(
        loaded,
        [open_picture(Path(item.params["image"])) for item in items],
        [item.params["prompt"] for item in items],
        max_new_tokens=params["max_new_tokens"],
        batch=len(items),
    )
    return Made([Seat(answer=text) for text in words])


def _pictures(loaded: Loaded, items: Sequence[Item], *, tiled: bool) -> Made:
    guard = Guard(len(items))
    panels: tuple[torch.Tensor, ...] = ()
    try:
        with tiled_decoding(loaded.target) if tiled else nullcontext():
            if items[0].kind == "imageset":
                canvas, panels = draw_set(loaded, items[0], guard)
                drawn = canvas[None]
            else:
                drawn = _draw(loaded, items, guard)
    except NonFiniteError:
        seats = [Seat() for _ in items]
    else:
        guard.look(drawn)
        checks = {"step_checks": guard.checks}
        seats = [Seat(drawn=part, panels=panels, counters=checks) for part in drawn]
    return Made(seats, {row: guard.reason(row) for row in guard.bad})


def _draw(loaded: Loaded, items: Sequence[Item], guard: Guard) -> torch.Tensor:
    params = items[0].params
    extra: dict[str, Any] = {
        name: params.get(name) for name in ("width", "height", "num_frames", "strength")
    }
    known = inspect.signature(type(loaded.target).__call__).parameters
    if "init_image" in params:
        pictures = [open_picture(Path(item.params["init_image"])) for item in items]
        if "width" not in known:
            # Such pipelines draw at the size of the picture they start from.
            wide, high = extra.pop("width"), extra.pop("height")
            pictures = [p.resize((wide or p.width, high or p.height)) for p in pictures]
        extra["image"] = pictures if items[0].kind == "image" else pictures[0]
    if "callback_on_step_end" in known:
        extra["callback_on_step_end"] = guard
        extra["callback_on_step_end_tensor_inputs"] = ["latents"]
    return draw(
        loaded,
        [item.params["prompt"] for item in items],
        [item.seed for item in items],
        steps=params["steps"],
        guidance=params.get("guidance"),
        negative=params.get("negative_prompt", ""),
        batch=len(items),
        **extra,
    )


def _counters(session: Session) -> dict[str, Any]:
    stats = session.stats
    found: dict[str, Any] = {"calls": stats.calls, "dense_calls": stats.dense_calls}
    if stats.density is not None:
        found["density"] = round(stats.density, 4)
    pruned = [s for s in stats.sites if s.tokens_kept is not None and s.tokens_in is not None]
    if pruned:
        found["tokens_in"] = max(s.tokens_in for s in pruned if s.tokens_in is not None)
        found["tokens_kept"] = min(s.tokens_kept for s in pruned if s.tokens_kept is not None)
    return found
