"""Image sets: related pictures drawn together, each alone on one side and as a set on the other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmattn_pipelines.in_context import InContextPipeline

from mmattn.batch.writers import write_image
from mmattn_demos import drawing, limits, panels, parts, pictures, sets
from mmattn_demos.models import Models
from mmattn_demos.numbers import measures
from mmattn_demos.streaming import Done

KIND = sets.KIND
INPUTS = (
    "captions",
    "shared",
    "arrangement",
    "seen",
    "images",
    "seed",
    "steps",
    "guidance",
)
CLAUSES = "a red circle on a white background\na blue star on a white background"
REAL_CLAUSES = "it sits under a tree\nit runs across a field"
REAL_SHARED = "a fox in ink and watercolour"
UNTRAINED = (
    " The embedded model was never trained on sets: with a given picture the others follow its place, "
    "without one it may draw next to nothing."
)


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    gr, models = ctx.gr, ctx.models
    embedded = models.embedded(KIND)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            clauses = gr.Textbox(
                CLAUSES if embedded else REAL_CLAUSES,
                label="Captions",
                info=f"One per line, 2 to {sets.PANELS} pictures; given pictures come first.",
                lines=3,
                max_length=limits.PROMPT_LENGTH,
                elem_id="imagesets-clauses",
            )
            shared = gr.Textbox(
                "" if embedded else REAL_SHARED,
                label="Shared",
                info="What all pictures have in common; goes in front of every caption.",
                max_length=limits.PROMPT_LENGTH,
                elem_id="imagesets-shared",
            )
            way = gr.Radio(
                list(sets.WAYS),
                value="batch" if embedded else "canvas",
                label="Arrangement",
                info="Separate pictures that see each other, or panels of one canvas."
                + (" The embedded model never saw canvases." if embedded else ""),
                elem_id="imagesets-way",
            )
            seen = gr.Dropdown(
                list(sets.SEEN),
                value="group"
                if InContextPipeline(models.get(KIND).target).reads_panels
                else "full",
                label="Who sees whom",
                info="group: every picture sees the others, and its own caption.",
                elem_id="imagesets-seen",
            )
            files = gr.File(
                label="Given pictures (PNG, JPEG, WebP)",
                file_count="multiple",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                type="filepath",
                height=170,
                elem_id="imagesets-files",
            )
            example = gr.Button(
                "Example picture", size="sm", visible=embedded, elem_id="imagesets-example"
            )
            seed = parts.seeding(ctx, "imagesets", 3)
            with gr.Accordion("More settings", open=False):
                steps = parts.slider(
                    ctx,
                    "imagesets",
                    "Steps",
                    "Denoising steps.",
                    12 if embedded else 28,
                    limits.STEPS,
                )
                guidance = gr.Slider(
                    0, 20, 3.0, step=0.1, label="Guidance", info="How closely to follow the prompt."
                )
            (run,), stop, status = panels.running(ctx, "imagesets", "Draw")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Compare"):
                gr.Markdown(
                    "Left of the line: every picture alone. Right: the set."
                    + (UNTRAINED if embedded else ""),
                    elem_classes=["caption"],
                )
                both = gr.ImageSlider(
                    label="alone | set",
                    show_label=False,
                    type="pil",
                    format="png",
                    interactive=False,
                    max_height=420,
                    buttons=["download", "fullscreen"],
                    elem_id="imagesets-slider",
                    elem_classes=["pixel"],
                )
                gallery = gr.Gallery(
                    label="The set",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="imagesets-gallery",
                )
                shown = parts.view(ctx, "Preview", "imagesets-preview", hard=True, show_label=False)
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "imagesets")
            with gr.Tab("Code"):
                gr.Markdown(
                    "Given pictures are read from `reference0.png` and so on. On the command line sets "
                    "are rows with `panels` of `mmattn batch`, on a canvas."
                )
                code = gr.Code(
                    "# Run something first.\n",
                    language="python",
                    label="Python",
                    interactive=False,
                    wrap_lines=True,
                    lines=6,
                    elem_id="imagesets-python",
                )

    def imageset(request: Any, *values: Any) -> Iterator[list[Any]]:
        ask = sets.asked(models, *values)
        loaded = models.get(KIND)
        for item in parts.follow(ctx, request, lambda tell: sets.work(loaded, ask, tell)):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), item.text, parts.preview(ctx, item), *[gr.skip()] * 5]
                continue
            runs = item.value
            rows = [measures(name, took, None, out.report) for name, out, took in runs]
            images = [drawing.shown(image) for image in runs[-1][1].images]
            density = rows[-1]["density"]
            line = f"{ask.visibility}: {runs[-1][2]:.2f} s"
            line += "." if density is None else f" at density {density:.2f}."
            yield [
                (sets.sheet(runs[0][1].images), sets.sheet(runs[-1][1].images)),
                list(zip(images, sets.captions(ask), strict=True)),
                line,
                None,
                *numbers.show(rows, [out.report for _, out, _ in runs]),
                sets.snippet(loaded, ask).python,
            ]

    event = parts.job(
        ctx,
        run,
        imageset,
        names=INPUTS,
        inputs=[clauses, shared, way, seen, files, seed, steps, guidance],
        outputs=[both, gallery, status, shown, *numbers, code],
        api_name="imageset",
    )
    parts.cancel(ctx, stop, [event], status)

    def given() -> list[Any]:
        picture, caption, paper = pictures.captioned(parts.roll())
        folder = Path(tempfile.mkdtemp(prefix="example-", dir=os.environ["GRADIO_TEMP_DIR"]))
        return [
            [str(write_image(folder / "example.png", picture))],
            f"{caption}\na blue star on a {paper} background",
        ]

    parts.quick(example, given, [files, clauses])


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    return panels.alone(models, "image sets", "Image sets\nRelated pictures drawn together.", add)


if __name__ == "__main__":
    parts.run_alone("imagesets")
