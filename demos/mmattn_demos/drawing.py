"""One prompt and one seed through a text-to-image or text-to-video model, untouched and with methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from mmattn.attaching import attach
from mmattn.calls import T2I_SIZE, T2V_SIZE, draw
from mmattn.evals.quality import decibels, psnr, ssim
from mmattn.loading import Loaded
from mmattn.measuring import Measured, measured
from mmattn.report import Stats
from mmattn.session import Session
from mmattn.variants import DENSE, Variant
from mmattn_demos import limits, presets
from mmattn_demos.models import Models, parameters_on
from mmattn_demos.numbers import Measures, measures
from mmattn_demos.previews import preview
from mmattn_demos.streaming import Tell, Update


@dataclass(frozen=True)
class Ask:
    """What a visitor asked for, checked."""

    prompt: str
    column: Variant
    seed: int
    steps: int
    guidance: float
    size: dict[str, Any] = field(default_factory=dict)


def asked(
    models: Models,
    kind: str,
    prompt: str,
    method: str,
    seed: float,
    steps: float,
    guidance: float,
    *size: float,
) -> Ask:
    """The request of a visitor for a model of `kind`, checked; `size` is width, height and frames.

    Raises:
        ConfigError: for anything out of bounds.
    """
    count = limits.whole(steps, "the number of steps", 1, limits.STEPS)
    text = limits.prompt(prompt)
    column, number = presets.chosen(method, kind), limits.seed(seed)
    scale = limits.guidance(guidance)
    return Ask(text, column, number, count, scale, limits.size(models.get(kind), count, *size))


@dataclass(frozen=True)
class Run:
    """One of the two runs.

    Args:
        value: ``[3, Y, X]`` or ``[3, T, Y, X]`` in [0, 1].
        seconds: wall time without the previews.
        memory_mb: peak above the level at the start, previews included; None where it cannot be read.
        stats: numbers of the session; None for the untouched model.
    """

    label: str
    value: Tensor
    seconds: float
    memory_mb: float | None
    stats: Stats | None = None


def pair(loaded: Loaded, ask: Ask, tell: Tell) -> list[Run]:
    """The untouched run and, where methods were chosen, theirs.

    Each begins with one step that is not measured, so that neither pays for start-up.
    """
    runs = [single(loaded, ask, tell, methods=False)]
    if ask.column.methods:
        runs.append(single(loaded, ask, tell, methods=True))
    return runs


def single(loaded: Loaded, ask: Ask, tell: Tell, *, methods: bool) -> Run:
    """One run, with previews about every fifth of the way."""
    label = ask.column.label if methods else DENSE.label
    with _session(loaded, ask, methods) as session:
        tell(Update(f"{label}: warming up"))
        _draw(loaded, ask, steps=1)
        if session is not None:
            session.reset()
        watch = _Watch(loaded, ask, label, session, tell)
        done: Measured = measured(
            lambda: _draw(loaded, ask, callback_on_step_end=watch), parameters_on(loaded)
        )
        stats = None if session is None else session.stats
    return Run(label, done.value[0], done.seconds - watch.spent, done.memory_mb, stats)


def again(loaded: Loaded, ask: Ask) -> Tensor:
    """The result of `ask` with whatever is attached now, not measured."""
    return _draw(loaded, ask)[0]


@contextlib.contextmanager
def _session(loaded: Loaded, ask: Ask, methods: bool) -> Iterator[Session | None]:
    if not methods or not ask.column.methods:
        yield None
        return
    with attach(loaded.target, list(ask.column.methods), seed=ask.seed) as session:
        yield session


def _draw(loaded: Loaded, ask: Ask, steps: int | None = None, **more: Any) -> Tensor:
    return draw(
        loaded,
        [ask.prompt],
        [ask.seed],
        steps=ask.steps if steps is None else steps,
        guidance=ask.guidance,
        **ask.size,
        **more,
    )


class _Watch:
    """The step callback of a pipeline: tells, decodes a preview now and then, and keeps its own time."""

    def __init__(
        self, loaded: Loaded, ask: Ask, label: str, session: Session | None, tell: Tell
    ) -> None:
        self.loaded, self.ask, self.label, self.session, self.tell = (
            loaded,
            ask,
            label,
            session,
            tell,
        )
        self.every = max(1, ask.steps // 5)
        self.spent = 0.0
        self.began = time.perf_counter()

    def __call__(
        self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        text = f"{self.label}: step {step + 1} of {self.ask.steps}"
        density = None if self.session is None else self.session.stats.density
        if density is not None:
            text += f", density {density:.2f}"
        text += f", {start - self.began - self.spent:.1f} s"
        picture = None
        if (step + 1) % self.every == 0 and step + 1 < self.ask.steps:
            picture = preview(pipe, values["latents"], self._size())
        self.tell(Update(text, picture))
        self.spent += time.perf_counter() - start
        return {}

    def _size(self) -> tuple[int, int] | None:
        if self.loaded.embedded:
            side = T2I_SIZE if self.loaded.kind == "t2i" else T2V_SIZE
            return side, side
        high, wide = self.ask.size.get("height"), self.ask.size.get("width")
        return None if high is None or wide is None else (high, wide)


def numbers(runs: list[Run]) -> list[Measures]:
    """One row per run; likeness is measured against the first."""
    rows = []
    for run in runs:
        more: Measures = {}
        if run.stats is not None and run is not runs[0]:
            value, dense = run.value[None], runs[0].value[None]
            more["psnr_db"] = round(float(psnr(value, dense).mean()), 2)
            more["ssim"] = round(float(ssim(value, dense).mean()), 4)
        rows.append(measures(run.label, run.seconds, run.memory_mb, run.stats, **more))
    return rows


def summary(runs: list[Run]) -> str:
    """One line on what was run."""
    parts = []
    for run, row in zip(runs, numbers(runs), strict=True):
        density = "" if row["density"] is None else f" at density {row['density']:.2f}"
        likeness = "" if "psnr_db" not in row else f", {decibels(row['psnr_db'])} from dense"
        parts.append(f"{run.label}: {run.seconds:.2f} s{density}{likeness}")
    if len(runs) == 1 and runs[0].stats is None:
        parts.append("choose a method to compare it with")
    return "; ".join(parts) + "."


def frames_of(value: Tensor) -> list[Tensor]:
    """The frames of a clip ``[3, T, Y, X]``."""
    return [value[:, t] for t in range(value.shape[1])]


def shown(picture: Any, side: int = 384) -> Image.Image:
    """A picture for the page: small ones enlarged with hard pixels."""
    from mmattn.batch.writers import to_image, upscale

    image = to_image(picture)
    return upscale(image, max(1, side // max(image.size)))
