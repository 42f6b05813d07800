"""ACT: sinks by mean attention and calibrated rows, against a dense oracle and in numbers."""

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import (
    case,
    check,
    check_identity,
    check_rows,
    made,
    notes,
    patched,
    steps,
)
from host_contract import distance

import mmattn
from mmattn.methods.act import ACT, search_heads

KNOBS = {"beta": 0.3, "threshold": 0.07}


def calibrated(beta, threshold, heads=None, span="all"):
    """The definition, from whole attention matrices; the rows of all calls so far are kept."""

    def edit(call):
        plain, weights = call.plain.nan_to_num(), call.plain
        rows, count, _, size = plain.shape
        if call.past == 0:
            call.store["sum"] = torch.zeros(rows, count, size)
            call.store["seen"] = torch.zeros(rows, size)
            columns = [next(c for r, _, c in call.rows() if r == b) for b in range(rows)]
            call.store["first"] = torch.tensor(columns)
        pad = torch.nn.functional.pad
        total = pad(call.store["sum"], (0, size - call.store["sum"].shape[2]))
        seen = pad(call.store["seen"], (0, size - call.store["seen"].shape[1]))
        for b, i, _ in call.rows():
            total[b] += plain[b, :, i]
            seen[b] += call.visible[b, i]
        call.store["sum"], call.store["seen"] = total, seen
        for b, i, _ in call.rows():
            for h in range(count):
                if heads is not None and (call.layer, h) not in heads:
                    continue
                sinks = total[b, h] / seen[b].clamp(min=1) > threshold
                sinks[call.store["first"][b]] = False
                if span != "all":
                    sinks &= call.image[b] if span == "image" else ~call.image[b]
                row = plain[b, h, i].clone()
                lost = (1 - beta) * row[sinks].sum()
                share = row[~sinks] / row[~sinks].sum()
                row[sinks] *= beta
                row[~sinks] += lost * share
                weights[b, h, i] = row
        return weights

    return edit


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name):
    stats = check(name, ACT(**KNOBS), calibrated(**KNOBS))
    assert all(0.1 < count < 10 for count in notes(stats, "sinks"))
    assert all(0 < moved < 1 for moved in notes(stats, "moved"))


@pytest.mark.parametrize("span", ["text", "image"])
def test_chosen_heads_and_spans(span):
    method = ACT(**KNOBS, head_list=((1, 3), (-1, 0), (2, 1)), span=span)
    assert method.chosen(4) == {1, 2, 3}
    check("llava", method, calibrated(**KNOBS, heads={(1, 3), (3, 0), (2, 1)}, span=span))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name):
    check_rows(name, ACT(**KNOBS))


def test_where_nothing_is_a_sink_nothing_changes():
    check_identity(ACT(beta=1.0))
    check_identity(ACT(threshold=1.0))


def weights_of(method, seed=0):
    """Attention weights after `method` for random heads with planted sinks; values are the identity."""
    q, k, _, mask, real = case(seed, queries=24, dim=24, pads=(0, 3))
    k[:, :, [7, 15]] = (
        q[:, ::2].mean((2, 3), keepdim=True) + q[:, ::2, 12:].mean(2, keepdim=True) * 2
    )
    v = torch.eye(24).expand(*k.shape[:2], -1, -1)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 24**-0.5
    plain = scores.masked_fill(~mask, -torch.inf).softmax(-1)

    class Layout:
        past, twins, image_mask = 0, 0, real & False

    class Site:
        layout, state, causal, index, depth = Layout, {}, False, 0, 1
        path, module = "site", None

        def note(self, name, value):
            self.state.setdefault(name, []).append(value)

    site = Site()
    out = method.attend(q, k, v, mask=mask, scale=None, site=site, dense=lambda *a: plain)
    return plain, out, real, site.state


