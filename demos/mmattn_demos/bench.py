"""Bench: methods against the untouched model, interleaved, with checks before any number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from mmattn.compare.bench import Timing, bench
from mmattn.errors import ConfigError
from mmattn.variants import Variant
from mmattn_demos import limits, panels, parts, presets, snippets
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done, Tell, Update

MODELS = {
    "Text to image": "t2i",
    "Text to video": "t2v",
    "Picture to words": "vlm",
    "Picture to class": "vit",
}
METHODS = 4


def columns(texts: Sequence[str] | None, kind: str) -> list[Variant]:
    """The chosen methods.

    Raises:
        ConfigError: for none, too many, or one that does not exist.
    """
    given = [text for text in texts or () if text and text != "dense"]
    if not 1 <= len(given) <= METHODS:
        raise ConfigError(
            f"choose one to {METHODS} methods; got {len(given)}. Dense is always timed as well"
        )
    return [presets.chosen(text, kind) for text in given]


def as_html(lines: Sequence[Timing]) -> str:
    """Bars of the medians, with quartiles and density in words; refusals with their reason."""
    longest = max((line.median_ms or 0.0 for line in lines), default=0.0) or 1.0
    rows = []
    for line in lines:
        if line.median_ms is None:
            rows.append(
                f'<div><div class="name"><b>{escape(line.label)}</b>: no number, because '
                f"{escape(line.refused or '')}</div></div>"
            )
            continue
        words = f"{line.median_ms:.1f} ms (quartiles {line.low_ms:.1f} to {line.high_ms:.1f})"
        if line.ratio is not None:
            words += f", {line.ratio:.2f} × dense"
        if line.density is not None:
            words += f", density {line.density:.2f}"
        share = 100 * line.median_ms / longest
        rows.append(
            f'<div><div class="name"><b>{escape(line.label)}</b>: {words}</div>'
            f'<div class="track" role="img" aria-label="{share:.0f} % of the slowest">'
            f'<div class="fill" style="width:{share:.1f}%"></div></div></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    gr, models = ctx.gr, ctx.models
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Radio(
                list(MODELS.items()),
                value="t2i",
                label="Model",
                info="What is timed: one picture or clip, one answer, or 32 classifications.",
                elem_id="bench-model",
            )
            offers = [one.label for one in presets.presets("t2i")]
            methods = gr.Dropdown(
                offers,
                value=[offers[0]],
                multiselect=True,
                max_choices=METHODS,
                allow_custom_value=True,
                label="Methods",
                info=f"One to {METHODS}, presets or your own (name:key=value). Dense is always timed.",
                elem_id="bench-methods",
            )
            repeats = parts.slider(
                ctx,
                "bench",
                "Repeats",
                "Timed calls of each, after one warm-up.",
                3,
                limits.REPEATS,
            )
            steps = parts.slider(ctx, "bench", "Steps", "Denoising steps of one call.", 4, 20)
            seed = parts.seeding(ctx, "bench")
            (run,), stop, status = panels.running(ctx, "bench", "Measure")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Times"):
                chart = gr.HTML("<p>Measure something.</p>", label="Times", elem_id="bench-chart")
                gr.Markdown(
                    "Small inputs have little attention to save: sparse methods pay from some thousand "
                    "tokens on, and these models have a few hundred.",
                    elem_classes=["caption"],
                    visible=models.embedded("t2i"),
                )
                with gr.Accordion("As JSON", open=False):
                    data = gr.JSON(label="Times as JSON", elem_id="bench-json")
            with gr.Tab("Code"):
                code = parts.codes(ctx, "bench")

    def measure(
        request: Any,
        model: str,
        methods: list[str],
        repeats: float,
        steps: float,
        seed: float,
    ) -> Iterator[list[Any]]:
        if model not in MODELS.values():
            raise ConfigError(f"the model is one of {list(MODELS.values())}; got {model!r}")
        chosen = columns(methods, model)
        count = limits.whole(repeats, "the number of repeats", 1, limits.REPEATS)
        many = limits.whole(steps, "the number of steps", 1, 20)
        start, loaded = limits.seed(seed), models.get(model)

        def work(tell: Tell) -> list[Timing]:
            return bench(
                loaded,
                chosen,
                repeats=count,
                warmup=1,
                seed=start,
                steps=many,
                progress=lambda line: tell(Update(line)),
            )

        for item in parts.follow(ctx, request, work):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), item.text, *[gr.skip()] * 3]
                continue
            lines = item.value
            green = sum(line.median_ms is not None for line in lines)
            yield [
                as_html(lines),
                [line.to_dict() for line in lines],
                f"{green} of {len(lines)} passed the checks and were timed.",
                *code.show(snippets.timing(loaded, chosen, count, many, start)),
            ]

    event = parts.job(
        ctx,
        run,
        measure,
        inputs=[model, methods, repeats, steps, seed],
        outputs=[chart, data, status, *code],
        api_name="bench",
    )
    parts.cancel(ctx, stop, [event], status)

    def switch(kind: str) -> Any:
        labels = [one.label for one in presets.presets(kind)]
        return gr.update(choices=labels, value=[labels[0]])

    model.change(
        switch, model, methods, queue=False, api_visibility="private", show_progress="hidden"
    )


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    heading = "Bench\nTime against the untouched model, interleaved on this machine."
    return panels.alone(models, "bench", heading, add)


if __name__ == "__main__":
    parts.run_alone("bench")
