"""Uptraining of grouped-query attention on the embedded ViT."""

import json

import pytest

import mmattn.mini
from mmattn.errors import ConfigError
from mmattn.evals import gqa_uptraining as gu

QUICK = {**gu.SETTINGS, "steps": 12, "batch": 24, "held_out": 100}


@pytest.fixture(scope="module")
def vit():
    return mmattn.mini.load("vit")


def test_grouping_costs_accuracy_and_training_brings_some_back(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(gu, "CASES", (("static", 2),))
    path = tmp_path / "runs.json"
    record = gu.measure(vit, path, [0], QUICK)
    run = record["runs"][0]
    assert record["untouched"] > 0.95
    assert run["before"] < record["untouched"] - 0.1
    assert run["after"] > run["before"] + 0.1
    assert run["parameters"] < record["parameters"]
    assert gu.measure(vit, path, [0], QUICK) == record == json.loads(path.read_text())
    assert "| static | 2 |" in gu.markdown(record)
    with pytest.raises(ConfigError, match="were asked for"):
        gu.measure(vit, path, [0], {**QUICK, "steps": 7})


def test_random_groups_differ_from_consecutive_ones(vit, monkeypatch):
    seen = {}

    def remember(model, batches, learning_rate):
        seen[len(seen)] = model.blocks[0].attn.k.weight.clone()
        return [0.0]

    monkeypatch.setattr(gu, "uptrain", remember)
    for kind, seed in (("static", 0), ("random", 0), ("random", 3)):
        gu.run(vit, kind, 2, seed, {**QUICK, "steps": 1, "held_out": 10})
    assert any(not bool((seen[0] == seen[i]).all()) for i in (1, 2))
