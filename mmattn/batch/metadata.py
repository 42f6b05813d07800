"""Cells of a row out of what a file says about itself; always data, checked afterwards like any row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmattn.batch.cells import KINDS
from mmattn.errors import ConfigError

SCHEMA = 1
"""Version of the metadata in files."""

_FORMS: dict[str, type] = {
    "id": str,
    "kind": str,
    "seed": int,
    "fingerprint": str,
    "methods": list,
}
_FACTS = frozenset(
    {"schema", "mmattn", "model", "fingerprint", "device", "dtype", "torch"}
    | {"methods", "method", "size", "notes"}
)
_HASHES = ("image_sha256", "init_image_sha256")
_LABELS = {"Steps": "steps", "Seed": "seed", "CFG scale": "guidance"}
_NEGATIVE = "Negative prompt: "


def cells_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row that asks for what `mmattn batch` made a file from; values are not checked yet.

    Raises:
        ConfigError: when the metadata is not of `mmattn batch`, or incomplete.
    """
    if meta.get("schema") != SCHEMA:
        raise ConfigError(
            f"it does not carry the metadata of mmattn batch (schema {SCHEMA}), so it cannot be made again "
            "from the file alone"
        )
    for key, form in _FORMS.items():
        if not isinstance(meta.get(key), form):
            raise ConfigError(f"{key} is missing from its metadata, or of the wrong type")
    if meta["kind"] not in KINDS:
        raise ConfigError(f"its metadata names the unknown kind {meta['kind']!r}")
    if not all(isinstance(table, dict) for table in meta["methods"]):
        raise ConfigError("the methods in its metadata are no tables")
    if "n" in meta:
        raise ConfigError("its metadata has the unknown key 'n'")
    cells = {k: v for k, v in meta.items() if k not in _FACTS and k not in _HASHES}
    if isinstance(cells.get("panels"), list):
        cells["panels"] = [
            {k: v for k, v in panel.items() if k != "image_sha256"}
            if isinstance(panel, dict)
            else panel
            for panel in cells["panels"]
        ]
    return {**cells, "method": meta["methods"] or "dense"}


def pictures_of(params: Mapping[str, Any]) -> list[Any]:
    """The hashes of the pictures that an item was made from, in a fixed order."""
    panels = params.get("panels")
    return [
        *(params.get(name) for name in _HASHES),
        *(
            panel.get("image_sha256")
            for panel in (panels if isinstance(panels, list) else ())
            if isinstance(panel, dict)
        ),
    ]


def parse_parameters(text: str) -> tuple[dict[str, Any], str]:
    """Cells, as text, and the name of the model, out of the ``parameters`` that other programs write.

    That text is the prompt, a line ``Negative prompt: ...``, and a last line ``Steps: 20, Sampler: ..., CFG
    scale: 7, Seed: 1, Size: 512x512, ...``. Prompt, negative prompt, steps, guidance, seed and size are
    taken; what else is there (samplers, upscalers, weights of words) means nothing here.

    Raises:
        ConfigError: for text of another form.
    """
    *lines, last = text.strip().split("\n")
    if _value(last, "Steps") is None or _value(last, "Seed") is None:
        raise ConfigError(
            "its parameters do not end in a line such as Steps: 20, Seed: 1, Size: 512x512"
        )
    cells: dict[str, Any] = {"kind": "image"}
    starts = [i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)]
    middle = starts[0] if starts else len(lines)
    cells["prompt"] = "\n".join(lines[:middle]).strip()
    negative = "\n".join(lines[middle:]).removeprefix(_NEGATIVE).strip()
    if negative:
        cells["negative_prompt"] = negative
    for label, key in _LABELS.items():
        if (value := _value(last, label)) is not None:
            cells[key] = value
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", _value(last, "Size") or "")
    if size:
        cells["width"], cells["height"] = size.groups()
    return cells, _value(last, "Model") or ""


def _value(line: str, label: str) -> str | None:
    # The first one counts: texts of extensions, which may hold anything, come later in the line.
    found = re.search(rf"(?:^|, ){label}: ([^,]{{1,200}})(?:,|$)", line)
    return found and found[1].strip()
