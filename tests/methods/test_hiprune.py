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


def test_masks_hide_keys_from_the_scores():
    q, k = torch.randn(2, 2, 4, 9, 8)
    seen = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    seen[1, ..., 6:] = False
    k = k[:, :2]  # grouped
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(
        ~seen, -torch.inf
    )
    got = column_mean(q, k, None, seen)
    assert torch.allclose(got, scores.softmax(-1).mean((1, 2)), atol=1e-6)
    assert not got[1, 6:].any()


def test_scores_are_the_ops_and_no_matrix_of_all_pairs_is_held(monkeypatch):
    """The mass comes from the op, with memory for rows of scores and not for all of them."""
    from mmattn_kernels import _row_blocks

    monkeypatch.setattr(_row_blocks, "_SCORES", 1 << 12)
    tokens, sizes = 400, []
    q, k = torch.randn(2, 1, 2, tokens, 4)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in torch.utils._pytree.tree_leaves(out) if hasattr(x, "numel")
            )
            return out

    with Sizes():
        got = column_mean(q, k, None)
    assert max(sizes) < tokens * tokens / 4
    want = (q @ k.transpose(-1, -2) * 0.5).softmax(-1).mean((1, 2))
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("case", range(12))
def test_compat_subtracts_one_as_the_code_does(case):
    generator = torch.Generator().manual_seed(case)
    by_object, by_depth = torch.rand(2, 63, generator=generator)
    if case % 2:
        by_depth = by_depth * 20  # sums over queries, far above 1, and an anchor among the largest
        by_depth[by_object.argmax()] = 30
    budget, alpha = 20, 0.5
    kept, _, held = select(by_object, by_depth, budget, alpha, (7, 9), compat=True)
    exact, _, _ = select(by_object, by_depth, budget, alpha, (7, 9))
    chosen = set()
    for j in sorted(range(63), key=lambda j: (-float(by_object[j]), j))[
        : round(alpha * budget / 5)
    ]:
        chosen |= {min(max(i, 0), 62) for i in (j, j - 1, j + 1, j - 9, j + 9)}
    lowered = [float(by_depth[j]) - (j in chosen) for j in range(63)]
    again = sorted(range(63), key=lambda j: (-lowered[j], j))[: budget - len(chosen)]
    assert held == len(chosen) and kept.tolist() == sorted(chosen | set(again))
    if case % 2:
        assert len(kept) < budget == len(exact), "some are selected twice"
    else:
        assert torch.equal(kept, exact), "means are below 1"


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_compat_in_models_matters_for_qwen_only(name):
    model, call, _ = zoo.made(name)
    if "qwen" in name:  # makes sinks, far above 1
        model.model.visual.blocks[3].attn.qkv.weight.data *= 100
    kept = {}
    for compat in (False, True):
        Spy.log.clear()
        with mmattn.attach(model, Spy(keep=0.5, alpha=0.4, compat=compat)):
            zoo.logits(model, call)
            zoo.tokens(model, call)
        kept[compat] = [k.tolist() for k in Spy.log[:2]]
    exact = [len(k) for k in kept[False]]
    if "qwen" in name:
        assert exact == [30, 12] and sum(map(len, kept[True])) < sum(exact)
        for few, all_ in zip(kept[True], kept[False], strict=True):
            assert set(few) <= set(all_)
    else:
        assert exact == [8, 8] and kept[True] == kept[False]


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
def test_text_guided_additions(name):
    """HiPrune++ against a loop over the features and the embeddings of the prompt's own text."""
    model, call, _ = zoo.made(name)
    image = call["input_ids"] == (250 if "qwen" in name else zoo.IMAGE)
    share = 0.25
    plain, added, texts = [], [], []

    class Both(HiPrune):
        def features(self, tile, *, site):
            kept = super().features(tile, site=site)
            added.append((kept.tolist(), tile))
            plain.append(HiPrune(keep=self.keep).features(tile, site=site).tolist())
            return kept

    with mmattn.attach(model, Both(keep=0.25, text_share=share)) as session:
        zoo.logits(model, call)
        row = next(r for r in session.stats.sites if r.kind == "features")
        bare = len(added)
        zoo.tokens(model, call, num_beams=2)
        assert [a[0] for a in added[bare:]] == [a[0] for a in added[:bare]]
    table = model.get_input_embeddings().weight
    for ids, pictures, padding in zip(
        call["input_ids"], image, call["attention_mask"], strict=True
    ):
        texts.append(table[ids[~pictures & padding.bool()]].mean(0))
    tiles = {"llava-next": (5, 3)}.get(name, (1, 1))
    owner = [b for b, n in enumerate(tiles) for _ in range(n)]
    for i, (kept, tile) in enumerate(added[:bare]):
        total = len(tile.features)
        cosine = torch.cosine_similarity(tile.features, texts[owner[i]][None], dim=1)
        rest = [j for j in range(total) if j not in plain[i]]
        extra = sorted(rest, key=lambda j: (-float(cosine[j]), j))[: round(share * total)]
        assert kept == sorted(plain[i] + extra) and extra
    assert bare == len(owner)
    if name == "llava":
        assert row.tokens_kept == 8 and [len(p) for p in plain] == [4] * len(plain)


