"""Tokens and attention: where a model looks for a word, layer by layer, and which tokens merge or go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from mmattn.calls import answer, draw
from mmattn.compare.heatmaps import short
from mmattn.errors import ConfigError
from mmattn_demos import (
    answering,
    drawing,
    image,
    limits,
    panels,
    parts,
    pictures,
    presets,
    snippets,
    vlm,
    words,
)
from mmattn_demos.models import Models
from mmattn_demos.streaming import Done

MODELS = {"Text to image": "t2i", "Picture to words": "vlm"}
LAYERS = 12
TEXTS = {"t2i": image.PROMPT, "vlm": vlm.QUESTION}


def look(
    models: Models,
    kind: str,
    picture: Image.Image | None,
    text: str,
    word: str,
    method: str,
    seed: float,
    steps: float,
) -> Any:
    """What `work` of the tokens tab does, with everything checked first: a function of `tell`.

    Raises:
        ConfigError: for anything out of bounds.
    """
    if kind not in TEXTS:
        raise ConfigError(f"the model is one of {list(TEXTS)}; got {kind!r}")
    text, count = limits.prompt(text), limits.whole(steps, "the number of steps", 1, limits.STEPS)
    start, loaded = limits.seed(seed), models.get(kind)
    if kind == "vlm":
        shown, column = vlm.needed(picture), presets.chosen(method, "vlm")

        def ask(tell: Any) -> tuple[str, words.WordMaps, Image.Image, Any]:
            said = answer(loaded, [shown], [text], max_new_tokens=vlm.NEW_TOKENS)[0]
            maps = words.in_answer(loaded, shown, text, said, word)
            both = answering.ask(loaded, shown, text, column, start, vlm.NEW_TOKENS, tell)
            return said, maps, shown, both[-1].overlay

        return ask
    words.find_word(text, word)

    def drawn(tell: Any) -> tuple[str, words.WordMaps, Image.Image, Any]:
        made: list[Any] = []
        size: dict[str, Any] = {} if loaded.embedded else {"width": 512, "height": 512}
        maps = words.in_prompt(
            loaded,
            text,
            word,
            lambda: made.append(draw(loaded, [text], [start], steps=count, **size)[0]),
        )
        return text, maps, drawing.shown(made[0]), None

    return drawn


def by_layer(maps: words.WordMaps, picture: Image.Image) -> list[tuple[Image.Image, str]]:
    """Up to twelve maps from the first to the last layer, with the layer's name."""
    count = min(LAYERS, len(maps.layers))
    chosen = [maps.layers[i * (len(maps.layers) - 1) // max(1, count - 1)] for i in range(count)]
    small = drawing.shown(picture, 192)
    return [(words.drawn(values, small), short(path)) for path, values in chosen]


def add(ctx: parts.Context) -> None:
    """Put the demo into the current blocks."""
    with ctx.gr.Tabs():
        with ctx.gr.Tab("A word"):
            _add_words(ctx)
        with ctx.gr.Tab("A classifier"):
            _add_classes(ctx)


def _add_words(ctx: parts.Context) -> None:
    gr, models = ctx.gr, ctx.models
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Radio(
                list(MODELS.items()),
                value="vlm",
                label="Model",
                info="Which model to look into.",
                elem_id="tokens-model",
            )
            with gr.Column() as given:
                picture = parts.upload(ctx, "Picture", "tokens-picture")
                new = gr.Button("New scene", size="sm", elem_id="tokens-example")
            text = gr.Textbox(
                vlm.QUESTION,
                label="Prompt or question",
                info="What to draw, or what to ask about the picture.",
                max_length=limits.PROMPT_LENGTH,
                elem_id="tokens-text",
            )
            word = gr.Textbox(
                label="Word",
                info="Of the prompt (image) or of the answer (words); empty takes one.",
                max_length=limits.WORD_LENGTH,
                elem_id="tokens-word",
            )
            with gr.Column() as pruning:
                method = parts.recipe(ctx, "vlm", "tokens", start=0, label="Method for kept tokens")
            seed = parts.seeding(ctx, "tokens")
            steps = parts.slider(
                ctx,
                "tokens",
                "Steps",
                "Denoising steps of a picture.",
                12,
                limits.STEPS,
                visible=False,
            )
            (run,), stop, status = panels.running(ctx, "tokens", "Look")
        with gr.Column(scale=3, min_width=300):
            heat = parts.view(ctx, "All layers", "tokens-heat", height=400)
            layers = gr.Gallery(
                label="Layer by layer",
                columns=4,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="tokens-layers",
            )
            kept = parts.view(ctx, "Kept tokens", "tokens-kept", height=400)

    def tokens(request: Any, *values: Any) -> Iterator[list[Any]]:
        work = look(models, *values)
        for item in parts.follow(ctx, request, work):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), gr.skip(), item.text]
                continue
            said, maps, shown, overlay = item.value
            yield [
                words.drawn(maps.mean, drawing.shown(shown)),
                by_layer(maps, shown),
                overlay,
                f"**{maps.word}** in “{said}”",
            ]

    inputs = [model, picture, text, word, method.menu, seed, steps]
    event = parts.job(
        ctx,
        run,
        tokens,
        names=("model", "image", "text", "word", "method", "seed", "steps"),
        inputs=inputs,
        outputs=[heat, layers, kept, status],
        api_name="tokens",
    )
    parts.cancel(ctx, stop, [event], status)
    parts.quick(new, lambda: pictures.scene(parts.roll())[0], picture)

    def switch(kind: str) -> list[Any]:
        words_only = gr.update(visible=kind == "vlm")
        return [TEXTS[kind], words_only, words_only, gr.update(visible=kind == "t2i"), ""]

    model.change(
        switch,
        model,
        [text, given, pruning, steps, word],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


def _add_classes(ctx: parts.Context) -> None:
    gr, models = ctx.gr, ctx.models
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = parts.upload(ctx, "Picture", "classify-picture")
            new = gr.Button("New picture", size="sm", elem_id="classify-example")
            method = parts.recipe(ctx, "vit", "classify", start=0)
            top = gr.Slider(1, 10, 3, step=1, label="Classes", info="How many to show.")
            run = gr.Button("Classify", variant="primary", elem_id="classify-run")
            status = panels.status(ctx, "classify")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Classes"):
                with gr.Row():
                    dense = gr.Label(label="dense", elem_id="classify-dense", min_width=200)
                    other = gr.Label(label="method", elem_id="classify-method", min_width=200)
                gr.Markdown(
                    "Merged tokens, if the method merges: one colour per group, lines between groups.",
                    elem_classes=["caption"],
                )
                merged = parts.view(
                    ctx,
                    "Merged tokens",
                    "classify-merged",
                    show_label=False,
                    height=400,
                )
            with gr.Tab("Numbers"):
                numbers = parts.figures(ctx, "classify")
            with gr.Tab("Code"):
                gr.Markdown("Save the picture as `picture.png` first (its download button).")
                code = parts.codes(ctx, "classify")

    def classify(
        request: Any, image: Image.Image | None, method: str, classes: float
    ) -> Iterator[list[Any]]:
        shown, column = vlm.needed(image), presets.chosen(method, "vit")
        count = limits.whole(classes, "the number of classes", 1, 10)
        loaded = models.get("vit")
        for item in parts.follow(
            ctx, request, lambda tell: answering.classify(loaded, shown, column, count, tell)
        ):
            if not isinstance(item, Done):
                yield [gr.skip(), gr.skip(), gr.skip(), item.text, *[gr.skip()] * 7]
                continue
            both = item.value
            best = [max(one.chances, key=one.chances.__getitem__) for one in both]
            same = "the same class" if best[0] == best[-1] else "another class"
            yield [
                both[0].chances,
                both[-1].chances,
                both[-1].overlay,
                f"{both[-1].label}: {same} as dense.",
                *numbers.show(answering.numbers(both), [one.stats for one in both]),
                *code.show(snippets.classifying(loaded, column, count)),
            ]

    parts.job(
        ctx,
        run,
        classify,
        inputs=[picture, method.menu, top],
        outputs=[dense, other, merged, status, *numbers, *code],
        api_name="classify",
    )
    parts.quick(new, lambda: pictures.single(parts.roll()), picture)


def build(models: Models | None = None) -> Any:
    """The demo alone."""
    heading = "Tokens and attention\nWhere a model looks, and what a method keeps."
    return panels.alone(models, "tokens and attention", heading, add)


if __name__ == "__main__":
    parts.run_alone("tokens")
