"""The verbs under ``train``: what is trained with the attention methods of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmattn.cli import common
from mmattn.cli.common import (
    Config,
    Device,
    Json,
    Kind,
    Quiet,
    Seed,
    emit,
    emit_json,
    guarded,
    option,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Train adapters; the embedded models themselves are trained by ``mmattn mini train``."""


def _bar(total: int, quiet: bool) -> Callable[[int, float], None] | None:
    if quiet:
        return None
    from tqdm import tqdm

    bar: Any = tqdm(total=total, file=sys.stderr, unit="step")

    def show(step: int, loss: float) -> None:
        bar.set_postfix_str(f"loss {loss:.4f}")
        bar.update(step - bar.n)
        if step == total:
            bar.close()

    return show


@app.command("in-context-lora")
@guarded
def in_context_lora(
    data: Annotated[Path, option("--data", help="Folder of 0001.jpg with 0001.txt, and so on.")],
    model: Annotated[str, option("--model", help="t2i, a folder, or a hub id of FLUX.")] = "t2i",
    out: Annotated[
        Path, option("--out", "-o", help="Folder for the LoRA and what it needs.")
    ] = Path("out/lora"),
    steps: Annotated[int | None, option("--steps", min=1, help="Published: 5000.")] = None,
    batch: Annotated[int | None, option("--batch", min=1, help="Published: 4.")] = None,
    rank: Annotated[int | None, option("--rank", min=1, help="Published: 16.")] = None,
    learning_rate: Annotated[
        float | None, option("--learning-rate", help="Published: 1e-4.")
    ] = None,
    resolution: Annotated[
        list[int] | None,
        option("--resolution", help="Repeatable; published: 512, 768, 1024, 1280, 1536."),
    ] = None,
    panels: Annotated[
        str | None, option("--panels", help="Rows x columns of the canvases, such as 1x2.")
    ] = None,
    references: Annotated[
        int, option("--references", min=0, help="Learn to continue up to so many given panels.")
    ] = 0,
    max_sequence_length: Annotated[
        int | None, option("--max-sequence-length", min=1, help="Tokens of a caption.")
    ] = None,
    save_every: Annotated[
        int | None, option("--save-every", min=1, help="Steps between checkpoints.")
    ] = None,
    seed: Seed = 0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Train an In-Context LoRA on a folder of canvases; a stopped training goes on where it was.

    For the embedded model t2i the resolution is 91 (two panels of 64 x 64) and captions have 48 tokens
    unless given. Load the result with pipe.load_lora_weights(folder, weight_name="lora.safetensors").
    """
    from mmattn.errors import ConfigError, MissingExtraError

    given = {
        "steps": steps,
        "batch": batch,
        "rank": rank,
        "learning_rate": learning_rate,
        "resolutions": tuple(resolution) if resolution else None,
        "max_sequence_length": max_sequence_length,
        "save_every": save_every,
    }
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    common.check_device(device)
    common.quiet_libraries()
    try:
        from mmattn_pipelines.lora_training import InContextLora, train
    except ImportError as error:
        if error.name != "peft":
            raise
        raise MissingExtraError("train in-context-lora", "peft", "train") from error
    if model == "t2i":
        settings = {"resolutions": (91,), "max_sequence_length": 48, **settings}
        settings["gradient_checkpointing"] = False
    recipe = InContextLora(panels=_panels(panels), references=references, seed=seed, **settings)
    from mmattn.loading import resolve

    loaded = resolve(model, kind, device=device)
    if loaded.kind != "t2i":
        raise ConfigError(f"{model} is of kind {loaded.kind}; a text-to-image model is needed")
    trained = train(
        loaded.target,
        data,
        out,
        recipe,
        log=(lambda _: None) if quiet else common.say,
        on_step=_bar(recipe.steps, quiet),
    )
    if as_json:
        emit_json(asdict(trained))
    else:
        emit(str(trained.lora))
        emit(str(trained.comfyui))


def _panels(text: str | None) -> tuple[int, int] | None:
    from mmattn.errors import ConfigError

    if text is None:
        return None
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise ConfigError(f"--panels is rows x columns, such as 1x2, got {text!r}")
    return int(rows), int(cols)
