"""What a chat about pictures plans before it draws: which pictures are given, made and seen by which canvas.

The rules are those of "ChatDiT: A Training-Free Baseline for Task-Agnostic Free-Form Chatting with
Diffusion Transformers", arXiv 2412.12571. Nothing here knows a model.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from PIL import Image

from mmattn.errors import ConfigError, MmattnError

MAX_PANELS = 12
"""Panels that one canvas has at most, given ones included."""

_UP_TO_TWELVE = "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE"
NUMBER_WORDS: tuple[str, ...] = tuple(_UP_TO_TWELVE.split())
"""Names of the panel counts, ``ONE`` first."""


class ContractError(MmattnError):
    """A plan, or the reply of a language model, breaks its form; the message names the field."""


class PlannerError(MmattnError):
    """A planner cannot make a plan of a message; the message says why and what to write or do instead."""


@dataclass(frozen=True)
class Picture:
    """One picture of a conversation.

    Args:
        number: its place in the conversation, from 1.
        name: unique in the conversation and safe as the stem of a file.
        description: what it shows, or what it was drawn from; empty if nobody said.
        drawn: False if the user gave it.
        round: the round it came in, from 1.
        image: in RGB.
    """

    number: int
    name: str
    description: str
    drawn: bool
    round: int
    image: Image.Image = field(repr=False, compare=False)


@dataclass(frozen=True)
class ChatRequest:
    """One message of the user.

    Args:
        text: what was written.
        given: pictures that came with it; they are in the conversation already.
        article: an illustrated article is wanted, whatever the text says.

    Raises:
        ConfigError: the text is empty.
    """

    text: str
    given: tuple[Picture, ...] = ()
    article: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty message."""
        if not self.text.strip():
            raise ConfigError("the message is empty; say what to draw")


@dataclass(frozen=True)
class Described:
    """A picture of a plan: its identifier, such as ``output_0001_red-circle``, and what it shows."""

    image_id: str
    description: str


