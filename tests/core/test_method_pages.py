"""Every method has a page that is up to date, a figure that shows something, and examples that work."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from mmattn.cli import app
from mmattn.registry import BUILTIN
from mmattn.variants import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
AGAIN = "run: python docs/build.py"
NAMES = sorted(BUILTIN)
build = runpy.run_path(str(ROOT / "docs" / "build.py"))


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.S)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_what_class_and_note_say(name):
    page = PAGES / f"{name}.md"
    assert page.is_file(), f"{name} has no page; {AGAIN} {name}"
    assert page.read_text() == build["page"](name), f"{page.name} is stale; {AGAIN} {name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_the_class_is_on_the_page(name):
    from dataclasses import fields

    from mmattn.registry import method_class

    text = (PAGES / f"{name}.md").read_text()
    for field in fields(method_class(name)):
        assert f"`{field.name}` (" in text, f"{name} does not document {field.name}"
    assert "## When it does not help" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_is_small_and_shows_something(name):
    path = PAGES / "figures" / f"{name}.png"
    assert path.is_file(), f"{name} has no figure; {AGAIN} {name} --figures"
    assert path.stat().st_size <= 60 * 1024
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    assert pixels.shape[1] >= 300 and pixels.std() > 10
    # More than one region differs from the background.
    assert (pixels.std(axis=2) > 8).any(axis=0).mean() > 0.05 or pixels.std() > 40


def test_no_page_or_note_is_left_of_a_method_that_is_gone():
    for folder in (PAGES, PAGES / "_notes"):
        assert {path.stem for path in folder.glob("*.md")} == set(NAMES)
    assert {path.stem for path in (PAGES / "figures").glob("*.png")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_python_example_parses_and_uses_the_method(name):
    (code,) = blocks(name, "python")
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert build["method_class"](name).__name__ in used


@pytest.mark.parametrize("name", NAMES)
def test_the_command_is_one_that_the_command_line_takes(name):
    (line,) = blocks(name, "sh")
    program, verb, *words = shlex.split(line)
    assert program == "mmattn"
    command = typer.main.get_command(app).commands[verb]
    # Parsing alone: nothing is loaded, and files are checked when the verb runs.
    context = command.make_context(verb, list(words))
    for text in context.params.get("method") or ():
        assert [method.name for method in parse(text).methods] == [name]
    for path in context.params.get("image") or ():
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", ["tome", "hiprune", "random-blocks"])
def test_examples_run_on_the_embedded_models(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks(name, "python")
    scope = {}
    exec(compile(code.replace("steps=8", "steps=2"), name, "exec"), scope)
    assert scope["session"].stats.executed > 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("doc", "wanted"),
    [
        (
            "First.\n\nIdea.\n\nArgs:\n    a: one,\n        two.\n\nRaises:\n    E: why.",
            ("Idea.", "a: one,\n    two.", "E: why."),
        ),
        ("First.\n\nArgs:\n    a: one.\n\nA last remark.", ("A last remark.", "a: one.", None)),
    ],
)
def test_docstrings_fall_into_sections(doc, wanted):
    found = build["sections"](doc)
    idea, args, raises = wanted
    assert found[""].startswith("First.") and found[""].endswith(idea)
    assert (found["Args"], found.get("Raises")) == (args, raises)


def test_links_of_a_note_are_moved_to_the_page(tmp_path, monkeypatch):
    notes = tmp_path / "_notes"
    notes.mkdir()
    (notes / "x.md").write_text(
        '+++\nuse = ""\ncli = ""\nfigure = ""\ncaption = ""\nrelated = []\n+++\n'
        "[a](../../video.md#speed) and [b](../tome.md)\n"
    )
    monkeypatch.setitem(build["note"].__globals__, "HERE", tmp_path)
    assert build["note"]("x").text == "[a](../video.md#speed) and [b](tome.md)"
