"""A conversation with `ChatDiT`, and its folder: one JSON file and a PNG for every picture."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmattn.batch.writers import atomic, write_json
from mmattn.errors import ConfigError
from mmattn_pipelines.chatdit_plan import ContractError, Picture, Plan

_FILE = "conversation.json"
_FORM = 1
_NAME = re.compile(r"picture_\d{4,}_[a-z0-9-]+")


@dataclass(frozen=True)
class Round:
    """One message and what became of it.

    Args:
        number: from 1.
        text: the message.
        given, drawn: numbers of the pictures that came with it, and of those that were drawn for it.
        seed: from which the noise of its canvases follows.
        article: an article was asked for by name.
        plan: what was decided; None before that.
        markdown: of the article; None without one.
        error: what stopped it, if something did.
        complete: whether everything was drawn and written.
    """

    number: int
    text: str
    given: tuple[int, ...]
    seed: int
    article: bool
    plan: Plan | None = None
    drawn: tuple[int, ...] = ()
    markdown: str | None = None
    error: str | None = None
    complete: bool = False


@dataclass
class Conversation:
    """All that a conversation is; `written` are the folders it is in, with the pictures that are there."""

    seed: int
    panel: tuple[int, int] | None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    pictures: list[Picture] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    written: dict[Path, int] = field(default_factory=dict)


def save(talk: Conversation, folder: Path) -> Path:
    """Write what is not there yet; the JSON file last, so that what it names is there."""
    path, place = folder / _FILE, folder.resolve()
    if place not in talk.written and path.exists() and _read(path)["identity"] != talk.identity:
        raise ConfigError(
            f"{folder} holds another conversation; choose another folder, or go on with that one by "
            "ChatDiT.load"
        )
    for picture in talk.pictures[talk.written.get(place, 0) :]:
        with atomic(folder / f"{picture.name}.png") as temporary:
            picture.image.save(temporary, "PNG")
    talk.written[place] = len(talk.pictures)
    pictures = [
        {"name": p.name, "description": p.description, "drawn": p.drawn, "round": p.round}
        for p in talk.pictures
    ]
    rounds = [
        {**asdict(replace(r, plan=None)), "plan": None if r.plan is None else r.plan.to_dict()}
        for r in talk.rounds
    ]
    write_json(
        path,
        {
            "form": _FORM,
            "identity": talk.identity,
            "seed": talk.seed,
            "panel": talk.panel,
            "pictures": pictures,
            "rounds": rounds,
        },
    )
    return path


def load(folder: Path) -> Conversation:
    """Read a conversation and all its pictures.

    Raises:
        ConfigError: there is none, it was written in another form, or it is damaged.
    """
    path = folder / _FILE
    data = _read(path)
    try:
        pictures = []
        for number, entry in enumerate(data["pictures"], 1):
            if not _NAME.fullmatch(entry["name"]):
                raise ValueError(f"{entry['name']!r} is not the name of a picture")
            with Image.open(folder / f"{entry['name']}.png", formats=("PNG",)) as image:
                pictures.append(Picture(number=number, image=image.convert("RGB"), **entry))
        rounds = [_round(entry) for entry in data["rounds"]]
        panel = None if data["panel"] is None else tuple(data["panel"])
        written = {folder.resolve(): len(pictures)}
        return Conversation(data["seed"], panel, data["identity"], pictures, rounds, written)
    except (ValueError, KeyError, TypeError, OSError, ContractError) as error:
        raise ConfigError(f"the conversation in {folder} is damaged: {error}") from error


def _round(entry: dict[str, Any]) -> Round:
    plan = None if entry["plan"] is None else Plan.from_dict(entry["plan"])
    numbers = {name: tuple(entry[name]) for name in ("given", "drawn")}
    return Round(**{**entry, **numbers, "plan": plan})


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no conversation in {path.parent}: {_FILE} is missing"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("form") != _FORM or "identity" not in data:
        raise ConfigError(f"{path} is not a conversation of form {_FORM}")
    return data
