"""VAR: sinks, gates and moved attention against a dense oracle, in whole models and in numbers."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import alone, check, check_identity, check_rows, made, notes, patched, steps
from host_contract import distance

import mmattn
from mmattn.methods.var import SINK_DIMS, VAR, _published, discover_sink_dims, standing_out

KNOBS = {"dims": (1, 2, 4, 5, 6, 7), "tau": 1.8, "rho": 0.25, "summ": 0.4, "move_fraction": 0.5}


def inputs_of(model):
    """``{layer: hidden states}`` of the running call, and the hooks that keep it up to date."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.language_model.layers):

        def keep(module, args, kwargs, i=i):
            seen[i] = (args[0] if args else kwargs["hidden_states"]).detach()

        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    return seen, hooks


def redistributed(seen, dims, tau, rho, summ, move_fraction):
    """The definition, row by row and head by head; `seen` holds the hidden states of the layers."""

    def edit(call):
        weights, image = call.plain, call.image
        rows, size = weights.shape[0], weights.shape[3]
        if call.past == 0:
            sinks = torch.zeros(rows, size, dtype=torch.bool)
            for b in range(rows):
                for j in range(size):
                    x = seen[call.layer][b, j].double()
                    peak = max(float(x[d].abs()) for d in dims)
                    sinks[b, j] = peak / float((x.square().mean() + 1e-6).sqrt()) > tau
            call.store["sinks"] = sinks
        sinks = torch.nn.functional.pad(
            call.store["sinks"], (0, size - call.store["sinks"].shape[1])
        )
        for b, i, column in call.rows():
            own, text = sinks[b] & image[b], sinks[b] & ~image[b]
            if not own.any() or column < int(image[b].nonzero().max()) + 1:
                continue
            for h in range(weights.shape[1]):
                row = weights[b, h, i].clone()
                v, u = float(row[image[b]].sum()), float(row[own].sum())
                if u / (v + int(image[b].sum()) * 1e-6) > rho or v < summ:
                    continue
                moved = move_fraction * (row[own].sum() + row[text].sum())
                free = image[b] & ~own
                gain = moved * row[free] / row[free].sum()
                row[own | text] *= 1 - move_fraction
                row[free] += gain
                weights[b, h, i] = row
        return weights

    return edit


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name, monkeypatch):
    import decoder_oracle

    model, call = made(name)
    monkeypatch.setattr(decoder_oracle, "made", lambda _: (model, call))
    seen, hooks = inputs_of(model)
    stats = check(name, VAR(**KNOBS), redistributed(seen, **KNOBS))
    for hook in hooks:
        hook.remove()
    assert any(0.1 < share < 0.9 for share in notes(stats, "gated"))
    assert max(notes(stats, "image_sinks")) >= 1 and max(notes(stats, "text_sinks")) >= 1
    assert all(0.01 < moved < 1 for moved in notes(stats, "moved"))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name):
    check_rows(name, VAR(**KNOBS))


@pytest.mark.parametrize(
    "settings", [{"move_fraction": 0.0}, {"tau": 50.0}, {"dims": (0,), "tau": 60.0}]
)
def test_without_sinks_or_moves_nothing_changes(settings):
    check_identity(VAR(**{**KNOBS, **settings}))


def test_a_gate_nothing_passes_changes_nothing():
    model, call = made("llava")
    real, stock = call["attention_mask"].bool(), zoo.logits(model, call)
    for settings in ({"rho": 0.0}, {"summ": 1.0}):
        with mmattn.attach(model, VAR(**{**KNOBS, **settings})) as session:
            got = zoo.logits(model, call)
            assert max(notes(session.stats, "gated")) == 0
        assert distance(got[real], stock[real]) < 1e-5


class Watched(VAR):
    """VAR that keeps the attention weights of one block, seen through values that are the identity."""

    name: ClassVar[str] = "watched-var"
    log: ClassVar[list] = []

    def attend(self, q, k, v, *, mask, scale, site, dense):
        if site.index == 1 and site.layout.past == 0:
            size, entering = k.shape[2], site.state["entering"]
            pad = torch.nn.functional.pad
            wide, keys = pad(q, (0, size - q.shape[-1])), pad(k, (0, size - k.shape[-1]))
            eye = torch.eye(size).expand(*k.shape[:2], -1, -1)
            each = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
            plain = (wide @ each.transpose(-1, -2) * scale + mask).softmax(-1)

            def stock(*args, **kw):
                return plain

            knobs = {"mask": mask, "scale": scale, "site": site, "dense": stock}
            self.log.append((plain, super().attend(wide, keys, eye, **knobs), entering))
            site.state["entering"] = entering
        return super().attend(q, k, v, mask=mask, scale=scale, site=site, dense=dense)


