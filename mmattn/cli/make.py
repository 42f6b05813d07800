"""Verbs that run one model on the user's inputs: ``generate``, ``caption``, ``classify``, ``attnmap``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    Sites,
    emit,
    emit_json,
    guarded,
    option,
    say,
)

if TYPE_CHECKING:
    from PIL import Image

    from mmattn.loading import Loaded
    from mmattn.variants import Variant

Model = Annotated[str, option("--model", help="t2i, t2v, vlm, vit, a folder, or a hub id.")]
Images = Annotated[list[Path] | None, option("--image", "-i", help="A picture; repeatable.")]
Prompts = Annotated[list[str] | None, option("--prompt", "-p", help="A prompt; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("generate")(generate)
    app.command("caption")(caption)
    app.command("classify")(classify)
    app.command("attnmap")(attnmap)


def _load(model: str, kind: str | None, device: str, wanted: tuple[str, ...], verb: str) -> Loaded:
    from mmattn.errors import ConfigError
    from mmattn.loading import resolve

    common.check_device(device)
    common.quiet_libraries()
    if kind is None and "/" in model and not Path(model).exists() and len(wanted) == 1:
        kind = wanted[0]
    loaded = resolve(model, kind, device=device)
    if loaded.kind not in wanted:
        raise ConfigError(
            f"{verb} takes a model of kind {' or '.join(wanted)}; {model} is of kind {loaded.kind}"
        )
    return loaded


@contextlib.contextmanager
def _attached(
    loaded: Loaded, chosen: Variant | None, sites: list[str] | None, seed: int, quiet: bool
) -> Iterator[dict[str, Any]]:
    """The model with the methods on; the numbers of the session appear in the mapping afterwards."""
    record: dict[str, Any] = {}
    if chosen is None:
        yield record
        return
    from mmattn.attaching import attach

    with attach(loaded.target, list(chosen.methods), sites=sites or None, seed=seed) as session:
        yield record
        record.update(session.to_dict())
        report = session.report()
    if not quiet:
        say(report)


def _open(paths: list[Path] | None) -> list[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    from mmattn.errors import ConfigError

    if not paths:
        raise ConfigError("give at least one picture: --image photo.png")
    pictures = []
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"there is no picture at {path}")
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as a picture: {error}") from error
    return pictures


@guarded
def generate(
    model: Model = "t2i",
    prompt: Prompts = None,
    method: Methods = None,
    changes: Set = None,
    sites: Sites = None,
    out: Out = Path("out/generate"),
    seed: Seed = 0,
    steps: Annotated[int, option("--steps", min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float | None, option("--guidance", help="Guidance scale.")] = None,
    negative: Annotated[str, option("--negative", help="What to steer away from.")] = "",
    width: Annotated[int | None, option("--width", min=8, help="Pixels.")] = None,
    height: Annotated[int | None, option("--height", min=8, help="Pixels.")] = None,
    frames: Annotated[int | None, option("--frames", min=1, help="Frames of a clip.")] = None,
    fps: Annotated[int, option("--fps", min=1, help="Frames per second.")] = 8,
    scale: Annotated[int, option("--scale", min=1, help="Enlarge by a whole factor.")] = 1,
    metadata: Annotated[
        bool, option("--metadata/--no-metadata", help="Write prompt and seed into the files.")
    ] = True,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Draw pictures or clips from prompts, with methods attached."""
    from mmattn.errors import ConfigError

    if not prompt:
        raise ConfigError('give at least one prompt: --prompt "a red circle on a white background"')
    chosen = common.together(method, changes)
    loaded = _load(model, kind, device, ("t2i", "t2v"), "generate")
    if loaded.embedded:
        _warn_unknown_words(prompt)
    from mmattn.batch.writers import write_image, write_json, write_video
    from mmattn.calls import draw

    seeds = [seed + i for i in range(len(prompt))]
    with _attached(loaded, chosen, sites, seed, quiet) as record:
        drawn = draw(
            loaded,
            prompt,
            seeds,
            steps=steps,
            guidance=guidance,
            negative=negative,
            width=width,
            height=height,
            num_frames=frames,
        )
    files = []
    for i, (text, value) in enumerate(zip(prompt, drawn, strict=True)):
        meta = {
            "prompt": text,
            "seed": seeds[i],
            "steps": steps,
            "guidance": guidance,
            "size": f"{value.shape[-1]}x{value.shape[-2]}",
            "model": model,
            "method": None if chosen is None else chosen.label,
        }
        kept = meta if metadata else None
        if loaded.kind == "t2i":
            files.append(write_image(out / f"{i:04d}.png", value, kept, scale=scale))
        else:
            clip = [value[:, t] for t in range(value.shape[1])]
            files.append(write_video(out / f"{i:04d}.mp4", clip, fps=fps, scale=scale, meta=kept))
    if record:
        write_json(out / "session.json", record)
    if as_json:
        rows = [
            {"file": str(f), "prompt": p, "seed": s}
            for f, p, s in zip(files, prompt, seeds, strict=True)
        ]
        emit_json({"files": rows, "session": record or None})
    else:
        emit("\n".join(str(path) for path in files))


def _warn_unknown_words(prompts: list[str]) -> None:
    from mmattn.mini.text import unknown_words

    words = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)))
    if words:
        say(f"the embedded model never learned these words: {', '.join(words)}")