def test_invariants_of_the_weights():
    method = ACT(beta=0.25, threshold=0.12, head_list=((0, 0), (0, 1), (0, 2)))
    plain, out, real, state = weights_of(method)
    own = real[:, :, None].expand(-1, -1, 24)
    assert torch.equal(out[:, 3][own], plain[:, 3][own]), "an unselected head was touched"
    mass, seen = state["received"]
    sinks = mass / seen.clamp(min=1)[:, None] > 0.12
    moved = 0
    for b in range(2):
        first = int(real[b].int().argmax())
        for h in range(3):
            mine = sinks[b, h].clone()
            mine[first] = False
            old, new = plain[b, h, real[b]], out[b, h, real[b]]
            assert torch.allclose(new.sum(-1), torch.ones(()), atol=1e-5) and (new >= 0).all()
            assert (new[old == 0] == 0).all(), "a key that causality hides was seen"
            assert distance(new[:, mine], 0.25 * old[:, mine]) < 1e-6
            ratio = new[:, ~mine] * old[:, ~mine].sum(-1, keepdim=True)
            assert distance(ratio, old[:, ~mine] * new[:, ~mine].sum(-1, keepdim=True)) < 1e-6
            assert float(new[0, first]) == pytest.approx(1.0), "the first row is not one-hot"
            moved += int(mine.sum())
    assert moved > 0


def test_a_first_token_that_is_no_sink_spares_none():
    """The published code drops the first sink it finds; here only the first token is spared."""
    _, _, _, state = weights_of(ACT(threshold=0.5))
    few = state["sinks"][-1].sum()
    _, _, _, state = weights_of(ACT(threshold=0.12))
    assert state["sinks"][-1].sum() > few


def test_the_cache_must_be_the_prompts():
    model, call = made("llava")
    mask = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[7], [7]]), "attention_mask": mask}
    with torch.no_grad(), mmattn.attach(model, ACT(**KNOBS)):
        first = model(**call, use_cache=True)
        other = model(**{**call, "pixel_values": -call["pixel_values"]}, use_cache=True)
        with pytest.raises(mmattn.UnsupportedCall, match="not those of the last call"):
            model(**step, cache=first.cache)
        model(**call, use_cache=True)
        other.cache.crop(-1)
        step["attention_mask"] = mask[:, :-1]
        with pytest.raises(mmattn.UnsupportedCall, match="continues a cache"):
            model(**step, cache=other.cache)


def test_search_keeps_heads_that_help_alone():
    model, call = made("llava")
    goal = torch.tensor([31, 47])

    def score():
        return -float(torch.nn.functional.cross_entropy(zoo.logits(model, call)[:, -1], goal))

    settings = ACT(**KNOBS, layers=(1, 2))
    heads, plain, trials = search_heads(model, score, method=settings)
    assert [(t.layer, t.head) for t in trials] == [(i, h) for i in (1, 2) for h in range(4)]
    assert heads == tuple((t.layer, t.head) for t in trials if t.score > plain)
    assert 0 < len(heads) < 8 and score() == plain
    with mmattn.attach(model, ACT(**KNOBS, head_list=heads)):
        assert score() > plain
    assert search_heads(model, lambda: 1.0, candidates=[(1, 0)])[0] == ()


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
    method = ACT()
    assert method.chosen(8) == {1, 2, 3, 4, 5, 6} and method.chosen(32) == set(range(2, 31))
    with patched(model, ids, calibrated(0.4, 0.1), method.chosen(8)):
        text, want = steps(model, call)
    with mmattn.attach(model, method):
        got, numbers = steps(model, call)
    assert torch.equal(got, text) and distance(numbers, want) < 1e-5


def test_text_models_and_what_it_refuses():
    model, call = zoo.llama(), zoo.prompt((0, 0), 0, (0, 3))
    with mmattn.attach(model, ACT(threshold=0.02)):
        zoo.tokens(model, call)
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(model, ACT(span="image"))
    bad = [{"beta": 1.5}, {"threshold": 0.0}, {"span": "all of it"}, {"head_list": ((1,),)}]
    for settings in bad:
        with pytest.raises(mmattn.ConfigError):
            ACT.from_dict(settings)
    method = ACT(head_list=((1, 2), (3, 0)), span="image")
    assert ACT.from_dict({**method.to_dict(), "head_list": [[1, 2], [3, 0]]}) == method
