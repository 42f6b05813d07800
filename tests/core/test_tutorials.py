"""The tutorials run as they are, and show what they say."""

import runpy
from pathlib import Path

import pytest
import torch

from mmattn import registry

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "tutorials"


@pytest.fixture(autouse=True)
def methods_of_the_tutorials_do_not_stay(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def run(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def test_first_attach():
    seen = run("01_first_attach")
    assert seen["accuracy"] > 0.95 and seen["merged_accuracy"] > 0.8
    assert not torch.equal(seen["merged"], seen["before"])
    assert torch.equal(seen["untouched"], seen["before"])
    assert torch.equal(seen["after"], seen["before"])
    kinds = [type(error).__name__ for error in seen["errors"]]
    assert kinds == ["NoSiteError", "SelectorError", "ConfigError"]


def test_prune_a_vlm():
    seen = run("02_prune_a_vlm")
    recall = {name: named for name, (named, _) in seen["results"].items()}
    assert recall["untouched"] > 0.8
    assert recall["random-prune"] < recall["untouched"]
    assert seen["kept"] == {"hiprune": 21, "merge-prune": 21, "random-prune": 21}
    assert seen["both"].stats.executed == 2 and seen["conflict"] is not None


def test_sparse_video():
    seen = run("03_sparse_video")
    quality = seen["quality"]
    assert 0.2 < seen["density"] < 0.5
    assert quality["vmoba, first quarter dense"] > quality["vmoba"] > quality["random blocks"]
    assert seen["session"].stats.recall > seen["density"]
    assert seen["half"].stats.executed == 3


def test_your_own_method():
    seen = run("04_your_own_method")
    assert seen["session"].stats.density == pytest.approx(0.246, abs=0.01)
    assert seen["results"]["untouched"] > 0.9 > seen["results"]["top-keys"]
    assert seen["on_video"].stats.executed == 6
    assert seen["decibel"]["top-keys"] > seen["decibel"]["some-keys"]


def test_compose_and_report():
    seen = run("05_compose_and_report")
    assert seen["stats"].executed == seen["stats"].planned == 9
    assert len(seen["files"]) == len(seen["maps"]) == 48
    assert all(path.is_file() for path in seen["files"])
    assert seen["again"] == seen["captions"]


def test_the_readme_lists_every_tutorial():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.py"):
        assert f"]({path.name})" in text
