"""Columns of a comparison: the untouched model, or a set of methods under one label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmattn.config import load
from mmattn.errors import ConfigError, suggest
from mmattn.methods.base import Method, Placed
from mmattn.registry import method_class, method_from

DEFAULTS: dict[str, tuple[dict[str, Any], ...]] = {
    "t2i": (
        {"name": "agent-attention", "agents": 16, "start": 0.75},
        {"name": "agent-attention", "agents": 16},
    ),
    "t2v": ({"name": "vmoba"},),
    "vlm": ({"name": "hiprune", "keep": 32}, {"name": "random-prune", "keep": 32}, {"name": "vhr"}),
    "vit": ({"name": "tome", "r": 8}, {"name": "agent-attention", "agents": 16}),
}
"""What the default comparison attaches to each embedded model. The two pruners have one budget, so
that the difference between them is the choice of tokens and nothing else. VMoBA runs in its paper's
training-free setting; agent attention in the last quarter of the steps and in all of them."""


def check_names(names: Sequence[str]) -> None:
    """Raise unless every name is an embedded model.

    Raises:
        ConfigError: for an unknown name, with a suggestion.
    """
    for name in names:
        if name not in DEFAULTS:
            raise ConfigError(
                f"unknown model {name!r}{suggest(name, DEFAULTS)} "
                f"Name an embedded model: {list(DEFAULTS)}."
            )


@dataclass(frozen=True)
class Variant:
    """One column. No methods means the untouched model."""

    label: str
    methods: tuple[Method | Placed, ...] = ()


DENSE = Variant("dense")


def label_of(methods: Sequence[Method | Placed]) -> str:
    """``hiprune keep=16 + vhr``: the names, with the settings that differ from the defaults."""
    parts = []
    for method in methods:
        cls = type(method.method if isinstance(method, Placed) else method)
        base = {f.name: f.default for f in fields(cls)}
        changed = {k: v for k, v in method.to_dict().items() if base.get(k) != v and k != "name"}
        settings = " ".join(f"{k}={_short(v)}" for k, v in changed.items())
        parts.append(f"{method.name} {settings}".strip())
    return " + ".join(parts)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def variant(methods: Sequence[Method | Placed]) -> Variant:
    """A column for `methods` attached together."""
    return Variant(label_of(methods), tuple(methods))


def parse(text: str) -> Variant:
    """A column from ``name``, ``name:key=value,key=value``, several joined by ``+``, a JSON object, or a
    recipe file.

    Values are JSON where they parse as JSON, words otherwise: ``vmoba:threshold=0.3,chunks=[2,4,4]``.

    Raises:
        ConfigError: for an unknown method or key (with a suggestion), or text of another form.
    """
    if text.endswith((".toml", ".json")):
        return _recipe(Path(text))
    if text.lstrip().startswith("{"):
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the method {text[:80]!r} is not valid JSON: {error}") from error
        return variant([method_from(table)])
    return variant([_parse_one(part.strip()) for part in _split(text, "+")])


def _recipe(path: Path) -> Variant:
    recipe = load(path)
    if recipe.unsupported != "error" or recipe.seed:
        raise ConfigError(
            f"{path} sets unsupported or seed, which a column cannot; attach it from Python: "
            "mmattn.attach(model, mmattn.load(path))"
        )
    methods = [
        m if recipe.sites is None or isinstance(m, Placed) else m.at(recipe.sites)
        for m in recipe.methods
    ]
    return Variant(f"recipe {path.stem}", tuple(methods))


def _parse_one(text: str) -> Method:
    name, _, settings = text.partition(":")
    if not name:
        raise ConfigError(f"a method is written name or name:key=value,key=value; got {text!r}")
    cls = method_class(name.strip())
    table: dict[str, Any] = {}
    for pair in _split(settings, ","):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"settings of {name} are written key=value and separated by commas; got {pair!r}"
            )
        table[key.strip()] = scalar(value.strip())
    return cls.from_dict(table)


def scalar(text: str) -> Any:
    """A JSON value where `text` is one, the text itself otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark`, but not inside brackets; drops empty parts. ``1e+5`` keeps its plus."""
    parts, depth = [""], 0
    for i, char in enumerate(text):
        depth += (char in "[({") - (char in "])}")
        exponent = mark == "+" and text[i - 1 : i] in "eE" and text[i + 1 : i + 2].isdigit()
        if char == mark and depth == 0 and not (exponent and "=" in parts[-1]):
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part.strip()]


def override(variants: Sequence[Variant], pairs: Sequence[str]) -> list[Variant]:
    """Apply ``--set name.key=value`` or ``--set key=value`` to every method that it names.

    Raises:
        ConfigError: when no method has that key, or the text has another form.
    """
    result = list(variants)
    for pair in pairs:
        path, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value or method.key=value; got {pair!r}")
        name, dot, key = path.strip().rpartition(".")
        hit, known = False, set[str]()
        for i, column in enumerate(result):
            methods = list(column.methods)
            for j, method in enumerate(methods):
                settings = method.to_dict()
                if isinstance(method, Placed):
                    continue  # a recipe is what its file says
                known |= {k for k in settings if k != "name"}
                if (not dot or method.name == name) and key in settings and key != "name":
                    methods[j] = method_from({**settings, key: scalar(value.strip())})
                    hit = True
            if column.methods:
                result[i] = replace(variant(methods))
        if not hit:
            raise ConfigError(
                f"--set {path}: no chosen method has that setting{suggest(key, known)} "
                f"Settings here: {sorted(known)}"
            )
    return result
