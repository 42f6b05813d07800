"""MME: two yes-or-no questions about every picture, and points for getting both right.

The idea: a model that always says yes gets half of the questions right, but not one pair. Per subtask the
score is ``acc + acc+`` in percent: right answers per question, plus pictures with both answers right, so 200
at most. Guessing at random scores 75, always saying yes 50.

Paper: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv 2306.13394. The reading of answers and the scores follow the published evaluation tool and are checked
on hand-worked examples; the sums are over the subtasks that are there.

On procedural scenes the subtasks are ``existence``, ``count``, ``position`` and ``color``, built from what is
known about each scene. The embedded model never learned the words of the last three; for it there is
``existence``, where the absent object is any, and ``habit``, where it is the one that habit expects. Its
questions come without "Please answer yes or no.", which has words it does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmattn.errors import ConfigError
from mmattn.evals._protocol import (
    Item,
    Protocol,
    Rate,
    World,
    opener,
    picture_file,
    put,
    ratio,
    records,
)
from mmattn.evals.pope import LIMIT, MINI_LIMIT, Question

if TYPE_CHECKING:
    from mmattn.mini.objects import Scene

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
HALLUCINATION = PERCEPTION[:4]
"""The subset that papers on hallucination report, 800 points at most."""

RATES = (
    Rate("total", "total", "points", "high"),
    Rate("hallucination", "hallucination", "points", "high"),
    Rate("existence", "existence", "points", "high"),
    Rate("habit", "habit", "points", "high"),
    Rate("count", "count", "points", "high"),
    Rate("position", "position", "points", "high"),
    Rate("color", "color", "points", "high"),
    Rate("yes_ratio", "yes", "percent"),
    Rate("other", "unparsed", "percent", "low"),
)
"""What a table shows, where it is there."""


def parse_answer(text: str) -> str:
    """``yes``, ``no``, or ``other``: the whole answer in any case, or what its first four characters hold.

    So "not sure" is no, "it is yes" is other, and yes wins where both would fit.
    """
    plain = text.strip().lower()
    if plain in ("yes", "no"):
        return plain
    start = plain[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def rates(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Points per subtask, sums over two or more, and the shares of yes and of unreadable answers."""
    tasks = [name.removesuffix("/pictures") for name in totals if name.endswith("/pictures")]
    found = {
        task: 100 * ratio(totals[f"{task}/right"], totals[f"{task}/questions"])
        + 100 * ratio(totals[f"{task}/both"], totals[f"{task}/pictures"])
        for task in tasks
    }
    sums = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
    groups = {name: [found[t] for t in members if t in found] for name, members in sums.items()}
    asked = torch.stack([totals[f"{task}/questions"] for task in tasks]).sum(0)
    shares = {
        name: ratio(torch.stack([totals[f"{task}/{key}"] for task in tasks]).sum(0), asked)
        for name, key in (("yes_ratio", "yes"), ("other", "other"))
    }
    added = {name: torch.stack(group).sum(0) for name, group in groups.items() if len(group) > 1}
    return {"total": torch.stack(list(found.values())).sum(0), **added, **found, **shares}


