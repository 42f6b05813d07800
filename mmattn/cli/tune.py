"""The verb ``tune``: which sparse setting each layer and step of a pipeline can bear, as a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    Quiet,
    Seed,
    Set,
    emit,
    emit_json,
    guarded,
    option,
    say,
)


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("tune")(tune)


def _bar(quiet: bool) -> Callable[[int, int, str], None] | None:
    if quiet:
        return None
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, file=sys.stderr, unit="run")
        bar.set_postfix_str(what)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


@guarded
def tune(
    model: Annotated[str, typer.Argument(help="t2v, t2i, a folder, or a hub id.")] = "t2v",
    prompt: Annotated[
        list[str] | None, option("--prompt", "-p", help="A typical prompt; repeatable.")
    ] = None,
    method: Methods = None,
    changes: Set = None,
    min_psnr: Annotated[
        float | None, option("--min-psnr", help="Budget: dB against the untouched model.")
    ] = None,
    min_recall: Annotated[
        float | None, option("--min-recall", help="Budget: share of attention mass recalled.")
    ] = None,
    out: Annotated[Path, option("--out", "-o", help="The recipe to write.")] = Path(
        "out/tuned.toml"
    ),
    steps: Annotated[int, option("--steps", min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float | None, option("--guidance", help="Guidance scale.")] = None,
    width: Annotated[int | None, option("--width", min=8, help="Pixels.")] = None,
    height: Annotated[int | None, option("--height", min=8, help="Pixels.")] = None,
    frames: Annotated[int | None, option("--frames", min=1, help="Frames of a clip.")] = None,
    seed: Seed = 0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Find per layer and step the sparsest setting within an error budget, and write it as a recipe.

    Every -m is one candidate; without any, VMoBA and neighborhood attention at several densities are
    tried. A run that was stopped continues from the record beside the recipe. Attach the result with
    mmattn.attach(pipe, mmattn.load("tuned.toml")), or give it to -m of the other verbs.
    """
    from mmattn.errors import ConfigError

    if min_psnr is None and min_recall is None:
        raise ConfigError("give a budget: --min-psnr 30 (dB) or --min-recall 0.9 (share)")
    columns = common.columns(method, changes if method else None)
    for column in columns:
        if len(column.methods) != 1:
            raise ConfigError(f"every -m is one candidate method here, got {column.label!r}")
    common.check_device(device)
    common.quiet_libraries()
    from mmattn.loading import resolve
    from mmattn.methods.base import Method
    from mmattn.tuning import default_candidates, default_prompts, tune as run

    loaded = resolve(model, kind, device=device)
    candidates = [column.methods[0] for column in columns] or default_candidates(loaded)
    placed = [c for c in candidates if not isinstance(c, Method)]
    if placed:
        raise ConfigError("a recipe is not a candidate; give methods with -m")
    prompts = prompt or (default_prompts(loaded) if loaded.embedded else [])
    if not prompts:
        raise ConfigError("give a few prompts that are typical of the use: --prompt ...")
    if hasattr(loaded.target, "set_progress_bar_config"):
        loaded.target.set_progress_bar_config(disable=True)
    tuned = run(
        loaded,
        prompts,
        candidates,  # type: ignore[arg-type]
        out,
        min_psnr=min_psnr,
        min_recall=min_recall,
        steps=steps,
        guidance=guidance,
        seed=seed,
        progress=_bar(quiet),
        width=width,
        height=height,
        num_frames=frames,
    )
    found = {
        "recipe": str(tuned.path),
        "density": tuned.density,
        "psnr": tuned.psnr,
        "recall": tuned.recall,
        "sites": {
            site: {
                "method": None
                if choice.candidate is None
                else candidates[choice.candidate].to_dict(),
                "dense_steps": choice.dense_steps,
                "density": choice.cost,
            }
            for site, choice in tuned.choices.items()
        },
    }
    if as_json:
        emit_json(found)
        return
    rows = [
        [
            site,
            "dense" if c.candidate is None else _label(candidates[c.candidate]),
            str(c.dense_steps),
            f"{c.cost:.3f}",
        ]
        for site, c in tuned.choices.items()
    ]
    emit(common.rows_as_text(["site", "method", "dense steps", "density"], rows))
    say(
        f"recipe: {tuned.path} (density {tuned.density:.3f}, PSNR {tuned.psnr:.1f} dB, "
        f"recall {tuned.recall:.3f})"
    )


def _label(method: Any) -> str:
    from mmattn.variants import label_of

    return label_of([method])
