"""Judge what a model drew, by measuring pixels and not by asking another network.

The idea is analysis by synthesis. The border of a picture gives its background; everything that
differs from it falls into connected pieces; each piece has a colour, which is named by the nearest
palette entry, and a soft outline, which is compared with every shape drawn at the same place with
the same area. The shape whose outline overlaps most is the answer. There are no weights, so the
judge cannot share a mistake with the model it judges.

Lengths are pixels of the 64-pixel canvas of `mmattn.mini.scenes`, whatever the picture's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional

from mmattn.mini.draw import BACKGROUNDS, COLOURS, SHAPES, coverage
from mmattn.mini.scenes import CANVAS, MOTIONS, POSITIONS, SCENE_COLOURS, SCENE_SHAPES, Clip, Scene

Verdict = dict[str, bool]
"""Question to answer for one sample; "all" is true if every other answer is."""

FOREGROUND = 0.22
"""Distance in RGB from the background above which a pixel belongs to an object."""

SMALLEST = 20.0
"""Pieces below this area (pixels of the 64-pixel canvas) are dirt and not objects."""

OVERLAP = 0.6
"""Soft intersection over union below which a piece has none of the known shapes."""


@dataclass(frozen=True)
class Found:
    """One object that the oracle sees; `shape` is None if no outline reaches `OVERLAP`."""

    shape: str | None
    colour: str
    cx: float
    cy: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Sight:
    """What the oracle sees in one picture; objects are sorted from large to small."""

    background: str
    things: tuple[Found, ...]


def _pieces(mask: Tensor) -> Tensor:
    """Number the connected pieces (8 neighbours) of every mask `[B, Y, X]`; 0 is outside."""
    height, width = mask.shape[-2:]
    marks = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width) * mask
    while True:
        spread = functional.max_pool2d(marks[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, marks):
            return marks.long()
        marks = spread


def _nearest(
    rgb: Tensor, names: Sequence[str], palette: dict[str, tuple[float, float, float]]
) -> list[str]:
    """Names of the palette entries nearest to `rgb`, `[N, 3]`."""
    entries = torch.tensor([palette[name] for name in names])
    return [names[i] for i in torch.cdist(rgb, entries).argmin(1).tolist()]


def _templates(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Area at radius 1, and centroid offset `(x, y)` at radius 1, of the named shapes: `[S]` and
    `[S, 2]`.
    """
    ids = torch.tensor([[SHAPES.index(name)] for name in names])
    middle, radius = torch.full(ids.shape, 64.0), torch.full(ids.shape, 48.0)
    filled = coverage(ids, middle, middle, radius, 128)[:, 0]
    area = filled.sum((1, 2))
    axis = torch.arange(128) + 0.5 - 64.0
    x = (filled.sum(1) * axis).sum(1) / area
    y = (filled.sum(2) * axis).sum(1) / area
    return area / 48.0**2, torch.stack([x, y], 1) / 48.0


