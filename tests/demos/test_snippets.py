"""The code beside a result gives that result: Python is executed, the command line is run."""

from __future__ import annotations

import shlex

import pytest
import torch
from mmattn_demos import answering, drawing, pictures, sets, snippets
from mmattn_demos.presets import chosen, presets
from PIL import Image

from mmattn.batch.writers import to_pixels
from mmattn.cli import main

PROMPT = 'a big red circle on the left on a "white" background'


def executed(code):
    names = {}
    exec(compile(code, "shown", "exec"), names)
    return names


def command(line):
    words = shlex.split(line)
    assert words[0] == "mmattn"
    return words[1:]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", [0, -1])
def test_python_gives_the_picture_on_screen(place, models, capsys):
    loaded, preset = models.get("t2i"), presets("t2i")[place]
    ask = drawing.Ask(PROMPT, preset.column, 5, 3, 2.5)
    runs = drawing.pair(loaded, ask, lambda update: None)
    code = snippets.drawing(loaded, ask.column, PROMPT, 5, 3, 2.5, {})
    names = executed(code.python)
    assert torch.equal(names["dense"][0], runs[0].value)
    assert torch.equal(names["result"][0], runs[1].value)
    assert not torch.equal(runs[0].value, runs[1].value)
    assert "executed" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, -1])  # the last one reads a recipe file
def test_the_command_line_gives_the_picture_on_screen(place, models, here, capsys):
    loaded, preset = models.get("t2i"), presets("t2i")[place]
    ask = drawing.Ask(PROMPT, preset.column, 5, 3, 2.5)
    shown = drawing.single(loaded, ask, lambda update: None, methods=True)
    code = snippets.drawing(loaded, ask.column, PROMPT, 5, 3, 2.5, {})
    assert bool(code.recipe) == (place == -1)
    if code.recipe:
        (here / "recipe.toml").write_text(code.recipe, encoding="utf-8")
    assert main(command(code.command)) == 0
    with Image.open(capsys.readouterr().out.strip()) as picture:
        assert (to_pixels(picture) == to_pixels(shown.value)).all()


def test_clips(models):
    loaded, column = models.get("t2v"), presets("t2v")[-1].column
    ask = drawing.Ask("a red circle moving right on a white background", column, 2, 2, 3.0)
    runs = drawing.pair(loaded, ask, lambda update: None)
    names = executed(snippets.drawing(loaded, column, ask.prompt, 2, 2, 3.0, {}).python)
    assert torch.equal(names["result"][0], runs[1].value)


@pytest.mark.parametrize("label", ["HiPrune + VCD (composition)"])
def test_answers(label, models, here, capsys):
    loaded, column = models.get("vlm"), chosen(label, "vlm")
    picture, _ = pictures.scene(3)
    picture.save(here / "picture.png")
    question = "describe the picture ."
    said = answering.ask(loaded, picture, question, column, 3, 40, lambda update: None)
    code = snippets.answering(loaded, column, question, 3, 40)
    names = executed(code.python)
    assert (names["dense"], names["result"]) == (said[0].text, said[1].text)
    capsys.readouterr()
    assert main(command(code.command)) == 0
    assert capsys.readouterr().out.strip() == said[1].text


def test_classes(models, here, capsys):
    loaded, column = models.get("vit"), presets("vit")[0].column
    picture = pictures.single(4)
    picture.save(here / "picture.png")
    said = answering.classify(loaded, picture, column, 3, lambda update: None)
    code = snippets.classifying(loaded, column, 3)
    best = executed(code.python)["result"].topk(3).values.tolist()
    assert best == pytest.approx(list(said[1].chances.values()), abs=1e-6)
    capsys.readouterr()
    assert main(command(code.command)) == 0
    assert next(iter(said[1].chances)) in capsys.readouterr().out


def test_benchmarks(models, capsys):
    loaded, columns = models.get("vit"), [chosen("tome:r=8", "vit"), chosen("tome:r=4", "vit")]
    code = snippets.timing(loaded, columns, 1, 1, 0)
    lines = executed(code.python)["lines"]
    assert len(lines) == 3 and all(line.median_ms for line in lines)
    assert main([*command(code.command), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("way", "seen", "given"), [("batch", "group", 1), ("canvas", "isolated", 0)]
)
def test_sets(way, seen, given, models, here):
    loaded = models.get("t2i")
    references = []
    for i in range(given):
        picture, _, _ = pictures.captioned(i)
        picture.save(here / f"reference{i}.png")
        references.append(picture)
    ask = sets.SetAsk(
        ("a red circle", "a blue star on a white background"),
        "",
        way,
        seen,
        tuple(references),
        64,
        3,
        3,
        3.0,
    )
    drawn = sets.draw_set(loaded, ask, seen).images
    again = executed(sets.snippet(loaded, ask).python)["result"]
    assert len(drawn) == len(again) == 2
    for one, other in zip(drawn, again, strict=True):
        assert (to_pixels(one) == to_pixels(other)).all()


def test_folders_of_models_are_named_without_their_place(models, tmp_path):
    from mmattn_demos.models import Models

    from mmattn.mini.manifest import weights_root

    mine = Models([weights_root() / "vit"])
    code = snippets.classifying(mine.get("vit"), presets("vit")[0].column, 3)
    assert "resolve('vit')" in code.python and str(weights_root()) not in repr(code)
    assert not mine.embedded("vit") and mine.embedded("t2i")
