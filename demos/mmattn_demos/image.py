"""Text to image: dense and with methods under one slider, with numbers, word maps and code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmattn.batch.writers import difference
from mmattn_demos import drawing, limits, parts, presets, snippets, words
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done

KIND = "t2i"
PROMPT = "a big red circle on the left on a white background"
REAL_PROMPT = "a lighthouse on a cliff at sunset, oil painting"


def asked(
    models: Models,
    prompt: str,
    method: str,
    seed: float,
    steps: float,
    guidance: float,
    width: float,
    height: float,
) -> drawing.Ask:
    """The request of a visitor, checked.

    Raises:
        ConfigError: for anything out of bounds.
    """
    count = limits.whole(steps, "the number of steps", 1, limits.STEPS)
    text = limits.prompt(prompt)
    column, number = presets.chosen(method, KIND), limits.seed(seed)
    scale = limits.guidance(guidance)
    size = limits.size(models.get(KIND), count, width, height)
    return drawing.Ask(text, column, number, count, scale, size)


def examples(seed: int) -> str:
    """A caption that the embedded model was trained to draw."""
    from mmattn.mini.scenes import make_scenes

    return make_scenes(1, 900_000 + seed)[0].caption


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    gr, models = ctx.gr, ctx.models
    embedded = models.embedded(KIND)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                PROMPT if embedded else REAL_PROMPT,
                label="Prompt",
                info="What to draw."
                + (" The embedded model knows shapes, colours and places." if embedded else ""),
                lines=2,
                max_length=limits.PROMPT_LENGTH,
                elem_id="image-prompt",
            )
            example = gr.Button("New example", size="sm", visible=embedded, elem_id="image-example")
            method = parts.recipe(ctx, KIND, "image", start=1)
            seed = parts.seeding(ctx, "image")
            with gr.Accordion("More settings", open=False):
                steps = parts.slider(
                    ctx, "image", "Steps", "Denoising steps.", 12 if embedded else 28, limits.STEPS
                )
                guidance = gr.Slider(
                    0, 20, 3.0, step=0.1, label="Guidance", info="How closely to follow the prompt."
                )
                with gr.Row(visible=not embedded):
                    sides = [
                        gr.Number(
                            512,
                            label=side,
                            info="Pixels, a multiple of 16.",
                            precision=0,
                            minimum=64,
                            maximum=limits.SIDE,
                            min_width=120,
                        )
                        for side in ("Width", "Height")
                    ]
            with gr.Row():
                run = gr.Button("Compare", variant="primary", elem_id="image-run", min_width=100)
                one = gr.Button("Draw", elem_id="image-one", min_width=100)
                stop = gr.Button("Cancel", variant="stop", elem_id="image-stop", min_width=100)
            status = gr.Markdown("Ready.", elem_classes=["status"], elem_id="image-status")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Compare"):
                gr.Markdown("Left of the line: dense. Right: the method.", elem_classes=["caption"])
                both = gr.ImageSlider(
                    label="dense | method",
                    show_label=False,
                    type="pil",
                    format="png",
                    interactive=False,
                    max_height=420,
                    buttons=["download", "fullscreen"],
                    elem_id="image-slider",
                    elem_classes=["pixel"],
                )
                gr.Markdown(
                    "Below, while it runs: a preview. Then the difference, × 5, or what was drawn alone.",
                    elem_classes=["caption"],
                )
                preview = parts.view(
                    ctx, "Preview", "image-preview", hard=True, height=240, show_label=False
                )
            with gr.Tab("Attention"):
                with gr.Row(elem_classes=["end"]):
                    word = gr.Textbox(
                        label="Word",
                        info="Of the prompt; empty takes one.",
                        max_length=limits.WORD_LENGTH,
                        elem_id="image-word",
                        scale=3,
                        min_width=140,
                    )
                    look = gr.Button("Show", elem_id="image-look", scale=0, min_width=100)
                found = gr.Markdown("Where the untouched model reads a word.")
                heat = parts.view(ctx, "Word map", "image-heat", height=400, show_label=False)
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "image")
            with gr.Tab("Code"):
                code = parts.codes(ctx, "image")

    inputs = [prompt, method.menu, seed, steps, guidance, *sides]

    def compare(request: Any, *values: Any) -> Iterator[list[Any]]:
        ask = asked(models, *values)
        loaded = models.get(KIND)
        for item in parts.follow(ctx, request, lambda tell: drawing.pair(loaded, ask, tell)):
            if not isinstance(item, Done):
                yield [gr.skip(), item.text, parts.preview(ctx, item), *[gr.skip()] * 7]
                continue
            runs = item.value
            dense, other = drawing.shown(runs[0].value), drawing.shown(runs[-1].value)
            gap = difference(other, dense)
            text = snippets.drawing(
                loaded, ask.column, ask.prompt, ask.seed, ask.steps, ask.guidance, ask.size
            )
            yield [
                (dense, other),
                drawing.summary(runs),
                gap,
                *numbers.show(drawing.numbers(runs), [run.stats for run in runs]),
                *code.show(text),
            ]

    def generate(request: Any, *values: Any) -> Iterator[list[Any]]:
        ask = asked(models, *values)
        loaded = models.get(KIND)

        def work(tell: Any) -> drawing.Run:
            return drawing.single(loaded, ask, tell, methods=True)

        for item in parts.follow(ctx, request, work):
            if not isinstance(item, Done):
                yield [parts.preview(ctx, item), item.text]
                continue
            picture = drawing.shown(item.value.value)
            yield [picture, drawing.summary([item.value])]

    def attention(request: Any, chosen: str, *values: Any) -> Iterator[list[Any]]:
        ask = asked(models, *values)
        loaded = models.get(KIND)

        def work(tell: Any) -> tuple[Any, str]:
            drawn: list[Any] = []
            maps = words.in_prompt(
                loaded, ask.prompt, chosen, lambda: drawn.append(drawing.again(loaded, ask))
            )
            return words.drawn(maps.mean, drawing.shown(drawn[0])), maps.word

        for item in parts.follow(ctx, request, work):
            if isinstance(item, Done):
                picture, word = item.value
                yield [
                    picture,
                    f"Where the untouched model reads **{word}**, all layers and steps.",
                ]

    outputs = [both, status, preview, *numbers, *code]
    events = [
        parts.job(ctx, run, compare, inputs=inputs, outputs=outputs, api_name="compare"),
        parts.job(
            ctx, one, generate, inputs=inputs, outputs=[preview, status], api_name="generate"
        ),
        parts.job(
            ctx,
            look,
            attention,
            inputs=[word, *inputs],
            outputs=[heat, found],
            api_visibility="private",
        ),
    ]
    parts.cancel(ctx, stop, events, status)
    parts.quick(example, lambda: examples(parts.roll()), prompt)


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    ctx = parts.context(models)
    with parts.page(ctx, "mmattn: image") as demo:
        ctx.gr.Markdown("# Text to image\nOne prompt, one seed: the untouched model and a method.")
        add(ctx)
    return demo


if __name__ == "__main__":
    parts.run_alone("image")
