"""ZeroTuning: a scaled first token against the dense formula, in whole models and in numbers."""

import math

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import check, check_identity, check_rows, made, notes
from host_contract import distance

import mmattn
from mmattn.methods.zerotuning import HeadProfile, ZeroTuning, profile_heads


def scaled(gamma, heads=None, span=(0, 0)):
    """``A_i0 -> gamma A_i0 / D_i``, one row after the other."""

    def edit(call):
        weights = call.plain
        if "first" not in call.store:
            columns = [next(c for r, _, c in call.rows() if r == b) for b in range(len(weights))]
            call.store["first"] = torch.tensor(columns)
        for b, i, _ in call.rows():
            first = int(call.store["first"][b])
            keys = slice(first + span[0], first + span[1] + 1)
            for h in range(weights.shape[1]):
                if heads is None or (call.layer, h) in heads:
                    row = weights[b, h, i].clone()
                    row[keys] *= gamma
                    weights[b, h, i] = row / row.sum()
        return weights

    return edit


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name):
    stats = check(name, ZeroTuning(gamma=4.0), scaled(4.0))
    pairs = zip(notes(stats, "before"), notes(stats, "after"), strict=True)
    assert all(after > 1.5 * before for before, after in pairs)


def test_chosen_heads_and_other_keys():
    heads = ((0, 1), (2, 0), (2, 3), (-1, 2))
    listed = {(0, 1), (2, 0), (2, 3), (3, 2)}
    method = ZeroTuning(gamma=0.25, head_list=heads, start=2, end=4)
    assert method.chosen(4) == {0, 2, 3}
    check("llava", method, scaled(0.25, listed, (2, 4)))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name):
    check_rows(name, ZeroTuning(gamma=0.2))


def test_at_one_nothing_changes():
    check_identity(ZeroTuning(gamma=1.0))


def attended(gamma, implementation="eager"):
    """Attention weights of block 0 by a value matrix that is the identity."""
    model, call = made("llava")
    method, seen = ZeroTuning(gamma=gamma), {}

    class Probe(ZeroTuning):
        name = "probe"

        def attend(self, q, k, v, **kw):
            if kw["site"].index == 0:
                eye = torch.eye(k.shape[2])[None, None].expand(*k.shape[:2], -1, -1)
                wide = torch.nn.functional.pad(q, (0, eye.shape[-1] - q.shape[-1]))
                keys = torch.nn.functional.pad(k, (0, eye.shape[-1] - k.shape[-1]))
                dense = kw.pop("dense")
                seen["out"] = method.attend(
                    wide, keys, eye, dense=_plain(wide, keys, eye, kw), **kw
                )
                return dense(q, k, v)
            return kw["dense"](q, k, v)

    with mmattn.attach(model, Probe(gamma=gamma)):
        zoo.logits(model, call)
    real = call["attention_mask"].bool()
    return seen["out"].transpose(1, 2)[real], real


def _plain(q, k, v, kw):
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.transpose(-1, -2) * kw["scale"] + kw["mask"]
    return lambda *a, **b: scores.softmax(-1) @ v.repeat_interleave(2, 1)


def test_invariants_of_the_weights():
    plain, real = attended(1.0)
    first = real.int().argmax(1).repeat_interleave(real.sum(1))[:, None, None]
    first = first.expand(-1, plain.shape[1], 1)
    share = {}
    for gamma in (0.0, 0.5, 2.0, 8.0):
        weights, _ = attended(gamma)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) and (weights >= 0).all()
        share[gamma] = weights.gather(-1, first)
        # The others keep their ratios, so the row is the old one with one logit shifted by log gamma.
        if gamma:
            shifted = plain.log().scatter_add(
                -1, first, torch.full_like(first, 1.0) * math.log(gamma)
            )
            assert distance(shifted.softmax(-1), weights) < 1e-5
    assert (share[0.5] <= share[2.0] + 1e-7).all() and (share[2.0] <= share[8.0] + 1e-7).all()
    # At 0 the first token is gone from every row that sees another one.
    alone = plain.gather(-1, first) > 1 - 1e-6
    assert (share[0.0][~alone] == 0).all() and (share[0.0][alone] == 1).all() and alone.any()
    with pytest.raises(AssertionError):
        assert distance(attended(2.0)[0], plain) < 1e-3


def test_text_models_too():
    model, call = zoo.llama(), zoo.prompt((0, 0), 0, (0, 3))
    stock = zoo.logits(model, call)
    with mmattn.attach(model, ZeroTuning(gamma=6.0)):
        got = zoo.logits(model, call)
        zoo.tokens(model, call)
    assert distance(got, stock) > 1e-4


def test_profiles_find_the_heads_that_help():
    model, call = made("llava")
    goal = torch.tensor([[31, 47]]).T
    planted = ((0, 1), (1, 2), (2, 0))

    def score():
        return -float(torch.nn.functional.cross_entropy(zoo.logits(model, call)[:, -1], goal[:, 0]))

    method, profiles = profile_heads(model, score, candidates=[*planted, (3, 3)], up=8.0, down=0.1)
    assert [(p.layer, p.head) for p in profiles] == [*planted, (3, 3)]
    assert all(p.plain == profiles[0].plain for p in profiles)
    assert score() == profiles[0].plain, "the model was left changed"
    if method is not None:
        kind = "up" if method.gamma > 1 else "down"
        chosen = [(p.layer, p.head) for p in profiles if p.kind == kind]
        assert method.head_list == tuple(chosen)
    with mmattn.attach(model, ZeroTuning(gamma=8.0, head_list=((1, 2),))):
        assert score() == profiles[1].up
    every = profile_heads(model, lambda: 0.0)
    assert every[0] is None and len(every[1]) == 16 and {p.kind for p in every[1]} == {"none"}
    assert HeadProfile(0, 0, 2.0, 3.0, 1.0).kind == "down"
    assert HeadProfile(0, 0, 3.0, 2.0, 1.0).kind == "up"


def test_what_it_refuses():
    bad = [{"gamma": -1.0}, {"start": 2, "end": 1}, {"head_list": ()}, {"head_list": (1, 2)}]
    for settings in [*bad, {"layers": (1.5,)}]:
        with pytest.raises(mmattn.ConfigError):
            ZeroTuning.from_dict(settings)
    method = ZeroTuning(gamma=2.0, head_list=((0, 1), (3, 2)))
    again = {**method.to_dict(), "head_list": [[0, 1], [3, 2]]}
    assert ZeroTuning.from_dict(again) == method
    model, call = zoo.llava(), zoo.llava_call()
    with (
        mmattn.attach(model, ZeroTuning(head_list=((0, 9),))),
        pytest.raises(mmattn.UnsupportedCall, match="has 4 heads"),
    ):
        zoo.logits(model, call)
    with torch.no_grad():
        out = model(**call, use_cache=True)
        step = {"input_ids": torch.tensor([[7], [7]]), "cache": out.cache}
        mask = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
        with (
            mmattn.attach(model, ZeroTuning(), sites="*language_model*"),
            pytest.raises(mmattn.UnsupportedCall, match="did not see the prompt"),
        ):
            model(**step, attention_mask=mask)
    for down, up in ((1.0, 2.0), (0.5, 1.0)):
        with pytest.raises(mmattn.ConfigError):
            profile_heads(model, lambda: 0.0, down=down, up=up)
