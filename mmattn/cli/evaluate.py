"""The verb ``eval``: what a method does to quality, by the embedded models' oracles or by a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    emit,
    emit_json,
    guarded,
    option,
    say,
)
from mmattn.cli.weigh import Guidance, Samples, Steps, _bar

if TYPE_CHECKING:
    from mmattn.evals._protocol import Protocol
    from mmattn.loading import Loaded
    from mmattn.variants import Variant

PROTOCOLS = ("pope", "chair", "mme", "amber")
PARSES = ("official", "strict", "xor")
SCENES = 100

Files = list[Path] | None


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("eval")(evaluate)


@guarded
def evaluate(
    what: Annotated[
        str | None,
        typer.Argument(
            help="pope, chair, mme or amber; or t2i, t2v, vlm or vit, by their oracles."
        ),
    ] = None,
    model: Annotated[
        str | None, option("--model", help="vlm, a folder, or a hub id; for protocols.")
    ] = None,
    method: Methods = None,
    changes: Set = None,
    seed: Seed = 0,
    samples: Samples = None,
    questions: Annotated[
        Files,
        option("--questions", help="POPE JSONL (repeatable), MME folder or JSONL, AMBER queries."),
    ] = None,
    images: Annotated[Path | None, option("--images", help="Folder of the pictures.")] = None,
    truth: Annotated[
        Path | None, option("--truth", help="What is there: CHAIR objects, AMBER annotations.")
    ] = None,
    words: Annotated[
        Files,
        option("--words", help="CHAIR synonyms; AMBER relation.json and safe_words.txt."),
    ] = None,
    answers: Annotated[
        Files, option("--answers", help="Grade these finished answers instead of asking a model.")
    ] = None,
    parse: Annotated[
        str | None, option("--parse", help="How yes and no are read: official, strict or xor.")
    ] = None,
    suffix: Annotated[str, option("--suffix", help="Text after every POPE question.")] = "",
    max_new_tokens: Annotated[
        int | None, option("--max-new-tokens", min=1, help="Most tokens of an answer.")
    ] = None,
    generate: Annotated[
        list[str] | None, option("--generate", help="Argument of generate, such as num_beams=3.")
    ] = None,
    batch: Annotated[int, option("--batch", min=1, help="Items per call.")] = 64,
    out: Out = Path("out/eval"),
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Measure quality: by an embedded model's oracle, or with POPE, CHAIR, MME or AMBER.

    Protocols ask about procedural scenes, or about your files in the published formats. Answers go to
    OUT/PROTOCOL/COLUMN as they come; the same command again goes on where it stopped.
    """
    from mmattn.errors import ConfigError, suggest
    from mmattn.variants import DEFAULTS, check_names

    chosen = common.columns(method, changes if method else None)
    name = what or model or "vlm"
    if name not in PROTOCOLS:
        if what is not None and what not in DEFAULTS:
            raise ConfigError(
                f"unknown model or protocol {what!r}"
                f"{suggest(what, [*DEFAULTS, *PROTOCOLS]) or '.'} Name a "
                f"protocol {list(PROTOCOLS)}, with --model for your own, or an embedded model "
                f"{list(DEFAULTS)}"
            )
        if what is not None and model not in (None, what):
            raise ConfigError(f"{what} is measured by its own oracle; for {model} name a protocol")
        own: dict[str, Any] = {
            "questions": questions,
            "images": images,
            "truth": truth,
            "words": words,
        }
        own |= {"answers": answers, "parse": parse, "generate": generate}
        given = [key for key, value in own.items() if value]
        if given:
            raise ConfigError(
                f"--{given[0]} is for the protocols {list(PROTOCOLS)}, not for {name}"
            )
        check_names([name])
        common.check_device(device)
        _by_oracle(
            name,
            chosen,
            changes,
            seed,
            steps,
            guidance,
            samples,
            device,
            as_json=as_json,
            quiet=quiet,
        )
        return
    if parse is not None and parse not in PARSES:
        raise ConfigError(f"--parse is one of {list(PARSES)}, found {parse!r}")
    source = model or "vlm"
    common.check_device(device)
    _check_files(name, questions, images, truth, answers)
    common.quiet_libraries()
    protocol, finished = _protocol(
        name,
        embedded=source == "vlm",
        scenes=samples or SCENES,
        seed=seed,
        questions=questions or [],
        images=images,
        truth=truth,
        words=words or [],
        answers=answers or [],
        parse=parse,
        suffix=suffix,
        limit=max_new_tokens,
    )
    if finished is not None:
        if method:
            raise ConfigError("--answers are finished, no method can act on them; leave out -m")
        from mmattn.evals.harness import score

        results = [{"label": "answers", "methods": [], **score(protocol, finished)}]
        _show(name, results, None, None, as_json=as_json, quiet=quiet)
        return
    from mmattn.loading import resolve

    if kind is None and "/" in source and not Path(source).exists():
        kind = "vlm"
    loaded = resolve(source, kind, device=device)
    if loaded.kind != "vlm":
        raise ConfigError(f"{name} asks a model of kind vlm; {source} is of kind {loaded.kind}")
    if not chosen and loaded.embedded:
        chosen = _defaults(changes)
    results = _asked(protocol, loaded, chosen, out, seed, batch, generate, quiet=quiet)
    _show(name, results, source, out / name, as_json=as_json, quiet=quiet)