def test_invariants_of_the_weights():
    model, call = made("llava")
    Watched.log.clear()
    with mmattn.attach(model, Watched(**KNOBS)):
        zoo.logits(model, call)
    (before, after, sinks), image = Watched.log[0], call["input_ids"] == zoo.IMAGE
    real = call["attention_mask"].bool()
    changed = found = 0
    for b in range(2):
        end = int(image[b].nonzero().max()) + 1
        rows = real[b].clone()
        old, new = before[b][:, rows], after[b][:, rows]
        assert torch.allclose(new.sum(-1), torch.ones(()), atol=1e-5) and (new >= 0).all()
        assert (
            distance(after[b][:, :end][:, real[b, :end]], before[b][:, :end][:, real[b, :end]])
            < 1e-6
        )
        own, free = image[b] & sinks[b], image[b] & ~sinks[b]
        assert (new[..., image[b]].sum(-1) >= old[..., image[b]].sum(-1) - 1e-5).all()
        assert (new[..., sinks[b]] <= old[..., sinks[b]] + 1e-6).all()
        rest = ~image[b] & ~sinks[b]
        assert distance(new[..., rest], old[..., rest]) < 1e-6
        order = old[..., free].argsort(-1)
        assert distance(new[..., free].gather(-1, order), new[..., free].sort(-1).values) < 1e-6
        changed += int(((new - old).abs().amax(-1) > 1e-3).sum())
        found += int(own.sum())
    assert changed > 0 and found > 0


def test_standing_out():
    x = torch.randn(2, 5, 64)
    x[0, 3, 7] = -90.0
    size = standing_out(x, (7, 9))
    want = x[0, 3, 7].abs() / (x[0, 3].square().mean() + 1e-6).sqrt()
    assert float(size[0, 3]) == pytest.approx(float(want)) and size[0, 3] > 7.9
    assert (size < 8).all(), "no token exceeds the square root of the hidden size"
    assert size.flatten().argmax() == 3


def test_sinks_are_those_of_the_prompt_at_hand():
    model, call = made("llava")
    with mmattn.attach(model, VAR(**KNOBS)):
        first, _ = steps(model, alone(call, 0))
        again = steps(model, alone(call, 1))[1]
    with mmattn.attach(model, VAR(**KNOBS)):
        fresh = steps(model, alone(call, 1))[1]
    assert torch.equal(again, fresh)
    assert first.shape[0] == 1


def test_a_prompt_in_parts_finds_its_sinks():
    model, call = made("llava")
    one = alone(call, 0)
    with torch.no_grad(), mmattn.attach(model, VAR(**KNOBS)):
        ids = torch.tensor([[5, 7, 9]])
        mask = torch.ones(1, one["input_ids"].shape[1] + 3, dtype=torch.long)
        together = model(
            input_ids=torch.cat([one["input_ids"], ids], 1),
            attention_mask=mask,
            pixel_values=one["pixel_values"],
        )
        whole = model(**one, use_cache=True)
        after = model(input_ids=ids, attention_mask=mask, cache=whole.cache)
    assert distance(after.logits, together.logits[:, -3:]) < 1e-5


def test_sink_dims_of_a_model_with_massive_activations():
    model, call = made("llava")
    embedding = model.get_input_embeddings().weight.data
    embedding[1, 11], embedding[1, 5] = 9.0, -6.0
    assert discover_sink_dims(model, tau=3.0) == (11, 5)
    assert discover_sink_dims(model, tau=3.0, most=1) == (11,)
    assert discover_sink_dims(model, call, tau=3.0) == (11, 5)
    assert discover_sink_dims(model, tau=7.9) == ()
    with mmattn.attach(model, VAR(dims=(11, 5), tau=3.0)) as session:
        zoo.logits(model, call)
        assert all(count == 1 for count in notes(session.stats, "text_sinks"))