def test_text_guided_choices_follow_the_text():
    """The same features with another question; and steps without a cache do not choose again."""
    model, call = zoo.llava(), zoo.llava_call((1,), (0,))
    model.get_input_embeddings().weight.data *= 50
    other = {**call, "input_ids": call["input_ids"].clone()}
    other["input_ids"][:, -3:] = torch.tensor([[90, 91, 92]])
    with torch.no_grad():
        rows = model.get_image_features(call["pixel_values"], return_dict=True)
    with mmattn.attach(model, Spy(keep=2, text_share=0.2)) as session:
        zoo.logits(model, call)
        again = {k: other[k] for k in ("input_ids", "attention_mask")}
        zoo.logits(model, {**again, "mm_encoder_outputs": {"image": rows}})
        zoo.logits(model, other)
        first, reused, fresh = (k.tolist() for k in Spy.log)
        assert reused == fresh != first
        zoo.tokens(model, call, use_cache=False)
        assert len(Spy.log) == 4 and Spy.log[3].tolist() == first
        assert session.stats.dense_calls == 0


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


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_idefics_scores_are_means_over_the_patches_of_a_token(name, implementation):
    model, call, _ = zoo.made(name, implementation)
    with mmattn.attach(model, Dense(), sites="*vision*"):
        zoo.logits(model, call)
    # Two by two patches of a 4 x 4 grid are one token; 0.375 of 2 blocks is block 1.
    cells = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    scores = [
        torch.stack([Dense.log[block][0][:, c].mean(1) for c in cells], 1) for block in (0, 1)
    ]
    want = [literal(scores[0][i], scores[1][i], 3, 0.0, 2) for i in range(2)]
    with mmattn.attach(model, Spy(keep=3, alpha=0.0)) as session:
        zoo.logits(model, call)
        zoo.tokens(model, call, num_beams=2)
        place = next(r for r in session.stats.sites if r.kind == "features")
    assert [k.tolist() for k in Spy.log[:2]] == want and place.tokens_kept == 3


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
        {"text_share": -0.1},
        {"text_share": 1.5},
        {"keeep": 3},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(mmattn.ConfigError):
        HiPrune.from_dict(settings)


def test_settings_round_trip():
    method = HiPrune(keep=0.3, alpha=0.2, object_layer=9, wrap=False, compat=True, text_share=0.1)
    assert HiPrune.from_dict(method.to_dict()) == method
    assert HiPrune(keep=1.0).passive and HiPrune(keep=None).passive and not HiPrune().passive
