"""Rows of attention_guidance.py on more than one picture: subject consistency, and clips."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attention_guidance_common import (
    SEED,
    SIZE,
    Object,
    Results,
    article,
    backgrounds,
    named,
    noise,
    objects,
)
from mmattn_pipelines.eidtv import EIDTV

import mmattn
from mmattn import IsolationReposition
from mmattn.mini.oracle import look
from mmattn.mini.scenes import POSITIONS

BOXES: dict[str, Any] = {
    "sources": ((0.2, 0.2, 0.8, 0.8),) * 2,
    "targets": ((0.2, 0.0, 0.8, 0.5), (0.2, 0.5, 0.8, 1.0)),
}
EVERYWHERE: dict[str, Any] = {**BOXES, "start_layer": 0, "dropout": 0.0}
SETTINGS: dict[str, IsolationReposition | None] = {
    "plain": None,
    "isolation alone": IsolationReposition(**BOXES, reposition=False),
    "published settings": IsolationReposition(**BOXES),
    "all layers": IsolationReposition(**BOXES, start_layer=0),
    "all layers, no dropout": IsolationReposition(**EVERYWHERE),
    "without isolation": IsolationReposition(**EVERYWHERE, isolate=False),
    "with the references' text": IsolationReposition(**EVERYWHERE, reference_text=True),
}


def consistency(results: Results, pipe: Any) -> None:
    """Scenes that name no colours, with references that do: do subjects have their reference's colour?"""
    n = results.n
    things, ground = objects(n, 2, SEED + 2), backgrounds(n, SEED + 2)
    scenes = [
        f"{article(a[1])} left of {article(b[1])} on a {g} background"
        for (a, b), g in zip(things, ground, strict=True)
    ]
    references = [
        [f"{named(t)} in the center on a {g} background" for t in row]
        for row, g in zip(things, ground, strict=True)
    ]
    shown: dict[str, list[torch.Tensor]] = {}

    def drawn(method: IsolationReposition | None, shift: int = 0) -> torch.Tensor:
        prompts: list[str] = []
        for i, scene in enumerate(scenes):
            prompts += [*references[(i + shift) % n], scene]

        def draw() -> torch.Tensor:
            pictures: torch.Tensor = pipe(
                prompts,
                generator=noise(len(prompts)),
                num_inference_steps=10,
                output_type="pt",
                **SIZE,
            ).images
            return pictures

        if method is None:
            return draw()
        with mmattn.attach(pipe, method):
            return draw()

    for name, method in {
        **SETTINGS,
        "references of another scene": SETTINGS["with the references' text"],
    }.items():
        shift = 1 if name == "references of another scene" else 0

        def measured(
            method: IsolationReposition | None = method, shift: int = shift, name: str = name
        ) -> dict[str, list[float]]:
            pictures = drawn(method, shift)
            shown[name] = list(pictures[: 3 * 5])
            values: dict[str, list[float]] = {
                "colour": [],
                "shape": [],
                "count": [],
                "moved colour": [],
            }
            for i, sight in enumerate(look(pictures[2::3])):
                seen = sorted(sight.things, key=lambda thing: thing.cx)
                right = len(seen) == 2
                own, other = things[i], things[(i + 1) % n]
                values["count"].append(float(right))
                values["colour"].append(_agreement(seen, [t[0] for t in own], "colour"))
                values["shape"].append(_agreement(seen, [t[1] for t in own], "shape"))
                values["moved colour"].append(_agreement(seen, [t[0] for t in other], "colour"))
            return values

        results.measure(f"consistency / {name}", measured, "consistency / plain")
    if "plain" in shown:
        plain, ours = shown["plain"], shown["with the references' text"]
        published, layers = shown["published settings"], shown["all layers, no dropout"]
        results.strip(
            "consistency.png",
            [
                [p for i in range(min(5, n)) for p in (plain[3 * i], plain[3 * i + 1])],
                [p for i in range(min(5, n)) for p in (plain[3 * i + 2], published[3 * i + 2])],
                [p for i in range(min(5, n)) for p in (layers[3 * i + 2], ours[3 * i + 2])],
            ],
        )


def _agreement(seen: Sequence[Any], wanted: Sequence[str], what: str) -> float:
    """Share of the two subjects, from left to right, that look as wanted; 0 unless there are two."""
    if len(seen) != 2:
        return 0.0
    return sum(getattr(thing, what) == w for thing, w in zip(seen, wanted, strict=True)) / 2


PLACES = ("left", "center", "right")


