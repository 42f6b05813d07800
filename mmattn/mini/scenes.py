"""Captioned pictures and clips whose content is known exactly.

The embedded text-to-image and text-to-video models are trained on these scenes, and because every
scene keeps the list of the objects in it, what a model drew can be judged without another network.
Lengths are in pixels of a 64-pixel canvas (`Scene`) or fractions of the frame (`Clip`) and scale
with the size that is drawn.

Everything is drawn from one `torch.Generator` per call, so a seed names the same scenes on every
machine and no global random state is read or changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmattn.mini.draw import BACKGROUNDS, COLOURS, SHAPES, plural, render

Kind = Literal["one", "relation", "count"]

SCENE_SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring", "star")
"""Shapes in captioned scenes: the six that stay apart in a few pixels."""

SCENE_COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "orange")
"""Object colours in captioned scenes."""

SCENE_BACKGROUNDS: tuple[str, ...] = tuple(BACKGROUNDS)
"""Background colours in captioned scenes."""

POSITIONS: dict[str, tuple[float, float]] = {
    "left": (18.0, 32.0),
    "right": (46.0, 32.0),
    "top": (32.0, 18.0),
    "bottom": (32.0, 46.0),
    "center": (32.0, 32.0),
}
"""Position word to the centre `(x, y)` of its zone on the 64-pixel canvas."""

RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((17.0, 32.0), (47.0, 32.0)),
    "right of": ((47.0, 32.0), (17.0, 32.0)),
    "above": ((32.0, 17.0), (32.0, 47.0)),
    "below": ((32.0, 47.0), (32.0, 17.0)),
}
"""Relation to the centres of its first and second object on the 64-pixel canvas."""

COUNTS: dict[str, int] = {"two": 2, "three": 3}
"""Number words in count captions."""

MOTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
"""Motion word to its direction `(x, y)`; `y` grows downwards."""

CANVAS = 64.0


@dataclass(frozen=True)
class Thing:
    """One object: its name, and where it is on the 64-pixel canvas."""

    shape: str
    colour: str
    cx: float
    cy: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A captioned picture.

    `position` is set where the caption names one, `relation` in "relation" scenes (first object to
    second).
    """

    caption: str
    kind: Kind
    background: str
    things: tuple[Thing, ...]
    position: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Clip:
    """A captioned clip of one object that moves straight; places are fractions of the frame."""

    caption: str
    shape: str
    colour: str
    background: str
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float


