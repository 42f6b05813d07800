"""Every contract accepts its smallest valid reply and names the field of every broken one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from mmattn_pipelines import chatdit_contracts as contracts
from mmattn_pipelines.chatdit_plan import ContractError, Described

ONE = {"image_id": "input_0001_fox", "description": "a fox"}
TWO = {"image_id": "input_0002_hen", "description": "a hen"}
DESCRIPTION = {
    "explanation": None,
    "descriptions": {"overview": "animals", "input_images": [ONE, TWO]},
}
COUNTING = {"explanation": "", "input_image_count": 2, "output_image_count": 3}
OUT = [
    {"image_id": "output_0001_fox", "description": "a fox in snow"},
    {"image_id": "output_0002_hen", "description": "a hen in snow"},
]
PROMPTING = {"explanation": "", "descriptions": {"overview": "", "output_images": OUT}}
SINGLE = {"explanation": "", "prompt": "a fox", "image_id": "output_0001_fox"}
PANELS = {"explanation": "", "prompt": "[TWO-PANEL] Animals. [PANEL-1] a fox, [PANEL-2] a hen."}
SELECTION = {"explanation": "", "image_ids": ["picture_0002_hen"]}
KNOWN = {"picture_0001_fox": 1, "picture_0002_hen": 2}

CHECKS = {
    "description": (DESCRIPTION, lambda reply: contracts.check_description(reply, 2)),
    "counting": (COUNTING, lambda reply: contracts.check_counting(reply, 2)),
    "prompting": (PROMPTING, lambda reply: contracts.check_prompting(reply, 1, 2)),
    "single": (SINGLE, lambda reply: contracts.check_prompting(reply, 0, 1)),
    "panels": (PANELS, lambda reply: contracts.check_panelizing(reply, 2)),
    "selection": (SELECTION, lambda reply: contracts.check_selection(reply, KNOWN)),
}


def places(value: Any, path: tuple = ()):
    """Path of every object in a reply."""
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from places(item, (*path, key))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def broken():
    """Every object of every contract without each key, with another key, and with a wrong type."""
    for name, (reply, _) in CHECKS.items():
        for path in places(reply):
            for key in at(reply, path):
                for how in ("missing", "type"):
                    yield pytest.param(
                        name, path, key, how, id=f"{name}-{'.'.join(map(str, path))}-{key}-{how}"
                    )
            yield pytest.param(
                name, path, "bonus", "extra", id=f"{name}-{'.'.join(map(str, path))}-extra"
            )


@pytest.mark.parametrize("name", CHECKS)
def test_the_smallest_valid_reply_passes(name: str):
    reply, check = CHECKS[name]
    check(reply)


@pytest.mark.parametrize(("name", "path", "key", "how"), broken())
def test_every_broken_field_is_named(name: str, path: tuple, key: str, how: str):
    reply, check = CHECKS[name]
    reply = copy.deepcopy(reply)
    if how == "missing":
        del at(reply, path)[key]
    else:
        at(reply, path)[key] = True
    with pytest.raises(ContractError) as caught:
        check(reply)
    message = str(caught.value)
    assert key in message
    assert {"missing": "lacks", "extra": "does not belong", "type": "got bool true"}[how] in message


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("counting", {"input_image_count": 3}, "must repeat the 2 of the request, got 3"),
        ("counting", {"output_image_count": 0}, "output_image_count must be at least 1, got 0"),
        ("counting", {"output_image_count": 1.5}, "must be a whole number, got float 1.5"),
        ("single", {"prompt": "  "}, "description of the reply.* is empty"),
        ("single", {"image_id": "fox"}, "must begin with 'output_0001_', got 'fox'"),
        ("panels", {"prompt": "[PANEL-1] a [PANEL-2] b"}, r"markers \[TWO-PANEL\] and then"),
        (
            "panels",
            {"prompt": "[TWO-PANEL] [PANEL-2] a [PANEL-1] b"},
            r"found \[TWO-PANEL\] \[PANEL-2\]",
        ),
        ("panels", {"prompt": "[TWO-PANEL] x [PANEL-1] a"}, "once each and in this order"),
        ("panels", {"prompt": "[THREE-PANEL] x [PANEL-1] a [PANEL-2] b"}, r"found \[THREE-PANEL\]"),
        ("panels", {"prompt": "two panels, a and b"}, "found none"),
        (
            "panels",
            {"prompt": "[TWO-PANEL] x [PANEL-1], [PANEL-2] b"},
            r"nothing behind \[PANEL-1\]",
        ),
        (
            "selection",
            {"image_ids": ["picture_0009_x"]},
            "'picture_0009_x', which is not in the conv",
        ),
        ("selection", {"image_ids": [{}]}, "names {}, which is not"),
        ("selection", {"image_ids": ["picture_0001_fox"] * 2}, "every picture once"),
    ],
)
def test_wrong_values_are_named(name: str, change: dict, said: str):
    reply, check = CHECKS[name]
    with pytest.raises(ContractError, match=said):
        check({**reply, **change})


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([ONE], "must have 2 entries, got 1"),
        ([ONE, TWO, TWO], "must have 2 entries, got 3"),
        ([TWO, ONE], "must begin with 'input_0001_', got 'input_0002_hen'"),
        ([ONE, {**TWO, "description": " ,;"}], r"input_images\[1\] is empty"),
    ],
)
def test_wrong_lists_are_named(images: list, said: str):
    reply = {"explanation": "", "descriptions": {"overview": "", "input_images": images}}
    with pytest.raises(ContractError, match=said):
        contracts.check_description(reply, 2)


def test_identifiers_become_safe_and_descriptions_one_line():
    item = {"image_id": "output_0001_../Über fox.JPG", "description": "a fox,\n [PANEL-9] runs; "}
    reply = {"explanation": "", "prompt": item["description"], "image_id": item["image_id"]}
    assert contracts.check_prompting(reply, 0, 1)[1] == (
        Described("output_0001_ber-fox-jpg", "a fox, PANEL-9 runs"),
    )


@pytest.mark.parametrize(
    "reply",
    [
        '{"a": 1}',
        'Here you are:\n```json\n{"a": 1}\n```\nDone.',
        'thinking {not json} ... {"a": 1} {"b": 2}',
    ],
)
def test_the_object_is_found_among_words(reply: str):
    assert contracts.parse_object(reply) == {"a": 1}


@pytest.mark.parametrize("reply", ["", "no", "[1, 2]", '{"a": ', "{a: 1}"])
def test_a_reply_without_an_object(reply: str):
    with pytest.raises(ContractError, match="holds no complete JSON object; it begins with"):
        contracts.parse_object(reply)


@pytest.mark.parametrize("count", range(2, 13))
def test_panels_are_taken_apart(count: int):
    panels = tuple(f"clause {i} of PANEL-1" for i in range(count))
    marked = ", ".join(f"[PANEL-{i}] {panel}" for i, panel in enumerate(panels, 1))
    prompt = f"[{count}-PANEL] what they share, {marked}"
    assert contracts.split_panels(prompt, count) == ("what they share", panels)


def test_the_header_may_stand_inside_its_sentence():
    prompt = "This [MULTI-PANEL] image shows a fox. [PANEL-1] it sits, and [PANEL-2] it runs."
    overall, panels = contracts.split_panels(prompt, 2)
    assert overall == "This image shows a fox." and panels == ("it sits", "it runs.")


MARKDOWN = "# Foxes\n\n![a fox](output_0001_fox.png)\n\nSee [more](https://example.org).\n"


def test_markdown_that_shows_everything_passes():
    assert contracts.check_markdown(MARKDOWN, ["output_0001_fox"]) == MARKDOWN
    fenced = f"```markdown\n{MARKDOWN}```"
    assert contracts.check_markdown(fenced, ["output_0001_fox"]) == MARKDOWN
    with_input = MARKDOWN + "![in](input_0001_a-hen.png)"
    contracts.check_markdown(with_input, ["output_0001_fox"], ["input_0001_a-hen"])


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("![x](output_0002_hen.png)", "shows 'output_0002_hen.png', which is not one of"),
        ("![x](https://example.org/track.png)", "shows 'https://example.org/track.png'"),
        ("![x](<output_0001_fox.png>)", "shows '<output_0001_fox.png>'"),
        ("[x](javascript:alert)", "links to 'javascript:alert'"),
        ("[x](\n javascript:alert)", "links to 'javascript:alert'"),
        (r"\\[x](javascript:alert)", "links to 'javascript:alert'"),
        ("[x](file:///etc/passwd)", "only web pages"),
        ("![x][ref]", "in line"),
        ("> [ref]: javascript:alert", "in line"),
        ("[a[b]](javascript:alert)", "in line"),
    ],
)
def test_markdown_with_something_else_is_refused(added: str, said: str):
    with pytest.raises(ContractError, match=said):
        contracts.check_markdown(f"{MARKDOWN}\n{added}\n", ["output_0001_fox"])


def test_markdown_that_leaves_a_picture_out_is_refused():
    with pytest.raises(ContractError, match=r"never shows output_0002_hen\.png"):
        contracts.check_markdown(MARKDOWN, ["output_0001_fox", "output_0002_hen"])
