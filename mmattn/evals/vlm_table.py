"""Every vision-language method on POPE, CHAIR, MME and AMBER with the embedded model: one table per protocol.

    python -m mmattn.evals.vlm_table --out docs/vlm --scenes 334 --captions 500 --seeds 3

Scenes are procedural and their objects known, with expected objects mostly absent. 334 scenes are 2004 POPE
questions per split. Every seed has its own scenes. Answers go to ``--answers`` as they come; a run that was
killed goes on with the same command, and several runs with different ``-m`` can share the folder: the
last one, with all of them, asks nothing and writes the tables. A method that is not installed, or does not
know its settings, is skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmattn.errors import MmattnError
from mmattn.evals import amber, chair, mme, pope
from mmattn.evals._protocol import Protocol, put, world
from mmattn.evals.harness import run
from mmattn.evals.table import lines, markdown
from mmattn.loading import Loaded, resolve
from mmattn.variants import Variant, parse

COLUMNS = (
    *("random-prune:keep=21", "uniform-prune:keep=21", "hiprune:keep=21"),
    *("hiprune:keep=21,text_share=0.1", "visionzip:keep=21"),
    *("merge-prune:keep=21", "fastv:keep=0.333", "pyramiddrop"),
    *("vhr", "var:dims=[37,101],tau=3.0", "var:dims=[37,101],tau=3.0,move_fraction=1.0"),
    *("pai:alpha=0.6", "paint", "act", "zerotuning:gamma=0.25", "zerotuning"),
    *("vasparse", "vasparse:keep=0.5,beta=0.0,alpha=0.0", "opera"),
    *("vcd", "dola", "dola:layers=high", "image-guidance", "largepig"),
    *("vcd+dola", "vcd+dola:layers=high", "hiprune:keep=21+vcd"),
)
"""What is compared when no ``-m`` is given."""

PROTOCOLS = ("pope", "chair", "mme", "amber")
TITLES = {
    "pope": "POPE: is it there?",
    "chair": "CHAIR: captions",
    "mme": "MME: pairs of questions",
    "amber": "AMBER: descriptions and questions",
}


def columns(texts: Sequence[str], say: Callable[[str], None]) -> list[Variant]:
    """The columns that can be made; the others are skipped with a message."""
    made: list[Variant] = []
    for text in texts:
        try:
            column = parse(text)
        except MmattnError as error:
            say(f"skipped {text}: {' '.join(str(error).split())}")
            continue
        if column.label in [other.label for other in made]:
            say(f"skipped {text}: it is the same as an earlier column")
            continue
        made.append(column)
    return made


def protocol(name: str, scenes: int, captions: int, seed: int) -> Protocol:
    """One protocol on the scenes of one seed; answers are read strictly, as yes or no and nothing else."""
    count = captions if name == "chair" else scenes
    drawn = world(count, seed)
    if name == "pope":
        return pope.Pope.from_world(drawn, parse="strict")
    if name == "chair":
        return chair.Chair.from_world(drawn)
    return mme.Mme.from_world(drawn) if name == "mme" else amber.Amber.from_world(drawn)


def table(
    out: Path,
    answers: Path,
    chosen: Sequence[Variant],
    *,
    loaded: Loaded,
    protocols: Sequence[str] = PROTOCOLS,
    scenes: int = 334,
    captions: int = 500,
    seeds: int = 3,
    batch: int = 64,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ask everything that is not answered yet, and write ``vlm.md`` and ``vlm.json`` after every seed.

    Args:
        out: folder of the tables.
        answers: folder of the answers, ``seed<n>/<protocol>/<column>/``.
        chosen: columns; the untouched model comes first by itself.
        loaded: the model.
        protocols: which of `PROTOCOLS`.
        scenes: scenes per seed for questions.
        captions: scenes per seed for CHAIR.
        seeds: sets of scenes.
        batch: items per call.
        command: what to type to get these tables again, for the document.
        say: told what happens.

    Returns:
        What ``vlm.json`` holds: per protocol, the lines with their intervals.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in protocols}
    summary: dict[str, Any] = {}
    for seed in range(seeds):
        for name in protocols:
            found = run(
                protocol(name, scenes, captions, seed),
                loaded,
                chosen,
                answers / f"seed{seed}",
                seed=seed,
                batch=batch,
                samples=False,
                progress=_ticker(f"seed {seed} {name}", say),
            )
            for result in found:
                if result["status"] != "ok":
                    say(f"seed {seed} {name} {result['label']}: {result['error']}")
            results[name] += found
        summary = write(out, results, command)
    return summary


def _ticker(where: str, say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Says how far a column is, when it is done and twice a minute."""
    last = time.perf_counter()

    def tick(label: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.perf_counter() - last > 30:
            last = time.perf_counter()
            say(f"{where} {label}: {done}/{total}")

    return tick


def write(out: Path, results: dict[str, list[dict[str, Any]]], command: str = "") -> dict[str, Any]:
    """Write ``vlm.md`` and ``vlm.json``."""
    parts = ["# Vision-language methods on procedural scenes\n"]
    if command:
        parts.append(f"```sh\n{command}\n```\n")
    summary: dict[str, Any] = {}
    for name, group in results.items():
        made = lines(group)
        parts.append(f"## {TITLES[name]}\n\n{markdown(group)}")
        summary[name] = [
            {
                "label": line.label,
                "sets": line.sets,
                "items": line.items,
                "error": line.error,
                "rates": {k: [round(x, 5) for x in v] for k, v in line.rates.items()},
                "differences": {k: [round(x, 5) for x in v] for k, v in line.differences.items()},
                "cost": {k: round(v, 3) for k, v in sorted(line.cost.items())},
            }
            for line in made
        ]
    put(out / "vlm.md", "\n".join(parts))
    put(out / "vlm.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--out", type=Path, required=True, help="folder of vlm.md and vlm.json")
    parser.add_argument("--answers", type=Path, default=Path("out/vlm"), help="folder of answers")
    parser.add_argument("--scenes", type=int, default=334, help="scenes per seed, 6 questions each")
    parser.add_argument("--captions", type=int, default=500, help="captions per seed")
    parser.add_argument("--seeds", type=int, default=3, help="sets of scenes")
    parser.add_argument("-m", "--method", action="append", help="a column; repeatable")
    parser.add_argument("--only", action="append", choices=PROTOCOLS, help="repeatable")
    parser.add_argument("--model", default="vlm", help="vlm, or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args(arguments)
    if min(given.scenes, given.captions, given.seeds, given.batch) < 1:
        parser.error("--scenes, --captions, --seeds and --batch must be at least 1")

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    chosen = columns(given.method or COLUMNS, say)
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        table(
            given.out,
            given.answers,
            chosen,
            loaded=resolve(given.model, device=given.device),
            protocols=given.only or PROTOCOLS,
            scenes=given.scenes,
            captions=given.captions,
            seeds=given.seeds,
            batch=given.batch,
            command=" ".join(["python -m mmattn.evals.vlm_table", *typed]),
            say=say,
        )
    except MmattnError as error:
        say(f"vlm_table: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    say(f"tables: {given.out / 'vlm.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