def find(picture: torch.Tensor, texts: Sequence[str], reach: int = 4) -> torch.Tensor:
    """The detector: a place word is its zone, other texts are what differs from the border, both widened.

    Args:
        picture: ``[3, 64, 64]``.
        texts: what to find.
        reach: by how many pixels maps are wider than what was found.
    """
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    apart = (picture - border.median(1).values[:, None, None]).norm(dim=0)
    there = torch.nn.functional.max_pool2d((apart > 0.22).float()[None], 2 * reach + 1, 1, reach)[0]
    axis = torch.arange(64) + 0.5
    maps = []
    for text in texts:
        if text in POSITIONS:
            x, y = POSITIONS[text]
            away = ((axis[:, None] - y) ** 2 + (axis[None] - x) ** 2).sqrt()
            maps.append((away < 14 + reach).float())
        else:
            maps.append(there)
    return torch.stack(maps)


def somewhere(picture: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """The control: maps of the same values at other places, in blocks of 8 x 8."""
    maps = find(picture, texts).unflatten(2, (8, 8)).unflatten(1, (8, 8)).transpose(2, 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(len(texts)))
    mixed = maps.flatten(1, 2)[:, order].unflatten(1, (8, 8)).transpose(2, 3)
    return mixed.flatten(3, 4).flatten(1, 2)


def video(results: Results, pipe: Any) -> None:
    """Three frames of one object; the prompts name no background and no size."""
    n = results.n
    things = [row[0] for row in objects(n, 1, SEED + 3)]
    prompts = [
        [f"{named(t)} {'in' if place == 'center' else 'on'} the {place}" for place in PLACES]
        for t in things
    ]
    draw = {"num_inference_steps": 8, **SIZE}
    shown: dict[str, list[torch.Tensor]] = {}

    def still(same: bool) -> torch.Tensor:
        """Frames that do not know of each other, ``[n, T, 3, Y, X]``."""
        generators = [
            torch.Generator().manual_seed(SEED + 10 * i + (0 if same else j))
            for i in range(n)
            for j in range(3)
        ]
        flat = [prompt for row in prompts for prompt in row]
        pictures: torch.Tensor = pipe(flat, generator=generators, output_type="pt", **draw).images
        return pictures.unflatten(0, (n, 3))

    def clips(**settings: Any) -> torch.Tensor:
        detector = settings.pop("detector", find)
        made = EIDTV(pipe, detector, **settings)
        return torch.stack(
            [
                made(
                    row,
                    changes=[[" ".join(t), PLACES[j]] for j in (1, 2)],
                    seed=SEED + 10 * i,
                    **draw,
                ).frames
                for i, (row, t) in enumerate(zip(prompts, things, strict=True))
            ]
        )

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "the same seed": lambda: still(same=True),
        "independent frames": lambda: still(same=False),
        "EIDT-V": lambda: clips(),
        "EIDT-V, the same noise": lambda: clips(same_noise=True),
        "EIDT-V, the same noise, wide maps": lambda: clips(
            same_noise=True, detector=functools.partial(find, reach=8)
        ),
        "EIDT-V, changes elsewhere": lambda: clips(detector=somewhere),
    }
    for name, way in ways.items():

        def measured(
            name: str = name, way: Callable[[], torch.Tensor] = way
        ) -> dict[str, list[float]]:
            frames = way()
            shown[name] = list(frames[:4].flatten(0, 1))
            values: dict[str, list[float]] = {}
            for i, clip in enumerate(frames):
                for key, value in _judged(clip, things[i]).items():
                    values.setdefault(key, []).append(value)
            return values

        results.measure(f"video / {name}", measured, "video / the same seed")
    if len(shown) == len(ways):
        results.strip("eidtv.png", list(shown.values()))


def _judged(clip: torch.Tensor, thing: Object) -> dict[str, float]:
    sights = look(clip)
    largest = [sight.things[0] if sight.things else None for sight in sights]
    places = [
        t is not None
        and min(PLACES, key=lambda p: abs(POSITIONS[p][0] - t.cx)) == place
        and len(sight.things) == 1
        for t, place, sight in zip(largest, PLACES, sights, strict=True)
    ]
    looks = [t is not None and (t.colour, t.shape) == thing for t in largest]
    sizes = [t.radius for t in largest if t is not None]
    corners = torch.stack([clip[:, :, :4, :4].mean((2, 3)), clip[:, :, -4:, -4:].mean((2, 3))])
    return {
        "same background": float(len({sight.background for sight in sights}) == 1),
        "background change": float((corners[:, 1:] - corners[:, :-1]).abs().mean()),
        "size change": (max(sizes) - min(sizes)) / 64 if len(sizes) == 3 else 1.0,
        "object right": sum(looks) / 3,
        "place right": sum(places) / 3,
        "all": float(len({s.background for s in sights}) == 1 and all(looks) and all(places)),
    }
