"""Verbs for many items: ``batch``, and ``inspect`` and ``rerun`` for the files it writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

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
    Set,
    emit,
    emit_json,
    guarded,
    option,
    say,
)

if TYPE_CHECKING:
    from mmattn.batch.jobs import Found, Jobs
    from mmattn.batch.local import Run

DTYPES = ("float32", "bfloat16", "float16")
Count = Annotated[int | None, option("--steps", min=1, help="Denoising steps.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("batch")(batch)
    app.command("inspect")(inspect_)
    app.command("rerun")(rerun)


@guarded
def batch(
    ctx: typer.Context,
    jobs: Annotated[
        list[Path],
        typer.Argument(
            help="A .jsonl, .csv, .parquet or .txt file; or folders and files that mmattn batch wrote."
        ),
    ],
    out: Out = Path("out/batch"),
    model: Annotated[
        list[str] | None,
        option("--model", help="Embedded model, folder or hub id; repeatable, one per kind."),
    ] = None,
    method: Methods = None,
    changes: Set = None,
    steps: Count = None,
    guidance: Annotated[float | None, option("--guidance", help="Guidance scale.")] = None,
    negative: Annotated[str | None, option("--negative", help="What to steer away from.")] = None,
    width: Annotated[int | None, option("--width", min=8, help="Pixels.")] = None,
    height: Annotated[int | None, option("--height", min=8, help="Pixels.")] = None,
    frames: Annotated[int | None, option("--frames", min=1, help="Frames of a clip.")] = None,
    fps: Annotated[int | None, option("--fps", min=1, help="Frames per second.")] = None,
    seed: Annotated[
        int | None, option("--seed", help="Seed of rows without one; by default from their id.")
    ] = None,
    size: Annotated[int, option("--batch", min=1, help="Most items per call of a model.")] = 1,
    shard: Annotated[str | None, option("--shard", help="Share i/n of the file, from 0.")] = None,
    verify: Annotated[
        str, option("--verify", help="How finished files are checked: fast (size) or full.")
    ] = "fast",
    overwrite: Annotated[bool, option("--overwrite", help="Make everything again.")] = False,
    retry_failed: Annotated[
        int, option("--retry-failed", min=0, help="Further rounds over items that failed.")
    ] = 0,
    fail_fast: Annotated[bool, option("--fail-fast", help="Stop at the first failure.")] = False,
    max_failures: Annotated[
        str | None, option("--max-failures", help="Stop when more fail: a number or 5%.")
    ] = None,
    allow_extra: Annotated[
        bool,
        option("--allow-extra", help="Take no offence at unknown keys, or files without metadata."),
    ] = False,
    metadata: Annotated[
        bool, option("--metadata/--no-metadata", help="Write prompt and seed into the files.")
    ] = True,
    dry_run: Annotated[bool, option("--dry-run", help="Print what would be made.")] = False,
    print_config: Annotated[
        bool, option("--print-config", help="Print all settings, as --config takes them, and end.")
    ] = False,
    dtype: Annotated[
        str, option("--dtype", help="Type of a model that is not embedded.")
    ] = "float32",
    threads: Annotated[int | None, option("--threads", min=1, help="Threads of torch.")] = None,
    deterministic: Annotated[
        bool, option("--deterministic", help="Slower GPU kernels that repeat to the bit.")
    ] = False,
    engine: Annotated[
        str, option("--engine", help="local, or ray: several processes on this machine.")
    ] = "local",
    actors: Annotated[
        int | None, option("--actors", min=1, help="Processes of the ray engine.")
    ] = None,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Make pictures, clips, image sets and captions from a file of rows; the same command resumes.

    Rows have a prompt and what differs from the options: id, kind, seed, n, steps, method and more. What a
    row says wins over the options. The other way round for files: each is made again from its metadata,
    under its id and with its seed, and the options that are given win. Everything is checked before a
    model is loaded, and everything made is a line in OUT/manifest.jsonl. Ctrl-C ends after the running
    batch, twice at once.
    """
    if print_config:
        _print_config(ctx)
        return
    from mmattn.batch.jobs import Shard
    from mmattn.batch.ledger import Ledger, OutputError
    from mmattn.batch.local import Limit, Rules, Run, Stop
    from mmattn.batch.models import Models
    from mmattn.batch.planning import describe_run, dry
    from mmattn.batch.remaking import FileJobs, jobs_from
    from mmattn.errors import ConfigError

    for name, value, known in (
        ("--verify", verify, ("fast", "full")),
        ("--dtype", dtype, DTYPES),
        ("--engine", engine, ("local", "ray")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is one of {list(known)}, got {value!r}")
    if engine == "ray":
        from mmattn.batch.ray_cluster import require

        require(device)
    elif actors is not None:
        raise ConfigError("--actors belongs to --engine ray, and the engine is local")
    share = None if shard is None else Shard.parse(shard)
    limit = None if max_failures is None else Limit.parse(max_failures)
    rules = Rules(verify, overwrite, retry_failed, fail_fast, limit)
    models = Models.named(model, kind, device=device, dtype=dtype)
    defaults: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "negative_prompt": negative,
        "width": width,
        "height": height,
        "num_frames": frames,
        "fps": fps,
        "seed": seed,
        "method": _methods(method, changes),
    }
    rows = jobs_from(
        jobs,
        out,
        {key: value for key, value in defaults.items() if value is not None},
        named=model is not None,
        changes=() if method else changes or (),
        kinds=models.kinds,
        default_kind=models.default_kind,
        allow_extra=allow_extra,
    )
    found = _checked(rows)
    if not quiet:
        items = ", ".join(f"{count} {name}s" for name, count in found.items.items())
        left = f", {found.skipped} without metadata left out" if found.skipped else ""
        say(f"{rows.name}: {found.rows} {rows.what}s, {items}{left}")
    files = models.files(list(found.items))
    fingerprints = models.fingerprints(list(found.items), files)
    if isinstance(rows, FileJobs) and (count := rows.of_other_models(fingerprints)):
        say(f"{count} of the files were made with other weights or on another kind of device")
    if dry_run:
        _dry(dry(rows, fingerprints, out, rules, share), as_json=as_json)
        return
    _prepare(device, threads, deterministic=deterministic)
    from mmattn.batch.worker import Options, Worker

    run: Run | None = None
    try:
        with Ledger(out, share) as ledger, Stop() as stop:
            options = Options(out, size, metadata)
            worker = Worker(models, options, stopping=stop)
            run = Run(rows, fingerprints, ledger, worker, rules, share, stop)
            if engine == "ray":
                run = _on_ray(run, actors, threads, deterministic=deterministic)
            describe_run(out, share, ledger.run, sys.argv, models, files, rows, found)
            _go(run, out, quiet=quiet)
    except OutputError as error:
        say(f"mmattn: {error}")
        raise typer.Exit(common.NOTHING_DONE) from None
    except KeyboardInterrupt:
        if run is None or not run.killed:
            raise
        say("mmattn: interrupted")
        _leave(common.INTERRUPTED)
    _report(run, out, as_json=as_json, quiet=quiet)


def _print_config(ctx: typer.Context) -> None:
    settings = {common.key_of(p): ctx.params.get(str(p.name)) for p in ctx.command.params}
    left_out = ("config", "print_config", "help")
    told = {k: v for k, v in settings.items() if v not in (None, [], ()) and k not in left_out}
    emit_json({"batch": told})


def _methods(
    method: list[str] | None, changes: list[str] | None
) -> list[dict[str, Any]] | str | None:
    if not method or method == ["dense"]:
        return "dense" if method else None  # without loading torch
    chosen = common.together(method, changes)
    return None if chosen is None else [m.to_dict() for m in chosen.methods]


def _checked(rows: Jobs) -> Found:
    from mmattn.batch.jobs import BadRows

    try:
        return rows.check()
    except BadRows as error:
        # A list, one row a line; everything else in one sentence.
        say(f"mmattn: {error}")
        raise typer.Exit(common.USAGE) from None


def _prepare(device: str, threads: int | None, *, deterministic: bool) -> None:
    if deterministic:
        # cuBLAS reads it when it starts, which is before the first kernel.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    common.check_device(device)
    common.quiet_libraries()
    import torch

    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)


