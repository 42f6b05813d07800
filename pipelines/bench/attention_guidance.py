"""Measure A-STAR, isolation and reposition, and EIDT-V on the embedded text-to-image model.

    python pipelines/bench/attention_guidance.py --out docs/attention-guidance        # everything
    python pipelines/bench/attention_guidance.py --out out/look --n 8 --parts astar  # a first look

Every row is written to ``results.json`` as soon as it is measured, and a row that is there already is not
measured again; strips of pictures go next to it. The oracle of `mmattn.mini` judges what was drawn.
Intervals are the middle 95 % of 1000 bootstrap resamples of the prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_guidance_common import (
    SEED,
    SIZE,
    Object,
    Results,
    backgrounds,
    named,
    noise,
    objects,
)
from attention_guidance_scenes import consistency, video
from mmattn_pipelines.attention_guidance import AttentionGuidance, GuidedStep

import mmattn.mini
from mmattn import AStar
from mmattn.methods._word_maps import word_places
from mmattn.mini.oracle import Found, Sight, look


def presence(sights: Sequence[Sight], wanted: Sequence[Sequence[Object]]) -> dict[str, list[float]]:
    """Whether all objects are there, what share of them is, and whether the number is right."""
    found: dict[str, list[float]] = {"all objects": [], "objects": [], "count": []}
    for sight, things in zip(sights, wanted, strict=True):
        seen = [(thing.colour, thing.shape) for thing in sight.things]
        hits = 0
        for thing in things:
            if thing in seen:
                seen.remove(thing)
                hits += 1
        found["all objects"].append(float(hits == len(things)))
        found["objects"].append(hits / len(things))
        found["count"].append(float(len(sight.things) == len(things)))
    return found


METHODS: dict[str, AStar] = {
    "plain": AStar(alpha=0.0),
    "A-STAR": AStar(),
    "A-STAR, first half": AStar(stop=0.5),
    "random direction": AStar(random=True),
    "random direction, first half": AStar(random=True, stop=0.5),
}
ABLATIONS: dict[str, AStar] = {
    "segregation alone": AStar(retention=0.0),
    "retention alone": AStar(segregation=0.0),
    "alpha 0.05": AStar(alpha=0.05),
    "alpha 20, gradient": AStar(alpha=20.0, unit="gradient"),
    "shares of the text": AStar(over="text"),
}


Condition = tuple[list[str], list[list[Object]], int, float]
"""Prompts, their objects, steps, guidance."""


def conditions(n: int) -> dict[str, Condition]:
    """Prompts that are easy, strange, crowded, with large objects, or drawn in few steps."""
    two, three, ground = objects(n, 2, SEED), objects(n, 3, SEED), backgrounds(n, SEED)
    places = list(zip(two, ground, strict=True))
    easy = [f"{named(a)} left of {named(b)} on a {g} background" for (a, b), g in places]
    strange = [f"{named(a)} with {named(b)} on a {g} background" for (a, b), g in places]
    crowded = [f"{named(a)} left of {named(b)} above {named(c)}" for a, b, c in three]
    big = [
        f"a big {' '.join(a)} left of a big {' '.join(b)} on a {g} background"
        for (a, b), g in places
    ]
    return {
        "easy": (easy, two, 8, 3.0),
        "with": (strange, two, 8, 3.0),
        "three": (crowded, three, 8, 3.0),
        "big": (big, two, 8, 1.0),
        "two steps": (easy, two, 2, 3.0),
    }


def draw(pipe: Any, method: AStar, condition: Condition) -> tuple[torch.Tensor, list[GuidedStep]]:
    """Pictures of a condition, and what the guided steps did."""
    prompts, wanted, steps, guidance = condition
    guided = AttentionGuidance(pipe, method)
    cfg: dict[str, Any] = {}
    if guidance > 1:
        cfg = {"negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance}
    pictures: torch.Tensor = guided(
        prompts,
        words=[[" ".join(thing) for thing in things] for things in wanted],
        generator=noise(len(prompts)),
        num_inference_steps=steps,
        output_type="pt",
        **SIZE,
        **cfg,
    ).images
    return pictures, guided.trace


def astar(results: Results, pipe: Any) -> None:
    """Are all objects of the prompt there?"""
    shown: dict[str, list[torch.Tensor]] = {}
    for place, condition in conditions(results.n).items():
        for name, method in {**METHODS, **(ABLATIONS if place == "with" else {})}.items():

            def measured(
                condition: Condition = condition, method: AStar = method, key: str = place + name
            ) -> dict[str, list[float]]:
                pictures, trace = draw(pipe, method, condition)
                shown[key] = list(pictures[:10])
                values = presence(look(pictures), condition[1])
                if trace:
                    values["segregation, last step"] = list(trace[-1].segregation)
                    values["moved"] = list(trace[0].moved)
                return values

            results.measure(f"astar / {place} / {name}", measured, f"astar / {place} / plain")
    rows = [shown["with" + name] for name in METHODS if "with" + name in shown]
    if rows:
        results.strip("astar.png", rows)


def why(results: Results, pipe: Any) -> None:
    """Where words are attended to, and what A-STAR changes about large objects."""
    easy, wanted = conditions(results.n)["easy"][:2]
    places = [
        word_places(pipe, p, [w for t in ts for w in t]) for p, ts in zip(easy, wanted, strict=True)
    ]
    maps = mmattn.AttentionMaps(tokens=tuple(sorted({i for row in places for (i,) in row})))
    with mmattn.attach(pipe, maps) as session:
        pictures = pipe(
            easy, generator=noise(len(easy)), num_inference_steps=8, output_type="pt", **SIZE
        ).images
        found = {(one.path, one.row, one.token): one.values[0] for one in maps.maps(session)}
    sites = sorted({path for path, _, _ in found})
    sights = [sorted(sight.things, key=lambda thing: thing.cx) for sight in look(pictures)]
    axis = (torch.arange(8) + 0.5) * 8

    def likeness(site: str, row: int, place: int, thing: Found) -> float:
        inside = (axis[:, None] - thing.cy) ** 2 + (axis - thing.cx) ** 2 < (thing.radius + 2) ** 2
        both = torch.stack([found[site, row, place].flatten(), inside.float().flatten()])
        return float(both.corrcoef()[0, 1])

    for site in sites:
        for offset, kind in enumerate(("colour", "shape")):

            def measured(site: str = site, offset: int = offset) -> dict[str, list[float]]:
                return {
                    "correlation": [
                        sum(
                            likeness(site, row, places[row][2 * j + offset][0], things[j])
                            for j in (0, 1)
                        )
                        / 2
                        for row, things in enumerate(sights)
                        if len(things) == 2
                    ]
                }

            name = f"why / {site} / {kind} words"
            results.measure(name, measured, name)
    for name in ("plain", "A-STAR, first half"):

        def parts(method: AStar = METHODS[name]) -> dict[str, list[float]]:
            big = conditions(results.n)["big"]
            values: dict[str, list[float]] = {"shape": [], "colour": []}
            for sight, things in zip(look(draw(pipe, method, big)[0]), big[1], strict=True):
                seen = sorted(sight.things, key=lambda thing: thing.cx)
                if len(seen) == 2:
                    pairs = list(zip(seen, things, strict=True))
                    values["colour"].append(sum(s.colour == t[0] for s, t in pairs) / 2)
                    values["shape"].append(sum(s.shape == t[1] for s, t in pairs) / 2)
            return values

        row = f"why / big / {name}"
        results.measure(row, parts, row)


PARTS: dict[str, Callable[[Results, Any], None]] = {
    "astar": astar,
    "why": why,
    "consistency": consistency,
    "video": video,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results.json and pictures"
    )
    parser.add_argument("--n", type=int, default=64, help="prompts per row")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args(argv)
    pipe = mmattn.mini.load("t2i")
    results = Results(arguments.out, arguments.n)
    for part in arguments.parts:
        PARTS[part](results, pipe)


if __name__ == "__main__":
    main()
