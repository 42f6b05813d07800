"""LargePiG against a literal reference on attention weights and hidden states of transformers."""

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance
from test_dola import by_hand

import mmattn
from mmattn import VHR, HiPrune, mini
from mmattn.methods.largepig import LargePiG, nearest, newest_rows, pointer, words_of
from mmattn.methods.vcd import VCD

SPECIAL = {0, 1, 2, zoo.IMAGE}
LAYERS = [4, 6]


def ids_of_source(model, call, features, source, words=None):
    """What each column of the prompt may be copied as; None where nothing."""
    table = model.get_input_embeddings().weight
    allowed = [i for i in (range(len(table)) if words is None else words) if i not in SPECIAL]
    rows, images = [], iter(features)
    for ids, mask in zip(call["input_ids"].tolist(), call["attention_mask"].tolist(), strict=True):
        row, left, first = [], iter(()), mask.index(1)
        for column, token in enumerate(ids):
            word = token
            if token == zoo.IMAGE:
                feature = next(left, None)
                if feature is None:
                    left = iter(next(images))
                    feature = next(left)
                far = [float((feature - table[i]).square().sum()) for i in allowed]
                word = allowed[far.index(min(far))]
            if isinstance(source, tuple):
                inside = source[0] <= column - first < source[1]
            else:
                inside = source == "prompt" or (token == zoo.IMAGE) == (source == "image")
            row.append(word if inside and mask[column] and word not in SPECIAL else None)
        rows.append(row)
    return rows


def mixture(logits, early, weights, ids, scale, normalize, contrast):
    """One position of one row: ``[V]`` probabilities."""
    contrasted, _, far = by_hand(logits, early, 0.1)
    share = min(max(scale * far, 0.0), 0.5)
    copied = torch.zeros(len(logits))
    total = sum(float(w) + 1e-7 for w, i in zip(weights, ids, strict=False) if i is not None)
    for w, i in zip(weights.tolist(), ids, strict=False):
        if i is not None:
            copied[i] += (w + 1e-7) / total if normalize else w
    own = contrasted.softmax(-1) if contrast else logits.softmax(-1)
    if copied.sum() == 0:
        return own
    mixed = share * copied + (1 - share) * own
    return mixed / mixed.sum()


@pytest.fixture(scope="module")
def model():
    return zoo.llava("eager", layers=8)


def trace(model, call, steps=4):
    keys = ("output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate")
    greedy = {"do_sample": False, "max_new_tokens": steps, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**call, **dict.fromkeys(keys, True), **greedy)


@pytest.mark.parametrize("source", ["image", "text", "prompt", (1, 7)])
@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 90.0},
        {"scale": 30.0, "normalize": False, "contrast": True},
        {"scale": 1e6, "words": tuple(range(20, 90))},
    ],
)
@torch.no_grad()
def test_every_token_equals_the_formula(model, source, settings):
    call = zoo.llava_call((1, 2), (2, 0))
    with mmattn.attach(model, LargePiG(source=source, **settings)) as session:
        out = trace(model, call)
        note = session.stats.sites[-1].notes["copied"]
    features = model.get_image_features(call["pixel_values"], return_dict=True).pooler_output
    ids = ids_of_source(model, call, features, source, settings.get("words"))
    rest = {"normalize": True, "contrast": False, **settings}
    rest.pop("words", None)
    for step in range(4):
        hidden = [h[:, -1] for h in out.hidden_states[step]]
        for b in range(2):
            early = {n: model.lm_head(hidden[n][b]) for n in LAYERS}
            weights = out.attentions[step][-1][b].mean(0)[-1]
            want = mixture(model.lm_head(hidden[-1][b]), early, weights, ids[b], **rest)
            assert distance(out.logits[step][b].softmax(-1), want) < 1e-5
    assert 0 < note <= 0.5


