"""Intervals, the table of many results, and the script that makes it."""

from __future__ import annotations

import json

import pytest
import torch

from mmattn.errors import ConfigError
from mmattn.evals import chair, harness, vlm_table
from mmattn.evals._protocol import world
from mmattn.evals.table import differences, intervals, lines, markdown, read
from mmattn.loading import Loaded
from mmattn.mini import vlm


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mmattn.measuring._settle", lambda: None)  # half a second per column


ZERO = dict.fromkeys(("right", "objects", "words", "broken"), 0)


def captions(wrong, mentions):
    """Counts of captions with so many wrong mentions each."""
    count = len(wrong)
    empty = {name: [0] * count for name in ZERO}
    flawed = [w > 0 for w in wrong]
    return {
        "captions": [1] * count,
        "mentions": mentions,
        "wrong": wrong,
        "flawed": flawed,
        **empty,
    }


def drawn(rate, seed, count=200):
    generator = torch.Generator().manual_seed(seed)
    hits = torch.rand(count, 5, generator=generator) < rate
    return captions(hits.sum(1).tolist(), [5] * count)


def test_an_interval_holds_the_ratio_over_the_whole_set():
    counts = captions([0, 3, 0, 1], [1, 4, 2, 1])
    found = intervals(counts, chair.rates)
    assert found["chair_i"].value == pytest.approx(4 / 8)  # not the mean of the captions' ratios
    assert found["chair_i"].low <= 0.5 <= found["chair_i"].high
    assert found == intervals(counts, chair.rates)


def test_interval_width_is_that_of_theory():
    """CHAIR s is a mean of 200 independent captions: plus or minus 1.96 standard errors."""
    counts = drawn(0.1, 0)
    found = intervals(counts, chair.rates)["chair_s"]
    error = (found.value * (1 - found.value) / 200) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_intervals_cover_the_truth():
    hits = 0
    for seed in range(100):
        found = intervals(drawn(0.2, seed), chair.rates, resamples=300)["chair_i"]
        hits += found.low <= 0.2 <= found.high
    assert 88 <= hits <= 100


def test_identical_columns_differ_by_exactly_nothing():
    counts = drawn(0.2, 0)
    gap = differences(counts, counts, chair.rates)["chair_i"]
    assert gap == (0, 0, 0) and not gap.certain


def test_a_planted_difference_is_found_where_unpaired_intervals_overlap():
    base = drawn(0.4, 1)
    better = {k: list(v) for k, v in base.items()}
    for i in range(0, 200, 5):  # every fifth caption loses one wrong mention
        better["wrong"][i] = max(0, better["wrong"][i] - 1)
    gap = differences(better, base, chair.rates)["chair_i"]
    assert gap.value < 0 and gap.high < 0 and gap.certain
    ours, theirs = intervals(better, chair.rates), intervals(base, chair.rates)
    assert ours["chair_i"].high > theirs["chair_i"].low
    noise = differences(drawn(0.4, 2), drawn(0.4, 3), chair.rates)["chair_i"]
    assert noise.low < 0 < noise.high
    with pytest.raises(ConfigError, match="the same pictures on both sides"):
        differences(drawn(0.4, 1, 10), drawn(0.4, 1, 20), chair.rates)


def result(label, seed, counts, **more):
    return {
        "protocol": "chair",
        "label": label,
        "status": "ok",
        "origin": {"seed": seed},
        "pictures": [str(i) for i in range(len(counts["captions"]))],
        "tallies": counts,
        "items": len(counts["captions"]),
        "cost": {"tokens": 10.0 + seed},
        **more,
    }


def test_seeds_are_pooled_and_pairs_are_the_same_pictures(tmp_path):
    results = [result("dense", s, drawn(0.4, s)) for s in (0, 1)]
    results += [result("good", s, drawn(0.1, 10 + s)) for s in (1, 0)]
    results += [result("half", 1, drawn(0.4, 1))]
    results += [{"protocol": "chair", "label": "bad", "status": "failed", "error": "a | b"}]
    paths = []
    for n, row in enumerate(results):
        paths.append(tmp_path / f"{n}.json")
        paths[-1].write_text(json.dumps(row))
    made = {line.label: line for line in lines(read(paths))}
    totals = [sum(r["tallies"]["wrong"]) for r in results[:2]]
    assert made["dense"].rates["chair_i"].value == pytest.approx(sum(totals) / 2000)
    assert made["dense"].sets == 2 and made["dense"].items == 400
    assert made["dense"].cost["tokens"] == 10.5 and not made["dense"].differences
    assert made["good"].differences["chair_i"].high < 0
    # Half has one seed only, and on it the very answers of dense.
    assert made["half"].differences["chair_i"] == (0, 0, 0) and made["half"].sets == 1
    assert made["bad"].error == "a | b"
    text = markdown(read(paths))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 and "a \\| b" in text
    assert rows[0].startswith("|  | CHAIR i | CHAIR s | recall | words | mentions | broken |")
    assert "*)" in rows[3] and "*)" not in rows[4]
    assert "On fewer sets: half." in text
    with pytest.raises(ConfigError, match="two results are about the same pictures"):
        lines([results[0], results[0]])
    with pytest.raises(ConfigError, match=r"one protocol, found \['chair', 'pope'\]"):
        lines([results[0], {**results[1], "protocol": "pope"}])
    paths[0].write_text("{}")
    with pytest.raises(ConfigError, match="is not the result of an evaluation"):
        read(paths)


