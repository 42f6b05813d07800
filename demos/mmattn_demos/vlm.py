"""Picture to words: one question to the untouched model and to a method, with what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from PIL import Image

from mmattn.compare.answers import mark
from mmattn.errors import ConfigError
from mmattn.loading import Loaded
from mmattn_demos import (
    answering,
    drawing,
    limits,
    panels,
    parts,
    pictures,
    presets,
    snippets,
    words,
)
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done

KIND = "vlm"
QUESTION = "describe the picture ."
NEW_TOKENS = 96


def needed(picture: Image.Image | None) -> Image.Image:
    """The picture.

    Raises:
        ConfigError: when there is none.
    """
    if picture is None:
        raise ConfigError("there is no picture; upload one, or press “New scene”")
    return picture


def card(label: str, text: str, there: str, embedded: bool) -> str:
    """An answer as HTML; of the embedded model with its objects marked where the scene is known."""
    known = tuple(name for name in there.replace(",", " ").split() if name)
    body = escape(text) or "<i>(silence)</i>"
    if embedded and known:
        marked, missed = mark(text, known)
        body = marked + (f"<br>left out:{missed}" if missed else "")
    return f'<div class="answer"><h4>{escape(label)}</h4><p>{body}</p></div>'


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    gr, models = ctx.gr, ctx.models
    embedded = models.embedded(KIND)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = parts.upload(ctx, "Picture", "vlm-picture")
            new = gr.Button("New scene", size="sm", elem_id="vlm-example")
            there = gr.Textbox(
                label="Really there",
                info="Objects of the scene; marks right and invented words. Leave it empty for photos.",
                max_length=limits.METHOD_LENGTH,
                elem_id="vlm-there",
                visible=embedded,
            )
            question = gr.Textbox(
                QUESTION if embedded else "Describe the picture.",
                label="Question",
                info="Greedy answer, no sampling."
                + (" Or: is there a leaf in the picture ?" if embedded else ""),
                max_length=limits.PROMPT_LENGTH,
                elem_id="vlm-question",
            )
            method = parts.recipe(ctx, KIND, "vlm", start=0)
            seed = parts.seeding(ctx, "vlm")
            with gr.Accordion("More settings", open=False):
                length = gr.Slider(
                    1,
                    limits.NEW_TOKENS,
                    NEW_TOKENS,
                    step=1,
                    label="New tokens",
                    info="Longest answer.",
                )
            (run,), stop, status = panels.running(ctx, "vlm", "Ask")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Answers"):
                said = gr.HTML("<p>Ask something.</p>", label="Answers", elem_id="vlm-answers")
                gr.Markdown(
                    "Image tokens that the method kept, if it drops any; the others are dimmed.",
                    elem_classes=["caption"],
                )
                kept = parts.view(ctx, "Kept tokens", "vlm-kept", show_label=False, height=400)
            with gr.Tab("Attention"):
                look = panels.word_map(
                    ctx,
                    "vlm",
                    "dense answer",
                    "Where the untouched model looked when it wrote a word.",
                    height=400,
                )
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "vlm")
            with gr.Tab("Code"):
                gr.Markdown("Save the picture as `picture.png` first (its download button).")
                code = parts.codes(ctx, "vlm")
    texts = [gr.Textbox(visible=False, label=label) for label in ("Dense answer", "Answer")]

    def ask(
        request: Any,
        image: Image.Image | None,
        question: str,
        method: str,
        seed: float,
        new_tokens: float,
        objects: str,
    ) -> Iterator[list[Any]]:
        shown = needed(image)
        asked, column = limits.prompt(question), presets.chosen(method, KIND)
        count = limits.whole(new_tokens, "the number of new tokens", 1, limits.NEW_TOKENS)
        start = limits.seed(seed)
        known = limits.short_enough(objects, "the list of objects", limits.METHOD_LENGTH)
        loaded = models.get(KIND)

        def work(tell: Any) -> list[answering.Said]:
            return answering.ask(loaded, shown, asked, column, start, count, tell)

        for item in parts.follow(ctx, request, work):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), gr.skip(), gr.skip(), item.text, *[gr.skip()] * 7]
                continue
            both = item.value
            cards = "".join(card(s.label, s.text, known, loaded.embedded) for s in both)
            yield [
                both[0].text,
                both[-1].text,
                cards,
                both[-1].overlay,
                _summary(both),
                *numbers.show(answering.numbers(both), [s.stats for s in both]),
                *code.show(snippets.answering(loaded, column, asked, start, count)),
            ]

    def attention(
        request: Any, image: Image.Image | None, asked: str, chosen: str
    ) -> Iterator[list[Any]]:
        shown, asked = needed(image), limits.prompt(asked)
        loaded = models.get(KIND)
        for item in parts.follow(ctx, request, lambda tell: word_map(loaded, shown, asked, chosen)):
            if isinstance(item, Done):
                maps, said_text = item.value
                yield [
                    words.drawn(maps.mean, drawing.shown(shown)),
                    f"Where the untouched model looked when it wrote **{maps.word}** in “{said_text}”.",
                ]

    outputs = [*texts, said, kept, status, *numbers, *code]
    inputs = [picture, question, method.menu, seed, length, there]
    events = [
        parts.job(ctx, run, ask, inputs=inputs, outputs=outputs, api_name="vlm_answer"),
        parts.job(
            ctx,
            look.look,
            attention,
            inputs=[picture, question, look.word],
            outputs=[look.heat, look.found],
            api_visibility="private",
        ),
    ]
    parts.cancel(ctx, stop, events, status)

    def draw() -> list[Any]:
        image, names = pictures.scene(parts.roll())
        return [image, ", ".join(names)]

    parts.quick(new, draw, [picture, there])


def word_map(
    loaded: Loaded, picture: Image.Image, question: str, word: str | None
) -> tuple[words.WordMaps, str]:
    """The map of a word of the dense answer, and the answer."""
    from mmattn.calls import answer

    text = answer(loaded, [picture], [question], max_new_tokens=NEW_TOKENS)[0]
    return words.in_answer(loaded, picture, question, text, word), text


def _summary(both: list[answering.Said]) -> str:
    rows = answering.numbers(both)
    lines = []
    for one, row in zip(both, rows, strict=True):
        kept = "" if row["tokens"] is None else f", {row['tokens']} image tokens"
        lines.append(f"{one.label}: {one.seconds:.2f} s{kept}")
    return "; ".join(lines) + "."


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    heading = "Picture to words\nOne question: the untouched model's answer and a method's."
    return panels.alone(models, "vision and language", heading, add)


if __name__ == "__main__":
    parts.run_alone("vlm")
