"""Does an In-Context LoRA make sets hang together? Trained and judged on drawn sets, on the embedded model.

    python pipelines/bench/in_context_lora.py --out out/in-context-lora

A set shows one object twice, at two places. The caption names it once, in plain words: the model's small
tokenizer ends a text at a square bracket. The judge looks at every panel by itself: a set is *consistent*
when both panels show exactly one object and it has the same shape and colour, *right* when that is the
object that was asked for, and *placed* when both are also where the caption says. Objects of the judged
captions (a sixth of all pairs of colour and shape) are in no training set. Rows: the untuned model, the
trained LoRA; with ``--references`` also with the first panel given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmattn_pipelines.panels import PanelLayout
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import mmattn.mini
from mmattn.mini.oracle import Sight, look
from mmattn.mini.recipe import log_to_stderr
from mmattn.mini.scenes import (
    POSITIONS,
    SCENE_BACKGROUNDS,
    SCENE_COLOURS,
    SCENE_SHAPES,
    Scene,
    Thing,
    draw_scenes,
)

SIDE = 64
LAYOUT = PanelLayout(1, 2, SIDE, SIDE)
LENGTH = 32
"""Text tokens of a set's caption."""

WORDS = {"left": "on the left", "right": "on the right", "top": "on the top"}
WORDS |= {"bottom": "on the bottom", "center": "in the center"}


@dataclass(frozen=True)
class DrawnSet:
    """A set of pictures of one object, and its caption."""

    caption: str
    panels: tuple[Scene, ...]

    @property
    def thing(self) -> Thing:
        """The object that every panel shows."""
        return self.panels[0].things[0]

    def draw(self) -> Tensor:
        """The panels ``[2, 3, Y, X]`` in [0, 1]."""
        return draw_scenes(self.panels, SIDE)


def held_out(colour: str, shape: str) -> bool:
    """Whether an object is kept for judging: every colour and every shape once."""
    return SCENE_COLOURS.index(colour) == SCENE_SHAPES.index(shape)


def make_sets(n: int, seed: int, *, judged: bool) -> list[DrawnSet]:
    """Sets for training, or with objects that training never shows."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def shake(reach: float) -> float:
        return (2 * torch.rand((), generator=generator).item() - 1) * reach

    objects = [
        (colour, shape)
        for colour in SCENE_COLOURS
        for shape in SCENE_SHAPES
        if held_out(colour, shape) == judged
    ]
    sets = []
    for _ in range(n):
        colour, shape = pick(objects)
        size, radius = pick((("big", 14.0), ("small", 9.5)))
        places = torch.randperm(len(POSITIONS), generator=generator).tolist()
        background, scenes = pick(SCENE_BACKGROUNDS), []
        for place in places[:2]:
            position = list(POSITIONS)[place]
            x, y = (middle + shake(2.0) for middle in POSITIONS[position])
            thing = Thing(shape, colour, x, y, radius)
            scenes.append(Scene(WORDS[position], "one", background, (thing,), position))
        left, right = (scene.caption for scene in scenes)
        what = f"a {size} {colour} {shape} on a {background} background"
        sets.append(DrawnSet(f"{what}, left {left}, right {right}", tuple(scenes)))
    return sets


def write_folder(sets: Sequence[DrawnSet], folder: Path) -> None:
    """Canvases and captions as the trainer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, drawn in enumerate(sets, 1):
        canvas = LAYOUT.join([to_pil_image(panel) for panel in drawn.draw()])
        canvas.save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(drawn.caption + "\n", encoding="utf-8")


def judge(left: Sight, right: Sight, drawn: DrawnSet) -> dict[str, bool]:
    """What the oracle says of a set whose panels it saw."""
    seen = [[(t.colour, t.shape) for t in sight.things] for sight in (left, right)]
    single = all(len(things) == 1 for things in seen)
    same = single and seen[0] == seen[1] and seen[0][0][1] is not None
    right_thing = same and seen[0][0] == (drawn.thing.colour, drawn.thing.shape)
    placed = right_thing and all(
        _nearest(sight.things[0]) == scene.position
        for sight, scene in zip((left, right), drawn.panels, strict=True)
    )
    return {
        "one object each": single,
        "consistent": same,
        "right": right_thing,
        "placed": placed,
    }


