"""Items: what one row asks for, checked, with an identity, a seed and a file name of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmattn.batch.cells import methods_of
from mmattn.batch.limits import picture_sha256, safe_stem
from mmattn.errors import MmattnError

FOLDERS = {"image": "images", "video": "videos", "imageset": "sets", "caption": "captions"}
SUFFIX = {"image": ".png", "video": ".mp4", "imageset": ".png", "caption": ".json"}


@dataclass(frozen=True)
class Item:
    """One picture, clip, image set or caption to make; JSON and pickle keep it whole.

    Args:
        id: name of the item; from the row, or a hash of its content and of the model.
        kind: one of `mmattn.batch.cells.KINDS`.
        seed: of its noise.
        params: everything else that the row and the defaults say, JSON-ready.
        methods: method tables, as in a recipe, attached together; empty for the untouched model.
        label: the methods for people; ``dense`` without any.
        model: fingerprint of the model that serves it.
        row: where it stands in the job file.
    """

    id: str
    kind: str
    seed: int
    params: dict[str, Any]
    methods: tuple[dict[str, Any], ...]
    label: str
    model: str
    row: int = 0

    @cached_property
    def key(self) -> str:
        """Hash of all that its result depends on. Resuming compares it."""
        return digest([self.kind, self.seed, portable(self.params), self.methods, self.model])

    @property
    def file(self) -> str:
        """Path inside the output folder."""
        stem = safe_stem(self.id)
        shelf = hashlib.sha256(self.id.encode()).hexdigest()[:2]
        return f"{FOLDERS[self.kind]}/{shelf}/{stem}{SUFFIX[self.kind]}"

    @property
    def group(self) -> str:
        """Items with the same group can share a call."""
        own = ("prompt", "init_image", "init_image_sha256", "image", "image_sha256", "panels")
        shared = {k: v for k, v in self.params.items() if k not in own}
        # Sets, and clips that start from a picture, are made one by one.
        alone = self.kind == "imageset" or (self.kind == "video" and "init_image" in self.params)
        more = {"init": "init_image" in self.params, "alone": alone and self.id}
        return canonical([self.kind, self.methods, shared, more])

    @property
    def cost(self) -> int:
        """Pixels times steps, roughly, as a power of two: shards get as many of each."""
        p = self.params
        pixels = p.get("width", 64) * p.get("height", 64) * p.get("num_frames", 1)
        work = pixels * p.get("steps", 1) + 4096 * p.get("max_new_tokens", 0)
        return int(work * max(1, len(p.get("panels", ())))).bit_length()


def portable(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` without paths: a picture is its content, wherever it lies."""
    kept = {k: v for k, v in params.items() if k not in ("init_image", "image")}
    if "panels" in kept:
        kept["panels"] = [
            {k: v for k, v in panel.items() if k != "image"} for panel in kept["panels"]
        ]
    return kept


def hashed(cells: Mapping[str, Any]) -> dict[str, Any]:
    """What the cells of a row say about its result, with the hashes of its pictures."""
    params = {k: v for k, v in cells.items() if k not in ("id", "kind", "seed", "n", "method")}
    for name in ("image", "init_image"):
        if name in params:
            params[f"{name}_sha256"] = picture_sha256(Path(params[name]))
    if "panels" in params:
        params["panels"] = [
            {**p, "image_sha256": picture_sha256(Path(p["image"]))} if "image" in p else p
            for p in params["panels"]
        ]
    return params


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def seed_of(identity: str) -> int:
    """The seed of an item that names none: it depends on nothing but the id."""
    return int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16)


def expand(
    cells: Mapping[str, Any],
    kind: str,
    fingerprint: str,
    *,
    row: int,
    repeat: int = 0,
) -> list[Item]:
    """The items of a checked row: one, or `n` with a seed each.

    Args:
        cells: what `check_cells` returned, with defaults filled in.
        kind: of the row.
        fingerprint: of the model.
        row: line in the file.
        repeat: how many rows without an id before this one said the same.
    """
    params = hashed(cells)
    methods, label = methods_of(cells.get("method"))
    name = cells.get("id")
    if name is None:
        content = [kind, portable(params), methods, fingerprint, cells.get("seed"), repeat]
        name = digest(content)
    count = cells.get("n", 1)
    items = []
    for k in range(count):
        identity = name if count == 1 else f"{name}-{k}"
        seed = seed_of(identity) if cells.get("seed") is None else cells["seed"] + k
        items.append(Item(identity, kind, seed, params, methods, label, fingerprint, row))
    return items


def sentence(error: BaseException) -> str:
    """An error in one line, with its type unless it is one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, MmattnError) else f"{type(error).__name__}: {text}"[:600]