@torch.no_grad()
def test_other_implementations_caches_and_beams(model):
    call = zoo.llava_call()
    method = LargePiG(scale=2000.0, source="prompt", words=tuple(range(30, 60)))
    with mmattn.attach(model, method):
        want = zoo.logits(model, call)[:, -1]
        long = {"eos_token_id": None, "max_new_tokens": 6}
        for beams in (1, 3):
            kept = zoo.tokens(model, call, num_beams=beams, **long)
            afresh = zoo.tokens(model, call, num_beams=beams, use_cache=False, **long)
            assert torch.equal(kept, afresh)
    sdpa = zoo.llava("sdpa", layers=8)
    stock = zoo.logits(sdpa, call)
    with mmattn.attach(sdpa, method):
        got = zoo.logits(sdpa, call)
        assert distance(got[:, -1], want) < 1e-4
        assert torch.equal(got[:, :-1], stock[:, :-1])
        tokens = torch.tensor([[8, 9, 10]] * 2)
        wide = torch.nn.functional.pad(call["attention_mask"], (0, 3), value=1)
        out = sdpa(**call, use_cache=True)
        together = sdpa(input_ids=tokens, attention_mask=wide, cache=out.cache).logits
        out = sdpa(**call, use_cache=True)
        for i in range(3):
            part = {
                "input_ids": tokens[:, i : i + 1],
                "attention_mask": wide[:, : wide.shape[1] - 2 + i],
            }
            one = sdpa(**part, cache=out.cache).logits[:, -1]
            assert distance(one, together[:, i]) < 1e-4


@pytest.mark.parametrize("name", ["qwen2.5-vl", "idefics3", "llava-next", "llama"])
@torch.no_grad()
def test_other_families(name):
    model, call, _ = zoo.made(name)
    source = "text" if name == "llama" else "image"
    stock = zoo.logits(model, call)
    with mmattn.attach(model, LargePiG(scale=1e6, source=source, layers=(1,))) as session:
        got = zoo.logits(model, call)[:, -1].softmax(-1)
        zoo.tokens(model, call)
        assert session.stats.sites[-1].notes["copied"] > 0.4
    plain = stock[:, -1].softmax(-1)
    # Half of the mass is copied, so what is not in the source is halved.
    assert torch.allclose(got.min(-1).values, plain.min(-1).values / 2, rtol=1e-3)


@torch.no_grad()
def test_invariants(model):
    call = zoo.llava_call((1, 0), (0, 3))
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, LargePiG(scale=0.0)):
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
    with mmattn.attach(model, LargePiG(scale=1e6)):
        got = zoo.logits(model, call)
    assert torch.equal(got[1], stock[1]), "a row without an image has nothing to copy"
    assert got[0, -1].exp().sum() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(got[0, -1], stock[0, -1])
    looks, ids = torch.rand(2, 3, 12).softmax(-1), torch.randint(3, 9, (2, 10))
    ids[0, :4] = -1
    copied = pointer(looks, ids, 20)
    assert torch.allclose(copied.sum(-1), torch.ones(2, 3))
    assert (copied[..., :3] == 0).all() and (copied[..., 9:] == 0).all()
    raw = pointer(looks, ids, 20, normalize=False)
    assert torch.allclose(raw[0].sum(-1), looks[0, :, 4:10].sum(-1))
    order = torch.randperm(10)
    moved = pointer(looks[..., :10][..., order], ids[:, order], 20)
    assert torch.allclose(moved, copied, atol=1e-6)
    assert (pointer(looks, torch.full_like(ids, -1), 20) == 0).all()