def _nearest(thing: Any) -> str:
    """The word for the place where an object was seen."""
    at = POSITIONS
    return min(at, key=lambda w: (at[w][0] - thing.cx) ** 2 + (at[w][1] - thing.cy) ** 2)


@torch.no_grad()
def draw(pipe: Any, sets: Sequence[DrawnSet], seed: int, *, given: str | None = None) -> Tensor:
    """What the model draws for the captions, panels ``[n, 2, 3, Y, X]``.

    `given` shows it the first panel: ``matched`` to the noise of a step, or ``clean``.
    """
    from mmattn_pipelines.in_context import InContextPipeline

    pipe.set_progress_bar_config(disable=True)
    draw_set, made = InContextPipeline(pipe), []
    for number, drawn in enumerate(sets):
        out = draw_set(
            drawn.caption,
            layout=LAYOUT,
            references=[to_pil_image(drawn.draw()[0])] if given else (),
            reference_level=given or "matched",
            num_inference_steps=20,
            true_cfg_scale=3.0,
            negative_prompt="",
            max_sequence_length=LENGTH,
            generator=torch.Generator().manual_seed(seed + number),
            output_type="pt",
        )
        made.append(torch.stack(list(out.images)))
    return torch.stack(made)


def interval(values: Sequence[bool], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of a share."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(data), (2000, len(data)), generator=generator)
    means = data[rows].mean(1)
    return [round(means.quantile(q).item(), 4) for q in (0.025, 0.975)]


def measure(
    pipe: Any, sets: Sequence[DrawnSet], seed: int, *, given: str | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Shares with intervals, and the panels."""
    panels = draw(pipe, sets, seed, given=given)
    sights = look(panels.flatten(0, 1).clamp(0, 1))
    verdicts = [judge(sights[2 * i], sights[2 * i + 1], drawn) for i, drawn in enumerate(sets)]
    return {
        key: {
            "share": round(sum(v[key] for v in verdicts) / len(verdicts), 4),
            "interval": interval([v[key] for v in verdicts]),
        }
        for key in verdicts[0]
    }, panels


def main(argv: Sequence[str] | None = None) -> int:
    """Judge, train, judge again."""
    from mmattn_pipelines.lora_training import ADAPTER, InContextLora, train
    from torchvision.utils import save_image

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--judged", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--references", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_folder(make_sets(args.sets, args.seed, judged=False), args.out / "data")
    sets = make_sets(args.judged, 900_000 + args.seed, judged=True)
    pipe = mmattn.mini.load("t2i")
    record: dict[str, Any] = {**vars(args), "out": str(args.out.name)}
    record["untuned"], before = measure(pipe, sets, args.seed)
    if args.references:
        record["untuned, first panel given"], _ = measure(pipe, sets, args.seed, given="matched")
    recipe = InContextLora(
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        caption_dropout=0.1,
        resolutions=(91,),
        max_sequence_length=LENGTH,
        gradient_checkpointing=False,
        panels=(1, 2),
        references=args.references,
        seed=args.seed,
    )
    start = time.process_time()
    trained = train(pipe, args.out / "data", args.out / "lora", recipe, log=log_to_stderr)
    record["training"] = {
        "cpu_seconds": round(time.process_time() - start),
        "losses": trained.losses,
    }
    pipe.transformer.set_adapter(ADAPTER)
    record["trained"], after = measure(pipe, sets, args.seed)
    if args.references:
        record["trained, first panel given"], _ = measure(pipe, sets, args.seed, given="clean")
    rows = torch.cat([before[:6].flatten(0, 1), after[:6].flatten(0, 1)])
    save_image(rows, args.out / "sets.png", nrow=12, padding=2)
    text = json.dumps(record, indent=2)
    (args.out / "result.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
