"""What every job shares: run each column with the same inputs, measure it, and survive failures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmattn.attaching import attach
from mmattn.compare.results import Column, Figure, Outcome, Section
from mmattn.errors import NoSiteError
from mmattn.loading import Loaded, resolve
from mmattn.measuring import measured
from mmattn.report import Stats
from mmattn.session import Session
from mmattn.variants import DENSE, Variant

Tick = Callable[[str], None]

HELD_OUT = 990_000
"""First of the ten thousand seeds that name the inputs of comparisons; no training uses them."""


@dataclass(frozen=True)
class Settings:
    """What a comparison is told.

    Args:
        out: folder for the files.
        seed: names the inputs and the noise.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        samples: prompts or pictures per model; None takes every job's own number.
        device: torch device.
    """

    out: Path
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    samples: int | None = None
    device: str = "cpu"


class Job(ABC):
    """The comparison on one model.

    Class attributes:
        name: which embedded model.
        title, lead: heading and first sentence of its section.
        samples: default number of prompts or pictures.
        columns: quality measures, most important first.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    lead: ClassVar[str]
    samples: ClassVar[int]
    columns: ClassVar[tuple[Column, ...]]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = settings.samples or self.samples
        self.loaded: Loaded
        self.values: dict[str, Any] = {}

    @property
    def input_seed(self) -> int:
        """Names the inputs; the next nine belong to this job as well."""
        return HELD_OUT + self.settings.seed * 10 % 10_000

    @property
    def folder(self) -> Path:
        """Where this job's files go."""
        return self.settings.out / self.name

    def load(self) -> Loaded:
        """The model; tests replace it."""
        return resolve(self.name, device=self.settings.device)

    @abstractmethod
    def inputs(self) -> None:
        """Make the prompts and the pictures, once."""

    @abstractmethod
    def warm(self) -> None:
        """A short call, as wide as the measured one, so that no measured call pays for start-up."""

    @abstractmethod
    def run(self) -> Any:
        """The measured work on all inputs."""

    @abstractmethod
    def score(self, value: Any, dense: Any | None) -> dict[str, float]:
        """Quality of what `run` returned; `dense` is what the untouched model gave, if it ran."""

    @abstractmethod
    def illustrate(self) -> list[Figure]:
        """Write files from `values` and say what they show."""

    def heat(self) -> list[Figure]:
        """Attention heat-maps; jobs without them return none."""
        return []


def fill(outcome: Outcome, stats: Stats) -> None:
    """Copy the numbers of a session."""
    outcome.sites, outcome.calls = stats.executed, stats.calls
    outcome.density, outcome.dense_calls = stats.density, stats.dense_calls
    pruned = [s for s in stats.sites if s.tokens_kept is not None and s.tokens_in is not None]
    if pruned:
        outcome.tokens_in = max(s.tokens_in for s in pruned if s.tokens_in is not None)
        outcome.tokens_kept = min(s.tokens_kept for s in pruned if s.tokens_kept is not None)


def sentence(error: BaseException) -> str:
    """An error in one line: its type unless it is one of ours, and its first line."""
    from mmattn.errors import MmattnError

    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, MmattnError) else f"{type(error).__name__}: {text}"[:600]


def one(job: Job, column: Variant) -> Outcome:
    """Run one column of `job`; every failure but Ctrl-C ends up in the outcome."""
    outcome = Outcome(column.label, methods=[m.to_dict() for m in column.methods])
    session: Session | None = None
    try:
        if column.methods:
            session = attach(job.loaded.target, list(column.methods), seed=job.settings.seed)
        job.warm()
        if session is not None:
            session.reset()
        result = measured(job.run, torch.device(job.settings.device))
        outcome.seconds, outcome.memory_mb = result.seconds, result.memory_mb
        if session is not None:
            fill(outcome, session.stats)
        outcome.quality = job.score(result.value, job.values.get(DENSE.label))
        job.values[column.label] = result.value
    except NoSiteError as error:
        outcome.status, outcome.error = "does not fit", sentence(error)
    except Exception as error:
        outcome.status, outcome.error = "failed", sentence(error)
    finally:
        if session is not None:
            session.detach()
    return outcome


def work(
    job: Job,
    columns: Sequence[Variant],
    section: Section,
    tick: Tick,
    *,
    figures: bool = True,
) -> None:
    """Fill `section`: load, run every column, draw the figures. Figures are drawn after Ctrl-C too."""
    try:
        job.loaded = job.load()
        job.inputs()
    except Exception as error:
        section.problems.append(sentence(error))
        for column in (DENSE, *columns):
            tick(f"{job.name} {column.label}")
        return
    section.samples = job.count
    try:
        for column in (DENSE, *columns):
            outcome = one(job, column)
            section.outcomes.append(outcome)
            tick(f"{job.name} {column.label}")
        if figures:
            _figures(section, job.heat)
    finally:
        if job.values and figures:
            _figures(section, job.illustrate)
        section.figures.sort(key=lambda figure: "attention" in figure.title.lower())


def _figures(section: Section, make: Callable[[], list[Figure]]) -> None:
    try:
        section.figures += make()
    except Exception as error:
        section.problems.append(f"figures: {sentence(error)}")


def relative(path: Path, settings: Settings) -> str:
    """A path inside the output folder, for links."""
    return path.relative_to(settings.out).as_posix()
