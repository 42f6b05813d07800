"""Chat in the small language of the embedded text-to-image model.

```python
from mmattn_pipelines.chatdit import ChatDiT
from mmattn_pipelines.chatdit_scenes import EMBEDDED_PANEL, embedded

chat = ChatDiT(panel=EMBEDDED_PANEL, **embedded())
circle, square = chat.chat("Two pictures: a red circle; a blue square").images
(green,) = chat.chat("Make the second image green").images
```

The model reads the captions of `mmattn.mini.scenes` and nothing else. `scene_style` brings the clauses of a
plan into that language before they are drawn; `describe_scene` says in it what a picture shows. Neither is
needed with a model that reads English.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmattn import mini
from mmattn.calls import TEXT_LENGTH
from mmattn.errors import ConfigError
from mmattn.mini.draw import plural
from mmattn.mini.oracle import Found, look
from mmattn.mini.scenes import (
    COUNTS,
    POSITIONS,
    RELATIONS,
    SCENE_BACKGROUNDS,
    SCENE_COLOURS,
    SCENE_SHAPES,
)
from mmattn_pipelines.chatdit_drawing import GroupGenerator
from mmattn_pipelines.chatdit_rules import RulePlanner
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout

_SPELLINGS = {
    "grey": "gray",
    "centre": "center",
    "middle": "center",
    "large": "big",
    "little": "small",
}
_SINGULARS = {plural(shape): shape for shape in SCENE_SHAPES}
_COLOUR, _SHAPE = "|".join(SCENE_COLOURS), "|".join(SCENE_SHAPES)
_RELATION = re.compile(
    rf"\b(?P<c1>{_COLOUR}) (?P<s1>{_SHAPE}) (?:to the )?(?P<how>{'|'.join(RELATIONS)}) (?:an?|the) "
    rf"(?P<c2>{_COLOUR}) (?P<s2>{_SHAPE})\b"
)


EMBEDDED_PANEL = (64, 64)
"""Height and width in pixels of what the embedded model draws."""


def embedded(steps: int = 20) -> dict[str, Any]:
    """Arguments of `ChatDiT` and of `ChatDiT.load` for the embedded model and `RulePlanner`.

    The model was trained on single pictures of 64 x 64 and draws worse on canvases of several panels, and in
    groups whose pictures see each other (docs/chatdit.md has the numbers). So the pictures of a step are a
    group whose members do not see each other, and a given picture counts through its description.

    Args:
        steps: denoising steps.
    """
    pipe = InContextPipeline(mini.load("t2i"))
    return {
        "generator": GroupGenerator(pipe, visibility="isolated"),
        "planner": RulePlanner(describe_scene),
        "caption_style": scene_style,
        "options": {
            "num_inference_steps": steps,
            "true_cfg_scale": 3.0,
            "negative_prompt": "",
            "max_sequence_length": TEXT_LENGTH,
        },
    }


def scene_style(layout: PanelLayout, overall: str, panels: tuple[str, ...]) -> tuple[str, ...]:
    """A caption style for `ChatDiT`: for every panel its clause as `scene_caption` has it.

    What panels share is not said apart: every clause repeats it, and the model reads 16 tokens.

    Raises:
        ConfigError: a clause has no object of the model's world.
    """
    return tuple(map(scene_caption, panels))


def scene_caption(text: str) -> str:
    """The caption of the embedded model that says what a text says.

    Words the model does not know are left out. A later colour, shape, size, place, number or background
    takes the place of an earlier one, so that "a red circle on a white background, blue" is a blue circle.
    A missing background is white.

    Raises:
        ConfigError: no colour or no shape; or a change to one of two objects, whose words cannot be told
            apart.
    """
    words = [_SPELLINGS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]
    said = " ".join(words)
    background = _last(words, SCENE_BACKGROUNDS) or "white"
    if relations := list(_RELATION.finditer(said)):
        found = relations[-1]
        if re.search(rf"\b(?:{_COLOUR}|{_SHAPE})\b", said[found.end() :]):
            raise ConfigError(
                f"{text!r} changes one of two objects; say anew how both are to look, as in {found[0]!r}"
            )
        first, second = (_a(f"{found[f'c{i}']} {found[f's{i}']}") for i in (1, 2))
        return f"{first} {found['how']} {second} on a {background} background"
    colour = _last(words, SCENE_COLOURS)
    shape = _last([_SINGULARS.get(word, word) for word in words], SCENE_SHAPES)
    if colour is None or shape is None:
        lacks, known = ("colour", SCENE_COLOURS) if colour is None else ("shape", SCENE_SHAPES)
        raise ConfigError(
            f"{text!r} names no {lacks} that the embedded model knows; it draws {', '.join(known)}"
        )
    number = _last(words, (*COUNTS, "one"))
    if number in COUNTS:
        return f"{number} {colour} {plural(shape)} on a {background} background"
    size, position = _last(words, ("big", "small")), _last(words, POSITIONS)
    thing = _a(" ".join(filter(None, (size, colour, shape))))
    place = "" if position is None else f" {'in' if position == 'center' else 'on'} the {position}"
    return f"{thing}{place} on a {background} background"


def describe_scene(image: Image.Image) -> str:
    """What a picture of the embedded model's world shows, by measuring it; for `RulePlanner`.

    Raises:
        ConfigError: there is no object that the model knows.
    """
    pixels = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32) / 255
    sight = look(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    things = [thing for thing in sight.things if thing.shape is not None]
    if not things:
        raise ConfigError(
            "the given picture shows no object of the embedded model's world; describe it in `captions`"
        )
    names = [f"{thing.colour} {thing.shape}" for thing in things]
    behind = f"on a {sight.background} background"
    for word, number in COUNTS.items():
        if len(things) == number and len(set(names)) == 1:
            return f"{word} {things[0].colour} {plural(str(things[0].shape))} {behind}"
    if len(things) > 1:
        return f"{_a(names[0])} {_how(things[0], things[1])} {_a(names[1])} {behind}"
    position = min(
        POSITIONS,
        key=lambda at: (
            (POSITIONS[at][0] - things[0].cx) ** 2 + (POSITIONS[at][1] - things[0].cy) ** 2
        ),
    )
    size = "big" if things[0].radius > 11.75 else "small"
    place = f"{'in' if position == 'center' else 'on'} the {position}"
    return f"{_a(f'{size} {names[0]}')} {place} {behind}"


def _how(first: Found, second: Found) -> str:
    dx, dy = first.cx - second.cx, first.cy - second.cy
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _last(words: Sequence[str], known: Collection[str]) -> str | None:
    return next((word for word in reversed(words) if word in known), None)