def _on_ray(run: Run, actors: int | None, threads: int | None, *, deterministic: bool) -> Run:
    from mmattn.batch.ray_engine import RayRun

    given = (run.jobs, run.fingerprints, run.ledger, run.worker, run.rules, run.shard, run.stop)
    return RayRun(*given, actors=actors, threads=threads or 1, deterministic=deterministic)


def _dry(planned: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        emit_json(planned)
        return
    head = ["status", "id", "kind", "seed", "method", "file"]
    emit(common.rows_as_text(head, [[str(entry[key]) for key in head] for entry in planned]))


def _go(run: Run, out: Path, *, quiet: bool) -> None:
    from mmattn.batch.ledger import OutputError
    from mmattn.batch.pages import finish
    from mmattn.batch.progress import Progress

    bar = Progress(say)
    if not quiet:
        run.watch = bar
    try:
        with run.worker:
            run()
        finish(out)
    except OutputError as error:
        run.summary.stopped = str(error)
    finally:
        bar.close()


def _report(run: Run, out: Path, *, as_json: bool, quiet: bool) -> None:
    summary = run.summary
    if as_json:
        emit_json({"out": str(out), "run": run.ledger.run, **summary.to_dict()})
    if summary.stopped is not None:
        say(f"stopped: {summary.stopped}; the same command goes on from here")
    if summary.changed and not quiet:
        say(f"{summary.changed} items were made before with other settings, and now again")
    if not quiet:
        say(
            f"{out}: {summary.ok} made, {summary.failed} failed, {summary.before} were there, "
            f"{summary.seconds:.0f} s" + (", see failures.jsonl" if summary.failed else "")
        )
    if run.killed:
        _leave(summary.exit_code)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)