def test_published_dims():
    def module(**config):
        kinds = {"model_type": "llama", "vocab_size": 32064, **config}
        return SimpleNamespace(config=SimpleNamespace(**kinds))

    assert _published(module(hidden_size=4096)) == SINK_DIMS["vicuna-7b"] == (2533, 1415)
    assert _published(module(hidden_size=5120)) == SINK_DIMS["vicuna-13b"]
    assert _published(module(hidden_size=4096, vocab_size=128256)) is None
    assert _published(module(hidden_size=4096, model_type="qwen2")) is None
    assert _published(module(hidden_size=64)) is None
    with pytest.raises(mmattn.NoSiteError, match="discover_sink_dims"):
        mmattn.attach(zoo.llava(), VAR())


def test_the_embedded_model():
    from mmattn.mini import load

    model, _ = load("vlm")
    ids = torch.tensor([[1, *[4] * 64, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
    }
    dims = discover_sink_dims(model, call, tau=2.0)
    knobs = {**KNOBS, "dims": dims, "tau": 2.0, "rho": 0.8}
    seen, hooks = inputs_of(model)
    with patched(model, ids, redistributed(seen, **knobs), VAR(**knobs).chosen(8)):
        text, want = steps(model, call)
    for hook in hooks:
        hook.remove()
    with mmattn.attach(model, VAR(**knobs)) as session:
        got, numbers = steps(model, call)
        assert max(notes(session.stats, "image_sinks")) > 0
    assert torch.equal(got, text) and distance(numbers, want) < 1e-5


def test_what_it_refuses():
    bad = [{"tau": 0.0}, {"rho": 1.0}, {"summ": 1.1}, {"move_fraction": 1.5}, {"dims": ()}]
    for settings in [*bad, {"dims": (-1,)}, {"layers": (0.5,)}]:
        with pytest.raises(mmattn.ConfigError):
            VAR.from_dict(settings)
    method = VAR(**KNOBS, layers=(1, -1))
    assert VAR.from_dict(method.to_dict()) == method
    assert VAR(**KNOBS).chosen(32) == set(range(2, 32))
    model, call = made("llava")
    with (
        mmattn.attach(model, VAR(dims=(64,))),
        pytest.raises(mmattn.ConfigError, match="have 64"),
    ):
        zoo.logits(model, call)
    with torch.no_grad():
        out = model(**call, use_cache=True)
        mask = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.tensor([[7], [7]]), "attention_mask": mask}
        with mmattn.attach(model, VAR(**KNOBS), sites="*language_model*"):
            with pytest.raises(mmattn.UnsupportedCall, match="pass input_ids"):
                model(**step, cache=out.cache)
            long = zoo.llava_call((1, 1), (0, 9))
            model(**long)
            with pytest.raises(mmattn.UnsupportedCall, match="the prompt seen last"):
                model(**step, cache=out.cache)


@pytest.mark.parametrize("kind", ["var", "act", "zerotuning", "pai", "vasparse"])
@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_twin_rows_and_dropped_tokens_do_not_get_in_the_way(name, kind):
    """VHR at a factor of nearly one adds a second, imageless row for every prompt and does nothing."""
    from mmattn.methods.act import ACT
    from mmattn.methods.pai import PAI
    from mmattn.methods.vasparse import VASparse
    from mmattn.methods.zerotuning import ZeroTuning

    method = {
        "var": VAR(**KNOBS),
        "act": ACT(threshold=0.07),
        "zerotuning": ZeroTuning(),
        "pai": PAI(alpha=0.6),
        "vasparse": VASparse(keep=0.7, beta=0.4, alpha=0.0),
    }[kind]
    model, call = made(name)
    with mmattn.attach(model, method):
        text, numbers = steps(model, call)
    with mmattn.attach(model, [mmattn.VHR(alpha=1 + 1e-9), method]):
        got, values = steps(model, call)
    assert torch.equal(got, text) and distance(values, numbers) < 1e-5
    with mmattn.attach(model, [mmattn.HiPrune(keep=0.5), method]) as session:
        one = steps(model, alone(call, 1))[1]
        assert distance(steps(model, call)[1][1], one[0]) < 1e-5
        assert session.stats.executed == session.stats.planned
