"""Text to image: dense and with methods under one slider, with numbers, word maps and code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmattn.batch.writers import difference
from mmattn_demos import drawing, limits, panels, parts, snippets
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done

KIND = "t2i"
PROMPT = "a blue ring below a green square on a white background"
INPUTS = ("prompt", "method", "seed", "steps", "guidance", "width", "height")
REAL_PROMPT = "a lighthouse on a cliff at sunset, oil painting"


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
            more = panels.settings(ctx, "image", KIND, 28)
            (run, one), stop, status = panels.running(ctx, "image", "Compare", "Draw")
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
                look = panels.word_map(
                    ctx, "image", "prompt", "Where the untouched model reads a word.", height=400
                )
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "image")
            with gr.Tab("Code"):
                code = parts.codes(ctx, "image")

    inputs = [prompt, method.menu, seed, more.steps, more.guidance, *more.sizes]

    def compare(request: Any, *values: Any) -> Iterator[list[Any]]:
        ask = drawing.asked(models, KIND, *values)
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
        ask = drawing.asked(models, KIND, *values)
        loaded = models.get(KIND)

        def work(tell: Any) -> drawing.Run:
            return drawing.single(loaded, ask, tell, methods=True)

        for item in parts.follow(ctx, request, work):
            if not isinstance(item, Done):
                yield [parts.preview(ctx, item), item.text]
                continue
            picture = drawing.shown(item.value.value)
            yield [picture, drawing.summary([item.value])]

    outputs = [both, status, preview, *numbers, *code]
    events = [
        parts.job(
            ctx,
            run,
            compare,
            names=INPUTS,
            inputs=inputs,
            outputs=outputs,
            api_name="compare",
        ),
        parts.job(
            ctx,
            one,
            generate,
            names=INPUTS,
            inputs=inputs,
            outputs=[preview, status],
            api_name="generate",
        ),
        parts.job(
            ctx,
            look.look,
            panels.word_drawn(ctx, KIND, drawing.shown),
            inputs=[look.word, *inputs],
            outputs=[look.heat, look.found],
            api_visibility="private",
        ),
    ]
    parts.cancel(ctx, stop, events, status)
    parts.quick(example, lambda: examples(parts.roll()), prompt)


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    heading = "Text to image\nOne prompt, one seed: the untouched model and a method."
    return panels.alone(models, "image", heading, add)


if __name__ == "__main__":
    parts.run_alone("image")
