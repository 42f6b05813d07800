"""What a protocol is, and where its items come from: procedural scenes, or the user's files."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image, UnidentifiedImageError

from mmattn.errors import ConfigError

if TYPE_CHECKING:
    from mmattn.mini.objects import Scene

Picture = Callable[[str], Image.Image]
"""From a picture's key to the picture."""

PARTNER_PROB = 0.2
"""Share of expected objects that really are in a scene: the world that breaks the habit of training."""


@dataclass(frozen=True)
class Item:
    """One request about one picture.

    Args:
        id: unique within its protocol.
        picture: key of the picture.
        prompt: what is asked.
        target: the right answer, as the protocol writes it.
        doc: the item in the protocol's own format.
        limit: most tokens of the answer.
    """

    id: str
    picture: str
    prompt: str
    target: str
    doc: Mapping[str, Any]
    limit: int


@dataclass(frozen=True)
class Rate:
    """A number that a protocol reports; a ``percent`` is a share in [0, 1]."""

    key: str
    label: str
    style: Literal["percent", "points", "number"]
    better: Literal["high", "low", ""] = ""


class Protocol(ABC):
    """Items, and how answers are graded. The module of a protocol also has ``RATES`` and ``rates``, which
    turns summed counts ``[R]`` into rates ``[R]``.

    Args:
        items: what is asked.
        picture: opens the picture of a key; None when finished answers are graded.
        origin: where the items come from, for the record.
    """

    name: ClassVar[str]

    def __init__(
        self, items: Sequence[Item], picture: Picture | None, origin: Mapping[str, Any]
    ) -> None:
        if not items:
            raise ConfigError(f"{self.name}: there is nothing to ask in {dict(origin)}")
        self.items, self.picture, self.origin = tuple(items), picture, dict(origin)

    @abstractmethod
    def tally(self, items: Sequence[Item], responses: Sequence[str]) -> dict[str, float]:
        """Counts of one picture, given all its items."""

    @abstractmethod
    def payload(self, item: Item, response: str) -> dict[str, Any]:
        """Per-metric entries of a line of the samples file."""

    @abstractmethod
    def write(self, folder: Path, responses: Sequence[str]) -> None:
        """Write all answers in the format that the protocol's own scorer reads."""

    def filtered(self, item: Item, response: str) -> str:
        """The answer as it is graded."""
        return response

    def tallies(self, responses: Sequence[str]) -> tuple[list[str], dict[str, list[float]]]:
        """Picture keys, and a list of counts per counter in that order."""
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            groups.setdefault(item.picture, []).append(i)
        rows = [
            self.tally([self.items[i] for i in group], [responses[i] for i in group])
            for group in groups.values()
        ]
        names = dict.fromkeys(name for row in rows for name in row)
        return list(groups), {name: [row.get(name, 0) for row in rows] for name in names}


def ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a / b``, and 0 where `b` is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


@dataclass(frozen=True)
class World:
    """Procedural scenes whose objects are known, their pictures, and the habit of the training world."""

    scenes: Sequence[Scene]
    images: Sequence[Image.Image]
    habit: Sequence[tuple[str, ...]]
    seed: int

    def picture(self, key: str) -> Image.Image:
        """The picture of scene number `key`."""
        return self.images[int(key)]

    @property
    def origin(self) -> dict[str, Any]:
        """For the record."""
        return {"scenes": len(self.scenes), "seed": self.seed, "partner_prob": PARTNER_PROB}


def world(count: int, seed: int = 0) -> World:
    """`count` scenes of the counter-world, where expected objects are mostly absent; no training saw them."""
    from mmattn.mini import objects
    from mmattn.mini.vlm import to_images

    generator = torch.Generator().manual_seed(990_000 + seed * 10 % 10_000)
    scenes = objects.sample_scenes(count, generator, PARTNER_PROB)
    habit = [scene.names for scene in objects.sample_scenes(1000, generator)]
    return World(scenes, to_images(objects.render(scenes)[0]), habit, seed)


def records(path: Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON list or a JSONL file, each with the place to name in an error.

    Raises:
        ConfigError: for a missing file, a line that is not a JSON object, or one without all `keys`.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file at {path}")
    text = path.read_text(encoding="utf-8")
    rows: Iterator[tuple[str, str | Any]]
    if text.lstrip().startswith("["):
        try:
            rows = ((f"{path} entry {n}", row) for n, row in enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
    else:
        lines = enumerate(text.split("\n"), 1)  # splitlines also breaks inside strings
        rows = ((f"{path} line {n}", line) for n, line in lines if line.strip())
    for place, row in rows:
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise ConfigError(f"{place} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{place} must be a JSON object, found {type(row).__name__}")
        missing = [key for key in keys if key not in row]
        if missing:
            raise ConfigError(f"{place} has no {missing[0]!r}; its keys are {sorted(row)}")
        yield place, row


def picture_file(images: Path | None, name: str, place: str) -> str:
    """`name`, if the folder has it or no folder is given (finished answers need no pictures).

    Raises:
        ConfigError: otherwise, naming the line.
    """
    if images is not None and not (images / name).is_file():
        raise ConfigError(f"{place} asks about {name}, which is not in {images}")
    return name


def opener(images: Path | None) -> Picture | None:
    """Opens pictures of a folder by file name."""
    if images is None:
        return None

    def read(name: str) -> Image.Image:
        try:
            with Image.open(images / name) as picture:
                return picture.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"{images / name} cannot be read as a picture: {error}") from error

    return read


def digest(data: Any) -> str:
    """SHA-256 of `data` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def put(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def put_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSONL."""
    put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
