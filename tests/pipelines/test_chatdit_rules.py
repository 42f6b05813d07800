"""What RulePlanner reads in a message: counts, lists, references, edits, articles."""

from __future__ import annotations

import pytest
import torch
from mmattn_pipelines.chatdit_contracts import check_markdown
from mmattn_pipelines.chatdit_plan import ChatRequest, Picture, PlannerError, groups
from mmattn_pipelines.chatdit_planners import RulePlanner
from PIL import Image


def picture(number: int, description: str, *, drawn: bool = True, round_: int = 1) -> Picture:
    image = Image.new("RGB", (8, 8))
    return Picture(number, f"picture_{number:04d}_x", description, drawn, round_, image)


MEMORY = (
    picture(1, "a red circle", drawn=False),
    picture(2, "a blue square"),
    picture(3, "a green star", round_=2),
    picture(4, "a yellow ring", round_=2),
)
GIVEN = (picture(5, "a fox", drawn=False, round_=3), picture(6, "a hen", drawn=False, round_=3))


def make(text: str, memory=(), given=(), **settings):
    return RulePlanner().plan(ChatRequest(text, tuple(given), **settings), memory)


def texts(plan) -> list[str]:
    return [item.description for item in plan.outputs]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a red circle", ["a red circle"]),
        ("Draw a red circle.", ["a red circle"]),
        ("Please draw me a picture of a fox on a white rug", ["a fox on a white rug"]),
        ("Draw three pictures of a fox", ["a fox"] * 3),
        ("I would like 2 different images of a fox, please", ["a fox, please"] * 2),
        ("a pair of icons of a fox", ["a fox"] * 2),
        ("some pictures of a fox", ["a fox"] * 2),
        ("several pictures of a fox", ["a fox"] * 3),
        ("pictures of a fox", ["a fox"] * 2),
        ("Tell me a story about a fox", ["a fox"] * 4),
        ("a comparison of a fox and a hen", ["a comparison of a fox and a hen"] * 2),
        ("Two pictures: a red circle; a blue square", ["a red circle", "a blue square"]),
        ("a red circle; no list", ["a red circle; no list"]),
        ("Draw these:\n1. a fox\n2. a hen\n3. a dog", ["a fox", "a hen", "a dog"]),
        ("Draw\n- a fox\n- a hen", ["a fox", "a hen"]),
        ("Three pictures: a fox, a hen and a dog", ["a fox", "a hen", "a dog"]),
        (
            "Two pictures of a fox: on the left; on the right",
            ["a fox on the left", "a fox on the right"],
        ),
        (
            "Two scenes with <Mira>, a fox: she runs; she sleeps",
            ["with <Mira>, a fox, she runs", "with <Mira>, a fox, she sleeps"],
        ),
        (
            "Tell a story about a fox. She wakes up. She finds a hen. They sleep.",
            ["a fox, She wakes up", "a fox, She finds a hen", "a fox, They sleep"],
        ),
        (
            "Three pictures in this style: watercolor of a fox",
            ["in this style, watercolor of a fox"] * 3,
        ),
        ("Draw a fox that is at the door at 10:30", ["a fox that is at the door at 10:30"]),
        ("Draw two pictures. The first picture shows a fox", None),
        ("a picture book about a fox in two pictures", ["a fox"] * 2),
        ("a painting of a fox", ["a painting of a fox"]),
    ],
)
def test_without_pictures(message: str, expected):
    plan = make(message)
    assert plan.sources == () and plan.inputs == ()
    if expected is None:
        assert len(plan.outputs) == 2
    else:
        assert texts(plan) == expected
    assert tuple(step.group for step in plan.steps) == groups(0, len(plan.outputs))


@pytest.mark.parametrize(
    ("message", "sources", "expected"),
    [
        ("Make it blue", (4,), ["a yellow ring, blue"]),
        ("make them blue", (3, 4), ["a green star and a yellow ring, blue"]),
        ("Make each of them blue", (3, 4), ["a green star, blue", "a yellow ring, blue"]),
        ("Make the second image green", (2,), ["a blue square, green"]),
        ("Turn picture 1 into a square", (1,), ["a red circle, a square"]),
        ("Turn the last picture into a square", (4,), ["a yellow ring, a square"]),
        ("Put a hat on #3", (3,), ["a green star, Put a hat on it"]),
        ("Put a hat on it", (4,), ["a yellow ring, Put a hat on it"]),
        ("Combine the first and the third picture", (3,), None),
        ("Combine the first picture and the third picture", (1, 3), None),
        ("Combine the first two pictures", (1, 2), None),
        ("Mix the last 3 pictures", (2, 3, 4), None),
        ("Combine the two pictures", (3, 4), None),
        ("Three variations of it", (4,), ["a yellow ring"] * 3),
        ("Two variations of each", (3, 4), ["a green star"] * 2 + ["a yellow ring"] * 2),
        (
            "Three pictures of it: on the left; in the center; on the right",
            (4,),
            [
                "a yellow ring on the left",
                "a yellow ring in the center",
                "a yellow ring on the right",
            ],
        ),
        ("Draw a fox. It sleeps.", (), ["a fox. It sleeps"]),
        ("Draw a fox that sleeps", (), ["a fox that sleeps"]),
        ("Draw cats that sleep", (), ["cats that sleep"]),
        (
            "Draw two pictures of a fox, each on a white background",
            (),
            ["a fox, each on a white background"] * 2,
        ),
        ("again", (4,), ["a yellow ring"]),
        ("the same in blue", (4,), ["a yellow ring in blue"]),
    ],
)
def test_earlier_pictures(message: str, sources, expected):
    plan = make(message, MEMORY)
    assert plan.sources == sources
    if expected is None:
        assert len(plan.outputs) == 1
    else:
        assert texts(plan) == expected


