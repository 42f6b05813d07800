"""What a comparison finds, as plain data: outcomes, figures, one section per model, the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "failed", "does not fit"]


@dataclass(frozen=True)
class Column:
    """A quality measure of a section.

    Args:
        key: name in `Outcome.quality`.
        label: heading.
        style: ``percent`` (0..1), ``db``, ``ratio`` or ``number``.
        better: ``high`` or ``low``.
        meaning: one line for people.
        headline: whether it belongs into the one-line finding.
    """

    key: str
    label: str
    style: Literal["percent", "db", "ratio", "number"]
    better: Literal["high", "low"]
    meaning: str
    headline: bool = False


@dataclass
class Outcome:
    """One column of the comparison: what it cost and what it was worth."""

    label: str
    status: Status = "ok"
    error: str | None = None
    methods: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    memory_mb: float | None = None
    sites: int = 0
    calls: int = 0
    density: float | None = None
    tokens_in: float | None = None
    tokens_kept: float | None = None
    dense_calls: int = 0
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A file to show. `kind` is ``image``, ``video`` (path of the MP4 or WebP) or ``html`` (a fragment)."""

    kind: Literal["image", "video", "html"]
    title: str
    text: str
    path: str = ""
    html: str = ""


@dataclass
class Section:
    """Everything about one model."""

    model: str
    title: str
    lead: str
    samples: int = 0
    columns: tuple[Column, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Columns that ran."""
        return sum(outcome.status == "ok" for outcome in self.outcomes)

    @property
    def failed(self) -> bool:
        """Whether anything that should have run did not."""
        return bool(self.problems) or any(o.status == "failed" for o in self.outcomes)


@dataclass
class Report:
    """A whole comparison. `exit_code` follows the convention of the command line."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    started: str
    seconds: float = 0.0
    interrupted: bool = False
    sections: list[Section] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all done, 3 something failed, 4 nothing done, 130 interrupted."""
        if self.interrupted:
            return 130
        if not any(section.done for section in self.sections):
            return 4
        return 3 if any(section.failed for section in self.sections) else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; HTML fragments are left out."""
        data = asdict(self)
        for section in data["sections"]:
            section["figures"] = [
                {key: value for key, value in figure.items() if key != "html"}
                for figure in section["figures"]
                if figure["path"]
            ]
        return {**data, "exit_code": self.exit_code}


def shown(value: float | None, style: str) -> str:
    """A quality value for people."""
    if value is None:
        return "–"
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "db":
        from mmattn.evals.quality import decibels

        return decibels(value)
    return f"{value:.3f}" if style == "ratio" else f"{value:.2f}"
