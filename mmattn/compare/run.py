"""Drive the jobs, keep what is done, and write the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch

from mmattn.batch.writers import write_json, write_text
from mmattn.compare.jobs import Job, Settings, sentence, work
from mmattn.compare.results import Report, Section
from mmattn.measuring import environment
from mmattn.registry import method_from
from mmattn.variants import DEFAULTS, Variant, check_names, override, variant

Progress = Callable[[int, int, str], None]


def jobs_for(names: Sequence[str], settings: Settings) -> list[Job]:
    """The jobs by name, in the order of the report.

    Raises:
        ConfigError: for an unknown name.
    """
    from mmattn.compare.answers import Answers
    from mmattn.compare.classes import Classes
    from mmattn.compare.clips import Clips
    from mmattn.compare.pictures import Pictures

    known: dict[str, type[Job]] = {job.name: job for job in (Pictures, Clips, Answers, Classes)}
    check_names(names)
    return [known[name](settings) for name in known if name in names]


def default_columns(
    sections: Sequence[Section], changes: Sequence[str] = ()
) -> list[list[Variant]]:
    """The default methods of every section's model; one that cannot be made is noted in the section.

    Raises:
        ConfigError: when one of `changes` (see `override`) fits none of them.
    """
    groups: list[list[Variant]] = []
    for section in sections:
        groups.append([])
        for table in DEFAULTS[section.model]:
            try:
                groups[-1].append(variant([method_from(dict(table))]))
            except Exception as error:
                section.problems.append(f"{table['name']}: {sentence(error)}")
    changed = iter(override([column for group in groups for column in group], changes))
    return [[next(changed) for _ in group] for group in groups]


def compare(
    jobs: Sequence[Job],
    settings: Settings,
    columns: Sequence[Variant] | None = None,
    *,
    changes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Run every job, and write ``report.html`` and ``report.json`` into ``settings.out``.

    Args:
        jobs: see `jobs_for`.
        settings: seeds, steps, folder.
        columns: methods for every model; None takes each model's defaults.
        changes: settings for the default methods, see `override`.
        progress: called with (done, total, what) after every column.

    Returns:
        The report. It is written and returned after Ctrl-C too, with `interrupted` set.
    """
    start = time.perf_counter()
    report = Report(
        settings={**asdict(settings), "out": settings.out.name},
        environment=environment(torch.device(settings.device)),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    sections = [Section(job.name, job.title, job.lead, job.count, job.columns) for job in jobs]
    if columns is None:
        chosen = default_columns(sections, changes)
    else:
        chosen = [list(columns) for _ in sections]
    try:
        total = sum(1 + len(group) for group in chosen)
        done = 0

        def tick(what: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total, what)

        for job, section, group in zip(jobs, sections, chosen, strict=True):
            report.sections.append(section)
            work(job, group, section, tick)
            job.values.clear()
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = time.perf_counter() - start
    write(report, settings)
    return report


def write(report: Report, settings: Settings) -> None:
    """Write both forms of the report."""
    from mmattn.compare.page import render

    write_json(settings.out / "report.json", report.to_dict())
    write_text(settings.out / "report.html", render(report, settings.out))
