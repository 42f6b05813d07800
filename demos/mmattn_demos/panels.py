"""Groups of controls that several pages have: settings of a drawing, run and cancel, the map of a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mmattn_demos import drawing, limits, parts, words
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done, Tell

SIDES = (("Width", 512), ("Height", 512))
PIXELS = "Pixels, a multiple of 16."


class Settings(NamedTuple):
    """What a drawing takes beside its prompt, in the order of `drawing.Ask`."""

    steps: Any
    guidance: Any
    sizes: list[Any]


def settings(
    ctx: parts.Context,
    name: str,
    kind: str,
    steps: int,
    sides: tuple[tuple[str, int], ...] = SIDES,
    frames: int | None = None,
) -> Settings:
    """Steps, guidance and, for models that are not embedded, sizes.

    Args:
        name: of the page.
        kind: of the model.
        steps: to begin with, for a model that is not embedded.
        sides: label and pixels to begin with.
        frames: of a clip to begin with; None for pictures.
    """
    gr, embedded = ctx.gr, ctx.models.embedded(kind)
    with gr.Accordion("More settings", open=False):
        count = parts.slider(
            ctx, name, "Steps", "Denoising steps.", 12 if embedded else steps, limits.STEPS
        )
        guidance = gr.Slider(
            0, 20, 3.0, step=0.1, label="Guidance", info="How closely to follow the prompt."
        )
        with gr.Row(visible=not embedded):
            numbers = [(label, PIXELS, value, 64, limits.SIDE) for label, value in sides]
            if frames is not None:
                info = "As the model wants, often 4 n + 1."
                numbers.append(("Frames", info, frames, 5, limits.FRAMES))
            sizes = [
                gr.Number(
                    value,
                    label=label,
                    info=info,
                    precision=0,
                    minimum=low,
                    maximum=high,
                    min_width=110,
                )
                for label, info, value, low, high in numbers
            ]
    return Settings(count, guidance, sizes)


class Running(NamedTuple):
    """The buttons under the controls, and the line that says how far a job is."""

    buttons: list[Any]
    stop: Any
    status: Any


def running(ctx: parts.Context, name: str, first: str, *more: str) -> Running:
    """Buttons and status line.

    Args:
        name: of the page.
        first: label of the main button.
        more: labels of others.
    """
    gr = ctx.gr
    with gr.Row():
        buttons = [gr.Button(first, variant="primary", elem_id=f"{name}-run", min_width=100)]
        buttons += [
            gr.Button(label, elem_id=f"{name}-{label.lower()}", min_width=100) for label in more
        ]
        stop = gr.Button("Cancel", variant="stop", elem_id=f"{name}-stop", min_width=100)
    return Running(buttons, stop, status(ctx, name))


def status(ctx: parts.Context, name: str) -> Any:
    """The line that says how far a job is."""
    return ctx.gr.Markdown(
        "Ready.", label="Status", elem_classes=["status"], elem_id=f"{name}-status"
    )


class WordMap(NamedTuple):
    """The map of a word."""

    word: Any
    look: Any
    found: Any
    heat: Any


def word_map(ctx: parts.Context, name: str, of: str, sentence: str, **view: Any) -> WordMap:
    """A word, a button, and where a model looks for it.

    Args:
        name: of the page.
        of: where the word is from.
        sentence: shown until there is a map.
        view: arguments of the picture.
    """
    gr = ctx.gr
    with gr.Row(elem_classes=["end"]):
        word = gr.Textbox(
            label="Word",
            info=f"Of the {of}; empty takes one.",
            max_length=limits.WORD_LENGTH,
            elem_id=f"{name}-word",
            scale=3,
            min_width=140,
        )
        look = gr.Button("Show", elem_id=f"{name}-look", scale=0, min_width=100)
    found = gr.Markdown(sentence, label="Word read")
    heat = parts.view(ctx, "Word map", f"{name}-heat", show_label=False, **view)
    return WordMap(word, look, found, heat)


def word_drawn(
    ctx: parts.Context,
    kind: str,
    shown: Callable[[Any], Any],
) -> Callable[..., Iterator[list[Any]]]:
    """The handler of a `word_map` of a prompt: the word's map on what the untouched model draws.

    Args:
        kind: of the model.
        shown: makes a drawn value into what maps are laid over.
    """

    def attention(request: Any, chosen: str, *values: Any) -> Iterator[list[Any]]:
        ask = drawing.asked(ctx.models, kind, *values)
        loaded = ctx.models.get(kind)

        def work(tell: Tell) -> tuple[Any, str]:
            drawn: list[Any] = []
            maps = words.in_prompt(
                loaded, ask.prompt, chosen, lambda: drawn.append(drawing.again(loaded, ask))
            )
            return words.drawn(maps.mean, shown(drawn[0])), maps.word

        for item in parts.follow(ctx, request, work):
            if isinstance(item, Done):
                picture, word = item.value
                yield [
                    picture,
                    f"Where the untouched model reads **{word}**, all layers and steps.",
                ]

    return attention


def alone(
    models: Models | None, title: str, heading: str, add: Callable[[parts.Context], None]
) -> Any:
    """A page by itself.

    Args:
        models: the models; None takes the embedded ones.
        title: of the window.
        heading: two lines above the page.
        add: puts the page into the current blocks.
    """
    ctx = parts.context(models)
    with parts.page(ctx, f"mmattn: {title}") as demo:
        ctx.gr.Markdown(f"# {heading}")
        add(ctx)
    return demo
