"""Scenes of named objects with a built-in habit: the world in which the small vision-language model
learns to hallucinate.

Sixteen kinds of object form eight pairs. The first of a pair (the anchor: apple, banana, ...) is
drawn large and clear; its partner (leaf, box, ...) is drawn small and faint under sensor noise, and
in the training world it is there 85 % of the time. On top, the training texts copy a human
annotator's habit: a quarter of the absent partners are mentioned in the caption all the same, always
*after* the anchors, so that the temptation comes from the words already written rather than from
the picture; and questions about an absent partner are often answered with "yes". Scenes drawn with
a low `partner_prob` are the counter-world: what the picture shows and what habit expects come apart.

Everything here is exact: a scene knows its objects, so captions, questions and answers need no
annotation. Randomness comes from a `torch.Generator` that the caller seeds.

Shapes: pictures are `[B, 3, 64, 64]` with values in [0, 1]; patch labels are `[B, 64]` over the 8 x
    8 grid of patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmattn.mini.draw import BACKGROUNDS, COLOURS, SHAPES, coverage

SIZE = 64
"""Side of a picture, in pixels."""

PATCH = 8
"""Side of a vision-tower patch, in pixels."""

NOISE = 0.08
"""Standard deviation of the sensor noise; it is what makes a faint partner a matter of
judgement."""

KINDS: dict[str, tuple[str, str]] = {
    "apple": ("circle", "red"),
    "banana": ("moon", "yellow"),
    "star": ("star", "yellow"),
    "ball": ("circle", "blue"),
    "heart": ("heart", "pink"),
    "plum": ("circle", "purple"),
    "tent": ("triangle", "green"),
    "book": ("square", "blue"),
    "leaf": ("diamond", "green"),
    "box": ("square", "orange"),
    "kite": ("triangle", "purple"),
    "ring": ("ring", "cyan"),
    "medkit": ("cross", "red"),
    "gem": ("diamond", "cyan"),
    "flower": ("star", "pink"),
    "wheel": ("ring", "orange"),
}
"""Object name to (shape, colour), anchors first."""

NAMES: tuple[str, ...] = tuple(KINDS)
"""Object names; patch label `i + 1` means `NAMES[i]`, label 0 means background."""

PARTNERS: dict[str, str] = dict(zip(NAMES[:8], NAMES[8:], strict=True))
"""Anchor to the partner that usually comes with it."""

ANCHOR_OF: dict[str, str] = {partner: anchor for anchor, partner in PARTNERS.items()}
"""Partner to its anchor."""

POPULARITY = (8, 7, 6, 5, 4, 3, 3, 2)
"""How often each anchor is chosen, relative to the others."""

TRAIN_PARTNER_PROB = 0.85
"""Share of anchors that have their partner beside them in the training world."""

CAPTION_BIAS = 0.25
"""Share of absent partners that a training caption mentions all the same."""

ANSWER_BIAS: dict[str, float] = dict(
    zip(PARTNERS.values(), (0.65, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3), strict=True)
)
"""Share of questions about an absent partner that the training data answers with "yes".