def _check_files(
    name: str, questions: Files, images: Path | None, truth: Path | None, answers: Files
) -> None:
    """The combinations of files that each protocol takes."""
    from mmattn.errors import ConfigError

    needs = {
        "pope": (questions, "--questions coco_pope_popular.json"),
        "chair": (truth, "--truth objects.jsonl"),
        "mme": (questions or answers, "--questions FOLDER"),
        "amber": (truth, "--truth annotations.json"),
    }
    files = any((questions, images, truth, answers))
    there, hint = needs[name]
    if files and not there:
        raise ConfigError(f"{name} on your own files needs {hint}")
    if name == "amber" and files and not (questions or answers):
        raise ConfigError("amber on your own files needs --questions query_all.json or --answers")
    if files and not answers:
        if images is None:
            raise ConfigError(f"{name}: say where the pictures are, --images FOLDER")
        if not images.is_dir():
            raise ConfigError(f"there is no folder of pictures at {images}")


def _protocol(
    name: str,
    *,
    embedded: bool,
    scenes: int,
    seed: int,
    questions: list[Path],
    images: Path | None,
    truth: Path | None,
    words: list[Path],
    answers: list[Path],
    parse: Any,
    suffix: str,
    limit: int | None,
) -> tuple[Protocol, list[str] | None]:
    """The items, and the finished answers where there are any."""
    from mmattn.evals import amber, chair, mme, pope
    from mmattn.evals._protocol import world

    pictures = None if answers else images
    if name == "pope":
        how: Any = parse or "official"
        if not questions:
            asked = pope.Pope.from_world(
                world(scenes, seed), parse=how, embedded=embedded, suffix=suffix, limit=limit
            )
            return asked, None
        asked = pope.Pope.from_files(
            questions, images=pictures, parse=how, suffix=suffix, limit=limit
        )
        return asked, asked.read_answers(answers) if answers else None
    if name == "chair":
        if truth is None:
            return chair.Chair.from_world(world(scenes, seed), embedded=embedded, limit=limit), None
        captions = chair.read_captions(answers[0]) if answers else None
        described = chair.Chair.from_files(
            truth,
            images=pictures,
            synonyms=words[0] if words else None,
            captioned=captions,
            limit=limit,
        )
        return described, None if captions is None else [
            captions[item.id] for item in described.items
        ]
    if name == "mme":
        if answers:
            return mme.read_results(answers[0])
        if questions:
            return mme.Mme.from_files(questions[0], images=images, limit=limit), None
        return mme.Mme.from_world(world(scenes, seed), embedded=embedded, limit=limit), None
    how = parse or "strict"
    if truth is None:
        made = amber.Amber.from_world(
            world(scenes, seed), embedded=embedded, parse=how, limit=limit
        )
        return made, None
    responses = amber.read_responses(answers[0]) if answers else None
    made = amber.Amber.from_files(
        truth,
        queries=questions[0] if questions else None,
        images=pictures,
        relation=next((path for path in words if path.suffix == ".json"), None),
        safe_words=next((path for path in words if path.suffix != ".json"), None),
        answered=responses,
        parse=how,
        limit=limit,
    )
    return made, None if responses is None else [responses[item.id] for item in made.items]


