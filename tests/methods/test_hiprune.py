"""HiPrune: selection against a literal reference, scores against dense attention, whole models."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import HiPrune
from mmattn.methods.hiprune import budget_of, column_mean, select


def literal(by_object, by_depth, budget, alpha, width):
    """The sheet's pseudo-code, one index at a time."""
    total = len(by_object)
    ranked = sorted(range(total), key=lambda j: (-float(by_object[j]), j))
    held = set()
    for j in ranked[: round(alpha * budget / 5)]:
        for near in (j, j - 1, j + 1, j - width, j + width):
            held.add(min(max(near, 0), total - 1))
    for j in sorted(range(total), key=lambda j: (-float(by_depth[j]), j)):
        if len(held) == budget:
            break
        held.add(j)
    return sorted(held)


@dataclass(frozen=True)
class Spy(HiPrune):
    """HiPrune that remembers what it kept."""

    name: ClassVar[str] = "spy"
    log: ClassVar[list] = []

    def features(self, tile, *, site):
        kept = super().features(tile, site=site)
        self.log.append(kept)
        return kept


@dataclass(frozen=True)
class Dense(mmattn.Method):
    """Keeps the mean attention of every key, from the whole attention matrix."""

    name: ClassVar[str] = "dense"
    observes: ClassVar[bool] = True
    log: ClassVar[dict] = {}

    def attend(self, q, k, v, *, mask, scale, site, dense):
        weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        self.log.setdefault(site.index, []).append(weights.mean((1, 2)))
        return dense(q, k, v)


@pytest.fixture(autouse=True)
def _fresh_logs():
    Spy.log.clear()
    Dense.log.clear()


@pytest.mark.parametrize(
    ("budget", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (342, 7), (228, 5), (115, 2)]
)
def test_number_of_anchors(budget, anchors):
    scores = torch.rand(1024)
    _, count, held = select(scores, torch.rand(1024), budget, 0.1, (32, 32))
    assert count == anchors and anchors <= held <= 5 * anchors


@pytest.mark.parametrize("case", range(30))
def test_selection_is_the_papers(case):
    generator = torch.Generator().manual_seed(case)
    y, x = (24, 24) if case % 3 else (7, 9)
    # Coarse scores make many ties, which must fall to the earlier token.
    scores = torch.rand(2, y * x, generator=generator)
    scores = (scores * 40).floor() if case % 2 else scores
    budget, alpha = [(192, 0.1), (64, 0.5), (50, 1.0)][case % 3] if case % 3 else (31, 0.4)
    kept, _, held = select(scores[0], scores[1], budget, alpha, (y, x))
    if held < budget:
        assert kept.tolist() == literal(scores[0], scores[1], budget, alpha, x)
    assert len(kept) == budget and (kept[1:] > kept[:-1]).all()


def test_selection_limits():
    by_object, by_depth = torch.rand(2, 35)
    kept, anchors, held = select(by_object, by_depth, 10, 0.0, (5, 7))
    assert anchors == held == 0
    assert set(kept.tolist()) == set(by_depth.topk(10).indices.tolist())
    # A tie everywhere keeps the first tokens.
    flat = torch.ones(35)
    assert select(flat, flat, 4, 0.0, (5, 7))[0].tolist() == [0, 1, 2, 3]
    # Anchors, buffers and corners: the code's flat neighbours wrap and clamp, the grid's do not.
    peak = torch.zeros(35)
    peak[6] = 1  # end of the first row of seven
    wrapped = select(peak, torch.zeros(35) + torch.arange(35), 10, 0.5, (5, 7))[0].tolist()
    assert {0, 5, 6, 7, 13} <= set(wrapped)
    edged = select(peak, torch.arange(35.0), 10, 0.5, (5, 7), wrap=False)[0].tolist()
    assert {5, 6, 13} <= set(edged) and not {0, 7} & set(edged)
    # More buffers than budget: never more tokens than asked for.
    for budget in range(1, 35):
        assert len(select(by_object, by_depth, budget, 1.0, (5, 7))[0]) == budget


