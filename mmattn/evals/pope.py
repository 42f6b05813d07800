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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

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