def _fit(outlines: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit every shape to every outline.

    Args:
        outlines: Soft masks `[N, Y, X]` in [0, 1].
        names: Candidate shapes.

    Returns:
        Overlap and radius `[N, S]`, and the centroid `x` and `y` of the outline `[N]`, in pixels.
    """
    count, height, width = outlines.shape
    unit_area, unit_offset = _templates(names)
    area = outlines.sum((1, 2))
    cx = (outlines.sum(1) * (torch.arange(width) + 0.5)).sum(1) / area
    cy = (outlines.sum(2) * (torch.arange(height) + 0.5)).sum(1) / area
    radius = (area[:, None] / unit_area).sqrt()
    ids = torch.tensor([SHAPES.index(name) for name in names]).expand(count, -1)
    best = torch.zeros(count, len(names))
    for stretch in (0.94, 1.0, 1.06):
        size = radius * stretch
        x, y = cx[:, None] - unit_offset[:, 0] * size, cy[:, None] - unit_offset[:, 1] * size
        drawn = coverage(ids, x, y, size, (height, width))
        both = torch.minimum(drawn, outlines[:, None]).sum((2, 3))
        either = torch.maximum(drawn, outlines[:, None]).sum((2, 3))
        best = torch.maximum(best, both / either)
    return best, radius, cx, cy


def look(
    pictures: Tensor,
    *,
    shapes: Sequence[str] = SCENE_SHAPES,
    colours: Sequence[str] = SCENE_COLOURS,
) -> list[Sight]:
    """See the objects in every picture.

    Args:
        pictures: `[B, 3, Y, X]` in [0, 1], square.
        shapes: Shape names to choose from.
        colours: Colour names to choose from.
    """
    pictures = pictures.float().cpu().clamp(0, 1)
    scale = pictures.shape[-1] / CANVAS
    border = torch.cat(
        [pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], dim=2
    )
    background = border.median(2).values
    difference = pictures - background[:, :, None, None]
    distance = difference.square().sum(1).sqrt()
    marks = _pieces((distance > FOREGROUND).float())

    owners: list[int] = []
    outlines: list[Tensor] = []
    tints: list[Tensor] = []
    for row in range(len(pictures)):
        sizes = torch.bincount(marks[row].flatten())
        sizes[0] = 0
        for mark in (sizes >= SMALLEST * scale**2).nonzero().flatten().tolist():
            piece = marks[row] == mark
            inside = distance[row][piece]
            core = piece & (distance[row] >= inside.median())
            tint = pictures[row][:, core].mean(1)
            away = tint - background[row]
            near = functional.max_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0]
            amount = (difference[row] * away[:, None, None]).sum(0) / away.square().sum()
            owners.append(row)
            outlines.append(amount.clamp(0, 1) * near)
            tints.append(tint)

    things: list[list[Found]] = [[] for _ in pictures]
    if owners:
        names = _nearest(torch.stack(tints), colours, dict(COLOURS))
        overlap, radius, cx, cy = _fit(torch.stack(outlines), shapes)
        for i, row in enumerate(owners):
            pick = int(overlap[i].argmax())
            score = overlap[i, pick].item()
            size = radius[i, pick].item() / scale
            place = cx[i].item() / scale, cy[i].item() / scale
            shape = shapes[pick] if score >= OVERLAP else None
            things[row].append(Found(shape, names[i], *place, size, score))
    backgrounds = _nearest(background, tuple(BACKGROUNDS), dict(BACKGROUNDS))
    return [
        Sight(name, tuple(sorted(found, key=lambda thing: -thing.radius)))
        for name, found in zip(backgrounds, things, strict=True)
    ]


def _position(thing: Found) -> str:
    """The position word whose zone is nearest."""
    return min(
        POSITIONS,
        key=lambda word: (
            (POSITIONS[word][0] - thing.cx) ** 2 + (POSITIONS[word][1] - thing.cy) ** 2
        ),
    )


def _relation(first: Found, second: Found) -> str:
    """How the first object lies to the second, by the longer of the two distances."""
    dx, dy = first.cx - second.cx, first.cy - second.cy
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def judge_scene(sight: Sight, scene: Scene) -> Verdict:
    """Compare what is seen with the scene that was asked for.

    Questions: "count" (as many objects as asked), "colour" and "shape" (of every object),
        "background", "position" if
    the caption names one, "relation" if it names one, and "all". Seen objects are assigned to asked
    ones so that most colours and shapes agree; a relation between objects of which none is
    recognised counts as wrong. A wrong count leaves no question right but the background.
    """
    verdict = {"count": len(sight.things) == len(scene.things), "colour": False, "shape": False}
    verdict["background"] = sight.background == scene.background
    if scene.position is not None:
        verdict["position"] = False
    if scene.relation is not None:
        verdict["relation"] = False
    if verdict["count"]:
        answers = []
        for seen in permutations(sight.things):
            pairs = list(zip(seen, scene.things, strict=True))
            colours = [found.colour == thing.colour for found, thing in pairs]
            shapes = [found.shape == thing.shape for found, thing in pairs]
            right = sum(colours) + sum(shapes)
            answer = {"colour": all(colours), "shape": all(shapes)}
            if scene.position is not None:
                answer["position"] = _position(seen[0]) == scene.position
            if scene.relation is not None:
                answer["relation"] = right > 0 and _relation(*seen) == scene.relation
            answers.append((right, sum(answer.values()), answer))
        verdict.update(max(answers, key=lambda entry: entry[:2])[2])
    verdict["all"] = all(verdict.values())
    return verdict


def judge_scenes(pictures: Tensor, scenes: Sequence[Scene]) -> list[Verdict]:
    """Judge pictures `[B, 3, Y, X]` in [0, 1] against the scenes they were asked to show."""
    return [judge_scene(sight, scene) for sight, scene in zip(look(pictures), scenes, strict=True)]


def judge_clips(frames: Tensor, clips: Sequence[Clip]) -> list[Verdict]:
    """Judge clips `[B, 3, T, Y, X]` in [0, 1] against what was asked for.

    Questions: "colour" and "shape" (majority of the frames, of the largest object), "background",
        "motion", and "all".
    Motion is the way from the mean place in the first quarter of the frames to that in the last; it
    must span at least a tenth of the frame. Clips that show an object in fewer than three quarters
    of their frames have no question right.
    """
    length = frames.shape[2]
    sights = look(frames.transpose(1, 2).flatten(0, 1))
    verdicts = []
    for row, clip in enumerate(clips):
        own = sights[row * length : (row + 1) * length]
        track = [(at, sight.things[0]) for at, sight in enumerate(own) if sight.things]
        backgrounds = [sight.background for sight in own]
        verdict = {"colour": False, "shape": False, "motion": False}
        verdict["background"] = max(set(backgrounds), key=backgrounds.count) == clip.background
        if len(track) >= 0.75 * length:
            colours = [thing.colour for _, thing in track]
            shapes = [thing.shape for _, thing in track]
            verdict["colour"] = max(sorted(set(colours)), key=colours.count) == clip.colour
            verdict["shape"] = max(sorted(set(shapes), key=str), key=shapes.count) == clip.shape
            verdict["motion"] = _motion([thing for _, thing in track]) == clip.motion
        verdict["all"] = all(verdict.values())
        verdicts.append(verdict)
    return verdicts


def _motion(track: Sequence[Found]) -> str | None:
    """The motion word nearest to the way an object went, or None if it stayed."""
    quarter = max(1, len(track) // 4)
    first, last = track[:quarter], track[-quarter:]
    dx = sum(thing.cx for thing in last) / quarter - sum(thing.cx for thing in first) / quarter
    dy = sum(thing.cy for thing in last) / quarter - sum(thing.cy for thing in first) / quarter
    if max(abs(dx), abs(dy)) < 0.1 * CANVAS:
        return None
    return max(MOTIONS, key=lambda word: MOTIONS[word][0] * dx + MOTIONS[word][1] * dy)


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right answers per question, over the samples that were asked it."""
    questions = dict.fromkeys(question for verdict in verdicts for question in verdict)
    return {
        question: sum(v[question] for v in verdicts if question in v)
        / sum(question in v for v in verdicts)
        for question in questions
    }