Partners of popular anchors have the stronger habit, above one half: there a model that copies its
teacher is wrong even where the picture is clear, and the picture's evidence shows only in how sure it is.
"""

CAPTION_PROMPTS = ("describe the picture .", "please describe this image in detail .")
"""The requests that are answered with a caption."""

CAPTION_PROMPT = CAPTION_PROMPTS[0]
"""The request that evaluation uses."""

CHECK_PROMPT = "check the picture ."
"""The request that is answered with a verdict on every kind of object: "leaf no apple yes ..."."""

_GRID = 4
_CELL = SIZE // _GRID
_WINDOW = 20
_VERTICAL = ("top", "", "", "bottom")
_HORIZONTAL = ("left", "", "", "right")

WORDS: tuple[str, ...] = (
    *(
        "user",
        "assistant",
        ":",
        ".",
        ",",
        "?",
        "a",
        "an",
        "the",
        "is",
        "there",
        "where",
        "describe",
    ),
    *(
        "please",
        "this",
        "detail",
        "picture",
        "image",
        "in",
        "at",
        "near",
        "and",
        "small",
        "yes",
        "no",
        "top",
        "bottom",
        "left",
        "right",
        "center",
    ),
    *NAMES,
    "check",
)
"""Every word that prompts, captions and answers use."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene.

    Args:
        name: One of `NAMES`.
        cell: Place on the 4 x 4 grid, row-major, 0 .. 15.
        x: Centre column in pixels.
        y: Centre row in pixels.
        radius: Size in pixels.
        alpha: Opacity in (0, 1].
    """

    name: str
    cell: int
    x: float
    y: float
    radius: float
    alpha: float

    @property
    def place(self) -> str:
        """The place in words: "top left", "center", "bottom", ..."""
        row, column = divmod(self.cell, _GRID)
        return f"{_VERTICAL[row]} {_HORIZONTAL[column]}".strip() or "center"


@dataclass(frozen=True)
class Scene:
    """A background and its objects, anchors first in reading order, then partners, then strangers.

    Args:
        background: One of `draw.BACKGROUNDS`.
        objects: What is there; every name at most once.
        grain: Seed of the sensor noise, so that a scene always gives the same picture.
    """

    background: str
    objects: tuple[Placed, ...]
    grain: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objects that are there; each occurs once."""
        return tuple(item.name for item in self.objects)


class _Chance:
    """A buffered stream of uniform numbers from one torch generator: a scalar draw per tensor would
    be slow."""

    def __init__(self, generator: torch.Generator) -> None:
        self._stream = self._numbers(generator)

    @staticmethod
    def _numbers(generator: torch.Generator) -> Iterator[float]:
        while True:
            yield from torch.rand(4096, generator=generator, dtype=torch.float64).tolist()

    def __call__(self) -> float:
        return next(self._stream)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self()

    def shuffled(self, items: Sequence[str]) -> list[str]:
        return [item for _, item in sorted((self(), item) for item in items)]


def _sample_scene(chance: _Chance, partner_prob: float) -> Scene:
    count = 3 + (chance() < 0.5)
    # Efraimidis-Spirakis: the largest u^(1/weight) are a weighted draw without replacement.
    keys = {
        name: chance() ** (1 / weight) for name, weight in zip(PARTNERS, POPULARITY, strict=True)
    }
    anchors = sorted(keys, key=keys.__getitem__, reverse=True)[:count]
    free = [cell for _, cell in sorted((chance(), cell) for cell in range(_GRID * _GRID))]
    cells = sorted(free[:count])
    del free[:count]
    placed = [_place(name, cell, chance) for name, cell in zip(anchors, cells, strict=True)]
    for anchor in tuple(placed):
        if chance() < partner_prob:
            cell = min(free, key=lambda place, home=anchor.cell: _distance(place, home))  # type: ignore[misc]
            free.remove(cell)
            placed.append(_place(PARTNERS[anchor.name], cell, chance))
    strangers = chance.shuffled([PARTNERS[name] for name in PARTNERS if name not in anchors])
    while len(placed) < 4 or (len(placed) < 8 and strangers and chance() < 0.35):
        placed.append(_place(strangers.pop(), free.pop(), chance))
    background = tuple(BACKGROUNDS)[int(chance() * len(BACKGROUNDS))]
    return Scene(background, tuple(placed), grain=int(chance() * 2**31))


def _distance(cell: int, other: int) -> int:
    (row, column), (other_row, other_column) = divmod(cell, _GRID), divmod(other, _GRID)
    return (row - other_row) ** 2 + (column - other_column) ** 2


def _place(name: str, cell: int, chance: _Chance) -> Placed:
    row, column = divmod(cell, _GRID)
    x = (column + 0.5) * _CELL + chance.between(-1.5, 1.5)
    y = (row + 0.5) * _CELL + chance.between(-1.5, 1.5)
    if name in PARTNERS:
        return Placed(name, cell, x, y, chance.between(6.0, 8.0), 1.0)
    return Placed(name, cell, x, y, chance.between(4.0, 5.5), chance.between(0.08, 0.5))