@guarded
def caption(
    model: Model = "vlm",
    image: Images = None,
    prompt: Annotated[str | None, option("--prompt", "-p", help="What to ask.")] = None,
    method: Methods = None,
    changes: Set = None,
    sites: Sites = None,
    max_new_tokens: Annotated[
        int, option("--max-new-tokens", min=1, help="Length of the answer.")
    ] = 96,
    seed: Seed = 0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Ask a vision-language model about pictures, with methods attached."""
    pictures = _open(image)
    chosen = common.together(method, changes)
    loaded = _load(model, kind, device, ("vlm",), "caption")
    from mmattn.calls import answer

    text = prompt
    if text is None:
        text = "describe the picture ." if loaded.embedded else "Describe the picture."
    with _attached(loaded, chosen, sites, seed, quiet) as record:
        said = answer(loaded, pictures, [text] * len(pictures), max_new_tokens=max_new_tokens)
    if as_json:
        rows = [
            {"image": str(path), "prompt": text, "answer": words}
            for path, words in zip(image or (), said, strict=True)
        ]
        emit_json({"answers": rows, "session": record or None})
    else:
        emit("\n".join(said))


@guarded
def classify(
    model: Model = "vit",
    image: Images = None,
    method: Methods = None,
    changes: Set = None,
    sites: Sites = None,
    top: Annotated[int, option("--top", min=1, help="How many classes to show.")] = 3,
    seed: Seed = 0,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Name what is in pictures, with methods attached."""
    pictures = _open(image)
    chosen = common.together(method, changes)
    loaded = _load(model, kind, device, ("vit",), "classify")
    from mmattn.calls import labels_of, logits, preprocess

    pixels = preprocess(loaded, pictures)
    with _attached(loaded, chosen, sites, seed, quiet) as record:
        chances = logits(loaded, pixels).softmax(1)
    names = labels_of(loaded)
    rows: list[dict[str, Any]] = []
    for path, row in zip(image or (), chances, strict=True):
        best = row.topk(min(top, len(row)))
        classes = [
            {"label": names[int(i)], "probability": round(float(p), 4)}
            for p, i in zip(best.values, best.indices, strict=True)
        ]
        rows.append({"image": str(path), "classes": classes})
    if as_json:
        emit_json({"pictures": rows, "session": record or None})
    else:
        table = [
            [row["image"], c["label"], f"{100 * c['probability']:.1f} %"]
            for row in rows
            for c in row["classes"]
        ]
        emit(common.rows_as_text(["picture", "class", "probability"], table))


@guarded
def attnmap(
    model: Model = "vlm",
    image: Images = None,
    prompt: Annotated[str | None, option("--prompt", "-p", help="Prompt or question.")] = None,
    analytics: Annotated[
        bool, option("--analytics", help="vit: importance and distance of every head instead.")
    ] = False,
    out: Out = Path("out/attnmap"),
    seed: Seed = 0,
    steps: Annotated[int, option("--steps", min=1, help="Denoising steps.")] = 8,
    kind: Kind = None,
    device: Device = "cpu",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Save heat-maps of where a model attends, one PNG per site.

    With --analytics two profiles of a classifier: how much the result changes without each head, and how
    far each head looks; over the pictures given, or for the embedded model over 256 procedural scenes.
    """
    from mmattn.errors import ConfigError

    kinds = ("vit",) if analytics else ("t2i", "t2v", "vlm", "vit")
    loaded = _load(model, kind, device, kinds, "attnmap")
    if analytics:
        files = _profiles(loaded, image, out, seed)
        emit_json([str(p) for p in files]) if as_json else emit("\n".join(map(str, files)))
        return
    from mmattn.calls import answer, draw, logits, preprocess
    from mmattn.compare.heatmaps import save_maps

    picture: Image.Image | None = None
    call: Any
    if loaded.kind in ("t2i", "t2v"):
        if prompt is None:
            raise ConfigError("attnmap needs a prompt for this model: --prompt TEXT")
        words = prompt
        call = lambda: draw(loaded, [words], [seed], steps=steps)  # noqa: E731
    elif loaded.kind == "vlm":
        picture = _open(image)[0]
        asked = prompt or "describe the picture ."
        call = lambda: answer(loaded, [picture], [asked], max_new_tokens=24)  # noqa: E731
    else:
        picture = _open(image)[0]
        pixels = preprocess(loaded, [picture])
        call = lambda: logits(loaded, pixels)  # noqa: E731
    files = save_maps(loaded.target, call, out, picture)
    if as_json:
        emit_json([str(path) for path in files])
    else:
        emit("\n".join(str(path) for path in files))
    if not files:
        raise typer.Exit(common.NOTHING_DONE)


def _profiles(loaded: Loaded, image: list[Path] | None, out: Path, seed: int) -> list[Path]:
    from mmattn.calls import preprocess
    from mmattn.errors import ConfigError
    from mmattn.evals.vit_analytics import attention_distance, head_importance

    labels = None
    if image:
        pixels = preprocess(loaded, _open(image))
    elif loaded.embedded:
        import torch

        from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch

        drawn, labels = draw_batch(256, torch.Generator().manual_seed(HELD_OUT_SEED + seed))
        pixels = drawn * 2 - 1
    else:
        raise ConfigError("give pictures: --image photo.png, repeatable")
    return [
        head_importance(loaded.target, pixels, labels).save(out / "head_importance.png"),
        attention_distance(loaded.target, pixels).save(out / "attention_distance.png"),
    ]
