"""Verbs that weigh methods against the untouched model: ``compare``, ``bench``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmattn.cli import common
from mmattn.cli.common import (
    Config,
    Device,
    Json,
    Kind,
    Methods,
    Out,
    Quiet,
    Seed,
    Set,
    Sites,
    emit,
    emit_json,
    guarded,
    option,
    say,
)

Only = Annotated[list[str] | None, option("--only", help="Compare only this model; repeatable.")]
Samples = Annotated[int | None, option("--samples", min=1, help="Prompts or pictures per model.")]
Steps = Annotated[int, option("--steps", min=1, help="Denoising steps.")]
Guidance = Annotated[float, option("--guidance", help="Classifier-free guidance scale.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("compare")(compare)
    app.command("bench")(bench)


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar(quiet: bool) -> Callable[[int, int, str], None] | None:
    """A bar on a terminal, one line per column elsewhere."""
    if quiet:
        return None
    if not sys.stderr.isatty():
        return lambda done, total, what: say(f"[{done}/{total}] {what}")
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, file=sys.stderr, unit="column")
        bar.set_postfix_str(what)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


@guarded
def compare(
    out: Out = Path("out"),
    only: Only = None,
    method: Methods = None,
    changes: Set = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    samples: Samples = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """The main job: every embedded model, untouched and with methods, in one report.

    Writes pictures, clips, report.html and report.json into the output folder. Ctrl-C keeps what is
    done so far.
    """
    from mmattn.variants import DEFAULTS, check_names

    chosen = common.columns(method, changes if method else None)
    names = list(only or DEFAULTS)
    common.check_device(device)
    check_names(names)
    if not quiet:
        say("loading libraries")
    common.quiet_libraries()
    from mmattn.compare.jobs import Settings
    from mmattn.compare.run import compare as run, jobs_for

    settings = Settings(out, seed, steps, guidance, samples, device)
    jobs = jobs_for(names, settings)
    with _sigterm_is_ctrl_c():
        report = run(jobs, settings, chosen or None, changes=changes or (), progress=_bar(quiet))
    if as_json:
        emit_json(report.to_dict())
    _verdict(report)
    say(f"report: {out / 'report.html'} ({report.seconds:.0f} s)")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _verdict(report: Any) -> None:
    for section in report.sections:
        for text in section.problems:
            say(f"{section.model}: {text}")
        for outcome in section.outcomes:
            if outcome.status == "failed":
                say(f"{section.model} {outcome.label}: {outcome.error}")
    if report.interrupted:
        say("interrupted; the report holds what was done by then")


@guarded
def bench(
    model: Annotated[
        list[str] | None, typer.Argument(help="Models; all embedded ones by default.")
    ] = None,
    method: Methods = None,
    changes: Set = None,
    sites: Sites = None,
    repeats: Annotated[int, option("--repeats", min=1, help="Timed calls of each.")] = 10,
    warmup: Annotated[int, option("--warmup", min=0, help="Calls before the timing.")] = 3,
    steps: Annotated[int, option("--steps", min=1, help="Denoising steps of one call.")] = 4,
    seed: Seed = 0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Time methods against dense in one run, interleaved. No number without green checks."""
    from mmattn.variants import DEFAULTS

    chosen = common.columns(method, changes if method else None)
    common.check_device(device)
    common.quiet_libraries()
    import torch

    from mmattn.compare.bench import bench as run
    from mmattn.compare.results import Section
    from mmattn.compare.run import default_columns
    from mmattn.errors import ConfigError, MmattnError
    from mmattn.loading import resolve
    from mmattn.measuring import environment

    every, lost = [], []
    for name in model or list(DEFAULTS):
        try:
            columns = chosen
            if not columns:
                if name not in DEFAULTS:
                    raise ConfigError(f"say which methods to time on {name}: -m vmoba")
                section = Section(name, name, "")
                columns = default_columns([section], changes or ())[0]
                lost += section.problems
            every += run(
                resolve(name, kind, device=device),
                columns,
                sites=sites or None,
                repeats=repeats,
                warmup=warmup,
                seed=seed,
                steps=steps,
                progress=None if quiet else say,
            )
        except MmattnError as error:
            if model is not None and len(model) == 1:
                raise
            lost.append(f"{name}: {' '.join(str(error).split())}")
    if as_json:
        emit_json(
            {
                "environment": environment(torch.device(device)),
                "timings": [line.to_dict() for line in every],
                "problems": lost,
            }
        )
    elif every:
        emit(_bench_text(every))
    for text in lost:
        say(text)
    if not any(line.median_ms is not None for line in every):
        raise typer.Exit(common.NOTHING_DONE)
    if lost or any(line.refused for line in every):
        raise typer.Exit(common.SOME_FAILED)


def _bench_text(lines: list[Any]) -> str:
    rows = []
    for line in lines:
        if line.refused is not None:
            rows.append([line.model, line.label, "refused", line.refused, "", ""])
            continue
        rows.append(
            [
                line.model,
                line.label,
                f"{line.median_ms:.1f} ms",
                f"{line.low_ms:.1f} .. {line.high_ms:.1f}",
                "" if line.ratio is None else f"{line.ratio:.2f} x dense",
                "" if line.density is None else f"{line.density:.3f}",
            ]
        )
    return common.rows_as_text(["model", "method", "median", "quartiles", "ratio", "density"], rows)
