"""Cells of a row: which keys there are, which kinds of item read them, and what they may hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmattn.batch.limits import check_picture, text_problem
from mmattn.errors import ConfigError, MmattnError, suggest

KINDS: dict[str, str] = {"image": "t2i", "video": "t2v", "imageset": "t2i", "caption": "vlm"}
"""What a row can ask for, and the kind of model that serves it."""

PROMPT_CHARS = METHOD_CHARS = 10_000
METHODS = 256
AREA, VOLUME = 2**26, 2**30
"""Most pixels of a picture, and of all frames of a clip."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "image": {"steps": 20},
    "video": {"steps": 20, "fps": 8},
    "imageset": {"steps": 20},
    "caption": {"max_new_tokens": 96, "prompt": "describe the picture ."},
}


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, float) and whole and value.is_integer():
            value = int(value)  # Parquet and spreadsheets write 20.0
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"must be {kind} from {low:g} to {high:g}, found {_shown(value)}")
        return value if whole else float(value)

    return check


def _text(most: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"must be text, found {_shown(value)}")
        if len(value) > most:
            raise ValueError(f"has {len(value):,} characters; {most:,} is the limit")
        if problem := text_problem(value):
            raise ValueError(problem)
        return value

    return check


def _id(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _text(200)(value)


def _kind(value: Any) -> str:
    if not isinstance(value, str) or value not in KINDS:
        raise ValueError(
            f"must be one of {list(KINDS)}, found {_shown(value)}{suggest(str(value), KINDS)}"
        )
    return value


def _path(value: Any) -> str:
    text = _text(1000)(value)
    if "://" in text or text.startswith("data:"):
        raise ValueError(f"must be a local file, found {_shown(text)}")
    return text


def _panels(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 1 <= len(value) <= 16:
        raise ValueError("must be a list of 1 to 16 panels")
    panels = []
    for panel in value:
        table = {"prompt": panel} if isinstance(panel, str) else panel
        if not isinstance(table, dict) or not {"prompt"} <= set(table) <= {"prompt", "image"}:
            raise ValueError(
                f"a panel is a prompt, or has the keys prompt and image; {_shown(panel)}"
            )
        checked = {"prompt": _text(PROMPT_CHARS)(table["prompt"])}
        if table.get("image") is not None:
            checked["image"] = _path(table["image"])
        panels.append(checked)
    return panels


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_ANY, _DRAWN = frozenset(KINDS), frozenset({"image", "video", "imageset"})
_side = _number(8, 8192, whole=True)
CELLS: dict[str, tuple[frozenset[str], Callable[[Any], Any]]] = {
    "id": (_ANY, _id),
    "kind": (_ANY, _kind),
    "prompt": (_ANY, _text(PROMPT_CHARS)),
    "seed": (_ANY, _number(0, 2**63 - 1, whole=True)),
    "n": (_ANY, _number(1, 1000, whole=True)),
    "method": (_ANY, lambda value: value),
    "negative_prompt": (_DRAWN, _text(PROMPT_CHARS)),
    "width": (_DRAWN, _side),
    "height": (_DRAWN, _side),
    "steps": (_DRAWN, _number(1, 1000, whole=True)),
    "guidance": (_DRAWN, _number(0, 100)),
    "num_frames": (frozenset({"video"}), _number(1, 600, whole=True)),
    "fps": (frozenset({"video"}), _number(1, 60, whole=True)),
    "init_image": (frozenset({"image", "video"}), _path),
    "strength": (frozenset({"image"}), _number(0.01, 1)),
    "panels": (frozenset({"imageset"}), _panels),
    "image": (frozenset({"caption"}), _path),
    "max_new_tokens": (frozenset({"caption"}), _number(1, 4096, whole=True)),
}
"""Key of a row to the kinds that read it and the check of its value."""


def kind_of(cells: Mapping[str, Any], default: str) -> str:
    """The kind a row names or, by its keys, means."""
    if "kind" in cells:
        return _kind(cells["kind"])
    for key, kind in (("panels", "imageset"), ("image", "caption"), ("num_frames", "video")):
        if key in cells:
            return kind
    return default


def check_cells(
    cells: Mapping[str, Any], kind: str, folder: Path, *, allow_extra: bool = False
) -> dict[str, Any]:
    """The cells of a row with their values checked, and paths made absolute against `folder`.

    Raises:
        ConfigError: with every problem of the row in one sentence each.
    """
    good: dict[str, Any] = {}
    problems: list[str] = []
    unknown = [key for key in cells if key not in CELLS]
    if unknown and not allow_extra:
        hint = suggest(str(unknown[0]), CELLS, n=1)
        problems.append(f"unknown key{'s' * (len(unknown) > 1)} {sorted(map(str, unknown))}{hint}")
    for key, value in cells.items():
        if key not in CELLS:
            continue
        kinds, check = CELLS[key]
        if kind not in kinds:
            problems.append(f"{key} is for {' and '.join(sorted(kinds))}, not for {kind}")
            continue
        try:
            good[key] = check(value)
        except ValueError as error:
            problems.append(f"{key} {error}")
    for name in ("image", "init_image"):
        if name in good:
            good[name] = _picture(good[name], name, folder, problems)
    for panel in good.get("panels", ()):
        if "image" in panel:
            panel["image"] = _picture(panel["image"], "panels: image", folder, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return good


def _picture(text: str, key: str, folder: Path, problems: list[str]) -> str:
    try:
        path = (folder / Path(text).expanduser()).absolute()
        check_picture(path)
    except (ConfigError, RuntimeError) as error:  # the latter: the home of an unknown user
        problems.append(f"{key}: {error}")
        return text
    return str(path)


def complete(cells: Mapping[str, Any], kind: str) -> None:
    """Check what only the whole row shows.

    Raises:
        ConfigError: when something is missing or too much together.
    """
    if kind == "caption" and "image" not in cells:
        raise ConfigError("a caption needs image, the path of a picture")
    if kind == "imageset" and "panels" not in cells:
        raise ConfigError("an imageset needs panels, a list of prompts")
    if kind == "imageset":
        from mmattn.batch.imagesets import caption_of

        caption_of(cells)
    if kind in ("image", "video") and "prompt" not in cells:
        raise ConfigError(f"{'an' if kind == 'image' else 'a'} {kind} needs a prompt")
    if "strength" in cells and "init_image" not in cells:
        raise ConfigError("strength needs init_image")
    area = cells.get("width", 8) * cells.get("height", 8) * len(cells.get("panels", "1"))
    volume = area * cells.get("num_frames", 1)
    if area > AREA or volume > VOLUME:
        raise ConfigError(
            f"{area:,} pixels a frame and {volume:,} in all; {AREA:,} and {VOLUME:,} are the limits"
        )


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[tuple[str, ...], str]:
    from mmattn.variants import parse

    column = parse(text)
    return tuple(json.dumps(m.to_dict()) for m in column.methods), column.label


def methods_of(value: Any) -> tuple[tuple[dict[str, Any], ...], str]:
    """Method tables and label of a ``method`` cell: text as for ``-m``, a table, or a list of those.

    Raises:
        ConfigError: for an unknown method or setting, or a cell of another form.
    """
    if value is None or value == "dense":
        return (), "dense"
    tables: list[dict[str, Any]] = []
    labels = []
    parts = value if isinstance(value, list) else [value]
    if len(parts) > METHODS:
        raise ConfigError(f"method is a list of {len(parts)}; {METHODS} is the limit")
    for part in parts:
        if not isinstance(part, (str, dict)) or not part or str(part).isspace():
            raise ConfigError(
                f"method must be text, a table or a list of those, found {_shown(part)}"
            )
        try:
            text = part.strip() if isinstance(part, str) else json.dumps(part)
            if len(text) > METHOD_CHARS:
                raise ConfigError(
                    f"method has {len(text):,} characters; {METHOD_CHARS:,} is the limit"
                )
            texts, label = _parsed(text)
        except MmattnError:
            raise
        except (ValueError, TypeError, OSError, RecursionError) as error:
            # JSON that is none, a type that JSON does not have, a path that cannot be.
            raise ConfigError(f"method {_shown(part)} cannot be read: {error}") from error
        tables += [json.loads(text) for text in texts]
        labels.append(label)
    return tuple(tables), " + ".join(labels)
