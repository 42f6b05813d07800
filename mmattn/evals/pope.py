"""POPE: ask a vision-language model about objects that are there and objects that are not.

The idea: captions are hard to grade, yes-or-no questions are not. Every picture gives a few
positives (objects that are there) and as many negatives; where the negatives come from decides how
tempting they are.

- random: any object of the vocabulary that is not in the picture;
- popular: the most frequent objects over all pictures that are not in this one;
- adversarial: for every positive, the absent object that most often comes with it.

A model that answers from habit rather than from the picture loses accuracy in that order, while its
share of "yes" grows. "Yes" is the positive class.

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023,
arXiv 2305.10355. Follows the authors' code (RUCAIBox/POPE @3df3ba1) and is checked on hand-worked
examples. Deviations: the article agrees with the noun ("an apple"), where the published template
leaves "a" or breaks other words; pictures with fewer objects than `positives` are used with what
they have; popularity and co-occurrence may be counted on `reference` pictures, for test sets that
were made to break the habit of the training set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from mmattn.errors import ConfigError
from mmattn.evals._protocol import (
    Item,
    Picture,
    Protocol,
    Rate,
    World,
    opener,
    picture_file,
    put_lines,
    ratio,
    records,
)

RATES = (
    Rate("f1", "F1", "percent", "high"),
    Rate("f1_adversarial", "F1 adversarial", "percent", "high"),
    Rate("accuracy", "accuracy", "percent", "high"),
    Rate("yes_ratio", "yes", "percent"),
    Rate("unparsed", "unparsed", "percent", "low"),
)
"""What a table shows; means over the splits. "yes" is the share of yes among the model's answers."""

LIMIT, MINI_LIMIT = 16, 2
"""Most tokens of an answer, for other models and for the embedded one."""

Split = Literal["random", "popular", "adversarial"]
Parse = Literal["official", "strict", "xor"]

SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")
"""The three sources of negatives, from easy to hard."""


@dataclass(frozen=True)
class Question:
    """One yes-or-no question.

    Args:
        picture: Index of the picture in the list given to `build`.
        name: The object asked about.
        answer: Whether it is there.
    """

    picture: int
    name: str
    answer: bool

    @property
    def text(self) -> str:
        """The question in words."""
        article = "an" if self.name[:1].lower() in "aeiou" else "a"
        return f"Is there {article} {self.name} in the image?"


@dataclass(frozen=True)
class PopeScore:
    """What a list of answers is worth.

    Args:
        accuracy: Share of right answers.
        precision: Share of "yes" answers that are right; 0 if there is none.
        recall: Share of the objects that are there and were answered "yes"; 0 if there is none.
        f1: Harmonic mean of precision and recall.
        yes_ratio: Share of "yes" among all answers; 0.5 is unbiased, as half of the questions are
            positive.
        unparsed: Share of answers that were neither yes nor no; each counts as wrong.
        count: Number of questions.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: float
    count: int


def build(
    pictures: Sequence[Sequence[str]],
    split: Split,
    *,
    generator: torch.Generator,
    positives: int = 3,
    reference: Sequence[Sequence[str]] | None = None,
) -> list[Question]:
    """Make balanced questions, yes and no in turn.

    Args:
        pictures: Object names per picture. The first `positives` distinct names are asked about, as
            in the paper's code; shuffle them first if the order carries meaning.
        split: Where the negatives come from.
        generator: Source of randomness for random negatives and fallbacks; it moves forward.
        positives: Objects per picture that are asked about, at least 1.
        reference: Pictures to count popularity and co-occurrence on. None counts on `pictures`.

    Raises:
        ValueError: Unknown `split`, `positives` below 1, or a picture that holds the whole
            vocabulary.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}.")
    if positives < 1:
        raise ValueError(f"positives must be at least 1, found {positives}.")
    counted = pictures if reference is None else reference
    sets = [dict.fromkeys(names) for names in counted]
    frequency = Counter(name for names in sets for name in names)
    for names in pictures:
        frequency.update(dict.fromkeys((name for name in names if name not in frequency), 0))
    vocabulary = sorted(frequency)
    rank = sorted(vocabulary, key=lambda name: (-frequency[name], name))
    together = Counter((a, b) for names in sets for a in names for b in names if a != b)

    def negative(positive: str, excluded: set[str]) -> str:
        free = [
            name for name in (vocabulary if split == "random" else rank) if name not in excluded
        ]
        if not free:
            raise ValueError(
                f"All {len(vocabulary)} objects of the vocabulary are used up in one picture; "
                "pass pictures with more kinds of objects."
            )
        if split == "popular":
            return free[0]
        if split == "adversarial":
            best = max(free, key=lambda name: together[positive, name])
            if together[positive, best]:
                return best
        return free[int(torch.randint(len(free), (), generator=generator))]

    questions = []
    for index, names in enumerate(pictures):
        excluded = set(names)
        for positive in list(dict.fromkeys(names))[:positives]:
            absent = negative(positive, excluded)
            excluded.add(absent)
            questions += [Question(index, positive, True), Question(index, absent, False)]
    return questions


