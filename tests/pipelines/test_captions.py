"""Captions of sets: grammar, markers, length."""

from __future__ import annotations

import pytest
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.panels import PanelLayout

from mmattn import ConfigError
from mmattn.mini.text import t5_tokenizer


def test_text():
    caption = SetCaption(
        "MOVIE-SHOTS", "a day of <Mira>", ("<Mira> wakes", "<Mira> meets <Old Tom>")
    )
    assert caption.text == (
        "[MOVIE-SHOTS] a day of <Mira>, [SCENE-1] <Mira> wakes; [SCENE-2] <Mira> meets <Old Tom>"
    )
    assert caption.markers == ("SCENE-1", "SCENE-2")
    assert caption.entities == ("Mira", "Old Tom")
    assert SetCaption("A", "All.", ("One.", "two"), ("[LEFT]", "RIGHT")).text == (
        "[A] All. [LEFT] One. [RIGHT] two"
    )
    assert SetCaption("A", "", ("one",)).text == "[A] [SCENE-1] one"


@pytest.mark.parametrize(
    "caption",
    [
        SetCaption("A", "shared: ", ("one;", " two, and", "three.")),
        SetCaption("FOUR-PANEL", "", ("a", "b", "c", "d"), ("PANEL-1", "X", "Y2", "Z")),
        SetCaption("[A]", "wide sand, and", ("land", "hand; and;")),
    ],
)
def test_parsing_undoes_writing(caption):
    assert SetCaption.parse(caption.text) == caption
    assert SetCaption.parse(caption.text).text == caption.text


def test_clauses_lose_only_what_joins_them():
    read = SetCaption.parse("[T] over the sand, [LEFT] a band and, [RIGHT] he says hi...")
    assert read.overall == "over the sand"
    assert read.panels == ("a band", "he says hi...")


@pytest.mark.parametrize(
    ("shape", "markers"),
    [
        ((1, 2), ("LEFT", "RIGHT")),
        ((2, 1), ("TOP", "BOTTOM")),
        ((2, 2), ("TOP-LEFT", "TOP-RIGHT", "BOTTOM-LEFT", "BOTTOM-RIGHT")),
        ((3, 1), ("SCENE-1", "SCENE-2", "SCENE-3")),
        ((1, 1), ("SCENE-1",)),
    ],
)
def test_markers_follow_the_arrangement(shape, markers):
    layout = PanelLayout(*shape, 16, 16)
    caption = SetCaption.for_layout(layout, "T", "all", ["x"] * layout.count)
    assert caption.markers == markers
    assert all(caption.text.count(f"[{marker}]") == 1 for marker in markers)


def test_length():
    layout, tokenizer = PanelLayout(1, 2, 16, 16), t5_tokenizer(16)
    caption = SetCaption("T", "a red circle", ("on the left", "on the right"))
    count = caption.check_length(tokenizer)
    assert count == len(tokenizer(caption.text).input_ids) > 8
    assert caption.check_length(tokenizer, limit=count) == count
    with pytest.raises(ConfigError, match=f"has {count} tokens and the text encoder reads 16"):
        caption.check_length(tokenizer, 16)
    with pytest.raises(ConfigError, match="shorten the clauses"):
        SetCaption.for_layout(layout, "T", "x " * 600, ["a", "b"], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SetCaption("movie", "x", ("a",)), "capitals, digits and hyphens"),
        (lambda: SetCaption("A--B", "x", ("a",)), "capitals, digits and hyphens"),
        (lambda: SetCaption("A", "x", ()), "at least one panel"),
        (lambda: SetCaption("A", "x", "a cat"), "a clause for every panel"),
        (lambda: SetCaption("A", "x", ("a", " ;")), "panel 2 of 2 has an empty clause"),
        (lambda: SetCaption("A", "x", ("a", "b"), ("LEFT",)), "2 panels need as many markers"),
        (lambda: SetCaption("A", "x", ("a", "b"), ("L", "L")), "every marker stands once"),
        (lambda: SetCaption("A", "x", ("a",), ("A",)), "differs from the tag"),
        (lambda: SetCaption("A", "x", ("a\nb",)), "line break"),
        (lambda: SetCaption("A", "see [LEFT]", ("a",)), "marker \\[LEFT\\] inside"),
        (lambda: SetCaption.parse("a cat"), "begins with its tag"),
        (lambda: SetCaption.parse("a [TAG] cat [LEFT] b"), "begins with its tag"),
        (lambda: SetCaption.parse("[TAG] a cat"), "no panel"),
        (lambda: SetCaption.parse("[TAG] a\n[LEFT] b"), "line breaks"),
        (
            lambda: SetCaption.for_layout(PanelLayout(2, 2, 8, 8), "A", "x", ["a"]),
            "needs 4 clauses, got 1",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