class _Dice:
    """Uniform numbers for one scene, drawn in one call because scenes are made by the thousand."""

    def __init__(self, generator: torch.Generator) -> None:
        numbers: list[float] = torch.rand(24, generator=generator, dtype=torch.float64).tolist()
        self._numbers = iter(numbers)

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def pick(self, choices: Sequence[str]) -> str:
        return choices[int(next(self._numbers) * len(choices))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _one(dice: _Dice) -> Scene:
    colour, shape = dice.pick(SCENE_COLOURS), dice.pick(SCENE_SHAPES)
    background = dice.pick(SCENE_BACKGROUNDS)
    big = dice.chance(0.5)
    radius = dice.between(13.0, 15.0) if big else dice.between(8.5, 10.5)
    words = [colour, shape]
    if dice.chance(0.75):
        words.insert(0, "big" if big else "small")
    words.insert(0, _article(words[0]))
    position = None
    if dice.chance(0.8):
        position = dice.pick(tuple(POSITIONS))
        zone = POSITIONS[position]
        cx, cy = zone[0] + dice.between(-2.5, 2.5), zone[1] + dice.between(-2.5, 2.5)
        words += ["in" if position == "center" else "on", "the", position]
    else:
        margin = radius + 1.0
        cx, cy = (dice.between(margin, CANVAS - margin) for _ in range(2))
    words += ["on", "a", background, "background"]
    thing = Thing(shape, colour, cx, cy, radius)
    return Scene(" ".join(words), "one", background, (thing,), position=position)


def _relation(dice: _Dice) -> Scene:
    relation = dice.pick(tuple(RELATIONS))
    background = dice.pick(SCENE_BACKGROUNDS)
    things = []
    for x, y in RELATIONS[relation]:
        colour, shape = dice.pick(SCENE_COLOURS), dice.pick(SCENE_SHAPES)
        jitter = dice.between(-3.0, 3.0), dice.between(-3.0, 3.0)
        things.append(Thing(shape, colour, x + jitter[0], y + jitter[1], dice.between(9.5, 11.5)))
    first, second = things
    nouns = [f"{_article(t.colour)} {t.colour} {t.shape}" for t in things]
    caption = f"{nouns[0]} {relation} {nouns[1]} on a {background} background"
    return Scene(caption, "relation", background, (first, second), relation=relation)


def _count(dice: _Dice) -> Scene:
    word = dice.pick(tuple(COUNTS))
    colour, shape = dice.pick(SCENE_COLOURS), dice.pick(SCENE_SHAPES)
    background = dice.pick(SCENE_BACKGROUNDS)
    zones: tuple[tuple[float, float], ...]
    if word == "two":
        zones = RELATIONS["left of"] if dice.chance(0.5) else RELATIONS["above"]
    else:
        zones = ((17.0, 45.0), (47.0, 45.0), (32.0, 18.0))
    things = tuple(
        Thing(
            shape,
            colour,
            x + dice.between(-2.5, 2.5),
            y + dice.between(-2.5, 2.5),
            dice.between(9.0, 11.0),
        )
        for x, y in zones
    )
    return Scene(
        f"{word} {colour} {plural(shape)} on a {background} background", "count", background, things
    )


_MAKERS = {"one": _one, "relation": _relation, "count": _count}


def _kind(point: float, mix: Sequence[tuple[Kind, float]]) -> Kind:
    """The kind on whose stretch of [0, 1] `point` falls when the shares are laid end to end."""
    for kind, share in mix:
        point -= share
        if point < 0:
            return kind
    return mix[-1][0]


def make_scenes(
    n: int,
    seed: int,
    *,
    mix: Sequence[tuple[Kind, float]] = (("one", 0.31), ("relation", 0.57), ("count", 0.12)),
) -> list[Scene]:
    """Make `n` captioned scenes.

    Args:
        n: How many.
        seed: Names the scenes; training and judging use different ones.
        mix: Scene kinds with their shares, which sum to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = []
    for _ in range(n):
        dice = _Dice(generator)
        scenes.append(_MAKERS[_kind(dice.between(0.0, 1.0), mix)](dice))
    return scenes


def make_clips(n: int, seed: int) -> list[Clip]:
    """Make `n` captioned clips of one moving object; `seed` names them."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(n):
        dice = _Dice(generator)
        colour, shape = dice.pick(SCENE_COLOURS), dice.pick(SCENE_SHAPES)
        background, motion = dice.pick(SCENE_BACKGROUNDS), dice.pick(tuple(MOTIONS))
        dx, dy = MOTIONS[motion]
        radius = dice.between(0.19, 0.22)
        drift = dice.between(-0.08, 0.08)
        reach = dice.between(0.20, 0.25)
        x, y = 0.5 + drift * abs(dy), 0.5 + drift * abs(dx)
        clips.append(
            Clip(
                f"{_article(colour)} {colour} {shape} moving {motion} on a {background} background",
                shape,
                colour,
                background,
                motion,
                (x - dx * reach, y - dy * reach),
                (x + dx * reach, y + dy * reach),
                radius,
            )
        )
    return clips


def draw_scenes(
    scenes: Sequence[Scene], size: int = 64, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw scenes as pictures `[B, 3, Y, X]` in [0, 1], `size` pixels a side."""
    slots = max(len(scene.things) for scene in scenes)
    scale = size / CANVAS
    table = torch.zeros(len(scenes), slots, 8)
    table[..., 3] = 1.0
    for row, scene in enumerate(scenes):
        for slot, thing in enumerate(scene.things):
            place = (thing.cx * scale, thing.cy * scale, thing.radius * scale)
            entry = (SHAPES.index(thing.shape), *place, 1.0, *COLOURS[thing.colour])
            table[row, slot] = torch.tensor(entry)
    table = table.to(device)
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)
    shape_ids, cx, cy, radius, alpha = table[..., :5].unbind(-1)
    return render(shape_ids.long(), table[..., 5:], cx, cy, radius, alpha, background, size)


def draw_clips(
    clips: Sequence[Clip], size: int = 48, frames: int = 17, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw clips as `[B, 3, T, Y, X]` in [0, 1], `size` pixels a side."""
    ids = torch.tensor([SHAPES.index(clip.shape) for clip in clips])
    rgb = torch.tensor([COLOURS[clip.colour] for clip in clips])
    background = torch.tensor([BACKGROUNDS[clip.background] for clip in clips])
    start = torch.tensor([clip.start for clip in clips])[:, None]
    end = torch.tensor([clip.end for clip in clips])[:, None]
    radius = torch.tensor([clip.radius for clip in clips])
    moment = torch.linspace(0, 1, frames).view(1, -1, 1)
    place = ((start + (end - start) * moment) * size).reshape(-1, 2)

    def per_frame(value: Tensor) -> Tensor:
        return value.repeat_interleave(frames, 0).to(device)

    pictures = render(
        per_frame(ids)[:, None],
        per_frame(rgb)[:, None],
        place[:, :1].to(device),
        place[:, 1:].to(device),
        per_frame(radius * size)[:, None],
        torch.ones(len(clips) * frames, 1, device=device),
        per_frame(background),
        size,
    )
    return pictures.view(len(clips), frames, 3, size, size).transpose(1, 2)
