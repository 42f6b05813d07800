"""What the rows of attention_guidance.py share: prompts, noise, intervals, and the file of results."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmattn.measuring import environment
from mmattn.mini.scenes import SCENE_BACKGROUNDS, SCENE_COLOURS, SCENE_SHAPES

SIZE = {"height": 64, "width": 64, "max_sequence_length": 16}
SEED = 77_000
"""Prompts and noise; the knobs were chosen on seed 0."""

Object = tuple[str, str]
"""Colour and shape."""


def interval(values: Sequence[float]) -> list[float]:
    """Mean of the values, and its 95 % bootstrap interval: ``[mean, low, high]``, rounded."""
    x = torch.tensor(values, dtype=torch.float64)
    draw = torch.randint(len(x), (1000, len(x)), generator=torch.Generator().manual_seed(0))
    means = x[draw].mean(1)
    low, high = means.quantile(0.025), means.quantile(0.975)
    return [round(float(v), 4) for v in (x.mean(), low, high)]


class Results:
    """Rows in a JSON file, written one by one."""

    def __init__(self, folder: Path, n: int) -> None:
        self.path, self.folder, self.n = folder / "results.json", folder, n
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = {}
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def measure(self, name: str, measured: Callable[[], dict[str, list[float]]], base: str) -> None:
        """One row: per-prompt numbers under their names, and the first one's difference to a row `base`."""
        if name in self.rows:
            return
        start = time.perf_counter()
        values = measured()
        first = next(iter(values.values()))
        row = {key: interval(numbers) for key, numbers in values.items()}
        if base != name:
            pairs = zip(first, self.rows[base]["each"], strict=True)
            row["difference"] = interval([ours - theirs for ours, theirs in pairs])
        self.rows[name] = {
            **row,
            "each": [round(value, 4) for value in first],
            "prompts": len(first),
            "seconds": round(time.perf_counter() - start, 1),
        }
        record = {"seed": SEED, "environment": environment(torch.device("cpu")), "rows": self.rows}
        self.path.write_text(json.dumps(record, indent=1) + "\n")
        shown = {k: v[0] for k, v in self.rows[name].items() if isinstance(v, list) and k != "each"}
        sys.stderr.write(f"{name}: {shown} {self.rows[name]['seconds']} s\n")

    def strip(self, name: str, rows: Sequence[Sequence[torch.Tensor]]) -> None:
        """Pictures in rows, twice their size."""
        grid = torch.cat([torch.cat([_framed(p) for p in row], 2) for row in rows], 1)
        large = grid.repeat_interleave(2, 1).repeat_interleave(2, 2)
        pixels = (large.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(self.folder / name)


def _framed(picture: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(picture, (2, 2, 2, 2), value=0.6)


def noise(count: int) -> list[torch.Generator]:
    """A generator per picture."""
    return [torch.Generator().manual_seed(SEED + i) for i in range(count)]


def article(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def objects(n: int, k: int, seed: int) -> list[list[Object]]:
    """`k` objects of different colours and shapes for each of `n` prompts."""
    dice = random.Random(seed)
    return [
        list(zip(dice.sample(SCENE_COLOURS, k), dice.sample(SCENE_SHAPES, k), strict=True))
        for _ in range(n)
    ]


def backgrounds(n: int, seed: int) -> list[str]:
    """A background for each of `n` prompts."""
    dice = random.Random(seed + 1)
    return [dice.choice(SCENE_BACKGROUNDS) for _ in range(n)]


def named(thing: Object) -> str:
    """The object with its article."""
    return f"{article(thing[0])} {thing[1]}"
