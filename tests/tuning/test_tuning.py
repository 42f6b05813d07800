"""Tuning: the choice from measurements, the record on disk, and a run on the embedded video model."""

import json

import pytest
import torch

import mmattn
from mmattn import VMoBA
from mmattn.config import Recipe
from mmattn.loading import resolve
from mmattn.tuning import Tuned, default_candidates, default_prompts, tune
from mmattn.tuning.choose import (
    Choice,
    at_price,
    mean_cost,
    recipe,
    step_weights,
    uniform,
    within,
)
from mmattn.tuning.state import State

FINE = (0.25, (3, 3), (1, 3, 3))
HALF, QUARTER = (VMoBA(topk=s, chunks=FINE, dense_steps=0) for s in (0.5, 0.25))
# Two candidates, two layers, four steps.
MEASURED = [
    {
        "a": {"density": [0.5] * 4, "recall": [0.8, 0.9, 0.95, 0.95], "error": [0.2, 0.1, 0, 0]},
        "b": {"density": [0.5] * 4, "recall": [0.9] * 4, "error": [0.1] * 4},
    },
    {
        "a": {"density": [0.25] * 4, "recall": [0.5, 0.6, 0.7, 0.9], "error": [0.6, 0.5, 0.4, 0.1]},
        "b": {"density": [0.25] * 4, "recall": [0.9] * 4, "error": [0.1] * 4},
    },
]


def test_each_layer_gets_its_cheapest_setting_within_the_bound():
    chosen = within(MEASURED, 0.9)
    # Layer a: half density from the second step on (0.625) beats a quarter in the last alone (0.8125).
    assert chosen == {"a": Choice(0, 1, (1 + 3 * 0.5) / 4), "b": Choice(1, 0, 0.25)}
    assert mean_cost(chosen) == pytest.approx((0.625 + 0.25) / 2)
    assert within(MEASURED, 1.0) == dict.fromkeys("ab", Choice(None, 0, 1.0))


def test_a_price_of_error_is_paid_where_it_saves_most():
    def total(site, option, price):
        if option is None:
            return 1.0
        index, first = option
        values = MEASURED[index][site]
        return (first + sum(values["density"][first:])) / 4 + price * sum(
            values["error"][first:]
        ) / 4

    options = [None, *((i, f) for i in range(2) for f in range(4))]
    costs = []
    for price in (0.0, 0.5, 1.0, 3.0, 8.0, 100.0):
        chosen = at_price(MEASURED, price, [1.0] * 4)
        for site, choice in chosen.items():
            mine = None if choice.candidate is None else (choice.candidate, choice.dense_steps)
            assert total(site, mine, price) == min(total(site, o, price) for o in options)
        costs.append(mean_cost(chosen))
    assert costs == sorted(costs) and costs[0] == 0.25 and costs[-1] > 0.8


def test_steps_weigh_what_dense_warm_ups_save():
    table = {"a": {"error": [1.0, 1.0, 1.0, 1.0]}, "b": {"error": [1.0, 1.0, 3.0, 3.0]}}
    # The first step causes 6, the second 2, the last two together 1.6.
    weights = step_weights(table, {0: 9.6, 1: 3.6, 2: 1.6})
    assert sum(weights) == pytest.approx(4)
    assert [w / weights[0] for w in weights] == pytest.approx([1, 2 / 6, 0.2 / 3, 0.2 / 3])
    worse = step_weights(table, {0: 2.0, 1: 3.0})
    assert min(worse) > 0, "a warm-up that does worse by chance is not worth anything negative"
    assert uniform(MEASURED, 1, 2)["a"] == Choice(1, 2, 0.625)
    careful = at_price(MEASURED, 1.0, [10.0, 0.1, 0.1, 0.1])
    assert (
        careful["a"].dense_steps == 1 and at_price(MEASURED, 1.0, [0.1] * 4)["a"].dense_steps == 0
    )


def test_a_recipe_groups_layers_and_reads_back(tmp_path):
    made = recipe(within(MEASURED, 0.9), [HALF, QUARTER], steps=4)
    path = made.save(tmp_path / "r.toml", comment=["why"])
    assert mmattn.load(path) == made
    assert [m.method.dense_steps for m in made.methods] == [0.25, 0]
    assert [m.sites for m in made.methods] == [["a"], ["b"]]
    assert path.read_text().startswith("# why\n")
    whole = Recipe((HALF,), sites="blocks.*", unsupported="dense", seed=3)
    assert mmattn.load(whole.save(tmp_path / "w.toml")) == whole
    with pytest.raises(mmattn.ConfigError, match="toml"):
        made.save(tmp_path / "r.json")


@pytest.mark.parametrize("total", range(1, 60))
def test_every_number_of_dense_steps_survives_as_a_share(total):
    for first in range(total):
        one = {"a": Choice(0, first, 1.0)}
        method = recipe(one, [HALF], total).methods[0].method
        assert [method.phase(i, total) for i in range(total)] == [i >= first for i in range(total)]