def test_parts_against_loops():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :2] = False
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[-3:] & real[:, None, None]
    additive = torch.zeros(2, 1, 3, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    want = torch.zeros(2, 3, 9)
    for b in range(2):
        for i in range(3):
            use = causal[b, 0, i]
            for h in range(4):
                scores = k[b, h // 2, use] @ q[b, h, i] * 8**-0.5
                want[b, i, use] += scores.softmax(-1) / 4
    for mask in (causal, additive):
        assert torch.allclose(newest_rows(q, k, mask, None), want, atol=1e-6)
    assert torch.allclose(newest_rows(q, k, None, None)[0], want[0], atol=1e-6)
    table, x = torch.randn(50, 6), torch.randn(3, 70, 6)
    near = nearest(x, table, None)
    far = (x[:, :, None] - table).square().sum(-1)
    assert torch.equal(near, far.argmin(-1))
    some = torch.tensor([3, 11, 20])
    assert torch.equal(nearest(x, table, some), some[far[..., some].argmin(-1)])


@pytest.mark.parametrize("other", [HiPrune(keep=6), VHR(alpha=3.0)], ids=lambda m: m.name)
@torch.no_grad()
def test_beside_other_methods(model, other):
    call = zoo.llava_call()
    with mmattn.attach(model, other):
        out = trace(model, call, steps=1)
    features = model.get_image_features(call["pixel_values"], return_dict=True).pooler_output
    ids = ids_of_source(model, call, features, "prompt")
    with mmattn.attach(model, [other, LargePiG(scale=2000.0, source="prompt")]) as session:
        got = zoo.logits(model, call)[:, -1].softmax(-1)
        zoo.tokens(model, call, num_beams=2)
        assert session.stats.sites[-1].notes["copied"] > 0
    if other.name == "vhr":
        for b in range(2):
            early = {n: model.lm_head(out.hidden_states[0][n][b, -1]) for n in LAYERS}
            weights = out.attentions[0][-1][b].mean(0)[-1]
            want = mixture(out.logits[0][b], early, weights, ids[b], 2000.0, True, False)
            assert distance(got[b], want) < 1e-5
    else:  # only what was kept can be copied
        plain = out.logits[0].softmax(-1)
        for b in range(2):
            known = sorted({i for i in ids[b] if i is not None})
            others = torch.ones(got.shape[-1], dtype=torch.bool)
            others[known] = False
            ratio = got[b, others] / plain[b, others]
            assert ratio.max() < 1 and torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-3)
        with (
            mmattn.attach(model, [other, LargePiG(source=(1, 3))]),
            pytest.raises(mmattn.UnsupportedCall, match="changed the length"),
        ):
            zoo.logits(model, call)
    with mmattn.attach(model, [VCD(beta=0.0), other, LargePiG(scale=2000.0)]):
        assert torch.equal(zoo.tokens(model, call), zoo.tokens(model, call))


@torch.no_grad()
def test_rows_do_not_depend_on_each_other(model):
    call = zoo.llava_call((1, 1, 1), (0, 2, 1))
    with mmattn.attach(model, LargePiG(scale=2000.0, source="prompt")):
        whole = zoo.logits(model, call)[:, -1]
        for row in range(3):
            real = call["attention_mask"][row].bool()
            one = {k: v[row : row + 1, real] for k, v in call.items() if k != "pixel_values"}
            one["pixel_values"] = call["pixel_values"][row : row + 1]
            assert distance(zoo.logits(model, one)[:, -1], whole[row : row + 1]) < 1e-4


def test_settings_words_and_refusals(model):
    _, processor = mini.load("vlm")
    words = words_of(processor.tokenizer)
    names = processor.tokenizer.convert_ids_to_tokens(words)
    assert "apple" in names and all(name.isalpha() for name in names)
    for settings in (
        {"scale": -1.0},
        {"source": "video"},
        {"source": (3, 1)},
        {"layers": "middle"},
    ):
        with pytest.raises(mmattn.ConfigError):
            LargePiG(**settings)
    method = LargePiG(source=(0, 9), words=(4, 5))
    assert LargePiG.from_dict(method.to_dict()) == method
    call = zoo.llava_call()
    with torch.no_grad():
        before = model(**call, use_cache=True).cache
        step = {"input_ids": torch.tensor([[7], [8]])}
        step["attention_mask"] = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
        with (
            mmattn.attach(model, LargePiG()),
            pytest.raises(mmattn.UnsupportedCall, match="has not seen the prompt"),
        ):
            model(**step, cache=before)
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.vit(), LargePiG())
