"""PAI: one row of raised scores, against a dense oracle in whole models."""

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import case, check, check_identity, check_rows, made, notes, patched, steps
from host_contract import distance

import mmattn
from mmattn.methods import _decoder_keys as decoder
from mmattn.methods.pai import PAI
from mmattn.mini import load


def raised(alpha):
    def edit(call):
        scores = call.scores.clone()
        for b in range(scores.shape[0]):
            for j in call.image[b].nonzero().flatten().tolist():
                s = call.products[b, :, -1, j] * call.scale
                scores[b, :, -1, j] = s + alpha * s.abs()
        return scores.softmax(-1)

    return edit


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name):
    stats = check(name, PAI(alpha=0.5), raised(0.5))
    assert all(won > 0 for won in notes(stats, "won"))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name):
    check_rows(name, PAI(alpha=0.5))


def test_at_zero_nothing_changes():
    check_identity(PAI(alpha=0.0))


def test_only_the_last_row_changes_and_only_at_the_prompts_layers():
    model, call = made("llava")
    real = call["attention_mask"].bool()[:, :-1]
    stock = zoo.logits(model, call)
    with mmattn.attach(model, PAI(alpha=0.5)):
        got = zoo.logits(model, call)
    assert torch.equal(got[:, :-1][real], stock[:, :-1][real])
    assert distance(got[:, -1], stock[:, -1]) > 1e-3


@pytest.mark.parametrize("additive", [True, False])
def test_scores_with_both_kinds_of_mask(additive):
    q, k, v, mask, real = case()
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[:, 3:6] = True
    scores = torch.einsum("bhd,bhkd->bhk", q[:, :, -1], k.repeat_interleave(2, 1)) * 8**-0.5
    lifted = scores + 0.7 * image[:, None] * scores.abs()
    before, want = (s.masked_fill(~real[:, None], -torch.inf).softmax(-1) for s in (scores, lifted))
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    keys = decoder.Keys(given if additive else mask, False, 0, real, image)
    out, won = decoder.lifted_last_row(q, k, v, None, keys, 0.7 * image)
    dense = torch.einsum("bhk,bhkd->bhd", want, v.repeat_interleave(2, 1))
    assert distance(out[:, :, 0], dense) < 1e-5
    assert torch.allclose(won, (want - before)[..., 3:6].sum(-1), atol=1e-6) and (won > 0).all()
    late = decoder.Keys(mask, False, 0, real.flip(1), image)
    with pytest.raises(mmattn.UnsupportedCall, match="padded on the right"):
        decoder.lifted_last_row(q, k, v, None, late, 0.7 * image)


def test_layers():
    assert PAI().chosen(32) == set(range(2, 32))
    assert PAI().chosen(8) == set(range(1, 8))
    assert PAI().chosen(24) == set(range(2, 24))
    assert PAI().chosen(1) == {0}
    assert PAI(layers=(0, -1)).chosen(6) == {0, 5}


def test_rows_without_images_stay_as_they_are():
    model = zoo.llava()
    mixed, text = zoo.llava_call((1, 0), (0, 2)), zoo.prompt((0, 0), 0, (0, 3))
    stock, plain = zoo.logits(model, mixed), zoo.logits(model, text)
    with mmattn.attach(model, PAI(alpha=2.0)):
        got = zoo.logits(model, mixed)
        assert torch.equal(zoo.logits(model, text), plain)
    real = mixed["attention_mask"][1].bool()
    assert distance(got[1, real], stock[1, real]) < 1e-5


def test_the_embedded_model():
    model, _ = load("vlm")
    ids = torch.tensor([[1, *[4] * 64, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
    }
    method = PAI(alpha=0.5)
    with patched(model, ids, raised(0.5), method.chosen(8)):
        text, want = steps(model, call)
    with mmattn.attach(model, method):
        got, numbers = steps(model, call)
    assert torch.equal(got, text) and distance(numbers, want) < 1e-5


def test_what_it_refuses():
    for settings in ({"alpha": -0.1}, {"layers": (0.5,)}, {"gamma": 1}):
        with pytest.raises(mmattn.ConfigError):
            PAI.from_dict(settings)
    method = PAI(alpha=0.3, layers=(1, -1))
    assert PAI.from_dict(method.to_dict()) == method
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.llama(), PAI())
    model = zoo.llava()
    call = zoo.llava_call()
    with torch.no_grad(), mmattn.attach(model, PAI()):
        embeds = model.get_input_embeddings().weight[call["input_ids"]]
        with pytest.raises(mmattn.UnsupportedCall, match="pass input_ids"):
            model(inputs_embeds=embeds, attention_mask=call["attention_mask"])
