"""One method at several places with several settings, probe steps, and the report by layer and step."""

import json
import re

import pytest
import torch

import mmattn
from mmattn import VMoBA
from mmattn.methods.base import Placed
from tests.methods.test_vmoba_models import wan, wan_inputs


def settings(density):
    return VMoBA(topk={0.25: 1, 0.5: 2}[density], chunks=(1, (8, 6), (1, 4, 6)), dense_steps=0)


@torch.no_grad()
def test_each_setting_acts_at_its_own_sites_and_round_trips(tmp_path):
    model, x = wan(3), wan_inputs()
    methods = [settings(0.25).at("blocks.0.*"), settings(0.5).at(re.compile(r"blocks\.2\.attn1"))]
    with mmattn.attach(model, methods) as session:
        out = model(**x).sample
        rows = {s.path: s.density for s in session.stats.sites}
        session.save(tmp_path / "run.json")
    assert rows == {"blocks.0.attn1": 0.25, "blocks.2.attn1": 0.5}
    recipe = mmattn.load(tmp_path / "run.json")
    assert recipe.methods[0] == Placed(settings(0.25), "blocks.0.*")
    assert recipe.methods[1] == Placed(settings(0.5), ["blocks.2.attn1"])
    with mmattn.attach(model, recipe) as session:
        assert torch.equal(model(**x).sample, out)
    tables = json.loads((tmp_path / "run.json").read_text())["method"]
    with mmattn.attach(model, tables) as session:
        assert torch.equal(model(**x).sample, out)


def test_the_same_site_twice_and_a_selector_of_nothing_are_refused():
    model = wan(3)
    with pytest.raises(mmattn.ConflictError, match=r"given twice.*method\.at"):
        mmattn.plan(model, [settings(0.25), settings(0.5).at("blocks.0.*")])
    with pytest.raises(mmattn.SelectorError, match=r"blocks\.9"):
        mmattn.plan(model, [settings(0.25).at("blocks.9.*")])
    with pytest.raises(mmattn.NoSiteError, match="kind cross"):
        mmattn.attach(model, settings(0.25).at("*.attn2"))
    path = {"name": "vmoba", "sites": 3}
    with pytest.raises(mmattn.ConfigError, match="sites must be"):
        from mmattn.config import recipe_from

        recipe_from({"method": [path]})


@torch.no_grad()
def test_recall_is_measured_in_the_steps_that_were_asked_for():
    model, x = wan(3), wan_inputs()
    with mmattn.attach(model, settings(0.5), probe=[1, 2]) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        recalled = []
        for step in range(4):
            session.step(step, 4)
            model(**x)
            meter = session.runs[0].sites[0].meter
            recalled.append(meter.counts.get("recall", 0))
        assert recalled == [0, 1, 2, 2]
        stats = session.stats
    assert 0 < stats.sites[0].recall < 1 and 0 < stats.sites[2].recall < 1
    assert stats.sites[1].recall == 1, "one chunk, so dense"
    assert stats.recall == pytest.approx(sum(s.recall for s in stats.sites) / 3)
    with mmattn.attach(model, settings(0.5), probe=True) as session:
        model(**x)
        assert "  recall" in session.report()
    for bad in ([], [-1], [0.5], "x"):
        with pytest.raises(mmattn.ConfigError, match="probe"):
            mmattn.plan(model, settings(0.5), probe=bad)
    with pytest.raises(mmattn.ConfigError, match="measures what it leaves out"):
        mmattn.plan(model, "identity", probe=True)


@torch.no_grad()
def test_the_report_shows_density_by_layer_and_step():
    model, x = wan(3), wan_inputs()
    method = VMoBA(topk=2, chunks=(1, (8, 6), (1, 4, 6)), dense_steps=3, dense_layers=1)
    with mmattn.attach(model, method) as session:
        for step in range(12):
            session.step(step, 12)
            model(**x)
        lines = session.report().splitlines()
        stats = session.stats
    at = next(i for i, line in enumerate(lines) if "density by step" in line)
    assert lines[at].split()[3:] == ["0-2", "3-11"]
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["blocks.0.attn1", "1.000", "1.000"],
        ["blocks.1.attn1", "1.000", "1.000"],
        ["blocks.2.attn1", "1.000", "0.500"],
    ]
    assert stats.sites[2].steps[2] == 1 and stats.sites[2].steps[3] == 0.5
    assert json.loads(json.dumps(stats.to_dict()))["sites"][2]["density"] == pytest.approx(0.625)


@torch.no_grad()
def test_many_different_steps_share_eight_columns():
    model = wan(3)
    method = VMoBA(threshold=0.3, kind="query", chunks=(1, (2, 3), (1, 2, 3)), dense_steps=0)
    with mmattn.attach(model, method) as session:
        for step in range(20):
            session.step(step, 20)
            model(**wan_inputs(seed=step))
        lines = session.report().splitlines()
    head = next(line for line in lines if "density by step" in line)
    assert head.split()[3:] == ["0-2", "3-5", "6-8", "9-11", "12-14", "15-17", "18-19"]


@torch.no_grad()
def test_two_resolutions_in_one_session_and_uneven_boxes_are_reported():
    model = wan(3)
    small, large = wan_inputs(), wan_inputs(seed=1)
    large["hidden_states"] = torch.randn(1, 4, 5, 10, 14)
    method = VMoBA(topk=2, chunks=(1, (2, 3), (2, 2, 3)), dense_steps=0)
    with mmattn.attach(model, method) as session:
        first = model(**small).sample
        second = model(**large).sample
        assert torch.equal(model(**small).sample, first)
        assert torch.equal(model(**large).sample, second)
        assert "do not divide the grid (5, 5, 7)" in session.report()
        assert "(4, 4, 6)" not in session.report()


@torch.no_grad()
def test_a_dry_run_measures_and_changes_nothing():
    model, x = wan(3), wan_inputs()
    before = model(**x).sample
    with mmattn.attach(model, settings(0.25), dry_run=True, probe=True) as session:
        assert torch.equal(model(**x).sample, before)
        first, dense, _ = session.stats.sites
    with mmattn.attach(model, settings(0.25).at("blocks.0.*"), dry_run=True):
        assert torch.equal(model(**x).sample, before)
    assert first.density == 0.25 and 0 < first.recall < 1 and first.notes["error"] > 1e-4
    assert dense.density == 1 and dense.notes["error"] == 0
    with pytest.raises(mmattn.ConfigError, match="attention seam"):
        mmattn.plan(model, "tome", dry_run=True)


@torch.no_grad()
def test_a_dense_fall_back_counts_as_density_one():
    model, x = wan(3), wan_inputs()
    x["attention_kwargs"] = None
    with mmattn.attach(model, settings(0.25), unsupported="dense") as session:
        session.runs[0].root.layout = None
        session.runs[0].layout = mmattn.Layout()
        model(**x)
        assert {s.density for s in session.stats.sites} == {1.0}
        assert "no token grid" in session.report()
