"""Train the small image classifier: a timm ViT that names the colour and shape of one object.

    python -m mmattn.mini.train_vit --out weights/vit

Forty-eight classes, eight colours by six shapes, from plain cross-entropy on the class token.
Colours are learned at once; shapes sit on a plateau for some thousand pictures before they come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmattn.mini.draw import BACKGROUNDS, COLOURS, SHAPES, render
from mmattn.mini.recipe import (
    Log,
    MuonAdamW,
    Progress,
    cosine,
    log_to_stderr,
    silent,
    trainer_arguments,
    write_record,
)

SIZE = 64
"""Side of a picture, in pixels."""

LEARNING_RATE = 2e-3
HELD_OUT_SEED = 900_000
"""Seeds from here on are for judging; training uses smaller ones."""

LABELS: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES[:6] for colour in COLOURS)
"""Class names, for example "red circle"."""

NOISE = 0.03
"""Standard deviation of the pixel noise."""

MODEL_ARGS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}


def build(seed: int = 0) -> nn.Module:
    """Return an untrained classifier."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=len(LABELS), **MODEL_ARGS
    )
    return model


def draw_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one object per picture.

    Returns:
        Pictures `[B, 3, 64, 64]` in [0, 1], rounded to 8 bits, and class indices `[B]`.
    """
    labels = torch.randint(len(LABELS), (count,), generator=generator)
    shape, colour = labels // len(COLOURS), labels % len(COLOURS)
    radius, x, y, light = torch.rand(4, count, generator=generator)
    radius = 14 + 12 * radius
    room = SIZE - 2 * radius
    rgb = torch.tensor(list(COLOURS.values()))[colour]
    rgb = rgb + 0.06 * (torch.rand(count, 3, generator=generator) - 0.5)
    scene = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    pictures = render(
        shape[:, None],
        rgb[:, None].clamp(0, 1),
        (radius + x * room)[:, None],
        (radius + y * room)[:, None],
        radius[:, None],
        (0.85 + 0.15 * light)[:, None],
        torch.tensor(list(BACKGROUNDS.values()))[scene],
        SIZE,
    )
    noise = torch.randn(pictures.shape, generator=generator)
    return ((pictures + NOISE * noise).clamp(0, 1) * 255).round() / 255, labels


def save(model: nn.Module, out: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:...")` and transformers both load, in
    fp16."""
    model.pretrained_cfg = dict(  # type: ignore[assignment]
        model.pretrained_cfg,  # type: ignore[arg-type]
        input_size=(3, SIZE, SIZE),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        license="apache-2.0",
    )
    timm.models.save_for_hf(
        model,
        str(out),
        model_config={"label_names": list(LABELS)},
        model_args=MODEL_ARGS,
        safe_serialization=True,
    )
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    # transformers passes num_classes by itself and refuses to be told twice.
    config["model_args"].pop("num_classes", None)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path | str) -> nn.Module:
    """Read a folder that `save` wrote, ready to classify."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, n: int = 2000, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """Measure top-1 accuracy on `n` fresh pictures, for the class and for its two words apart."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    guesses, truths = [], []
    for start in range(0, n, 250):
        pictures, labels = draw_batch(min(250, n - start), generator)
        guesses.append(model((pictures * 2 - 1).to(device)).argmax(1).cpu())
        truths.append(labels)
    guess, truth = torch.cat(guesses), torch.cat(truths)
    colours = len(COLOURS)
    return {
        "n": n,
        "seed": seed,
        "accuracy": round((guess == truth).float().mean().item(), 4),
        "colour": round((guess % colours == truth % colours).float().mean().item(), 4),
        "shape": round((guess // colours == truth // colours).float().mean().item(), 4),
    }


def train(
    out: Path,
    *,
    minutes: float | None = None,
    steps: int = 1300,
    batch: int = 64,
    device: str = "cpu",
    seed: int = 0,
    smoke: bool = False,
    resume: Path | None = None,
    samples: int = 4000,
    log: Log = silent,
) -> dict[str, Any]:
    """Train, save and grade a classifier.

    Args:
        out: Folder for the weights (float16), the config and `training.json`; checkpoints go there
            on the way.
        minutes: Time to train; None goes by steps.
        steps: Steps without `minutes`.
        batch: Pictures per step.
        device: Torch device.
        seed: Seed of weights and pictures, below the evaluation seeds.
        smoke: Three steps and a few pictures of evaluation, to see that everything runs.
        resume: Folder of a saved model to go on from.
        samples: Pictures of the final evaluation.
        log: Receives one line of progress now and then.

    Returns:
        The content of `training.json`.

    Raises:
        ValueError: `seed` is one of the evaluation seeds.
    """
    if not 0 <= seed < HELD_OUT_SEED:
        raise ValueError(
            f"seed must lie in 0 .. {HELD_OUT_SEED - 1} to stay clear of evaluation, found {seed}."
        )
    if smoke:
        minutes, steps, samples = None, 3, 8
    model = build(seed) if resume is None else load(resume)
    model.to(torch.device(device)).train()
    draw = torch.Generator().manual_seed(seed)
    optimizer = MuonAdamW(
        [model],
        hidden=lambda name: "blocks." in name,
        muon_lr=LEARNING_RATE,
        adamw_lr=LEARNING_RATE,
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    progress = Progress(steps=steps) if minutes is None else Progress(minutes=minutes)
    while not progress.done:
        pictures, labels = draw_batch(batch, draw)
        loss = cross_entropy(model((pictures * 2 - 1).to(device)), labels.to(device))
        optimizer.step(loss, cosine(progress.fraction))
        progress.step += 1
        progress.samples += batch
        if progress.step % 50 == 0 or progress.done:
            progress.curve.append((progress.step, loss.item()))
            log(f"vit step {progress.step} loss {loss.item():.4f} {progress.cpu_seconds:.0f} s")
        if progress.step % 1000 == 0:
            save(model, out)
    save(model, out)
    record = {
        "recipe": "mmattn.mini.train_vit",
        "seed": seed,
        "resumed": resume is not None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "learning_rate": LEARNING_RATE,
        "noise": NOISE,
        "stages": {"classifier": progress.record()},
        "metrics": [evaluate(load(out), samples)],
    }
    write_record(out, record)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train` from the command line, on one thread: two are slower here."""
    arguments = trainer_arguments(__doc__, argv)
    torch.set_num_threads(1)
    record = train(**vars(arguments), log=log_to_stderr)
    sys.stdout.write(json.dumps(record["metrics"], indent=1) + "\n")


if __name__ == "__main__":
    main()
