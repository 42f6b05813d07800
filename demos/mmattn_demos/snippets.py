"""The Python, command line and recipe that repeat what is on screen. The tests run them."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any, NamedTuple

import mmattn
from mmattn.config import Recipe
from mmattn.loading import Loaded
from mmattn.methods.base import Method, Placed
from mmattn.variants import Variant
from mmattn_demos.presets import command_text


class Snippets(NamedTuple):
    """Code that repeats a result.

    Args:
        python: a script; it leaves the untouched result in ``dense`` and the other in ``result``.
        command: one line for a shell.
        recipe: contents of ``recipe.toml`` where the command reads one, else empty.
    """

    python: str
    command: str
    recipe: str = ""


def constructor(entry: Method | Placed) -> str:
    """``VMoBA(topk=0.5)``, with ``.at("...")`` where the method has its own sites."""
    method = entry.method if isinstance(entry, Placed) else entry
    base = {f.name: f.default for f in fields(method)}
    knobs = [
        f"{key}={value!r}"
        for key, value in method.to_dict().items()
        if key != "name" and value != base.get(key)
    ]
    made = f"{type(method).__name__}({', '.join(knobs)})"
    return f"{made}.at({entry.sites!r})" if isinstance(entry, Placed) else made


def _imports(column: Variant) -> str:
    lines = []
    ours = set()
    for entry in column.methods:
        cls = type(entry.method if isinstance(entry, Placed) else entry)
        if getattr(mmattn, cls.__name__, None) is cls:
            ours.add(cls.__name__)
        else:
            lines.append(f"from {cls.__module__} import {cls.__name__}")
    if ours:
        lines.insert(0, f"from mmattn import {', '.join(sorted(ours))}")
    return "\n".join(dict.fromkeys(lines))


def _methods(column: Variant) -> str:
    made = [constructor(entry) for entry in column.methods]
    if len(made) == 1:
        return f"methods = [{made[0]}]"
    return "methods = [\n" + "".join(f"    {one},\n" for one in made) + "]"


def _arguments(values: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in values.items() if value is not None)


def resolving(loaded: Loaded) -> str:
    """The call that loads a model; of a folder, its name alone."""
    device = "" if loaded.embedded else _device(loaded)
    return f"resolve({loaded.source!r}{device and f', device={device!r}'})"


def _device(loaded: Loaded) -> str:
    from mmattn_demos.models import parameters_on

    device = parameters_on(loaded).type
    return "" if device == "cpu" else device


def _command(verb: str, loaded: Loaded, column: Variant, words: list[str]) -> tuple[str, str]:
    """A shell line, and the recipe file it reads or an empty text."""
    parts = ["mmattn", verb, "--model", loaded.source, *words]
    recipe = ""
    if column.methods:
        text = command_text(column, loaded.kind)
        if text is None:
            recipe, text = recipe_text(column), "recipe.toml"
        parts += ["--method", text]
    device = _device(loaded)
    if device:
        parts += ["--device", device]
    return shlex.join(parts), recipe


def recipe_text(column: Variant) -> str:
    """`column` as TOML, as `mmattn.load` reads it."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Recipe(column.methods).save(Path(folder) / "recipe.toml")
        return path.read_text(encoding="utf-8").strip() + "\n"


def _script(
    loaded: Loaded, column: Variant, helpers: str, before: str, call: str, seed: int
) -> str:
    head = "\n".join(
        line
        for line in (
            "import mmattn",
            _imports(column),
            f"from mmattn.calls import {helpers}",
            "from mmattn.loading import resolve",
        )
        if line
    )
    parts = [head, "", f"model = {resolving(loaded)}", before, f"dense = {call}"]
    if column.methods:
        parts += [
            "",
            _methods(column),
            f"with mmattn.attach(model.target, methods, seed={seed}) as session:",
            f"    result = {call}",
            "print(session.report())",
        ]
    else:
        parts.append("result = dense")
    return "\n".join(parts) + "\n"


def drawing(
    loaded: Loaded,
    column: Variant,
    prompt: str,
    seed: int,
    steps: int,
    guidance: float,
    size: dict[str, int | None],
) -> Snippets:
    """For a picture or a clip."""
    more = _arguments({"guidance": guidance, **size})
    call = f"draw(model, [prompt], [{seed}], steps={steps}{more})"
    words = ["--prompt", prompt, "--seed", str(seed), "--steps", str(steps)]
    words += ["--guidance", f"{guidance:g}"]
    flags = {"width": "--width", "height": "--height", "num_frames": "--frames"}
    for key, value in size.items():
        words += [flags[key], str(value)]
    command, recipe = _command("generate", loaded, column, words)
    before = f"prompt = {prompt!r}"
    return Snippets(_script(loaded, column, "draw", before, call, seed), command, recipe)


def answering(
    loaded: Loaded, column: Variant, question: str, seed: int, new_tokens: int
) -> Snippets:
    """For a question about a picture that the reader has as ``picture.png``."""
    before = f'picture = Image.open("picture.png")\nquestion = {question!r}'
    call = f"answer(model, [picture], [question], max_new_tokens={new_tokens})[0]"
    python = _script(loaded, column, "answer", before, call, seed)
    words = ["--image", "picture.png", "--prompt", question, "--seed", str(seed)]
    words += ["--max-new-tokens", str(new_tokens)]
    command, recipe = _command("caption", loaded, column, words)
    return Snippets(_with_pillow(python), command, recipe)


def classifying(loaded: Loaded, column: Variant, top: int) -> Snippets:
    """For a classification of ``picture.png``."""
    before = 'pixels = preprocess(model, [Image.open("picture.png")])'
    call = "logits(model, pixels).softmax(1)[0]"
    python = _script(loaded, column, "logits, preprocess", before, call, 0)
    words = ["--image", "picture.png", "--top", str(top)]
    command, recipe = _command("classify", loaded, column, words)
    return Snippets(_with_pillow(python), command, recipe)


def _with_pillow(python: str) -> str:
    return python.replace("\n\nmodel =", "\nfrom PIL import Image\n\nmodel =", 1)


def timing(loaded: Loaded, columns: list[Variant], repeats: int, steps: int, seed: int) -> Snippets:
    """For a benchmark; methods with sites of their own are left to Python."""
    imports = "\n".join(line for line in map(_imports, columns) if line)
    made = ", ".join(f"variant([{', '.join(map(constructor, c.methods))}])" for c in columns)
    python = (
        "from mmattn.compare.bench import bench\nfrom mmattn.loading import resolve\n"
        f"from mmattn.variants import variant\n{imports}\n\nmodel = {resolving(loaded)}\n"
        f"lines = bench(model, [{made}], repeats={repeats}, warmup=1, steps={steps}, seed={seed})\n"
        "for line in lines:\n    print(line.label, line.median_ms, line.density, line.refused)\n"
    )
    parts = ["mmattn", "bench", loaded.source, "--repeats", str(repeats), "--warmup", "1"]
    parts += ["--steps", str(steps), "--seed", str(seed)]
    texts = [command_text(column, loaded.kind) for column in columns]
    for text in texts:
        if text is not None:
            parts += ["--method", text]
    return Snippets(python, shlex.join(parts))
