"""Sets of related pictures: checks, drawing, and the code that repeats it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.in_context import InContextOutput, InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

from mmattn.batch.writers import to_image
from mmattn.calls import T2I_SIZE, TEXT_LENGTH, draw, guiding
from mmattn.errors import ConfigError
from mmattn.loading import Loaded
from mmattn_demos import drawing, limits
from mmattn_demos.models import Models
from mmattn_demos.previews import preview
from mmattn_demos.snippets import Snippets, resolving
from mmattn_demos.streaming import Tell, Update
from mmattn_demos.uploads import read_picture

KIND = "t2i"
WAYS = ("batch", "canvas")
SEEN = ("group", "full", "isolated", "reference-blocked")
ALONE = "isolated"
PANELS = 4


@dataclass(frozen=True)
class SetAsk:
    """A set that a visitor asked for, checked.

    Args:
        clauses: one per picture; those of given pictures first.
        shared: what all have in common; may be empty.
        way: ``canvas``: panels of one picture; ``batch``: separate pictures whose images attend to each
            other.
        visibility: which pictures see which.
        references: given pictures, for the first places.
    """

    clauses: tuple[str, ...]
    shared: str
    way: str
    visibility: str
    references: tuple[Image.Image, ...]
    side: int
    seed: int
    steps: int
    guidance: float


def asked(
    models: Models,
    clauses: str,
    shared: str,
    way: str,
    visibility: str,
    files: Sequence[str | Path] | None,
    seed: float,
    steps: float,
    guidance: float,
) -> SetAsk:
    """The request of a visitor, checked.

    Raises:
        ConfigError: for anything out of bounds.
    """
    count = limits.whole(steps, "the number of steps", 1, limits.STEPS)
    lines = limits.short_enough(clauses, "the captions", limits.PROMPT_LENGTH).splitlines()
    each = tuple(line.strip() for line in lines if line.strip())
    limits.few(files)
    given = tuple(read_picture(file) for file in files or ())
    if not 2 <= len(each) <= PANELS or len(given) >= len(each):
        raise ConfigError(
            f"a set has 2 to {PANELS} captions, one per line, and fewer pictures than captions; got "
            f"{len(each)} captions and {len(given)} pictures"
        )
    if way not in WAYS or visibility not in SEEN:
        raise ConfigError(f"choose one of {WAYS} and one of {SEEN}; got {way!r}, {visibility!r}")
    if visibility == "reference-blocked" and not given:
        raise ConfigError("reference-blocked needs a given picture; upload one, or choose group")
    loaded = models.get(KIND)
    if (
        way == "canvas"
        and visibility != "full"
        and not InContextPipeline(loaded.target).reads_panels
    ):
        raise ConfigError(
            f"{type(loaded.target).__name__} reads one text for a whole canvas, so that every picture sees "
            "the others; choose full"
        )
    side = T2I_SIZE if loaded.embedded else 512
    return SetAsk(
        each,
        limits.short_enough(shared, "the shared caption", limits.PROMPT_LENGTH),
        way,
        visibility,
        given,
        side,
        limits.seed(seed),
        count,
        limits.guidance(guidance),
    )


def captions(ask: SetAsk) -> list[str]:
    """A whole caption for every picture."""
    return [f"{ask.shared}, {clause}" if ask.shared else clause for clause in ask.clauses]


def layout(ask: SetAsk) -> PanelLayout:
    """The panels of a canvas."""
    return PanelLayout.auto(len(ask.clauses), ask.side, ask.side)


def extra(loaded: Loaded, ask: SetAsk) -> dict[str, Any]:
    """Arguments of the pipeline beyond those of a set."""
    if loaded.embedded:
        return {
            **guiding(loaded, ask.guidance),
            "max_sequence_length": TEXT_LENGTH,
        }
    return guiding(loaded, ask.guidance)


def text_of(loaded: Loaded, ask: SetAsk, visibility: str) -> SetCaption | list[str]:
    """The caption of a canvas. The embedded model reads 16 words, so every panel gets its own."""
    if loaded.embedded or visibility != "full":
        return captions(ask)
    return SetCaption.for_layout(layout(ask), "IMAGE-SET", ask.shared, ask.clauses)


@torch.no_grad()
def draw_set(loaded: Loaded, ask: SetAsk, visibility: str, watch: Any = None) -> Any:
    """Draw the set once; returns the pipeline's output."""
    pipe = InContextPipeline(loaded.target)
    common: dict[str, Any] = {
        "references": list(ask.references),
        "visibility": visibility,
        "num_inference_steps": ask.steps,
        "generator": torch.Generator().manual_seed(ask.seed),
        "callback_on_step_end": watch,
        **extra(loaded, ask),
    }
    if ask.way == "batch":
        return pipe.group(captions(ask), size=(ask.side, ask.side), **common)
    return pipe(text_of(loaded, ask, visibility), layout=layout(ask), **common)


def one_by_one(loaded: Loaded, ask: SetAsk) -> InContextOutput:
    """Every picture by a call of its own, for pipelines that read one text per canvas."""
    texts, given = captions(ask), list(ask.references)
    drawn = [
        draw(
            loaded,
            [text],
            [ask.seed],
            steps=ask.steps,
            guidance=ask.guidance,
            width=ask.side,
            height=ask.side,
        )[0]
        for text in texts[len(given) :]
    ]
    return InContextOutput([*given, *map(to_image, drawn)])


def work(loaded: Loaded, ask: SetAsk, tell: Tell) -> list[tuple[str, Any, float]]:
    """Every picture alone, and the set: (visibility, output, seconds without previews)."""
    found = []
    for visibility in dict.fromkeys((ALONE, ask.visibility)):
        watch = _Watch(ask, visibility, tell)
        start = time.perf_counter()
        if (
            visibility == ALONE
            and ask.way == "canvas"
            and not InContextPipeline(loaded.target).reads_panels
        ):
            output: Any = one_by_one(loaded, ask)
        else:
            output = draw_set(loaded, ask, visibility, watch)
        found.append((visibility, output, time.perf_counter() - start - watch.spent))
    return found


class _Watch:
    """The step callback: tells, decodes a preview now and then, and keeps its own time."""

    def __init__(self, ask: SetAsk, visibility: str, tell: Tell) -> None:
        self.ask, self.visibility, self.tell, self.spent = ask, visibility, tell, 0.0

    def __call__(
        self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        start, ask = time.perf_counter(), self.ask
        picture = None
        if (step + 1) % max(1, ask.steps // 5) == 0 and step + 1 < ask.steps:
            size = (ask.side, ask.side)
            if ask.way == "canvas":
                size = (layout(ask).height, layout(ask).width)
            picture = preview(pipe, values["latents"], size)
        self.tell(Update(f"{self.visibility}: step {step + 1} of {ask.steps}", picture))
        self.spent += time.perf_counter() - start
        return {}


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, with a gap."""
    views = [drawing.shown(image, 256) for image in images]
    gap = 8
    wide = sum(view.width for view in views) + gap * (len(views) - 1)
    paper = Image.new("RGB", (wide, max(view.height for view in views)), (148, 163, 184))
    left = 0
    for view in views:
        paper.paste(view, (left, 0))
        left += view.width + gap
    return paper


def snippet(loaded: Loaded, ask: SetAsk) -> Snippets:
    """Python that draws the set; given pictures are read from ``reference0.png`` and so on."""
    lines = ["import torch"]
    if ask.references:
        lines.append("from PIL import Image")
    lines += ["from mmattn.loading import resolve"]
    text = text_of(loaded, ask, ask.visibility)
    canvas = ask.way == "canvas"
    if canvas and isinstance(text, SetCaption):
        lines.append("from mmattn_pipelines.captions import SetCaption")
    lines.append("from mmattn_pipelines.in_context import InContextPipeline")
    if canvas:
        lines.append("from mmattn_pipelines.panels import PanelLayout")
    lines += ["", f"model = {resolving(loaded)}"]
    place = layout(ask)
    if canvas and isinstance(text, SetCaption):
        lines += [f"captions = SetCaption({text.tag!r}, {text.overall!r}, {text.panels!r},"]
        lines += [f"    {text.markers!r})"]
    else:
        lines.append(f"captions = {captions(ask)!r}")
    if canvas:
        numbers = (place.rows, place.cols, place.panel_height, place.panel_width)
        lines.append(f"layout = PanelLayout{numbers!r}")
    names = ", ".join(f'Image.open("reference{i}.png")' for i in range(len(ask.references)))
    where = "layout=layout" if canvas else f"size=({ask.side}, {ask.side})"
    call = "InContextPipeline(model.target)" + ("" if canvas else ".group")
    lines += ["with torch.no_grad():", f"    result = {call}(", f"        captions, {where},"]
    lines.append(f"        references=[{names}], visibility={ask.visibility!r},")
    lines.append(f"        num_inference_steps={ask.steps},")
    lines.append(f"        generator=torch.Generator().manual_seed({ask.seed}),")
    lines += [f"        {key}={value!r}," for key, value in extra(loaded, ask).items()]
    lines += ["    ).images"]
    return Snippets("\n".join(lines) + "\n", "")
