"""One question about one picture, and one classification, untouched and with methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from mmattn.attaching import attach
from mmattn.calls import answer, labels_of, logits, preprocess
from mmattn.loading import Loaded
from mmattn.measuring import measured
from mmattn.report import Stats
from mmattn.variants import DENSE, Variant
from mmattn_demos import overlays
from mmattn_demos.models import parameters_on
from mmattn_demos.numbers import Measures, measures
from mmattn_demos.streaming import Tell, Update


@dataclass(frozen=True)
class Said:
    """One answer, or one classification.

    Args:
        text: the answer; empty for classifications.
        chances: class to probability; empty for answers.
        overlay: the picture with what was kept or merged; None where nothing was.
    """

    label: str
    text: str
    chances: dict[str, float]
    seconds: float
    memory_mb: float | None
    stats: Stats | None
    overlay: Image.Image | None


def ask(
    loaded: Loaded,
    picture: Image.Image,
    question: str,
    column: Variant,
    seed: int,
    new_tokens: int,
    tell: Tell,
) -> list[Said]:
    """The untouched model's answer and, where methods were chosen, theirs; greedy."""
    found = []
    for label, methods in _turns(column):
        tell(Update(f"{label}: answering"))
        found.append(_answer(loaded, picture, question, label, methods, seed, new_tokens))
    return found


def _turns(column: Variant) -> list[tuple[str, Variant]]:
    return [(DENSE.label, DENSE)] + ([(column.label, column)] if column.methods else [])


def _answer(
    loaded: Loaded,
    picture: Image.Image,
    question: str,
    label: str,
    column: Variant,
    seed: int,
    new_tokens: int,
) -> Said:
    def call(length: int) -> str:
        return answer(loaded, [picture], [question], max_new_tokens=length)[0]

    device = parameters_on(loaded)
    if not column.methods:
        call(1)
        done = measured(lambda: call(new_tokens), device)
        return Said(label, done.value, {}, done.seconds, done.memory_mb, None, None)
    methods = [overlays.watched(entry) for entry in column.methods]
    with attach(loaded.target, methods, seed=seed) as session:
        call(1)
        session.reset()
        done = measured(lambda: call(new_tokens), device)
        kept, stats = overlays.kept_of(session), session.stats
    overlay = None if kept is None else overlays.kept_overlay(picture, *kept)
    return Said(label, done.value, {}, done.seconds, done.memory_mb, stats, overlay)


def classify(
    loaded: Loaded, picture: Image.Image, column: Variant, top: int, tell: Tell
) -> list[Said]:
    """The `top` classes of the untouched model and, where methods were chosen, with them."""
    pixels, names = preprocess(loaded, [picture]), labels_of(loaded)
    device = parameters_on(loaded)
    found = []
    for label, chosen in _turns(column):
        tell(Update(f"{label}: looking"))
        logits(loaded, pixels)
        stats, overlay = None, None
        if chosen.methods:
            methods = [overlays.watched(entry) for entry in chosen.methods]
            with attach(loaded.target, methods) as session:
                logits(loaded, pixels)
                session.reset()
                done = measured(lambda: logits(loaded, pixels), device)
                groups, stats = overlays.groups_of(session), session.stats
            overlay = None if groups is None else _merged(picture, groups)
        else:
            done = measured(lambda: logits(loaded, pixels), device)
        best = done.value.softmax(1)[0].topk(min(top, len(names)))
        chances = {names[int(i)]: float(p) for p, i in zip(*best, strict=True)}
        found.append(Said(label, "", chances, done.seconds, done.memory_mb, stats, overlay))
    return found


def _merged(picture: Image.Image, groups: torch.Tensor) -> Image.Image | None:
    side = round(len(groups) ** 0.5)
    if side * side != len(groups):
        return None
    square = _crop(picture)
    return overlays.merged_overlay(square, (side, side), groups)


def _crop(picture: Image.Image) -> Image.Image:
    """The middle square, which is what classifiers look at."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def numbers(said: list[Said]) -> list[Measures]:
    """One row per run."""
    return [measures(one.label, one.seconds, one.memory_mb, one.stats) for one in said]
