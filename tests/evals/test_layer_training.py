"""The training check of attention layers: equal models, a resumable record, and layers that learn."""

import json

import pytest
import torch

from mmattn.errors import ConfigError
from mmattn.evals import layer_training as lt

QUICK = {**lt.SETTINGS, "steps": 70, "batch": 16, "held_out": 50}


@pytest.mark.parametrize("name", lt.NAMES)
def test_models_have_the_same_size_and_run(name):
    model = lt.build(name, 0)
    size = sum(p.numel() for p in model.parameters())
    plain = sum(p.numel() for p in lt.build("softmax", 0).parameters())
    assert abs(size - plain) < 0.003 * plain
    assert len(model.blocks) == lt.DEPTH
    x, _ = lt.draw(2, torch.Generator().manual_seed(0))
    out = model(x)
    assert out.shape == (2, lt.CLASSES) and torch.isfinite(out).all()


def test_only_the_blind_control_does_not_mix_tokens():
    x, _ = lt.draw(1, torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[0, 0, :2, :2] = -changed[0, 0, :2, :2]
    for name in lt.NAMES:
        model = lt.build(name, 0).eval()
        first, second = (model.forward_features(t)[0] for t in (x, changed))
        moved = (first - second).abs().amax(-1) > 0
        # The changed pixels are the first token.
        assert moved[0]
        assert moved[1:].any() == (name != "nothing"), name


def test_seeds_decide_and_the_global_random_state_stays():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = lt.build("agent", 1), lt.build("agent", 1), lt.build("agent", 2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)
    # What all models have in common starts equal.
    soft = lt.build("softmax", 1)
    assert torch.equal(first.patch_embed.proj.weight, soft.patch_embed.proj.weight)


def test_silhouettes_show_the_object_and_no_colour():
    x, y = lt.draw(20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 1, 16, 16) and y.min() >= 0 and y.max() < lt.CLASSES
    assert (x.amax((1, 2, 3)) - 1).abs().max() < 1e-6 and (x[:, 0, 0, 0] < -0.5).all()


def test_two_attentions_learn_and_the_control_stays_behind():
    names = ("NaLa", "bi-level routing", "nothing")
    losses = {name: lt.train(name, 0, QUICK)["loss"] for name in names}
    for name in names[:2]:
        assert losses[name][-1] < losses[name][0] - 0.1, losses
        assert losses[name][-1] < losses["nothing"][-1] - 0.15, losses


def test_record_goes_on_where_it_stopped_and_refuses_other_settings(tmp_path, monkeypatch):
    trained = []

    def train(name, seed, settings):
        trained.append((name, seed))
        return {
            "attention": name,
            "seed": seed,
            "accuracy": 0.5 + 0.1 * seed,
            "loss": [1.7, 1.5, 1.0],
            "parameters": 10,
            "cpu_seconds": 1.0,
        }

    monkeypatch.setattr(lt, "train", train)
    path = tmp_path / "deep" / "runs.json"
    lt.measure(path, ["softmax"], [0])
    record = lt.measure(path, ["softmax", "nothing"], [0, 1])
    assert trained == [("softmax", 0), ("nothing", 0), ("softmax", 1), ("nothing", 1)]
    assert json.loads(path.read_text()) == record
    row = lt.table(record)[0]
    assert (row["low"], row["high"], row["seeds"]) == (0.5, 0.6, 2)
    text = lt.markdown(record)
    assert "| *nothing* | 55.0 % (50.0 .. 60.0) |" in text and "| *chance* | 16.7 % |" in text
    with pytest.raises(ConfigError, match="were asked for"):
        lt.measure(path, ["softmax"], [0], {**lt.SETTINGS, "steps": 1})
    with pytest.raises(ConfigError, match="softmax"):
        lt.build("softmaxx", 0)


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra [eval]")
    run = {"loss": [1.7, 1.5, 1.0], "parameters": 10, "cpu_seconds": 1.0}
    runs = [
        {"attention": n, "seed": s, "accuracy": 0.4 + 0.1 * s, **run}
        for n in ("softmax", "nothing")
        for s in (0, 1)
    ]
    path = lt.plot({"settings": lt.SETTINGS, "runs": runs}, tmp_path / "p.png")
    assert path.stat().st_size > 5000