@dataclass(frozen=True)
class Group:
    """Pictures on one canvas, as indices into the inputs followed by the outputs of a plan."""

    references: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One canvas: its pictures, what they share, and a clause for every panel, given ones first."""

    group: Group
    overall: str
    panels: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first canvas is drawn.

    Args:
        instruction: the message.
        sources: numbers, in the conversation, of the pictures that serve as inputs.
        inputs: identifier and description of every input, in the order of `sources`.
        outputs: identifier and description of every picture to draw, in order.
        steps: the canvases, in order.
        article: whether an illustrated article is to be written around the pictures.

    Raises:
        ContractError: a picture is drawn twice, never, or out of order; a canvas sees a picture that is
            not there yet, or has more than `MAX_PANELS` panels; a panel has no clause.
    """

    instruction: str
    sources: tuple[int, ...]
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    steps: tuple[Step, ...]
    article: bool = False

    def __post_init__(self) -> None:
        """Check that the canvases draw every output once, in order, from what is there by then."""
        first = len(self.inputs)
        if len(self.sources) != first:
            raise ContractError(f"the plan has {len(self.sources)} sources and {first} inputs")
        for place, item in enumerate(self.inputs + self.outputs):
            if not item.description:
                raise ContractError(
                    f"the description of {item.image_id} is empty (picture {place})"
                )
        drawn = [index for step in self.steps for index in step.group.outputs]
        wanted = list(range(first, first + len(self.outputs)))
        if drawn != wanted:
            raise ContractError(
                f"the steps must draw the pictures {wanted} once and in this order, they draw {drawn}"
            )
        for number, step in enumerate(self.steps, 1):
            count = len(step.group.references) + len(step.group.outputs)
            if late := [i for i in step.group.references if not 0 <= i < step.group.outputs[0]]:
                raise ContractError(
                    f"step {number} draws picture {step.group.outputs[0]} and sees {late}, which is not "
                    "there before it"
                )
            if count > MAX_PANELS or count != len(step.panels) or not all(step.panels):
                raise ContractError(
                    f"step {number} has {count} pictures and {sum(map(bool, step.panels))} clauses; every "
                    f"picture needs one, and a canvas has at most {MAX_PANELS}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON: ``parsing`` and ``strategy`` in the form that ChatDiT's agents exchange."""
        return {
            "instruction": self.instruction,
            "sources": list(self.sources),
            "article": self.article,
            "parsing": {
                "input_image_count": len(self.inputs),
                "output_image_count": len(self.outputs),
                "descriptions": {
                    "input_images": [vars(item) for item in self.inputs],
                    "output_images": [vars(item) for item in self.outputs],
                },
            },
            "strategy": {
                "steps": [
                    {
                        "prompt": {"overall": step.overall, "panels": list(step.panels)},
                        "images": list(step.group.references),
                        "num_outputs": len(step.group.outputs),
                    }
                    for step in self.steps
                ]
            },
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The plan that `to_dict` wrote.

        Raises:
            ContractError: a key is missing, or the plan is not sound.
        """
        try:
            images = data["parsing"]["descriptions"]
            inputs, outputs = (
                tuple(Described(**item) for item in images[key])
                for key in ("input_images", "output_images")
            )
            steps, at = [], len(inputs)
            for entry in data["strategy"]["steps"]:
                end = at + entry["num_outputs"]
                group = Group(tuple(entry["images"]), tuple(range(at, end)))
                prompt = entry["prompt"]
                steps.append(Step(group, prompt["overall"], tuple(prompt["panels"])))
                at = end
            sources, article = tuple(data["sources"]), data["article"]
            return cls(data["instruction"], sources, inputs, outputs, tuple(steps), article)
        except (KeyError, TypeError) as error:
            raise ContractError(f"the saved plan is incomplete: {error!r}") from error


class Planner(Protocol):
    """What turns messages into plans, and plans into articles."""

    def plan(self, request: ChatRequest, memory: Sequence[Picture]) -> Plan:
        """Decide what to draw.

        Args:
            memory: the pictures of the conversation before this message, in order.

        Raises:
            PlannerError: the planner cannot make a plan of this message.
        """
        ...

    def write(self, plan: Plan) -> str:
        """Markdown around the outputs of a plan, each shown as ``![text](<image_id>.png)``."""
        ...


def groups(inputs: int, outputs: int, *, each: bool = False) -> tuple[Group, ...]:
    """Which pictures share a canvas, from how many are given and how many are wanted.

    Without inputs up to four outputs are drawn together, and every later one from the first three. One
    input and one output share a canvas. From one input, outputs are drawn one after the other, each from
    the input and all outputs before it. From several inputs, every output is drawn from all of them and
    does not see the other outputs. These are ChatDiT's rules.

    Deviations: a canvas has at most `MAX_PANELS` panels, where ChatDiT stops with an error; a sequence
    then keeps its input and the latest outputs, and of twelve inputs and more the first eleven are seen.
    With `each`, outputs are drawn from one input each: the first share from the first input, and so on.

    Args:
        inputs: pictures that are given, at least 0.
        outputs: pictures to draw, at least 1; indices of outputs begin at `inputs`.
        each: as many outputs for every input.

    Raises:
        ConfigError: no output; or `each` with outputs that do not divide among the inputs.
    """
    if inputs < 0 or outputs < 1:
        raise ConfigError(
            f"a plan draws at least one picture, got {inputs} inputs, {outputs} outputs"
        )
    if each and (inputs == 0 or outputs % inputs):
        raise ConfigError(f"{outputs} outputs do not divide among {inputs} inputs")
    wanted = range(inputs, inputs + outputs)
    if each:
        share = outputs // inputs
        return tuple(Group((i // share,), (index,)) for i, index in enumerate(wanted))
    if inputs == 0:
        later = tuple(Group((0, 1, 2), (index,)) for index in wanted[4:])
        return Group((), tuple(wanted[:4])), *later
    if inputs == 1:
        room = MAX_PANELS - 2
        return tuple(Group((0, *wanted[: index - 1][-room:]), (index,)) for index in wanted)
    return tuple(Group(tuple(range(inputs))[: MAX_PANELS - 1], (index,)) for index in wanted)


def panel_size(panels: int, aspect: float = 1.0) -> tuple[int, int]:
    """Height and width in pixels of a panel: a megapixel alone, two megapixels for a whole canvas.

    Args:
        panels: panels of the canvas, 1 to `MAX_PANELS`.
        aspect: width over height, above 0.

    Returns:
        Multiples of 64.
    """
    area = 2**20 if panels == 1 else 2**21 / panels
    height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
    return max(64, int(height) // 64 * 64), max(64, int(width) // 64 * 64)


def median_aspect(images: Sequence[Image.Image]) -> float:
    """Width over height of the middle one of the pictures, 1 if there are none."""
    logs = [math.log2(image.width / image.height) for image in images]
    return 2.0 ** statistics.median(logs) if logs else 1.0


def slug(text: str, words: int = 4) -> str:
    """The first words of a text in lower case, joined by hyphens; safe in names of files and in links."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    kept = [word[:24] for word in found if word not in _SMALL][:words]
    return "-".join(kept) or "picture"


_SMALL = ("a", "an", "the", "of", "on", "in", "at", "to", "and", "with", "is", "are")


def image_id(kind: str, number: int, text: str) -> str:
    """``input_0001_red-circle``: kind, place from 1, and the first words of a text."""
    return f"{kind}_{number:04d}_{slug(text)}"
