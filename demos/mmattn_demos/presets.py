"""Methods that the demos offer by name, and methods that a visitor types."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mmattn.errors import ConfigError
from mmattn.methods.base import Method, Placed
from mmattn.registry import method_from
from mmattn.variants import DENSE, Variant, parse
from mmattn_demos.limits import METHOD_LENGTH, short_enough

Entry = tuple[str, str, str]
"""Label, method as the command line writes it, one sentence."""

_PICTURES: tuple[Entry, ...] = (
    ("VMoBA, half of the chunks", "vmoba:topk=0.5", "Each query chooses the chunks most like it."),
    (
        "VMoBA, a quarter of the chunks",
        "vmoba:topk=0.25",
        "The setting of the paper, with the first quarter of the steps dense.",
    ),
    (
        "Neighborhood, 70 % windows",
        "neighborhood:window=0.7",
        "A fixed window around each query; what lies outside is out for good.",
    ),
    (
        "SparseD, small blocks",
        "sparsed:block=16",
        "The best blocks of keys, chosen once, at the last dense step.",
    ),
    (
        "Agent attention, last quarter",
        "agent-attention:agents=16,start=0.75",
        "A few pooled queries stand between queries and keys, late in the run.",
    ),
    (
        "Random blocks, half (baseline)",
        "random-blocks:density=0.5,block=16",
        "Blocks drawn at random: what a choice has to beat.",
    ),
)
_ANSWERS: tuple[Entry, ...] = (
    (
        "HiPrune, 32 tokens",
        "hiprune:keep=32",
        "Image tokens that two attention maps of the vision tower point at.",
    ),
    ("MergePrune, 21 tokens", "merge-prune:keep=21", "Tokens that look alike become one."),
    ("FastV, a third", "fastv:keep=0.33", "From block 3 on, a third of the image tokens."),
    (
        "Random pruning, 32 tokens (baseline)",
        "random-prune:keep=32",
        "Tokens drawn at random: what a choice has to beat.",
    ),
    ("VCD", "vcd", "Contrasts the words with those for a noised picture; invents less."),
    ("VHR", "vhr", "Reinforces the heads that react to the picture."),
    (
        "HiPrune + VCD (composition)",
        "hiprune:keep=32+vcd",
        "Half of the image tokens, and the contrast on top.",
    ),
    ("VCD + DoLa (composition)", "vcd+dola", "Two contrasts: a noised picture, an early layer."),
)
_CLASSES: tuple[Entry, ...] = (
    ("ToMe, 8 tokens a block", "tome:r=8", "Tokens that look alike merge after every block."),
    ("ToMe, half of the tokens", "tome:ratio=0.5", "Spread evenly over the blocks."),
    (
        "Agent attention, 16 agents",
        "agent-attention:agents=16",
        "A few pooled queries stand between queries and keys.",
    ),
    (
        "Random blocks, half (baseline)",
        "random-blocks:density=0.5,block=16",
        "Blocks drawn at random: what a choice has to beat.",
    ),
)
_SIMPLE = {"t2i": _PICTURES, "t2v": _PICTURES, "vlm": _ANSWERS, "vit": _CLASSES}


@dataclass(frozen=True)
class Preset:
    """A named choice of methods.

    Args:
        label: what the menu shows.
        column: the methods.
        note: one sentence.
        text: the same as the command line writes it; None where it takes a recipe file.
    """

    label: str
    column: Variant
    note: str
    text: str | None


def presets(kind: str) -> list[Preset]:
    """What the menu of a model of `kind` offers, compositions last.

    VMoBA gets its default chunks; on real models they are the paper's, on the embedded ones a few tokens.
    """
    found = [
        Preset(label, Variant(label, parse(text).methods), note, text)
        for label, text, note in _SIMPLE[kind]
    ]
    layers = {
        "t2i": (
            "Windows, then VMoBA (composition)",
            [("neighborhood", {"window": 0.7}, "*.transformer_blocks.*")],
            [("vmoba", {"topk": 0.5}, "*.single_transformer_blocks.*")],
            "Windows in the two-stream blocks, VMoBA in the single-stream ones.",
        ),
        "t2v": (
            "VMoBA by layer (composition)",
            [("vmoba", {"topk": 0.5}, "*.blocks.[0-2].attn1")],
            [("vmoba", {"topk": 0.25}, "*.blocks.[3-9].attn1")],
            "Half of the chunks in the first three blocks, a quarter in the next ones.",
        ),
    }
    if kind in layers:
        label, first, second, note = layers[kind]
        methods = [
            method_from({"name": name, **knobs}).at(where) for name, knobs, where in first + second
        ]
        found.append(Preset(label, Variant(label, tuple(methods)), note, None))
    return found


def chosen(text: str | None, kind: str) -> Variant:
    """The methods behind a menu entry, or behind what a visitor typed.

    Args:
        text: a label of `presets`, or ``name:key=value`` as for ``mmattn generate --method``; empty or
            ``dense`` means the untouched model.
        kind: which model.

    Raises:
        ConfigError: for an unknown method or setting, too long a text, or the name of a file: visitors
            name no files here.
    """
    text = short_enough(text, "the method", METHOD_LENGTH)
    if text in ("", DENSE.label):
        return DENSE
    for preset in presets(kind):
        if preset.label == text:
            return preset.column
    if text.lower().endswith((".toml", ".json")):
        raise ConfigError(
            "recipe files are read by the command line, not here; type the method, such as "
            "vmoba:topk=0.5, or choose one from the menu"
        )
    try:
        column = parse(text)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{text[:60]!r} is not a method: {error}") from error
    if not column.methods:
        raise ConfigError("that names no method; type one such as vmoba:topk=0.5")
    return column


def note_of(text: str | None, kind: str) -> str:
    """The sentence of a menu entry; empty for anything else."""
    return next((p.note for p in presets(kind) if p.label == text), "")


def command_text(column: Variant, kind: str) -> str | None:
    """`column` as the command line writes it, or None where it needs a recipe file."""
    for preset in presets(kind):
        if preset.column.methods == column.methods:
            return preset.text
    if any(isinstance(entry, Placed) for entry in column.methods):
        return None
    return "+".join(_written(entry) for entry in column.methods if isinstance(entry, Method))


def _written(method: Method) -> str:
    base = type(method)()
    changed = {
        key: value
        for key, value in method.to_dict().items()
        if key != "name" and value != getattr(base, key)
    }
    pairs = [f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in changed.items()]
    return f"{method.name}:{','.join(pairs)}" if pairs else method.name