class Mme(Protocol):
    """Pairs of questions; ``doc["category"]`` is the subtask.

    Args:
        items: Questions; ``target`` is yes or no.
        picture: Opens pictures.
        origin: Where they come from.

    Raises:
        ConfigError: When a picture does not have exactly two questions in a subtask.
    """

    name: ClassVar[str] = "mme"

    def __init__(
        self,
        items: Sequence[Item],
        picture: Callable[[str], Any] | None,
        origin: Mapping[str, Any],
    ) -> None:
        super().__init__(items, picture, origin)
        pairs = Counter((item.doc["category"], item.doc["question_id"]) for item in items)
        for (task, name), count in pairs.items():
            if count != 2:
                raise ConfigError(
                    f"mme: {task} has {count} question(s) about {name}; every picture needs exactly two"
                )

    @classmethod
    def from_world(
        cls,
        world: World,
        *,
        embedded: bool = True,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Mme:
        """Pairs about procedural scenes; a scene that has no fitting pair is left out of the subtask."""
        generator = torch.Generator().manual_seed(world.seed)
        chosen = tasks or (("existence", "habit") if embedded else HALLUCINATION)
        suffix = "" if embedded else " Please answer yes or no."
        limit = limit or (MINI_LIMIT if embedded else LIMIT)
        items = []
        for task in chosen:
            for n, scene in enumerate(world.scenes):
                pair = _pair(task, scene, generator)
                for text, label in zip(pair or (), ("yes", "no"), strict=False):
                    items.append(_item(task, str(n), str(n), text + suffix, label, limit))
        return cls(items, world.picture, world.origin)

    @classmethod
    def from_files(
        cls, questions: Path, *, images: Path | None = None, limit: int | None = None
    ) -> Mme:
        """Published questions.

        Args:
            questions: Folder of ``<subtask>.txt`` files with lines ``picture<TAB>question<TAB>Yes``, as the
                evaluation tool reads them (a fourth field, the answer, is ignored here), or JSONL of
                ``{"image", "category", "question", "answer"}``.
            images: Folder of pictures, or of one folder of pictures per subtask.
            limit: Most tokens of an answer.

        Raises:
            ConfigError: For a line of another form, an answer that is neither yes nor no, or a picture that
                is not there. The line is named.
        """
        items = []
        for place, task, name, text, label, _ in _lines(questions):
            if label.strip().lower() not in ("yes", "no"):
                raise ConfigError(f"{place}: the answer must be yes or no, found {label!r}")
            file = name
            if images is not None and (images / task / name).is_file():
                file = f"{task}/{name}"
            file = picture_file(images, file, place)
            items.append(_item(task, name, file, text, label.strip().lower(), limit or LIMIT))
        return cls(_numbered(items), opener(images), {"questions": questions.name})

    def filtered(self, item: Item, response: str) -> str:
        """yes, no or other."""
        return parse_answer(response)

    def tally(self, items: Sequence[Item], responses: Sequence[str]) -> dict[str, float]:
        """Right answers and right pairs of one picture, by subtask."""
        counts: dict[str, float] = {}
        pairs: dict[tuple[str, str], bool] = {}
        for item, text in zip(items, responses, strict=True):
            task, said = item.doc["category"], parse_answer(text)
            right, pair = said == item.target, (task, item.doc["question_id"])
            pairs[pair] = pairs.get(pair, True) and right
            for key, value in (
                ("questions", 1),
                ("right", right),
                ("yes", said == "yes"),
                ("other", said == "other"),
            ):
                counts[f"{task}/{key}"] = counts.get(f"{task}/{key}", 0) + value
        for (task, _), both in pairs.items():
            counts[f"{task}/pictures"] = counts.get(f"{task}/pictures", 0) + 1
            counts[f"{task}/both"] = counts.get(f"{task}/both", 0) + both
        return counts

    def payload(self, item: Item, response: str) -> dict[str, Any]:
        """The entry of lmms-eval's task: cognition for its four subtasks, perception for all others."""
        task = item.doc["category"]
        entry = {"question_id": item.doc["question_id"], "category": task}
        entry["score"] = float(parse_answer(response) == item.target)
        kind = "cognition" if task in COGNITION else "perception"
        return {f"mme_{kind}_score": entry}

    def write(self, folder: Path, responses: Sequence[str]) -> None:
        """``results/<subtask>.txt``, which the evaluation tool reads."""
        pairs = list(zip(self.items, responses, strict=True))
        for task in dict.fromkeys(item.doc["category"] for item in self.items):
            rows = [
                "\t".join(
                    " ".join(str(field).split())
                    for field in (
                        i.doc["question_id"],
                        i.doc["question"],
                        i.target.capitalize(),
                        text,
                    )
                )
                for i, text in pairs
                if i.doc["category"] == task
            ]
            put(folder / "results" / f"{task}.txt", "\n".join(rows) + "\n")


def read_results(folder: Path) -> tuple[Mme, list[str]]:
    """Questions and finished answers from a folder of ``<subtask>.txt`` with four fields per line.

    Raises:
        ConfigError: For a line without an answer, and as `Mme.from_files`.
    """
    rows = list(_lines(folder))
    for place, *_, said in rows:
        if said is None:
            raise ConfigError(
                f"{place} has no answer; a result line is picture, question, truth and answer, "
                "separated by tabs"
            )
    return Mme.from_files(folder), [str(row[-1]) for row in rows]


def _lines(source: Path) -> list[tuple[str, str, str, str, str, str | None]]:
    """(place, subtask, picture, question, truth, answer or None)."""
    if not source.is_dir():
        return [
            (place, *(str(row[key]) for key in ("category", "image", "question", "answer")), None)  # type: ignore[misc]
            for place, row in records(source, "image", "category", "question", "answer")
        ]
    files = sorted(source.glob("*.txt"))
    if not files:
        raise ConfigError(f"{source} has no <subtask>.txt")
    found: list[tuple[str, str, str, str, str, str | None]] = []
    for path in files:
        for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            fields = line.rstrip("\r").split("\t")
            place = f"{path} line {n}"
            if len(fields) not in (3, 4):
                raise ConfigError(
                    f"{place} must have three or four fields separated by tabs, found {len(fields)}"
                )
            found.append((place, path.stem, *fields[:3], fields[3] if len(fields) == 4 else None))  # type: ignore[arg-type]
    return found


def _item(task: str, pair: str, picture: str, text: str, label: str, limit: int) -> Item:
    doc = {"question_id": pair, "category": task, "question": text, "answer": label}
    return Item(f"{task}/{pair}/{label}", picture, text, label, {**doc, "image": picture}, limit)


def _numbered(items: Sequence[Item]) -> list[Item]:
    """Pairs may have one truth twice: their ids tell the first from the second."""
    seen: Counter[str] = Counter()
    made = []
    for item in items:
        pair = item.id.rpartition("/")[0]
        seen[pair] += 1
        made.append(
            Item(
                f"{pair}/{seen[pair]}", item.picture, item.prompt, item.target, item.doc, item.limit
            )
        )
    return made


def _pair(task: str, scene: Scene, generator: torch.Generator) -> tuple[str, str] | None:
    """A question whose answer is yes and one whose answer is no, or None where the scene has none."""
    from mmattn.mini import objects

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    absent = [name for name in objects.NAMES if name not in scene.names]
    if task == "existence":
        return Question(0, pick(scene.names), True).text, Question(0, pick(absent), False).text
    if task == "habit":
        expected = objects.absent_partners(scene)
        if not expected:
            return None
        return Question(0, pick(scene.names), True).text, Question(0, pick(expected), False).text
    if task == "count":
        count = len(scene.objects)
        other = count + pick((-1, 1))
        return (
            f"Are there {count} objects in the image?",
            f"Are there {other} objects in the image?",
        )
    if task == "position":
        beside = [
            item for item in scene.objects if abs(item.x - objects.SIZE / 2) > objects.SIZE / 8
        ]
        if not beside:
            return None
        item = pick(beside)
        sides = ("left", "right") if item.x < objects.SIZE / 2 else ("right", "left")
        first, second = (f"Is the {item.name} on the {side} side of the image?" for side in sides)
        return first, second
    if task == "color":
        name = pick(scene.names)
        colour = objects.KINDS[name][1]
        others = sorted({c for _, c in objects.KINDS.values()} - {colour})
        return f"Is the {name} {colour}?", f"Is the {name} {pick(others)}?"
    raise ConfigError(f"unknown subtask {task!r}; scenes have {[*HALLUCINATION, 'habit']}")
