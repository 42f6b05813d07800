"""DoLa against the formula on the hidden states that transformers returns."""

import math

import pytest
import torch
import transformers as hf
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import VHR, HiPrune
from mmattn.methods.dola import DoLa, candidates, most_different
from mmattn.methods.vcd import VCD

TRACE = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}


def surrogate(p, q):
    """Half of both reverse divergences from the mean, word by word."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        m = (a + b) / 2
        total += m * (math.log(m) - math.log(a)) + m * (math.log(m) - math.log(b))
    return total / 2 / len(p)


def by_hand(final, early, top):
    """One position: ``final [V]`` logits, ``early`` logits by layer."""
    p = final.double().softmax(-1)
    scores = {n: surrogate(p, e.double().softmax(-1)) for n, e in early.items()}
    layer = max(scores, key=lambda n: (scores[n], -n))
    out = p.log() - early[layer].double().log_softmax(-1)
    return out.masked_fill(p < top * p.max(), -torch.inf).float(), layer, scores[layer]


def reference(model, out, layers, top):
    """``[B, V]`` of the last position, and the layers chosen."""
    rows, chosen = [], []
    for b in range(len(out.logits)):
        early = {n: model.lm_head(out.hidden_states[n][b, -1]) for n in layers}
        row, layer, _ = by_hand(out.logits[b, -1], early, top)
        rows.append(row)
        chosen.append(layer)
    return torch.stack(rows), chosen


def same(got, want):
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want)[want.isfinite()].abs().max())


@pytest.mark.parametrize(
    ("name", "layers", "numbers"),
    [
        ("llava", "low", [0, 2]),
        ("llava", "high", [4, 6]),
        ("llava", (1, 3, -1), [1, 3, 7]),
        ("qwen2.5-vl", (0, 1, 2), [0, 1, 2]),
        ("llama", (0, 1), [0, 1]),
    ],
)
@pytest.mark.parametrize("top", [0.1, 0.8])
@torch.no_grad()
def test_every_token_equals_the_formula_on_hidden_states(name, layers, numbers, top):
    build, make, _ = zoo.ALL[name]
    model = zoo.llava(layers=8) if name == "llava" else build()
    call = make(model)
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    with mmattn.attach(model, DoLa(layers=layers, relative_top=top)) as session:
        out = model.generate(**call, **TRACE, **greedy)
        note = session.stats.sites[-1].notes["premature_layer"]
        whole = zoo.logits(model, call)
    stock = zoo.logits(model, call)
    assert torch.equal(whole[:, :-1], stock[:, :-1])
    ids, chosen = call["input_ids"], []
    width = ids.shape[1]
    for i in range(5):
        # Hidden states are those of the untouched run, as the method only looks at them.
        hidden = [h[:, -1] for h in out.hidden_states[i]]
        final = model.lm_head(hidden[-1])
        for b in range(len(ids)):
            early = {n: model.lm_head(hidden[n][b]) for n in numbers}
            want, layer, _ = by_hand(final[b], early, top)
            assert same(out.logits[i][b], want) < 1e-4
            chosen.append(layer)
        assert torch.equal(out.sequences[:, width + i], out.logits[i].argmax(-1))
    assert note == pytest.approx(sum(chosen) / len(chosen))
    assert same(whole[:, -1], out.logits[0]) < 1e-5


@torch.no_grad()
def test_caches_beams_and_several_tokens_at_once():
    model, call = zoo.llava(layers=8), zoo.llava_call()
    long = {"eos_token_id": None, "max_new_tokens": 6}
    with mmattn.attach(model, DoLa(layers="high", relative_top=0.5)):
        for beams in (1, 3):
            kept = zoo.tokens(model, call, num_beams=beams, **long)
            afresh = zoo.tokens(model, call, num_beams=beams, use_cache=False, **long)
            assert torch.equal(kept, afresh)
        tokens = torch.tensor([[8, 9, 10]] * 2)
        wide = torch.nn.functional.pad(call["attention_mask"], (0, 3), value=1)
        out = model(**call, use_cache=True)
        together = model(input_ids=tokens, attention_mask=wide, cache=out.cache).logits
        out = model(**call, use_cache=True)
        for i in range(3):
            mask = wide[:, : wide.shape[1] - 2 + i]
            part = tokens[:, i : i + 1]
            one = model(input_ids=part, attention_mask=mask, cache=out.cache).logits[:, -1]
            both = one.isfinite() & together[:, i].isfinite()
            assert distance(one[both], together[:, i][both]) < 1e-4


@torch.no_grad()
def test_rows_choose_their_own_layers():
    model = zoo.llava(layers=8)
    call = zoo.llava_call((1, 1, 1), (0, 2, 1))
    method = DoLa(layers=(1, 2, 3, 4, 5, 6, 7))
    with mmattn.attach(model, method):
        whole = zoo.logits(model, call)[:, -1]
        for row in range(3):
            real = call["attention_mask"][row].bool()
            one = {k: v[row : row + 1, real] for k, v in call.items() if k != "pixel_values"}
            one["pixel_values"] = call["pixel_values"][row : row + 1]
            assert same(zoo.logits(model, one)[:, -1], whole[row : row + 1]) < 1e-4
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(4, 2, 50, generator=generator).log_softmax(-1)
    early = [(n, torch.randn(4, 2, 50, generator=generator) * n) for n in (1, 2, 3)]
    far, premature, number = most_different(final, early)
    for b in range(4):
        for i in range(2):
            want, layer, most = by_hand(final[b, i], {n: e[b, i] for n, e in early}, 0.0)
            assert number[b, i] == layer and abs(far[b, i] - most) < 1e-6
            assert distance(final[b, i] - premature[b, i], want) < 1e-4
    assert len(number.unique()) > 1
    zero, _, first = most_different(final, [(3, final), (5, final)])
    assert zero.abs().max() < 1e-8 and (first == 3).all()


def test_buckets():
    assert candidates("low", 32) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert candidates("high", 32) == [16, 18, 20, 22, 24, 26, 28, 30]
    assert candidates("low", 32, tied=True)[0] == 2
    assert candidates("low", 4, tied=True) == [1] and candidates("high", 7) == [4, 6]
    assert candidates((-1, 3), 8) == [3, 7]
    model = zoo.llava(layers=8)
    plan = mmattn.plan(model, DoLa(layers=(0, 5)))
    rows = [row.site.path.split(".")[-2] for row in plan.rows if row.methods]
    assert rows == ["0", "4"]


@torch.no_grad()
def test_a_head_tied_to_the_embedding_leaves_layer_0_out():
    torch.manual_seed(0)
    config = zoo.llama_config(4, tie_word_embeddings=True)
    model = zoo.build(hf.LlamaForCausalLM, config)
    text = zoo.prompt((0, 0), 0, (0, 3))
    with mmattn.attach(model, DoLa(layers="low")) as session:
        got = zoo.logits(model, text)
        assert session.stats.sites[-1].notes["premature_layer"] == 1
    out = model(**text, output_hidden_states=True)
    want, _ = reference(model, out, [1], 0.1)
    assert same(got[:, -1], want) < 1e-4


@pytest.mark.parametrize("other", [HiPrune(keep=6), VHR(alpha=3.0)], ids=lambda m: m.name)
@torch.no_grad()
def test_beside_other_methods_it_contrasts_the_layers_they_leave(other):
    model, call = zoo.llava(layers=8), zoo.llava_call()
    with mmattn.attach(model, other):
        out = model(**call, output_hidden_states=True)
    want, _ = reference(model, out, [4, 6], 0.1)
    for order in (1, -1):
        with mmattn.attach(model, [other, DoLa(layers="high")][::order]):
            got = zoo.logits(model, call)[:, -1]
            zoo.tokens(model, call, num_beams=2)
        assert same(got, want) < 1e-4
    with mmattn.attach(model, [other, VCD(beta=0.0), DoLa(layers="high")]):
        mixed = zoo.tokens(model, call)
        assert torch.equal(mixed, zoo.tokens(model, call))


def test_what_it_refuses_and_leaves_behind():
    model, call = zoo.llava(), zoo.llava_call()
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    classes = {n: type(m) for n, m in model.named_modules()}
    with mmattn.attach(model, DoLa()) as session:
        assert not torch.equal(zoo.logits(model, call), stock)
        with session.disabled():
            assert torch.equal(zoo.logits(model, call), stock)
    assert torch.equal(zoo.logits(model, call), stock)
    assert torch.equal(zoo.tokens(model, call), greedy)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    only = "*language_model.layers.0.*"
    with (
        mmattn.attach(model, DoLa(layers=(0, 2)), sites=only),
        pytest.raises(mmattn.UnsupportedCall, match="Layer 2 was not seen"),
    ):
        zoo.logits(model, call)
    with pytest.raises(mmattn.NoSiteError, match="are not among"):
        mmattn.attach(model, DoLa(layers=(9,)))
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.vit(), DoLa())
    for settings in ({"layers": "middle"}, {"layers": ()}, {"layers": (0.5,)}, {"relative_top": 2}):
        with pytest.raises(mmattn.ConfigError):
            DoLa(**settings)
    method = DoLa(layers=(1, 2))
    assert DoLa.from_dict(method.to_dict()) == method
