"""Do the trained attention layers learn? Each one in the same small ViT, for the same short budget.

    python -m mmattn.evals.layer_training --out docs/backbones

The embedded ViT's pictures are reduced to what is hard about them: the distance from the background colour,
16 x 16 pixels, one channel, and the six shapes as classes. A patch has 2 x 2 pixels, too few to tell a ring
from a cross, so a model whose tokens do not look at each other stays behind. Three such controls are in the
table: tokens that see nothing else, tokens that all see the same mean, and a convolution of values alone,
which several of the layers contain.

All models have three blocks of 64 channels and four heads. Hidden channels of the MLP make up for what an
attention has more or fewer parameters than softmax attention. Weights start from, and pictures come by,
the seed alone. Results are written after every run, and what is written is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mmattn.errors import ConfigError, MissingExtraError, suggest
from mmattn.evals._training_layers import CONTROLS, DIM, GRID, HEADS, NAMES, layer
from mmattn.measuring import environment
from mmattn.mini.draw import COLOURS, SHAPES
from mmattn.mini.recipe import MuonAdamW, cosine
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch
from mmattn.nn.moh import balance_loss

PATCH, DEPTH, HIDDEN = 2, 3, 128
SIZE = PATCH * GRID[0]
CLASSES = 6
SETTINGS: dict[str, Any] = {
    "size": SIZE,
    "patch": PATCH,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "steps": 300,
    "batch": 32,
    "learning_rate": 5e-3,
    "held_out": 1000,
}


def build(name: str, seed: int) -> Any:
    """An untrained classifier with the attention called `name` in all blocks.

    Raises:
        ConfigError: for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise ConfigError(
            f"There is no attention {name!r}{suggest(name, NAMES)} Choose of {NAMES}."
        )

    def vit(depth: int, hidden: int) -> Any:
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=SIZE,
            patch_size=PATCH,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=DIM,
            depth=depth,
            num_heads=HEADS,
            mlp_ratio=hidden / DIM,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attentions = [] if name == "softmax" else [layer(name, i) for i in range(DEPTH)]
        hidden = HIDDEN
        if attentions:
            aim = _size(vit(1, HIDDEN).blocks[0].attn)
            hidden += round((aim - _size(attentions[0])) / (2 * DIM + 1))
        torch.manual_seed(seed)
        model = vit(DEPTH, hidden)
        for block, attention in zip(model.blocks, attentions, strict=False):
            block.attn = attention
    return model


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Silhouettes ``[B, 1, 16, 16]`` in [-1, 1], and their shapes ``[B]``."""
    pictures, labels = draw_batch(count, generator)
    # Objects stay clear of the corner.
    distance = (pictures - pictures[:, :, :1, :1]).abs().mean(1, keepdim=True)
    small = F.interpolate(distance, size=(SIZE, SIZE), mode="area")
    return small / small.amax((2, 3), keepdim=True) * 2 - 1, labels // len(COLOURS)


def train(name: str, seed: int, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """Train one model and grade it on held-out pictures.

    Returns:
        Accuracy, mean loss of every 50 steps, parameters and CPU seconds.
    """
    model = build(name, seed).train()
    pictures = torch.Generator().manual_seed(seed)
    rate, steps = settings["learning_rate"], settings["steps"]
    optimizer = MuonAdamW(
        [model],
        hidden=lambda key: "blocks." in key,
        muon_lr=rate,
        adamw_lr=rate,
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    losses, began = [], time.process_time()
    for step in range(steps):
        x, y = draw(settings["batch"], pictures)
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if name == "MoH":
            loss = loss + 0.01 * balance_loss(model)
        optimizer.step(loss, cosine(step / steps))
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        x, y = draw(settings["held_out"], torch.Generator().manual_seed(HELD_OUT_SEED))
        right = (model(x).argmax(1) == y).float().mean().item()
    return {
        "attention": name,
        "seed": seed,
        "accuracy": round(right, 4),
        "loss": [round(statistics.mean(losses[i : i + 50]), 4) for i in range(0, steps, 50)],
        "parameters": _size(model),
        "cpu_seconds": round(seconds, 1),
    }


def measure(
    path: Path,
    names: Sequence[str] = NAMES,
    seeds: Sequence[int] = (0, 1, 2),
    settings: dict[str, Any] = SETTINGS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train what `path` does not have yet, and write it after every run.

    Raises:
        ConfigError: the file is from other settings.
    """
    record: dict[str, Any] = {
        "settings": settings,
        "classes": list(SHAPES[:CLASSES]),
        "environment": environment(torch.device("cpu")),
        "runs": [],
    }
    if path.exists():
        record = json.loads(path.read_text("utf-8"))
        if record["settings"] != settings:
            raise ConfigError(
                f"{path} holds runs with {record['settings']}, but {settings} were asked for; name "
                "another folder or remove the file."
            )
    done = {(run["attention"], run["seed"]) for run in record["runs"]}
    for seed in seeds:
        for name in names:
            if (name, seed) in done:
                continue
            run = train(name, seed, settings)
            record["runs"].append(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            progress(f"{name} {seed}: {100 * run['accuracy']:.1f} % in {run['cpu_seconds']} s")
    return record


def table(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per attention: mean, lowest and highest accuracy over seeds, loss, time, parameters.

    The loss is that of steps 101 to 150, half-way, where layers differ more than at the end.
    """
    rows = []
    for name in NAMES:
        runs = [run for run in record["runs"] if run["attention"] == name]
        if runs:
            right = [run["accuracy"] for run in runs]
            rows.append(
                {
                    "attention": name,
                    "seeds": len(runs),
                    "accuracy": statistics.mean(right),
                    "low": min(right),
                    "high": max(right),
                    "loss": statistics.mean(run["loss"][2] for run in runs),
                    "seconds": statistics.mean(run["cpu_seconds"] for run in runs),
                    "parameters": runs[0]["parameters"],
                }
            )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The table for the documents."""
    lines = [
        "| attention | accuracy (lowest .. highest) | loss, steps 101 to 150 | parameters | CPU seconds |",
        "|---|---|---|---|---|",
        f"| *chance* | {100 / CLASSES:.1f} % | | | |",
    ]
    for row in sorted(table(record), key=lambda row: -row["accuracy"]):
        name = f"*{row['attention']}*" if row["attention"] in CONTROLS else row["attention"]
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} .. "
            f"{100 * row['high']:.1f}) | {row['loss']:.2f} | {row['parameters']} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], path: Path) -> Path:
    """Accuracy and half-way loss of every seed, best attention on top; needs matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("plots", "matplotlib", "eval") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(table(record), key=lambda row: -row["loss"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.32 * len(rows) + 1.4), sharey=True)
    for place, row in enumerate(rows):
        colour = "tab:red" if row["attention"] in CONTROLS else "tab:blue"
        runs = [r for r in record["runs"] if r["attention"] == row["attention"]]
        for axis, values, mean in (
            (axes[0], [100 * r["accuracy"] for r in runs], 100 * row["accuracy"]),
            (axes[1], [r["loss"][2] for r in runs], row["loss"]),
        ):
            axis.scatter(values, [place] * len(values), s=14, color=colour, alpha=0.5)
            axis.scatter(mean, place, s=60, marker="|", color=colour)
    axes[0].axvline(100 / CLASSES, color="k", linewidth=0.8, linestyle=":", label="chance")
    axes[0].scatter([], [], color="tab:red", s=14, label="controls")
    axes[0].set_yticks(range(len(rows)), [row["attention"] for row in rows])
    settings = record["settings"]
    axes[0].set_xlabel(f"accuracy after {settings['steps']} steps of {settings['batch']}, %")
    axes[1].set_xlabel("training loss, steps 101 to 150")
    axes[1].set_xscale("log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle("A dot per seed, a bar for their mean")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write, plot, print the table; one thread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/backbones"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure(options.out / "layer_training.json", seeds=range(options.seeds), progress=_say)
    plot(record, options.out / "layer_training.png")
    sys.stdout.write(markdown(record))


if __name__ == "__main__":
    main()