def _leave(code: int) -> NoReturn:
    """End without what Python does at its end, which is to wait a minute for a Ray that was killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@guarded
def inspect_(
    files: Annotated[list[Path], typer.Argument(help="PNG, MP4, WebP or caption JSON files.")],
) -> None:
    """Print what files say about themselves, as JSON."""
    from mmattn.batch.inspecting import inspect_file

    found = [inspect_file(path) for path in files]
    emit_json(found[0] if len(found) == 1 else found)


@guarded
def rerun(
    file: Annotated[Path, typer.Argument(help="A file that mmattn batch wrote.")],
    out: Out = Path("out/rerun"),
    model: Annotated[str | None, option("--model", help="Where its model is now.")] = None,
    device: Annotated[str | None, option("--device", help="Torch device.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Make a file again from its own metadata, and compare: byte for byte on the same machine."""
    if device is not None:
        common.check_device(device)
    common.quiet_libraries()
    from mmattn.batch.ledger import OutputError
    from mmattn.batch.rerunning import rerun as again

    try:
        found = again(file, out, model, device=device)
    except OutputError as error:
        say(f"mmattn: {error}")
        raise typer.Exit(common.NOTHING_DONE) from None
    if as_json:
        emit_json(found)
    elif found["file"] is not None:
        emit(found["file"])
    if found["status"] != "ok":
        say(f"mmattn: {found['error']['message']}")
        raise typer.Exit(common.SOME_FAILED)
    say("identical" if found["identical"] else f"differs from {file}")
    if not found["identical"]:
        raise typer.Exit(common.SOME_FAILED)
