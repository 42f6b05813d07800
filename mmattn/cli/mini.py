"""``mmattn mini``: the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmattn.cli import common
from mmattn.cli.common import Json, emit, emit_json, guarded

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
@guarded
def list_models(as_json: Json = False) -> None:
    """Show the embedded models, their size and how good they are."""
    import json

    from mmattn.mini import manifest

    about = {
        "t2i": "text to image, FluxPipeline",
        "t2v": "text to video, WanPipeline",
        "vlm": "vision and language, LlavaForConditionalGeneration",
        "vit": "classifier, timm ViT",
    }
    rows: list[dict[str, Any]] = []
    for name in manifest.NAMES:
        check = manifest.check(name)
        record = manifest.weights_root() / name / "training.json"
        metrics = None
        if record.is_file():
            metrics = json.loads(record.read_text(encoding="utf-8")).get("metrics")
        rows.append(
            {
                "name": name,
                "about": about[name],
                "present": check.present,
                "verified": check.ok,
                "megabytes": round(check.bytes / 2**20, 2),
                "metrics": metrics,
            }
        )
    if as_json:
        emit_json(rows)
        return
    table = [
        [
            row["name"],
            row["about"],
            f"{row['megabytes']:.1f} MB" if row["present"] else "missing",
            "verified" if row["verified"] else "not verified",
        ]
        for row in rows
    ]
    emit(common.rows_as_text(["model", "what it is", "size", "files"], table))


@app.command("train")
@guarded
def train(
    name: Annotated[str, typer.Argument(help="t2i, t2v, vlm or vit.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the weights.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for all stages together.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    resume: Annotated[Path | None, typer.Option(help="Folder of weights to go on from.")] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Train an embedded model from drawn scenes; needs no data and no network."""
    import importlib

    from mmattn.errors import ConfigError, suggest
    from mmattn.mini import manifest

    if name not in manifest.NAMES:
        hint = suggest(name, manifest.NAMES)
        raise ConfigError(
            f"unknown embedded model {name!r}{hint} Choose one of {list(manifest.NAMES)}."
        )
    common.check_device(device)
    if resume is not None and not resume.is_dir():
        raise ConfigError(f"there is no folder of weights at {resume}")
    common.quiet_libraries()
    target = Path("weights") / name if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    recipe = importlib.import_module(f"mmattn.mini.train_{name}")
    record = recipe.train(
        target,
        minutes=minutes,
        device=device,
        seed=seed,
        smoke=smoke,
        resume=resume,
        log=common.say,
    )
    common.say(f"weights in {target}; use them with MMATTN_WEIGHTS={target.parent}")
    emit_json(record)


@app.command("verify")
@guarded
def verify(
    write: Annotated[bool, typer.Option("--write", help="Record the files as they are.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the embedded weights with their manifest."""
    from dataclasses import asdict

    from mmattn.mini import manifest

    if write:
        common.say(f"wrote {manifest.write()}")
    checks = [manifest.check(name) for name in manifest.NAMES]
    if as_json:
        emit_json([{**asdict(check), "ok": check.ok} for check in checks])
    else:
        for check in checks:
            state = f"ok, {check.files} files" if check.ok else "; ".join(check.problems)
            emit(f"{check.name}: {state}")
    if not any(check.ok for check in checks):
        raise typer.Exit(common.NOTHING_DONE)
    if not all(check.ok for check in checks):
        raise typer.Exit(common.SOME_FAILED)