@pytest.mark.parametrize("tokens", [1, 63, 111, 130])
def test_column_mean_is_the_dense_one(tokens):
    q, k = torch.randn(2, 2, 3, tokens, 8, dtype=torch.float64)
    want = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1).mean((1, 2))
    got = column_mean(q, k, None)
    assert torch.allclose(got.double(), want, atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(column_mean(q[:, [2, 0, 1]], k[:, [2, 0, 1]], None), got, atol=1e-6)


def test_budgets():
    assert budget_of(192, 576, 1) == 192 and budget_of(9999, 576, 1) == 576
    assert [budget_of(n, 576, 5) for n in (640, 320, 160)] == [128, 64, 32]
    assert [budget_of(r, 1024, 1) for r in (0.334, 0.223, 0.112)] == [342, 228, 115]
    with pytest.raises(mmattn.UnsupportedCall, match="leaves no token"):
        budget_of(3, 576, 5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llava_keeps_what_its_attention_maps_say(implementation):
    model, call = zoo.llava("eager", vision_feature_layer=-2), zoo.llava_call()
    with torch.no_grad():
        maps = model.model.vision_tower(call["pixel_values"], output_attentions=True).attentions
    scores = [m.mean((1, 2))[:, 1:] for m in maps]
    # 0.375 of 4 blocks is block 2; the features come out of block 3.
    want = [literal(scores[1][i], scores[2][i], 7, 0.8, 4) for i in range(2)]
    model.set_attn_implementation(implementation)
    with mmattn.attach(model, Spy(keep=7, alpha=0.8)) as session:
        zoo.logits(model, call)
        assert [k.tolist() for k in Spy.log] == want
        paths = [row.path for row in session.stats.sites if row.kind == "self"]
        place = next(r for r in session.stats.sites if r.kind == "features")
    assert [p.split(".")[-2] for p in paths] == ["1", "2"]
    assert place.tokens_kept == 7 and place.tokens_in == 16 and place.notes["anchors"] == 1


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_qwen_scores_are_merged_unwindowed_and_split_by_image(name):
    from transformers.vision_utils import get_vision_window_index

    build, make, _ = zoo.ALL[name]
    model, visual = build(), None
    call, visual = make(model), model.model.visual
    grids = call["image_grid_thw"]
    with mmattn.attach(model, Dense(), sites="*visual*"):
        zoo.logits(model, call)
    scores = []
    for block in (1, 3):  # half of 4 blocks, and the last
        assert len(Dense.log[block]) == 2, "one attention call per image"
        merged = torch.cat([c.flatten() for c in Dense.log[block]]).view(-1, 4).mean(1)
        if name == "qwen2.5-vl":
            order, _ = get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)
            merged = merged[torch.argsort(order)]
        scores.append(merged.split((grids.prod(1) // 4).tolist()))
    want = []
    for i, (_, y, x) in enumerate(grids.tolist()):
        budget = round(y * x // 4 * 0.4)
        want.append(literal(scores[0][i], scores[1][i], budget, 0.5, x // 2))
    with mmattn.attach(model, Spy(keep=0.4, alpha=0.5)):
        zoo.logits(model, call)
        zoo.logits(model, call)
    assert [k.tolist() for k in Spy.log] == want * 2


def test_beams_share_what_was_kept_and_images_have_their_own_budget():
    model = zoo.llava()
    call = zoo.llava_call((2, 1), (0, 3))
    with mmattn.attach(model, Spy(keep=5)) as session:
        zoo.tokens(model, call, num_beams=3)
        place = next(r for r in session.stats.sites if r.kind == "features")
    assert [len(k) for k in Spy.log] == [5, 5, 5]
    assert place.tokens_kept == 7.5 and place.calls == 1
    together = [k.tolist() for k in Spy.log]
    Spy.log.clear()
    with mmattn.attach(model, Spy(keep=5)):
        for i in range(3):
            one = zoo.llava_call((1,), (0,))
            zoo.logits(model, {**one, "pixel_values": call["pixel_values"][i : i + 1]})
    assert [k.tolist() for k in Spy.log] == together, "one image depends on another"


def test_keeps_more_deep_attention_than_chance():
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, [Spy(keep=4), Dense()], sites="*vision*"):
        zoo.logits(model, call)
    deep = Dense.log[3][0][:, 1:]
    share = sum(float(deep[i, k].sum()) for i, k in enumerate(Spy.log)) / float(deep.sum())
    assert share > 4 / 16 * 1.02, "random selection keeps a quarter"


def test_composes_with_methods_in_the_decoder():
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, HiPrune(keep=6)) as session:
        alone = zoo.logits(model, call)
        session.report()
    with mmattn.attach(model, [HiPrune(keep=6), mmattn.VHR(), "identity"]) as session:
        both = zoo.logits(model, call)
        zoo.tokens(model, call)
        assert session.stats.executed == session.stats.planned
    assert both.shape == alone.shape and distance(both, alone) > 1e-3


def test_what_it_refuses():
    qwen, llava = zoo.qwen25(), zoo.llava()
    with (
        mmattn.attach(qwen, HiPrune(keep=0.5, object_layer=1)),
        pytest.raises(mmattn.UnsupportedCall, match="inside windows only"),
    ):
        zoo.logits(qwen, zoo.qwen_call())
    with pytest.raises(mmattn.NoSiteError, match="deeper than the tower"):
        mmattn.attach(llava, HiPrune(object_layer=5))
    with pytest.raises(mmattn.NoSiteError, match="feeds a language model"):
        mmattn.attach(zoo.clip(), HiPrune())
    with (
        mmattn.attach(llava, HiPrune(keep=5), sites="*vision*layers.3*"),
        pytest.raises(mmattn.UnsupportedCall, match="object block"),
    ):
        zoo.logits(llava, zoo.llava_call())
    with mmattn.attach(llava, HiPrune(keep=5), sites="*vision*layers.3*", unsupported="dense") as s:
        assert zoo.logits(llava, zoo.llava_call()).shape[1] == 24
        assert s.stats.dense_calls == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"keep": True},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"object_layer": 0},
        {"object_layer": 1.2},
        {"keeep": 3},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(mmattn.ConfigError):
        HiPrune.from_dict(settings)


def test_settings_round_trip():
    method = HiPrune(keep=0.3, alpha=0.2, object_layer=9, wrap=False)
    assert HiPrune.from_dict(method.to_dict()) == method
    assert HiPrune(keep=1.0).passive and HiPrune(keep=None).passive and not HiPrune().passive
