"""Rules of ChatDiT plans for every number of inputs and outputs, sizes of panels, and plans as JSON."""

from __future__ import annotations

import json
import math

import pytest
from mmattn_pipelines.chatdit_plan import (
    MAX_PANELS,
    ContractError,
    Described,
    Group,
    Plan,
    Step,
    groups,
    image_id,
    median_aspect,
    panel_size,
    slug,
)
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

from mmattn.errors import ConfigError


def reference(inputs: int, outputs: int) -> list[tuple[list[str], list[str]]]:
    """The published table, case by case, with names in place of indices."""
    given = [f"in{i}" for i in range(inputs)]
    drawn = [f"out{i}" for i in range(outputs)]
    if inputs == 0 and outputs <= 4:
        return [([], drawn)]
    if inputs == 0:
        return [([], drawn[:4])] + [(["out0", "out1", "out2"], [name]) for name in drawn[4:]]
    if inputs == 1 and outputs == 1:
        return [(given, drawn)]
    if inputs == 1:
        return [(["in0"] + drawn[:i], [drawn[i]]) for i in range(outputs)]
    if outputs == 1:
        return [(given, drawn)]
    return [(given, [name]) for name in drawn]


@pytest.mark.parametrize("inputs", range(12))
@pytest.mark.parametrize("outputs", range(1, 12))
def test_groups_are_those_of_the_paper(inputs: int, outputs: int):
    names = [f"in{i}" for i in range(inputs)] + [f"out{i}" for i in range(outputs)]
    found = groups(inputs, outputs)
    named = [([names[i] for i in g.references], [names[i] for i in g.outputs]) for g in found]
    assert named == reference(inputs, outputs)
    assert [i for g in found for i in g.outputs] == list(range(inputs, inputs + outputs))


@pytest.mark.parametrize(
    ("inputs", "outputs", "canvases"),
    [(0, 1, 1), (0, 4, 1), (0, 5, 2), (0, 6, 3), (1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 2, 2)],
)
def test_number_of_canvases(inputs: int, outputs: int, canvases: int):
    assert len(groups(inputs, outputs)) == canvases


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 12), (1, 30), (12, 1), (40, 3), (0, 30)])
def test_no_canvas_has_more_than_twelve_panels(inputs: int, outputs: int):
    found = groups(inputs, outputs)
    sizes = [len(g.references) + len(g.outputs) for g in found]
    assert max(sizes) <= MAX_PANELS
    if inputs == 1:
        assert found[-1].references == (0, *range(outputs - 10, outputs))
    if inputs >= MAX_PANELS:
        assert all(g.references == tuple(range(MAX_PANELS - 1)) for g in found)


def test_one_for_each_input():
    assert groups(3, 3, each=True) == tuple(Group((i,), (3 + i,)) for i in range(3))
    assert [g.references for g in groups(2, 4, each=True)] == [(0,), (0,), (1,), (1,)]
    with pytest.raises(ConfigError, match="3 outputs do not divide among 2"):
        groups(2, 3, each=True)
    with pytest.raises(ConfigError, match="at least one picture, got 2 inputs, 0 outputs"):
        groups(2, 0)


@pytest.mark.parametrize(
    ("panels", "aspect", "expected"),
    [
        (1, 1, (1024, 1024, 1, 1)),
        (2, 1, (1024, 1024, 1, 2)),
        (3, 1, (832, 832, 1, 3)),
        (4, 1, (704, 704, 2, 2)),
        (5, 1, (640, 640, 1, 5)),
        (6, 1, (576, 576, 2, 3)),
        (7, 1, (512, 512, 1, 7)),
        (8, 1, (512, 512, 2, 4)),
        (9, 1, (448, 448, 3, 3)),
        (10, 1, (448, 448, 2, 5)),
        (11, 1, (384, 384, 1, 11)),
        (12, 1, (384, 384, 3, 4)),
        (1, 16 / 9, (768, 1344, 1, 1)),
        (2, 16 / 9, (768, 1344, 2, 1)),
        (3, 16 / 9, (576, 1088, 3, 1)),
        (4, 16 / 9, (512, 960, 2, 2)),
        (6, 16 / 9, (384, 768, 3, 2)),
        (7, 16 / 9, (384, 704, 7, 1)),
        (9, 16 / 9, (320, 640, 3, 3)),
        (12, 16 / 9, (256, 512, 4, 3)),
    ],
)
def test_panel_sizes_and_layouts_are_the_published_ones(panels, aspect, expected):
    height, width = panel_size(panels, aspect)
    layout = PanelLayout.auto(panels, height, width)
    assert (height, width, layout.rows, layout.cols) == expected
    assert layout.height * layout.width <= 2**21 and height * width <= 2**20


def test_aspect_is_the_middle_one_on_a_logarithmic_scale():
    def blank(w: int, h: int) -> Image.Image:
        return Image.new("RGB", (w, h))

    assert median_aspect([]) == 1
    assert math.isclose(median_aspect([blank(40, 10), blank(10, 40)]), 1)
    assert math.isclose(median_aspect([blank(40, 10), blank(20, 10), blank(10, 10)]), 2)
    assert panel_size(2, 1000)[0] == 64


def test_identifiers_are_safe_in_files_and_links():
    assert (
        image_id("output", 3, "A big RED circle, on the moon") == "output_0003_big-red-circle-moon"
    )
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("日本") == "picture"
    assert len(slug("x" * 500)) == 24


def plan(**changes) -> Plan:
    settings = {
        "instruction": "two more like this",
        "sources": (7,),
        "inputs": (Described("input_0001_fox", "a fox"),),
        "outputs": (Described("output_0001_fox", "a fox"), Described("output_0002_hen", "a hen")),
        "steps": (
            Step(Group((0,), (1,)), "animals", ("a fox", "a fox")),
            Step(Group((0, 1), (2,)), "animals; ink,", ("a fox", "a fox", "a hen, [odd] and")),
        ),
        "article": True,
    }
    return Plan(**{**settings, **changes})


def test_a_plan_survives_json():
    once = plan()
    data = json.loads(json.dumps(once.to_dict()))
    assert Plan.from_dict(data) == once
    assert data["strategy"]["steps"][1]["images"] == [0, 1]
    assert data["parsing"]["output_image_count"] == 2


@pytest.mark.parametrize("path", ["instruction", "sources", "parsing", "strategy", "article"])
def test_an_incomplete_plan_is_named(path: str):
    data = plan().to_dict()
    del data[path]
    with pytest.raises(ContractError, match=f"incomplete: KeyError.'{path}'"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": ()}, "0 sources and 1 inputs"),
        ({"inputs": (Described("input_0001_fox", ""),)}, "description of input_0001_fox is empty"),
        ({"steps": plan().steps[:1]}, r"must draw the pictures \[1, 2\] once .* they draw \[1\]"),
        ({"steps": plan().steps[::-1]}, r"they draw \[2, 1\]"),
        (
            {"steps": (Step(Group((2,), (1,)), "", ("a", "b")), plan().steps[1])},
            r"step 1 draws picture 1 and sees \[2\]",
        ),
        (
            {"steps": (Step(Group((0,), (1,)), "", ("a",)), plan().steps[1])},
            "step 1 has 2 pictures and 1 clauses",
        ),
        (
            {"steps": (Step(Group((0,), (1,)), "", ("a", "")), plan().steps[1])},
            "step 1 has 2 pictures and 1 clauses",
        ),
    ],
)
def test_an_unsound_plan_is_refused(changes, said: str):
    with pytest.raises(ContractError, match=said):
        plan(**changes)
