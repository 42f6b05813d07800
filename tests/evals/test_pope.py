"""POPE by hand: the questions, the reading of answers, and the numbers."""

from __future__ import annotations

import pytest
import torch

from mmattn.evals import pope

# Co-occurrence: cup and table three times, cup and spoon once, dog and leash twice.
PICTURES = [
    ["cup", "table"],
    ["cup", "table", "spoon"],
    ["table", "cup", "dog"],
    ["dog", "leash"],
    ["dog", "leash"],
    ["cup"],
]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("split", pope.SPLITS)
def test_questions_alternate_and_are_true(split: pope.Split) -> None:
    questions = pope.build(PICTURES, split, generator=_seeded(), positives=2)
    assert [question.answer for question in questions] == [True, False] * (len(questions) // 2)
    assert len(questions) == 2 * sum(min(2, len(names)) for names in PICTURES)
    for question in questions:
        assert (question.name in PICTURES[question.picture]) is question.answer
    for picture in range(len(PICTURES)):
        absent = [q.name for q in questions if q.picture == picture and not q.answer]
        assert len(set(absent)) == len(absent)


def test_popular_takes_the_most_frequent_absent_objects() -> None:
    questions = pope.build(PICTURES, "popular", generator=_seeded(), positives=2)
    # Frequencies: cup 4, dog 3, table 3, leash 2, spoon 1; ties are broken by name.
    assert [q.name for q in questions if q.picture == 3 and not q.answer] == ["cup", "table"]
    assert [q.name for q in questions if q.picture == 0 and not q.answer] == ["dog", "leash"]


def test_adversarial_takes_the_companion_that_is_missing() -> None:
    questions = pope.build(PICTURES, "adversarial", generator=_seeded(), positives=2)
    assert [q.name for q in questions if q.picture == 5 and not q.answer] == ["table"]
    # Picture 2 holds table, cup and dog; what is left of table's companions is spoon.
    assert [q.name for q in questions if q.picture == 2 and not q.answer] == ["spoon", "leash"]


def test_reference_supplies_habit_and_vocabulary() -> None:
    habit = [["cup", "saucer"]] * 3 + [["cup", "table"]]
    questions = pope.build([["cup", "moon"]], "adversarial", generator=_seeded(), reference=habit)
    assert next(q.name for q in questions if not q.answer) == "saucer"


def test_random_is_reproducible() -> None:
    first = pope.build(PICTURES, "random", generator=_seeded(), positives=2)
    assert first == pope.build(PICTURES, "random", generator=_seeded(), positives=2)


def test_question_text_has_the_right_article() -> None:
    assert pope.Question(0, "apple", True).text == "Is there an apple in the image?"
    assert pope.Question(0, "cup", True).text == "Is there a cup in the image?"


@pytest.mark.parametrize(
    ("text", "official", "strict", "xor"),
    [
        ("yes", True, True, True),
        ("No.", False, False, False),
        ("There is not. Yes", False, None, True),
        ("", True, None, None),
        ("yes and no", False, None, None),
        ("nothing", True, None, None),
    ],
)
def test_parse_answer(text: str, official: bool, strict: bool | None, xor: bool | None) -> None:
    assert pope.parse_answer(text) is official
    assert pope.parse_answer(text, "strict") is strict
    assert pope.parse_answer(text, "xor") is xor


def test_score_by_hand() -> None:
    truth = [True, True, True, True, False, False, False, False]
    answers = [True, True, True, None, True, False, False, False]
    result = pope.score(answers, truth)
    assert result.accuracy == 6 / 8
    assert result.precision == 3 / 4
    assert result.recall == 3 / 4
    assert result.f1 == pytest.approx(3 / 4)
    assert result.yes_ratio == 4 / 8
    assert result.unparsed == 1 / 8
    assert result.count == 8


def test_always_yes_scores_two_thirds_f1() -> None:
    result = pope.score([True] * 4, [True, False, True, False])
    assert (result.accuracy, result.recall, result.yes_ratio) == (0.5, 1.0, 1.0)
    assert result.f1 == pytest.approx(2 / 3)


def test_ask_puts_each_distinct_question_once() -> None:
    asked: list[pope.Question] = []

    def oracle(questions: list[pope.Question]) -> list[bool | None]:
        asked.extend(questions)
        return [question.answer for question in questions]

    scores = pope.ask(PICTURES, oracle, positives=2)  # type: ignore[arg-type]
    assert len(set(asked)) == len(asked)
    assert all(result.accuracy == 1.0 and result.f1 == 1.0 for result in scores.values())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        pope.build(PICTURES, "hard", generator=_seeded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocabulary"):
        pope.build([["cup", "table"]], "random", generator=_seeded())
    with pytest.raises(ValueError, match="one answer per question"):
        pope.score([True], [True, False])