def _defaults(changes: list[str] | None) -> list[Variant]:
    from mmattn.compare.results import Section
    from mmattn.compare.run import default_columns

    section = Section("vlm", "vlm", "")
    chosen = default_columns([section], changes or ())[0]
    for text in section.problems:
        say(text)
    return chosen


def _asked(
    protocol: Protocol,
    loaded: Loaded,
    chosen: Sequence[Variant],
    out: Path,
    seed: int,
    batch: int,
    generate: list[str] | None,
    *,
    quiet: bool,
) -> list[dict[str, Any]]:
    from mmattn.errors import ConfigError
    from mmattn.evals.harness import run
    from mmattn.variants import scalar

    arguments: dict[str, Any] = {}
    for pair in generate or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--generate takes key=value, such as num_beams=3; got {pair!r}")
        arguments[key.strip()] = scalar(value.strip())

    def tick(label: str, done: int, total: int) -> None:
        say(f"[{done}/{total}] {label}")

    try:
        return run(
            protocol,
            loaded,
            chosen,
            out,
            seed=seed,
            batch=batch,
            generation=arguments,
            progress=None if quiet else tick,
        )
    except KeyboardInterrupt:
        say(f"the answers so far are in {out}; the same command goes on from there")
        raise


def _show(
    name: str,
    results: list[dict[str, Any]],
    source: str | None,
    folder: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from mmattn.evals.table import NOTE, cells, lines

    made = lines(results)
    good = [result for result in results if result["status"] == "ok"]
    if as_json:
        shown = []
        for line, result in zip(made, results, strict=True):
            row = {key: result.get(key) for key in ("label", "methods", "status", "error", "items")}
            row["rates"] = {k: v._asdict() for k, v in line.rates.items()}
            row["differences"] = {k: v._asdict() for k, v in line.differences.items()}
            shown.append({**row, "cost": line.cost})
        emit_json(
            {
                "protocol": name,
                "model": source,
                "origin": good[0]["origin"] if good else None,
                "out": None if folder is None else str(folder),
                "columns": shown,
            }
        )
    elif good:
        head, rows = cells(name, [line for line in made if line.rates])
        emit(common.rows_as_text(head, rows))
        if not quiet:
            say(NOTE)
    for result in results:
        if result["status"] != "ok":
            say(f"{name} {result['label']}: {result['error']}")
    if folder is not None and not quiet:
        say(f"answers and samples: {folder}")
    if not good:
        raise typer.Exit(common.NOTHING_DONE)
    if len(good) < len(results):
        raise typer.Exit(common.SOME_FAILED)


def _by_oracle(
    model: str,
    chosen: list[Variant],
    changes: list[str] | None,
    seed: int,
    steps: int,
    guidance: float,
    samples: int | None,
    device: str,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quality on an embedded model, where the truth is known: oracle, CHAIR, POPE, top-1."""
    common.quiet_libraries()
    from mmattn.compare.jobs import Settings, work
    from mmattn.compare.results import Section, shown
    from mmattn.compare.run import default_columns, jobs_for

    settings = Settings(Path("."), seed, steps, guidance, samples, device)
    job = jobs_for([model], settings)[0]
    section = Section(job.name, job.title, job.lead, job.count, job.columns)
    columns = chosen or default_columns([section], changes or ())[0]
    progress = _bar(quiet)
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 1 + len(columns), what)

    work(job, columns, section, tick, figures=False)
    rows = [outcome for outcome in section.outcomes if outcome.status == "ok"]
    if as_json:
        emit_json(
            {
                "model": model,
                "samples": job.count,
                "seed": seed,
                "rows": [
                    {"label": o.label, "methods": o.methods, "seconds": o.seconds, **o.quality}
                    for o in rows
                ],
                "problems": section.problems
                + [f"{o.label}: {o.error}" for o in section.outcomes if o.status != "ok"],
            }
        )
    elif rows:
        head = ["", *(column.label for column in section.columns)]
        table = [
            [o.label, *(shown(o.quality.get(c.key), c.style) for c in section.columns)]
            for o in rows
        ]
        emit(common.rows_as_text(head, table))
    for text in section.problems:
        say(f"{model}: {text}")
    for outcome in section.outcomes:
        if outcome.status != "ok":
            say(f"{model} {outcome.label}: {outcome.error}")
    if not rows:
        raise typer.Exit(common.NOTHING_DONE)
    if section.failed or len(rows) < len(section.outcomes):
        raise typer.Exit(common.SOME_FAILED)
