"""The JSON that ChatDiT's agents and a language model exchange, and checks that answer in sentences.

A check takes a parsed reply and returns what is in it, typed. What it refuses is a `ContractError` whose
message can be handed to the model as it is: which field, what was expected, what was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmattn_pipelines.chatdit_plan import NUMBER_WORDS, ContractError, Described, image_id

_PART = rf"(?:{'|'.join(NUMBER_WORDS[1:])}|MULTI|PANEL|\d+)"
_MARKER = re.compile(rf"\[({_PART}(?:-{_PART})*)\]")
Types = tuple[type, ...]

_TEXT: Types = (str,)
_MAYBE: Types = (str, type(None))


def parse_object(reply: str) -> dict[str, Any]:
    """The JSON object of a reply, which may have words or a code fence around it.

    Raises:
        ContractError: there is none.
    """
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", reply)):
        try:
            found = decoder.raw_decode(reply, start)[0]
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise ContractError(
        f"the reply holds no complete JSON object; it begins with {reply.strip()[:60]!r}"
    )


def check_description(reply: Any, count: int) -> tuple[str, tuple[Described, ...]]:
    """Overview and descriptions of `count` given pictures."""
    top = _fields(reply, "the reply", {"explanation": _MAYBE, "descriptions": (dict,)})
    inner = _fields(
        top["descriptions"], "descriptions", {"overview": _TEXT, "input_images": (list,)}
    )
    where = "descriptions.input_images"
    return inner["overview"], _images(inner["input_images"], where, "input", count)


def check_counting(reply: Any, input_count: int) -> int:
    """How many pictures are to be drawn."""
    whole = (int,)
    fields = {"explanation": _MAYBE, "input_image_count": whole, "output_image_count": whole}
    top = _fields(reply, "the reply", fields)
    if top["input_image_count"] != input_count:
        raise ContractError(
            f"input_image_count must repeat the {input_count} of the request, got "
            f"{top['input_image_count']}"
        )
    if top["output_image_count"] < 1:
        raise ContractError(
            f"output_image_count must be at least 1, got {top['output_image_count']}"
        )
    return int(top["output_image_count"])


def check_prompting(reply: Any, inputs: int, outputs: int) -> tuple[str, tuple[Described, ...]]:
    """Overview and descriptions of the pictures to draw.

    Without inputs and for one output the reply is flat: ``prompt`` and ``image_id``.
    """
    if inputs == 0 and outputs == 1:
        fields = {"explanation": _MAYBE, "prompt": _TEXT, "image_id": _TEXT}
        top = _fields(reply, "the reply", fields)
        item = {"image_id": top["image_id"], "description": top["prompt"]}
        return "", _images([item], "the reply", "output", 1)
    top = _fields(reply, "the reply", {"explanation": _MAYBE, "descriptions": (dict,)})
    wanted: dict[str, Types] = {"overview": _TEXT, "output_images": (list,)}
    inner = _fields(top["descriptions"], "descriptions", wanted)
    where = "descriptions.output_images"
    return inner["overview"], _images(inner["output_images"], where, "output", outputs)


def check_panelizing(reply: Any, count: int) -> tuple[str, tuple[str, ...]]:
    """What the panels share, and a clause for each."""
    top = _fields(reply, "the reply", {"explanation": _MAYBE, "prompt": _TEXT})
    return split_panels(top["prompt"], count)


def split_panels(prompt: str, count: int) -> tuple[str, tuple[str, ...]]:
    """Take ``[TWO-PANEL] shared, [PANEL-1] one, [PANEL-2] other`` apart.

    Raises:
        ContractError: other markers than one header and ``PANEL-1`` to ``PANEL-n`` in order; an empty
            clause.
    """
    marks = list(_MARKER.finditer(prompt))
    names = [mark[1] for mark in marks]
    headers = {f"{NUMBER_WORDS[count - 1]}-PANEL", f"{count}-PANEL", "MULTI-PANEL"}
    wanted = [f"PANEL-{i}" for i in range(1, count + 1)]
    if names[1:] != wanted or names[0] not in headers:
        raise ContractError(
            f"prompt must have the markers [{NUMBER_WORDS[count - 1]}-PANEL] and then "
            f"{_list(wanted)}, once each and in this order; found {_list(names)}"
        )
    ends = [mark.start() for mark in marks[1:]] + [len(prompt)]
    parts = [prompt[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    parts[0] = prompt[: marks[0].start()] + parts[0]
    overall, *panels = (one_line(part) for part in parts)
    for number, panel in enumerate(panels, 1):
        if not panel:
            raise ContractError(f"prompt has nothing behind [PANEL-{number}]; describe that panel")
    return overall, tuple(panels)


def check_selection(reply: Any, known: Mapping[str, int]) -> tuple[int, ...]:
    """Numbers of the earlier pictures that a message is about; `known` maps identifiers to numbers.

    Not one of ChatDiT's contracts: its code has no memory.
    """
    top = _fields(reply, "the reply", {"explanation": _MAYBE, "image_ids": (list,)})
    names = top["image_ids"]
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        raise ContractError(
            f"image_ids names {unknown[0]!r}, which is not in the conversation; known are {list(known)}"
        )
    if len(set(names)) != len(names):
        raise ContractError(f"image_ids must name every picture once, got {names}")
    return tuple(known[name] for name in names)


_ESCAPED = re.compile(r"\\[!-/:-@\[-`{-~]")
_TARGET = re.compile(r"(!?)\[[^\]]*\]\(\s*([^)\s]*)")
_LOOSE = re.compile(r"!\[[^\]]*\](?!\()|\[[^\]]+\]:|\[[^\]]*\[")


def check_markdown(text: str, outputs: Sequence[str], others: Sequence[str] = ()) -> str:
    """Markdown that shows every output, no unknown picture, and links to nothing but web pages.

    Args:
        outputs: identifiers of the pictures that must be shown, as ``![text](<identifier>.png)``.
        others: identifiers that may be shown too.

    Raises:
        ContractError: with the first thing that is wrong.
    """
    body = _unfenced(text)
    live = _ESCAPED.sub("", body)
    known = [f"{name}.png" for name in (*outputs, *others)]
    if loose := _LOOSE.search(live):
        raise ContractError(
            f"the article has {loose[0]!r}; write links and pictures in line, as [text](target) without "
            "square brackets in the text"
        )
    shown = []
    for picture, target in _TARGET.findall(live):
        if picture and target not in known:
            raise ContractError(f"the article shows {target!r}, which is not one of {known}")
        if not picture and not target.startswith(("https://", "http://")):
            raise ContractError(f"the article links to {target!r}; only web pages may be linked")
        shown += [target] * bool(picture)
    if missing := [name for name in outputs if f"{name}.png" not in shown]:
        raise ContractError(
            f"the article never shows {missing[0]}.png; every drawn picture is shown once"
        )
    return body


def _unfenced(text: str) -> str:
    """Markdown without the code fence that models like to put around all of it."""
    fence = re.fullmatch(r"\s*```(?:markdown|md)?\n(.*?)\n```\s*", text, re.S)
    return (fence[1] if fence else text).strip() + "\n"


def one_line(text: str) -> str:
    """A clause in one line, without square brackets and without what joins clauses at its end."""
    bare = re.sub(r"[\[\]]", "", " ".join(text.split()))
    return re.sub(r"(?:[\s,;]|(?<![\w-])and(?=[\s,;]*$))+$", "", bare)


def _fields(value: Any, where: str, wanted: Mapping[str, Types]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ContractError(f"{where} must be a JSON object, got {_kind(value)}")
    if missing := [key for key in wanted if key not in value]:
        raise ContractError(f"{where} lacks {missing[0]!r}; its keys are {list(wanted)}")
    if extra := [key for key in value if key not in wanted]:
        raise ContractError(
            f"{where} has {extra[0]!r}, which does not belong there; its keys are {list(wanted)}"
        )
    for key, types in wanted.items():
        if not isinstance(value[key], types) or isinstance(value[key], bool):
            raise ContractError(
                f"{key} must be {_NAMES[types[0]]}, got {_kind(value[key])} in {where}"
            )
    return value


def _images(items: list[Any], where: str, kind: str, count: int) -> tuple[Described, ...]:
    if len(items) != count:
        raise ContractError(f"{where} must have {count} entries, got {len(items)}")
    found = []
    for number, item in enumerate(items, 1):
        place = f"{where}[{number - 1}]"
        entry = _fields(item, place, {"image_id": _TEXT, "description": _TEXT})
        prefix = f"{kind}_{number:04d}_"
        if not entry["image_id"].startswith(prefix):
            raise ContractError(
                f"image_id of {place} must begin with {prefix!r}, got {entry['image_id']!r}"
            )
        description = one_line(entry["description"])
        if not description:
            raise ContractError(f"description of {place} is empty; say what the picture shows")
        name = image_id(kind, number, entry["image_id"].removeprefix(prefix))
        found.append(Described(name, description))
    return tuple(found)


_NAMES = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


def _list(names: Sequence[str]) -> str:
    return " ".join(f"[{name}]" for name in names) or "none"