@pytest.mark.parametrize(
    ("message", "sources", "outputs"),
    [
        ("Make it rain", (5, 6), 1),
        ("Make each picture rainy", (5, 6), 2),
        ("Paint the second image in oil", (6,), 1),
        ("Put the second picture beside the first picture", (6, 5), 1),
        ("Make #2 look like these", (2, 5, 6), 1),
        ("Draw three pictures with both of them", (5, 6), 3),
    ],
)
def test_pictures_that_come_along(message: str, sources, outputs: int):
    plan = make(message, MEMORY, GIVEN)
    assert plan.sources == sources and len(plan.outputs) == outputs


def test_each_picture_is_drawn_from_its_own():
    plan = make("Make each picture rainy", (), GIVEN)
    assert [step.group.references for step in plan.steps] == [(0,), (1,)]
    assert [step.panels for step in plan.steps] == [
        ("a fox", "a fox, rainy"),
        ("a hen", "a hen, rainy"),
    ]
    together = make("Two pictures of them", (), GIVEN)
    assert [step.group.references for step in together.steps] == [(0, 1), (0, 1)]


def test_a_name_in_angle_brackets_is_remembered():
    memory = (picture(1, "<Mira>, a small fox, runs"), picture(2, "a hen", round_=2))
    assert make("Mira sleeps", memory).sources == (1,)
    assert make("<Mira> sleeps", memory).sources == (1,)
    assert make("Miranda sleeps", memory).sources == ()


def test_every_panel_says_who_is_in_it():
    plan = make("Three scenes of <Mira>, a red fox: she wakes; she runs; she sleeps")
    assert all("<Mira>, a red fox" in panel for panel in plan.steps[0].panels)
    assert plan.steps[0].overall == "<Mira>, a red fox"


@pytest.mark.parametrize(
    ("message", "memory", "said"),
    [
        ("Make the fifth picture blue", MEMORY, "'fifth picture' and there are 4 pictures"),
        ("Make #9 blue", MEMORY, "'#9' and there are 4"),
        ("Make the first picture blue", (), "there are 0 pictures"),
        ("Draw three pictures", (), "does not say what to draw"),
        ("Four pictures: a fox; a hen", (), "asks for 4 pictures and lists 2 things"),
        ("Draw 0 pictures of a fox", (), "asks for 0 pictures"),
        ("Mix the last 5 pictures", MEMORY, "there are 4 pictures"),
    ],
)
def test_what_cannot_be_planned_is_said(message: str, memory, said: str):
    with pytest.raises(PlannerError, match=said):
        make(message, memory)


def test_no_word_is_added():
    for message in ("Three pictures of a fox: on the left; at night; it runs", "Make it blue"):
        known = message.lower() + " ".join(p.description for p in MEMORY)
        for text in texts(make(message, MEMORY)):
            assert all(word in known for word in text.lower().replace(",", "").split())


def test_pictures_that_nobody_described():
    unknown = (picture(1, "", drawn=False),)
    assert make("Make it blue", (), unknown).inputs[0].description == "picture 1"
    plan = RulePlanner(lambda image: f"a {image.width} pixel thing").plan(
        ChatRequest("Make it blue", unknown), ()
    )
    assert texts(plan) == ["a 8 pixel thing, blue"]


@pytest.mark.parametrize(
    ("message", "article", "count"),
    [
        ("Write an illustrated article about a fox", True, 3),
        ("a picture book about a fox", True, 4),
        ("an article about foxes: a fox; a den", True, 2),
        ("a fox", False, 1),
    ],
)
def test_articles(message: str, article: bool, count: int):
    plan = make(message)
    assert plan.article == article and len(plan.outputs) == count
    assert make("a fox", article=True).article


def test_the_article_is_valid_and_its_texts_are_escaped():
    planner = RulePlanner()
    hostile = "an article about <script>alert(1)</script> [x](javascript:y): a *fox*; ![b](http://c/d.png)"
    plan = planner.plan(ChatRequest(hostile), ())
    text = planner.write(plan)
    check_markdown(text, [item.image_id for item in plan.outputs])
    assert "<script" not in text and r"\*fox\*" in text


def test_plans_are_deterministic_and_consume_no_randomness():
    state = torch.random.get_rng_state()
    assert make("Three variations of it", MEMORY) == make("Three variations of it", MEMORY)
    assert torch.equal(state, torch.random.get_rng_state())
