"""CHAIR by hand: looking objects up in captions, and the ratios."""

from __future__ import annotations

import pytest

from mmattn.evals import chair

SYNONYMS = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "table": "table", "cup": "cup"}


def test_longer_names_win_and_repeats_count() -> None:
    caption = "A hot dog on a table; a puppy, and another dog."
    assert chair.find_objects(caption, SYNONYMS) == ["hot dog", "table", "dog", "dog"]


def test_lemma_is_applied_before_the_look_up() -> None:
    found = chair.find_objects("Two cups", SYNONYMS, lemma=lambda word: word.removesuffix("s"))
    assert found == ["cup"]


def test_score_by_hand() -> None:
    mentions = [["dog", "cup", "cup"], ["table"], []]
    truth = [{"dog", "table"}, {"table", "cup"}, {"dog"}]
    result = chair.score(mentions, truth)
    assert result.chair_i == 2 / 4
    assert result.chair_s == 1 / 3
    assert result.coverage == 2 / 5
    assert result.mentions == pytest.approx(4 / 3)
    assert result.by_rank == (0.0, 1.0, 1.0)
    assert result.count == 3


def test_silence_hallucinates_nothing_and_covers_nothing() -> None:
    result = chair.score([[], []], [{"dog"}, {"cup"}])
    assert (result.chair_i, result.chair_s, result.coverage, result.by_rank) == (0.0, 0.0, 0.0, ())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="one caption per picture"):
        chair.score([["dog"]], [])
    with pytest.raises(ValueError, match="at least one"):
        chair.score([], [])