def test_the_record_survives_and_refuses_other_settings(tmp_path):
    path = tmp_path / "deep" / "r.tune.json"
    State(path, {"steps": 4}).save("one", {"x": 1})
    assert State(path, {"steps": 4}).results == {"one": {"x": 1}}
    with pytest.raises(mmattn.ConfigError, match="other settings"):
        State(path, {"steps": 5})
    path.write_text("{")
    with pytest.raises(mmattn.ConfigError, match="not a tuning record"):
        State(path, {"steps": 4})


@pytest.fixture(scope="module")
def video():
    loaded = resolve("t2v")
    loaded.target.set_progress_bar_config(disable=True)
    return loaded


PROMPTS = ["a red circle moving left on a white background"]


def run(video, out, **more) -> Tuned:
    return tune(video, PROMPTS, [HALF, QUARTER], out, steps=4, **more)


def test_a_recall_budget_is_kept_and_a_stopped_run_continues(video, tmp_path):
    out = tmp_path / "tuned.toml"
    seen = []

    def stop(done, total, what):
        seen.append(done)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(video, out, min_recall=0.75, progress=stop)
    record = json.loads((tmp_path / "tuned.tune.json").read_text())["results"]
    assert list(record) == ["measure 0 0"] and not out.exists()
    before = video.target.transformer.blocks[0].attn1.processor
    assert "mmattn" not in type(before).__module__

    drawn = []
    forward = video.target.transformer.register_forward_hook(lambda *_: drawn.append(1))
    tuned = run(video, out, min_recall=0.75)
    # One candidate was measured before; left are one candidate, dense and the check, 4 steps each
    # with guidance, which is two calls.
    assert len(drawn) == 3 * 4 * 2
    forward.remove()
    assert tuned.density < 1 and tuned.recall >= 0.75 and tuned.psnr > 5
    assert any(c.candidate is not None for c in tuned.choices.values())

    recipe = mmattn.load(out)
    assert recipe == tuned.recipe
    with mmattn.attach(video.target, recipe, probe=True) as session:
        video.target(
            PROMPTS[0],
            height=48,
            width=48,
            num_frames=17,
            num_inference_steps=4,
            guidance_scale=3.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        stats = session.stats
    own = {s.path: s.density for s in stats.sites}
    planned = {site: c.cost for site, c in tuned.choices.items() if c.candidate is not None}
    assert own == pytest.approx(planned, abs=0.02)
    again = run(video, out, min_recall=0.75)
    assert (again.density, again.psnr, again.choices) == (tuned.density, tuned.psnr, tuned.choices)
    with pytest.raises(mmattn.ConfigError, match="other settings"):
        tune(video, PROMPTS, [HALF], out, steps=4, min_recall=0.75)


def test_a_psnr_budget_is_kept_by_what_is_written(video, tmp_path):
    strict = run(video, tmp_path / "strict.toml", min_psnr=35.0)
    loose = run(video, tmp_path / "loose.toml", min_psnr=15.0)
    assert strict.psnr >= 35 and loose.psnr >= 15
    assert loose.density < strict.density < 1
    assert "budget PSNR of at least 15.0 dB" in (tmp_path / "loose.toml").read_text()


def test_a_budget_that_nothing_keeps_says_how_far_it_is(video, tmp_path):
    with pytest.raises(mmattn.BudgetNotMet, match="best recall of any layer and step"):
        run(video, tmp_path / "none.toml", min_recall=1.0)
    assert not (tmp_path / "none.toml").exists()


def test_bad_requests_are_refused_before_anything_runs(video, tmp_path):
    out = tmp_path / "r.toml"
    for more, says in (
        ({}, "one budget"),
        ({"min_psnr": 3, "min_recall": 0.5}, "one budget"),
        ({"min_recall": 1.5}, "share"),
    ):
        with pytest.raises(mmattn.ConfigError, match=says):
            run(video, out, **more)
    with pytest.raises(mmattn.ConfigError, match="cannot be tuned"):
        tune(video, PROMPTS, [mmattn.Identity()], out, min_recall=0.5)
    with pytest.raises(mmattn.ConfigError, match=r"\.toml"):
        run(video, tmp_path / "r.json", min_recall=0.5)
    with pytest.raises(mmattn.ConfigError, match="at least one prompt"):
        tune(video, [], [HALF], out, min_recall=0.5)
    assert not list(tmp_path.iterdir())


def test_defaults_fit_the_embedded_models(video):
    assert len(default_prompts(video)) == 4
    densities = []
    for candidate in default_candidates(video):
        with mmattn.attach(video.target, candidate.at("*.attn1"), dry_run=True) as session:
            video.target(
                PROMPTS[0],
                height=48,
                width=48,
                num_frames=17,
                num_inference_steps=2,
                max_sequence_length=16,
                output_type="latent",
            )
            densities.append(session.stats.density)
    assert len(densities) == 6 and all(0.08 < d <= 1 for d in densities)