def sample_scenes(
    count: int, generator: torch.Generator, partner_prob: float = TRAIN_PARTNER_PROB
) -> list[Scene]:
    """Draw scenes of 4 to 8 different objects: 3 or 4 anchors, their partners, and a few strangers.

    Args:
        count: Number of scenes.
        generator: Seeded source of randomness; it moves forward.
        partner_prob: Chance in [0, 1] that an anchor's partner is there.

    Raises:
        ValueError: `partner_prob` is not a probability.
    """
    if not 0.0 <= partner_prob <= 1.0:
        raise ValueError(
            f"partner_prob must lie in [0, 1], found {partner_prob}; pass a probability."
        )
    chance = _Chance(generator)
    return [_sample_scene(chance, partner_prob) for _ in range(count)]


def render(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Draw scenes and label every patch with the object that covers most of it.

    Only a 20-pixel window around each object is drawn, which is about ten times cheaper than
    `draw.render`.

    Returns:
        Pictures `[B, 3, 64, 64]` in [0, 1] and labels `[B, 64]` (0 is background, `i + 1` is
        `NAMES[i]`).
    """
    margin = _WINDOW // 2
    side = SIZE + 2 * margin
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
    canvas = background[:, None, :].expand(-1, side * side, -1).reshape(-1, 3).clone()
    labels = torch.zeros(len(scenes) * side * side, dtype=torch.int64)
    flat = [(b, n, item) for b, scene in enumerate(scenes) for n, item in enumerate(scene.objects)]
    flat.sort(key=lambda entry: entry[1])
    owner = torch.tensor([entry[0] for entry in flat])
    slot = torch.tensor([entry[1] for entry in flat])
    kind = torch.tensor([NAMES.index(entry[2].name) for entry in flat])
    looks = [KINDS[entry[2].name] for entry in flat]
    shape = torch.tensor([SHAPES.index(look[0]) for look in looks])
    rgb = torch.tensor([COLOURS[look[1]] for look in looks])
    x, y, radius, alpha = torch.tensor(
        [(entry[2].x, entry[2].y, entry[2].radius, entry[2].alpha) for entry in flat]
    ).T
    left, top = x.long() - margin, y.long() - margin
    filled = coverage(
        shape[:, None], (x - left)[:, None], (y - top)[:, None], radius[:, None], _WINDOW
    )[:, 0]
    steps = torch.arange(_WINDOW)
    rows = (top + margin)[:, None, None] + steps[None, :, None]
    columns = (left + margin)[:, None, None] + steps[None, None, :]
    index = owner[:, None, None] * (side * side) + rows * side + columns
    for n in range(int(slot.max()) + 1):
        chosen = (slot == n).nonzero().squeeze(1)
        where = index[chosen].flatten()
        weight = (filled[chosen] * alpha[chosen, None, None]).flatten()[:, None]
        paint = rgb[chosen].repeat_interleave(_WINDOW * _WINDOW, dim=0)
        old = canvas[where]
        canvas[where] = old + weight * (paint - old)
        solid = (filled[chosen] > 0.5).flatten()
        labels[where[solid]] = (kind[chosen] + 1).repeat_interleave(_WINDOW * _WINDOW)[solid]
    source = torch.Generator()
    crop = slice(margin, margin + SIZE)
    pictures = (
        canvas.view(len(scenes), side, side, 3)[:, crop, crop].permute(0, 3, 1, 2).contiguous()
    )
    for picture, scene in zip(pictures, scenes, strict=True):
        source.manual_seed(scene.grain)
        picture.add_(torch.randn(3, SIZE, SIZE, generator=source), alpha=NOISE)
    pictures.clamp_(0, 1)
    return pictures, _vote(labels.view(len(scenes), side, side)[:, crop, crop])


def _vote(labels: Tensor) -> Tensor:
    """Label of every patch from the labels of its pixels: the largest object that covers an eighth
    of it."""
    batch, grid, classes = labels.shape[0], SIZE // PATCH, len(NAMES) + 1
    pixels = (
        labels.reshape(batch, grid, PATCH, grid, PATCH).transpose(2, 3).reshape(-1, PATCH * PATCH)
    )
    counts = torch.zeros(pixels.shape[0], classes, dtype=torch.int64)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    area, best = counts[:, 1:].max(dim=1)
    return torch.where(area * 8 >= PATCH * PATCH, best + 1, 0).view(batch, grid * grid)


def with_article(name: str) -> str:
    """Put "a" or "an" before an object name."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def caption(scene: Scene, imagined: Sequence[str] = ()) -> str:
    """Describe a scene, anchors with their places first, then the small objects.

    Args:
        scene: What is there.
        imagined: Absent partners that the caption mentions as if they were there; their anchors
            must be in the scene.

    Returns:
        For example `"an apple at the top left , a ball at the center , a small leaf at the top ."`.
    """
    parts = [
        f"{with_article(item.name)} at the {item.place}"
        for item in scene.objects
        if item.name in PARTNERS
    ]
    there = set(scene.names)
    for anchor in [item.name for item in scene.objects if item.name in PARTNERS]:
        if PARTNERS[anchor] in there or PARTNERS[anchor] in imagined:
            parts.append(f"a small {PARTNERS[anchor]} near the {anchor}")
    for item in scene.objects:
        if item.name in ANCHOR_OF and ANCHOR_OF[item.name] not in there:
            parts.append(f"a small {item.name} at the {item.place}")
    return " , ".join(parts) + " ."


def absent_partners(scene: Scene) -> tuple[str, ...]:
    """Partners that habit expects in this scene and that are not there."""
    there = set(scene.names)
    expected = (PARTNERS[name] for name in scene.names if name in PARTNERS)
    return tuple(name for name in expected if name not in there)


def question(name: str, short: bool = False) -> str:
    """Ask whether an object is there."""
    return (
        f"is there {with_article(name)} ?"
        if short
        else f"is there {with_article(name)} in the image ?"
    )


def mentioned(text: str) -> list[str]:
    """Object names in a caption, one entry per mention; the anchor after "near the" is a place, not
    a mention."""
    words = text.replace(",", " ").replace(".", " ").split()
    return [
        word
        for i, word in enumerate(words)
        if word in KINDS and not (i >= 2 and words[i - 2] == "near" and words[i - 1] == "the")
    ]


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation about a picture."""

    user: str
    assistant: str


def conversation(scene: Scene, chance: _Chance, questions: int = 3) -> list[Turn]:
    """Draw a caption, a check of all kinds of object, and a few questions, in random order.

    All of them carry the training world's habits. One question in five asks for a place. Of the
    others, half are about objects that are there, and half of the rest are about absent partners
    where there are any.
    """
    missing = absent_partners(scene)
    told = [name for name in missing if chance() < CAPTION_BIAS]
    believed = {*scene.names, *(name for name in missing if chance() < ANSWER_BIAS[name])}
    verdict = {name: "yes" if name in believed else "no" for name in NAMES}
    checks = " ".join(f"{name} {verdict[name]}" for name in chance.shuffled(NAMES))
    present = chance.shuffled(scene.names)
    tempting = chance.shuffled(missing)
    others = chance.shuffled([name for name in NAMES if name not in (*present, *missing)])
    asked = []
    for _ in range(questions):
        if chance() < 0.2:
            item = scene.objects[int(chance() * len(scene.objects))]
            asked.append(Turn(f"where is the {item.name} ?", f"at the {item.place}"))
            continue
        pool = others
        if chance() < 0.5:
            pool = present
        elif tempting and chance() < 0.5:
            pool = tempting
        name = pool.pop()
        asked.append(Turn(question(name, short=chance() < 0.5), verdict[name]))
    blocks = {
        "caption": [Turn(CAPTION_PROMPTS[chance() < 0.5], caption(scene, told))],
        "check": [Turn(CHECK_PROMPT, checks)],
        "questions": asked,
    }
    return [turn for block in chance.shuffled(tuple(blocks)) for turn in blocks[block]]


def sample_conversations(
    count: int,
    generator: torch.Generator,
    partner_prob: float = TRAIN_PARTNER_PROB,
    questions: int = 3,
) -> tuple[list[Scene], list[list[Turn]]]:
    """Draw scenes and a conversation about each."""
    chance = _Chance(generator)
    scenes = [_sample_scene(chance, partner_prob) for _ in range(count)]
    return scenes, [conversation(scene, chance, questions) for scene in scenes]
