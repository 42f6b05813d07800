"""Text to video: dense and with methods as two clips in step, with numbers, word maps and code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mmattn.batch.writers import difference, write_video
from mmattn_demos import drawing, limits, panels, parts, snippets
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done

KIND = "t2v"
FPS = 8
PROMPT = "a red circle moving right on a white background"
INPUTS = ("prompt", "method", "seed", "steps", "guidance", "width", "height", "frames")
SIDES = (("Width", 480), ("Height", 320))
REAL_PROMPT = "a sailing boat crosses a calm bay at dawn"
VIEW = 384

# Both clips start when both can: otherwise one runs ahead by the time the other took to load.
TOGETHER = """() => {
  const clips = ['video-dense', 'video-method']
    .map((id) => document.querySelector('#' + id + ' video')).filter(Boolean);
  const ready = clips.map((clip) => clip.readyState >= 2 ? Promise.resolve() :
    new Promise((done) => clip.addEventListener('loadeddata', done, {once: true})));
  Promise.all(ready).then(() => {
    for (const clip of clips) { clip.muted = true; clip.pause(); clip.currentTime = 0; }
    for (const clip of clips) clip.play().catch(() => undefined);
  });
}"""


def example(seed: int) -> str:
    """A caption that the embedded model was trained to film."""
    from mmattn.mini.scenes import make_clips

    return make_clips(1, 900_000 + seed)[0].caption


def write(value: Tensor) -> str:
    """A clip ``[3, T, Y, X]`` as a file in the private folder, enlarged where it is small."""
    frames = drawing.frames_of(value)
    scale = max(1, VIEW // max(value.shape[-2:]))
    folder = Path(tempfile.mkdtemp(prefix="clip-", dir=os.environ["GRADIO_TEMP_DIR"]))
    return str(write_video(folder / "clip.mp4", frames, fps=FPS, scale=scale))


def small_frames(value: Tensor) -> list[Any]:
    """The frames of a clip as small pictures."""
    return [drawing.shown(frame, 192) for frame in drawing.frames_of(value)]


def gap(run: drawing.Run, dense: drawing.Run) -> Any:
    """Difference of the middle frames, amplified."""
    middle = run.value.shape[1] // 2
    one, other = (drawing.shown(value[:, middle]) for value in (run.value, dense.value))
    return difference(one, other)


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    gr, models = ctx.gr, ctx.models
    embedded = models.embedded(KIND)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                PROMPT if embedded else REAL_PROMPT,
                label="Prompt",
                info="What to film."
                + (" The embedded model knows one moving object." if embedded else ""),
                lines=2,
                max_length=limits.PROMPT_LENGTH,
                elem_id="video-prompt",
            )
            new = gr.Button("New example", size="sm", visible=embedded, elem_id="video-example")
            method = parts.recipe(ctx, KIND, "video", start=1)
            seed = parts.seeding(ctx, "video")
            more = panels.settings(ctx, "video", KIND, 30, SIDES, frames=33)
            (run,), stop, status = panels.running(ctx, "video", "Compare")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Compare"):
                with gr.Row():
                    clips = [
                        gr.Video(
                            label=label,
                            interactive=False,
                            autoplay=True,
                            loop=True,
                            height=300,
                            min_width=240,
                            buttons=["download"],
                            elem_id=f"video-{label}",
                        )
                        for label in ("dense", "method")
                    ]
                again = gr.Button("Play both from the start", size="sm", elem_id="video-again")
                gr.Markdown(
                    "Below, while it runs: a preview. Then the difference of the middle frames, × 5.",
                    elem_classes=["caption"],
                )
                preview = parts.view(
                    ctx, "Preview", "video-preview", hard=True, height=240, show_label=False
                )
            with gr.Tab("Attention"):
                look = panels.word_map(
                    ctx,
                    "video",
                    "prompt",
                    "Where the untouched model reads a word, frame by frame.",
                )
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "video")
            with gr.Tab("Code"):
                code = parts.codes(ctx, "video")

    inputs = [prompt, method.menu, seed, more.steps, more.guidance, *more.sizes]

    def compare(request: Any, *values: Any) -> Iterator[list[Any]]:
        ask = drawing.asked(models, KIND, *values)
        loaded = models.get(KIND)
        for item in parts.follow(ctx, request, lambda tell: drawing.pair(loaded, ask, tell)):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), item.text, parts.preview(ctx, item), *[gr.skip()] * 7]
                continue
            runs = item.value
            text = snippets.drawing(
                loaded, ask.column, ask.prompt, ask.seed, ask.steps, ask.guidance, ask.size
            )
            yield [
                write(runs[0].value),
                write(runs[-1].value),
                drawing.summary(runs),
                gap(runs[-1], runs[0]),
                *numbers.show(drawing.numbers(runs), [one.stats for one in runs]),
                *code.show(text),
            ]

    outputs = [*clips, status, preview, *numbers, *code]
    compared = parts.job(
        ctx, run, compare, names=INPUTS, inputs=inputs, outputs=outputs, api_name="video"
    )
    compared.success(None, None, None, js=TOGETHER, api_visibility="private")
    looked = parts.job(
        ctx,
        look.look,
        panels.word_drawn(ctx, KIND, small_frames),
        inputs=[look.word, *inputs],
        outputs=[look.heat, look.found],
        api_visibility="private",
    )
    again.click(None, None, None, js=TOGETHER, api_visibility="private")
    parts.cancel(ctx, stop, [compared, looked], status)
    parts.quick(new, lambda: example(parts.roll()), prompt)


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    heading = "Text to video\nOne prompt, one seed: the untouched model and a method."
    return panels.alone(models, "video", heading, add)


if __name__ == "__main__":
    parts.run_alone("video")