def parse_answer(text: str, mode: Parse = "official") -> bool | None:
    """Read yes or no from a model's answer.

    Args:
        text: What the model said.
        mode: "official" looks at the first sentence: no, not and No mean no, everything else means
            yes, silence included. "strict" accepts exactly yes or no, up to case, spaces and one
            full stop. "xor" needs exactly one of the words yes and no anywhere.

    Returns:
        True for yes, False for no, None for neither (never in "official" mode).

    Raises:
        ValueError: Unknown `mode`.
    """
    if mode == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return not any(word in ("No", "no", "not") for word in words)
    plain = text.strip().lower()
    if mode == "strict":
        return {"yes": True, "no": False}.get(plain.removesuffix("."))
    if mode == "xor":
        found = set("".join(c if c.isalnum() else " " for c in plain).split())
        yes, no = "yes" in found, "no" in found
        return yes if yes != no else None
    raise ValueError(f"mode must be official, strict or xor, found {mode!r}.")


def score(answers: Sequence[bool | None], truth: Sequence[bool]) -> PopeScore:
    """Grade answers.

    Args:
        answers: What the model said, True for yes, None for an answer that could not be read.
        truth: What is right, in the same order.

    Raises:
        ValueError: Different lengths, or no questions at all.
    """
    if len(answers) != len(truth):
        raise ValueError(
            f"Found {len(answers)} answers to {len(truth)} questions; pass one answer per question."
        )
    if not truth:
        raise ValueError("There are no questions to grade; pass at least one.")
    pairs = list(zip(answers, truth, strict=True))
    hits = sum(answer is True and right for answer, right in pairs)
    said_yes = sum(answer is True for answer in answers)
    is_yes = sum(truth)
    precision = hits / said_yes if said_yes else 0.0
    recall = hits / is_yes if is_yes else 0.0
    return PopeScore(
        accuracy=sum(answer is right for answer, right in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=said_yes / len(pairs),
        unparsed=sum(answer is None for answer in answers) / len(pairs),
        count=len(pairs),
    )


def ask(
    pictures: Sequence[Sequence[str]],
    answer: Callable[[Sequence[Question]], Sequence[bool | None]],
    *,
    seed: int = 0,
    positives: int = 3,
    reference: Sequence[Sequence[str]] | None = None,
) -> dict[Split, PopeScore]:
    """Build all three splits, put every distinct question once, and grade each split.

    Args:
        pictures: Object names per picture, see `build`.
        answer: Answers a list of questions, in order.
        seed: Seed of the random negatives.
        positives: Objects per picture that are asked about.
        reference: Pictures to count popularity and co-occurrence on.
    """
    generator = torch.Generator().manual_seed(seed)
    splits = {
        split: build(pictures, split, generator=generator, positives=positives, reference=reference)
        for split in SPLITS
    }
    distinct = list(
        dict.fromkeys(question for questions in splits.values() for question in questions)
    )
    said = dict(zip(distinct, answer(distinct), strict=True))
    return {
        split: score(
            [said[question] for question in questions], [question.answer for question in questions]
        )
        for split, questions in splits.items()
    }


def rates(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`PopeScore` of every split (``f1_popular``, ...) from summed counts, and the means over splits."""
    found: dict[str, torch.Tensor] = {}
    splits = [name.removesuffix(".count") for name in totals if name.endswith(".count")]
    for split in splits:
        count, hits = totals[f"{split}.count"], totals[f"{split}.hits"]
        said_yes, is_yes = totals[f"{split}.said_yes"], totals[f"{split}.is_yes"]
        precision, recall = ratio(hits, said_yes), ratio(hits, is_yes)
        numbers = {
            "accuracy": ratio(totals[f"{split}.right"], count),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(said_yes, count),
            "unparsed": ratio(totals[f"{split}.unparsed"], count),
        }
        found |= {f"{name}_{split}": value for name, value in numbers.items()}
    means = ("f1", "accuracy", "precision", "recall", "yes_ratio", "unparsed")
    averages = {m: sum(found[f"{m}_{s}"] for s in splits) / len(splits) for m in means}
    return {**averages, **found}  # type: ignore[dict-item]


class Pope(Protocol):
    """Yes-or-no questions in one or several splits (``doc["category"]``).

    Args:
        items: Questions; ``target`` is yes or no.
        picture: Opens pictures.
        origin: Where they come from.
        parse: How answers are read, see `parse_answer`. It can be changed without asking again.
    """

    name: ClassVar[str] = "pope"

    def __init__(
        self,
        items: Sequence[Item],
        picture: Picture | None,
        origin: Mapping[str, Any],
        parse: Parse = "official",
    ) -> None:
        super().__init__(items, picture, origin)
        parse_answer("", parse)
        self.parse: Parse = parse

    @classmethod
    def from_world(
        cls,
        world: World,
        *,
        parse: Parse = "official",
        embedded: bool = True,
        suffix: str = "",
        limit: int | None = None,
    ) -> Pope:
        """Three splits of six questions per procedural scene; habit is counted in the training world."""
        generator = torch.Generator().manual_seed(world.seed)
        shuffled = [
            [scene.names[i] for i in torch.randperm(len(scene.names), generator=generator)]
            for scene in world.scenes
        ]
        limit = limit or (MINI_LIMIT if embedded else LIMIT)
        items = []
        for split in SPLITS:
            questions = build(shuffled, split, generator=generator, reference=world.habit)
            for n, question in enumerate(questions, 1):
                label = "yes" if question.answer else "no"
                items.append(
                    _item(n, str(question.picture), question.text, label, split, suffix, limit)
                )
        return cls(items, world.picture, world.origin, parse)

    @classmethod
    def from_files(
        cls,
        questions: Sequence[Path],
        *,
        images: Path | None = None,
        parse: Parse = "official",
        suffix: str = "",
        limit: int | None = None,
    ) -> Pope:
        """Published question files, one split each: JSONL of ``{"question_id", "image", "text", "label"}``.

        Raises:
            ConfigError: For a line of another form, a label that is neither yes nor no, a picture that is
                not in `images`, or two files of one name. The line is named.
        """
        items: dict[str, Item] = {}
        for path in questions:
            split = _split_of(path)
            for place, row in records(path, "question_id", "image", "text", "label"):
                label = str(row["label"]).strip().lower()
                if label not in ("yes", "no"):
                    raise ConfigError(
                        f"{place}: the label must be yes or no, found {row['label']!r}"
                    )
                file = picture_file(images, str(row["image"]), place)
                item = _item(
                    row["question_id"], file, str(row["text"]), label, split, suffix, limit or LIMIT
                )
                if item.id in items:
                    raise ConfigError(f"{place}: {item.id} is there twice")
                items[item.id] = item
        origin = {"questions": [path.name for path in questions]}
        return cls(list(items.values()), opener(images), origin, parse)

    def filtered(self, item: Item, response: str) -> str:
        """The answer as yes, no, or as it is."""
        return {True: "yes", False: "no"}.get(parse_answer(response, self.parse), response)  # type: ignore[arg-type]

    def tally(self, items: Sequence[Item], responses: Sequence[str]) -> dict[str, float]:
        """Counts of one picture, by split."""
        counts: Counter[str] = Counter()
        for item, text in zip(items, responses, strict=True):
            split, said = item.doc["category"], parse_answer(text, self.parse)
            truth = item.target == "yes"
            counts[f"{split}.count"] += 1
            counts[f"{split}.hits"] += said is True and truth
            counts[f"{split}.said_yes"] += said is True
            counts[f"{split}.is_yes"] += truth
            counts[f"{split}.right"] += said is truth
            counts[f"{split}.unparsed"] += said is None
        return dict(counts)

    def payload(self, item: Item, response: str) -> dict[str, Any]:
        """The entries of lmms-eval's task; its ``pope_yes_ratio`` counts the truth, ours the predictions."""
        said = self.filtered(item, response)
        entry = {
            "question_id": item.doc["question_id"],
            "score": float(said == item.target),
            "prediction": said,
            "ground_truth": item.target,
        }
        names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
        return {f"pope_{name}": entry for name in names}

    def write(self, folder: Path, responses: Sequence[str]) -> None:
        """``questions_<split>.jsonl`` and ``answers_<split>.jsonl``, which the original's scorer reads."""
        pairs = list(zip(self.items, responses, strict=True))
        for split in dict.fromkeys(item.doc["category"] for item in self.items):
            chosen = [(i, text) for i, text in pairs if i.doc["category"] == split]
            questions = [
                {
                    "question_id": i.doc["question_id"],
                    "image": i.doc["image"],
                    "text": i.doc["question"],
                    "label": i.target,
                }
                for i, _ in chosen
            ]
            put_lines(folder / f"questions_{split}.jsonl", questions)
            answers = [{"question": i.doc["question"], "answer": text} for i, text in chosen]
            put_lines(folder / f"answers_{split}.jsonl", answers)

    def read_answers(self, paths: Sequence[Path]) -> list[str]:
        """Finished answers: JSONL of ``{"question", "answer"}``, one file per question file, in its order.

        Raises:
            ConfigError: When the questions are others, or their number is.
        """
        rows = [entry for path in paths for entry in records(path, "question", "answer")]
        if len(rows) != len(self.items):
            raise ConfigError(
                f"{', '.join(path.name for path in paths)}: found {len(rows)} answers to "
                f"{len(self.items)} questions"
            )
        for (place, row), item in zip(rows, self.items, strict=True):
            if str(row["question"]).strip() != item.doc["question"].strip():
                raise ConfigError(
                    f"{place} answers {row['question']!r}, but {item.id} asks "
                    f"{item.doc['question']!r}; answers come in the order of the questions"
                )
        return [str(row["answer"]) for _, row in rows]


def _item(
    number: Any, picture: str, text: str, label: str, split: str, suffix: str, limit: int
) -> Item:
    doc = {"question_id": number, "question": text, "answer": label}
    doc |= {"image": picture, "category": split}
    return Item(f"{split}/{number}", picture, text + suffix, label, doc, limit)


def _split_of(path: Path) -> str:
    """``coco_pope_popular.json`` is the popular split; other files are named after themselves."""
    return next((split for split in SPLITS if split in path.stem), path.stem)