@pytest.fixture(scope="module")
def untrained():
    model, processor = vlm.build(layers=1)
    return Loaded("vlm", model.eval(), processor, "untrained", embedded=True)


def test_missing_methods_are_skipped_with_a_message():
    said: list[str] = []
    texts = ["vhr", "nosuch:keep=3", "hiprune:keeep=3", "vhr", "random-prune:keep=8"]
    made = vlm_table.columns(texts, said.append)
    assert [column.label for column in made] == ["vhr", "random-prune keep=8"]
    assert "skipped nosuch:keep=3: unknown method 'nosuch'" in said[0]
    assert "skipped hiprune:keeep=3" in said[1] and "the same as an earlier column" in said[2]


def test_the_script_goes_on_and_gathers_columns(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_table, "resolve", lambda *a, **k: untrained)
    monkeypatch.setattr(chair, "MINI_LIMIT", 4)

    def call(out, *methods, seeds="2"):
        code = vlm_table.main(
            [
                *("--out", str(tmp_path / out), "--answers", str(tmp_path / "answers")),
                *("--scenes", "2", "--captions", "3", "--seeds", seeds),
                *("--only", "pope", "--only", "chair"),
                *(part for m in methods for part in ("-m", m)),
            ]
        )
        assert code == 0
        return json.loads((tmp_path / out / "vlm.json").read_text())

    one = call("one", "vhr", seeds="1")
    assert [line["label"] for line in one["pope"]] == ["dense", "vhr"]
    call("two", "hiprune:keep=8", "nosuch")
    asked: list[int] = []
    answer = harness.Asker.__call__

    def counting(self, items):
        asked.append(len(items))
        return answer(self, items)

    monkeypatch.setattr(harness.Asker, "__call__", counting)
    both = call("both", "vhr", "hiprune:keep=8")
    assert asked  # the second seed of vhr
    asked.clear()
    again = call("again", "vhr", "hiprune:keep=8")
    assert not asked and again == both
    assert list(both) == ["pope", "chair"]
    for name in both:
        assert [line["label"] for line in both[name]] == ["dense", "vhr", "hiprune keep=8"]
        assert all(line["sets"] == 2 and line["error"] is None for line in both[name])
        assert both[name][2]["cost"]["tokens_kept"] == 8
        assert not both[name][0]["differences"] and both[name][1]["differences"]
    text = (tmp_path / "both/vlm.md").read_text()
    assert text.count("| hiprune keep=8 |") == 2 and "python -m mmattn.evals.vlm_table" in text
    assert not list((tmp_path / "answers").rglob("samples_*"))


@pytest.mark.parametrize("name", vlm_table.PROTOCOLS)
def test_every_protocol_has_a_table_of_its_rates(name):
    """Right answers, without a model."""
    from mmattn.mini import objects

    protocol = vlm_table.protocol(name, 4, 4, 1)
    said = [
        item.target
        if item.target in ("yes", "no")
        else objects.caption(world(4, 1).scenes[int(item.picture)])
        for item in protocol.items
    ]
    text = markdown([{"label": "dense", **harness.score(protocol, said)}])
    best = {"pope": "F1", "chair": "CHAIR i", "mme": "existence", "amber": "AMBER"}
    rows = [[c.strip() for c in row.split("|")] for row in text.splitlines() if row[:1] == "|"]
    value = float(rows[2][rows[0].index(best[name])].split()[0])
    assert value == pytest.approx({"chair": 0, "mme": 200}.get(name, 100), abs=0.1)


def test_seeds_have_their_own_scenes():
    names = [[scene.names for scene in world(4, seed).scenes] for seed in (0, 1)]
    assert names[0] != names[1]


def test_wrong_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        vlm_table.main(["--out", "x", "--scenes", "0"])
    assert "at least 1" in capsys.readouterr().err
