"""Pieces that the demos share: menus, seed with dice, code panel, toasts for errors."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmattn.errors import MmattnError, ModelLoadError
from mmattn.registry import names
from mmattn.report import Stats
from mmattn_demos import limits, overlays, presets
from mmattn_demos.models import Models
from mmattn_demos.numbers import Measures, as_html, remarks
from mmattn_demos.serving import gradio, private_folder
from mmattn_demos.snippets import Snippets
from mmattn_demos.streaming import Done, StoppedError, Stops, Tell, Update, stream
from mmattn_demos.uploads import read_picture

NO_RECIPE = "# The command needs no recipe file.\n"

log = logging.getLogger("mmattn.demos")


class Context(NamedTuple):
    """What a running demo shares."""

    gr: Any
    models: Models
    stops: Stops


def context(models: Models | None) -> Context:
    """For `build` functions. Comes before any component, which ask for the private folder."""
    gr = gradio()
    private_folder()
    return Context(gr, models or Models(), Stops())


def page(ctx: Context, title: str) -> Any:
    """Empty blocks."""
    return ctx.gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400))


def toasts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of `function` (or generator) as a message that says what to do next, without internals."""

    def told(error: Exception) -> Any:
        gr = gradio()
        if isinstance(error, gr.Error):
            return error
        text = "That failed here, not with you. Try another method or fewer steps; the log has details."
        if isinstance(error, StoppedError):
            text = "Stopped. Change what you like and run it again."
        elif isinstance(error, MmattnError) and not isinstance(error, ModelLoadError):
            sentence = " ".join(str(error).split())
            named = sentence.split(" ")[0].strip(":,") in names()
            text = sentence[:400] if named else sentence[:1].upper() + sentence[1:400]
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            text = "The memory does not suffice. Ask for fewer pixels, frames or steps."
        else:
            log.error("a demo failed", exc_info=error)
        return gr.Error(text, duration=10, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise told(error) from None

        return generate

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise told(error) from None

    return call


def follow(ctx: Context, request: Any, work: Callable[[Tell], Any]) -> Iterator[Update | Done[Any]]:
    """`stream` for the visitor behind `request`."""
    visitor = getattr(request, "session_hash", None) or "nobody"
    return stream(work, lock=ctx.models.lock, stops=ctx.stops, visitor=visitor)


def job(
    ctx: Context,
    button: Any,
    function: Callable[..., Any],
    *,
    names: Sequence[str] = (),
    **more: Any,
) -> Any:
    """An event that uses a model: one at a time over all tabs and visitors.

    Args:
        ctx: what the demo shares.
        button: starts it.
        function: gets the visitor's request, then the inputs.
        names: of the inputs in the API, where `function` takes them all as one.
        more: arguments of the event.
    """
    function.__annotations__["request"] = ctx.gr.Request
    told = toasts(function)
    if names:
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        given = [inspect.Parameter(name, place) for name in ("request", *names)]
        told.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
    return button.click(
        told,
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        **more,
    )


def cancel(ctx: Context, button: Any, events: list[Any], status: Any) -> None:
    """Make `button` stop the visitor's running and waiting jobs of this tab."""

    def stop(request: Any) -> str:
        ctx.stops.stop(request.session_hash or "nobody")
        return "Stopped."

    stop.__annotations__["request"] = ctx.gr.Request
    button.click(
        stop,
        None,
        status,
        cancels=events,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


class Recipe(NamedTuple):
    """The method menu and its sentence."""

    menu: Any
    note: Any


def recipe(ctx: Context, kind: str, name: str, *, start: int = 0, label: str = "Method") -> Recipe:
    """A menu of presets that also takes typed text."""
    gr, offers = ctx.gr, presets.presets(kind)
    menu = gr.Dropdown(
        ["dense", *(one.label for one in offers)],
        value=offers[start].label,
        label=label,
        info="A preset, or your own as on the command line: name:key=value, joined by +.",
        allow_custom_value=True,
        elem_id=f"{name}-method",
    )
    note = gr.Markdown(offers[start].note, elem_id=f"{name}-note")
    menu.change(
        lambda text: presets.note_of(text, kind) or "Your own method.",
        menu,
        note,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
    return Recipe(menu, note)


def seeding(ctx: Context, name: str, value: int = 7) -> Any:
    """A seed with dice."""
    gr = ctx.gr
    with gr.Row(elem_classes=["end"]):
        seed = gr.Number(
            value,
            label="Seed",
            info="Names the noise: the same seed gives the same result.",
            precision=0,
            minimum=0,
            maximum=limits.SEED,
            min_width=120,
            scale=3,
            elem_id=f"{name}-seed",
        )
        dice = gr.Button("Dice", min_width=90, scale=0, elem_id=f"{name}-dice")
    quick(dice, roll, seed)
    return seed


def slider(
    ctx: Context, name: str, label: str, info: str, value: int, most: int, **more: Any
) -> Any:
    """A whole number from 1."""
    return ctx.gr.Slider(
        1,
        most,
        value=value,
        step=1,
        label=label,
        info=info,
        elem_id=f"{name}-{label.split()[0].lower()}",
        **more,
    )


def upload(ctx: Context, label: str, name: str, **more: Any) -> Any:
    """A picture input that opens files itself; handlers get a PIL image or None."""
    part = ctx.gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        format="png",
        elem_id=name,
        elem_classes=["upload"],
        height=260,
        buttons=["download"],
        **more,
    )
    # Gradio would open any format Pillow knows, and text in place of a file.
    part.preprocess = toasts(_opened)
    return part


def _opened(payload: Any) -> Image.Image | None:
    if payload is None:
        return None
    if payload.path is None:
        from mmattn.errors import ConfigError

        raise ConfigError("send a picture as a file: upload it first")
    return read_picture(Path(payload.path))


class Codes(NamedTuple):
    """The code panel."""

    python: Any
    command: Any
    recipe: Any

    def show(self, code: Snippets) -> list[Any]:
        """New contents."""
        return [code.python, code.command, code.recipe or NO_RECIPE]


def codes(ctx: Context, name: str) -> Codes:
    """Panels that show how to repeat what is on screen."""
    gr = ctx.gr
    common = {"interactive": False, "wrap_lines": True}
    return Codes(
        gr.Code(
            "# Run something first.\n",
            language="python",
            label="Python",
            lines=6,
            elem_id=f"{name}-python",
            **common,
        ),
        gr.Code(
            "# Run something first.\n",
            language="shell",
            label="Command line",
            lines=1,
            elem_id=f"{name}-command",
            **common,
        ),
        gr.Code(
            NO_RECIPE,
            language="python",
            label="recipe.toml",
            lines=1,
            elem_id=f"{name}-recipe",
            **common,
        ),
    )


class Figures(NamedTuple):
    """The numbers of a run."""

    table: Any
    data: Any
    density: Any
    notes: Any

    def show(self, rows: list[Measures], every: list[Stats | None]) -> list[Any]:
        """New contents: the table, the same as JSON, density by layer and step, remarks."""
        last = every[-1]
        picture = None if last is None else overlays.density_picture(last)
        return [as_html(rows), rows, picture, remarks(every)]


def figures(ctx: Context, name: str) -> Figures:
    """Panels for `Figures`."""
    gr = ctx.gr
    table = gr.HTML("<p>Run something first.</p>", label="Numbers", elem_id=f"{name}-numbers")
    notes = gr.Markdown(label="Remarks", elem_id=f"{name}-remarks")
    density = view(ctx, "Density by layer and step", f"{name}-density", show_label=False)
    with gr.Accordion("As JSON", open=False):
        data = gr.JSON(label="Numbers as JSON", elem_id=f"{name}-json")
    return Figures(table, data, density, notes)


def view(ctx: Context, label: str, name: str, *, hard: bool = False, **more: Any) -> Any:
    """A picture to look at; there is no frame without one."""
    return ctx.gr.Image(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["full-only", "pixel"] if hard else ["full-only"],
        **more,
    )


def run_alone(name: str) -> None:
    """What ``python -m mmattn_demos.<name>`` does; the options are those of ``mmattn demo``."""
    import sys

    from mmattn.cli import main

    sys.exit(main(["demo", *([name] if name else []), *sys.argv[1:]]))


def roll() -> int:
    """A number for dice and examples."""
    return secrets.randbelow(100_000)


def preview(ctx: Context, update: Update) -> Any:
    """New contents of a preview panel; unchanged where there is nothing to see yet."""
    from mmattn_demos.drawing import shown

    if update.preview is None:
        return ctx.gr.skip()
    return shown(update.preview, 240)


def quick(button: Any, function: Callable[[], Any], outputs: Any) -> None:
    """An event that needs no model and no queue."""
    button.click(
        toasts(function),
        None,
        outputs,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )
