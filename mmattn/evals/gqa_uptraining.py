"""How well grouped-query attention heals: the embedded ViT, converted, then trained for a moment.

    python -m mmattn.evals.gqa_uptraining --out docs/backbones

Accuracy on held-out pictures right after `mmattn.nn.gqa.convert`, and after a short `uptrain`, for every
kind of grouping and for groups of heads drawn at random. Pictures of a seed are the same for all. Results are
written after every run, and what is written is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.errors import ConfigError
from mmattn.measuring import environment
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch
from mmattn.nn.gqa import convert, uptrain

SETTINGS: dict[str, Any] = {
    "steps": 40,
    "batch": 32,
    "learning_rate": 1e-3,
    "window": 10,
    "held_out": 1000,
}
CASES: tuple[tuple[str, int], ...] = (
    ("static", 2),
    ("random", 2),
    ("key", 2),
    ("diff", 2),
    ("ema", 2),
    ("static", 1),
)
"""Kinds and numbers of groups; ``random`` is ``static`` with heads in a random order."""


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[B, 3, 64, 64]`` as the model wants them, and labels."""
    x, y = draw_batch(count, torch.Generator().manual_seed(seed))
    return x * 2 - 1, y


@torch.no_grad()
def accuracy(model: nn.Module, count: int) -> float:
    """Share of `count` held-out pictures that are named right, in batches of 250."""
    x, y = pictures(count, HELD_OUT_SEED)
    guesses = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return round((guesses == y).float().mean().item(), 4)


def run(
    model: nn.Module, kind: str, groups: int, seed: int, settings: dict[str, Any] = SETTINGS
) -> dict[str, Any]:
    """Convert, grade, train, grade."""
    shuffle = seed if kind == "random" else None
    plain = "static" if kind == "random" else kind
    grouped = convert(model, groups, plain, window=settings["window"], shuffle=shuffle)
    before = accuracy(grouped, settings["held_out"])
    batch = settings["batch"]
    # Seeds of training pictures are below those of held-out ones.
    x, y = pictures(batch * settings["steps"], 1000 + seed)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    losses = uptrain(grouped, batches, learning_rate=settings["learning_rate"])
    return {
        "kind": kind,
        "groups": groups,
        "seed": seed,
        "before": before,
        "after": accuracy(grouped, settings["held_out"]),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "parameters": sum(p.numel() for p in grouped.parameters()),
    }


def measure(
    model: nn.Module,
    path: Path,
    seeds: Sequence[int] = (0, 1, 2),
    settings: dict[str, Any] = SETTINGS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run what `path` does not have yet, and write it after every run.

    Raises:
        ConfigError: the file is from other settings.
    """
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if record["settings"] != settings:
            raise ConfigError(
                f"{path} holds runs with {record['settings']}, but {settings} were asked for; name "
                "another folder or remove the file."
            )
    else:
        record = {
            "settings": settings,
            "environment": environment(torch.device("cpu")),
            "untouched": accuracy(model, settings["held_out"]),
            "parameters": sum(p.numel() for p in model.parameters()),
            "runs": [],
        }
    done = {(r["kind"], r["groups"], r["seed"]) for r in record["runs"]}
    for seed in seeds:
        for kind, groups in CASES:
            if (kind, groups, seed) in done:
                continue
            found = run(model, kind, groups, seed, settings)
            record["runs"].append(found)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            progress(f"{kind} {groups} {seed}: {found['before']:.3f} -> {found['after']:.3f}")
    return record


def markdown(record: dict[str, Any]) -> str:
    """The table for the documents: means and extremes over seeds."""
    lines = [
        "| grouping | groups | parameters | converted | after uptraining |",
        "|---|---|---|---|---|",
        f"| none | 4 | {record['parameters']} | {100 * record['untouched']:.1f} % | |",
    ]
    for kind, groups in CASES:
        runs = [r for r in record["runs"] if (r["kind"], r["groups"]) == (kind, groups)]
        if runs:
            cells = []
            for key in ("before", "after"):
                right = [100 * r[key] for r in runs]
                cells.append(
                    f"{statistics.mean(right):.1f} % ({min(right):.1f} .. {max(right):.1f})"
                )
            lines.append(f"| {kind} | {groups} | {runs[0]['parameters']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, train, write, print the table; one thread."""
    import mmattn.mini

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/backbones"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure(
        mmattn.mini.load("vit"),
        options.out / "gqa_uptraining.json",
        seeds=range(options.seeds),
        progress=_say,
    )
    sys.stdout.write(markdown(record))


if __name__ == "__main__":
    main()
