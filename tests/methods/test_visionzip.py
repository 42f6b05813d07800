"""VisionZip: choice and merging against loops, features before the projector, whole models."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mmattn
from mmattn.layout import Kept
from mmattn.methods.visionzip import VisionZip, absorb


@dataclass(frozen=True)
class Spy(VisionZip):
    """VisionZip that remembers what it kept."""

    name: ClassVar[str] = "spy-visionzip"
    log: ClassVar[list] = []

    def features(self, tile, *, site):
        kept = super().features(tile, site=site)
        self.log.append(kept)
        return kept


@dataclass(frozen=True)
class Look(mmattn.Method):
    """Remembers queries and keys of every call."""

    name: ClassVar[str] = "look"
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    log: ClassVar[dict] = {}

    def attend(self, q, k, v, *, mask, scale, site, dense):
        self.log.setdefault(site.index, []).append((q, k, scale))
        return dense(q, k, v)


@pytest.fixture(autouse=True)
def _fresh_logs():
    Spy.log.clear()
    Look.log.clear()


def literal(scores, keys, features, budget, merged):
    """The published algorithm, one token at a time: ``{place: feature}``, unmerged ones None."""
    total = len(scores)
    ranked = sorted(range(total), key=lambda j: (-float(scores[j]), j))
    dominant = sorted(ranked[: budget - merged])
    rest = [j for j in range(total) if j not in dominant]
    step = max(1, len(rest) // merged)
    targets = rest[::step][:merged]
    members = {t: [] for t in targets}
    for j in rest:
        if j not in members:
            cosines = [torch.cosine_similarity(keys[j], keys[t], dim=0) for t in targets]
            members[targets[int(torch.stack(cosines).argmax())]].append(j)
    out = dict.fromkeys(dominant)
    for t, joined in members.items():
        out[t] = features[t] + (torch.stack([features[j] for j in joined]).mean(0) if joined else 0)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_merging_is_the_published_one(seed):
    generator = torch.Generator().manual_seed(seed)
    total = (16, 63, 111)[seed % 3]
    scores = torch.rand(total, generator=generator)
    keys, features = torch.randn(2, total, 8, generator=generator)
    budget, merged = [(9, 3), (12, 12), (15, 1), (10, 5)][seed % 4]
    want = literal(scores, keys, features, budget, merged)
    dominant = scores.topk(budget - merged).indices.sort().values
    places, sums = absorb(features, keys, dominant, merged)
    assert places.tolist() == sorted(j for j, f in want.items() if f is not None)
    for place, feature in zip(places.tolist(), sums, strict=True):
        assert torch.allclose(feature, want[place], atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llava_equals_merging_before_the_projector(implementation):
    """The whole model against one that is handed the features this file computes."""
    model, call = zoo.llava("eager", vision_feature_layer=-2), zoo.llava_call()
    with torch.no_grad(), mmattn.attach(model, Look(), sites="*vision*"):
        tower = model.model.vision_tower(
            call["pixel_values"], output_attentions=True, output_hidden_states=True
        )
    raw, project = tower.hidden_states[-2][:, 1:], model.model.multi_modal_projector
    rows, where = [], []
    with torch.no_grad():
        for i in range(2):
            scores = tower.attentions[2][i, :, 0, 1:].mean(0)
            keys = Look.log[2][0][1][i].mean(0)[1:]
            want = literal(scores, keys, raw[i], 7, 2)
            places = sorted(want)
            kept = [raw[i, j] if want[j] is None else want[j] for j in places]
            rows.append(project(torch.stack(kept)))
            where.append(places)
    keep = torch.ones_like(call["input_ids"], dtype=torch.bool)
    for i in range(2):
        image = (call["input_ids"][i] == zoo.IMAGE).nonzero().flatten()
        keep[i, image] = False
        keep[i, image[where[i]]] = True
    short = {
        k: torch.stack([r[m] for r, m in zip(call[k], keep, strict=True)])
        for k in call
        if k != "pixel_values"
    }

    def features():
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=rows)}}

    model.set_attn_implementation(implementation)
    want = zoo.logits(model, {**short, **features()})
    greedy = zoo.tokens(model, {**short, **features()})
    beams = zoo.tokens(model, {**short, **features()}, num_beams=3)
    length, full = short["input_ids"].shape[1], call["input_ids"].shape[1]
    with mmattn.attach(model, Spy(keep=7, contextual=0.25)) as session:
        got = zoo.logits(model, call)
        assert torch.equal(zoo.tokens(model, call)[:, full:], greedy[:, length:])
        assert torch.equal(zoo.tokens(model, call, num_beams=3)[:, full:], beams[:, length:])
        place = next(r for r in session.stats.sites if r.kind == "features")
    assert [k.indices.tolist() for k in Spy.log[:2]] == where
    assert distance(got, want) < 1e-5
    assert place.tokens_kept == 7 and place.notes["contextual"] == 2
    with mmattn.attach(model, Spy(keep=7, contextual=0.0)):
        assert distance(zoo.logits(model, call)[:, -1], want[:, -1]) > 1e-3, (
            "merging changes nothing"
        )


@pytest.mark.parametrize(("budget", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_budgets_are_the_published_ones(budget, contextual):
    assert round(budget * VisionZip().contextual) == contextual


@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"])
def test_other_families(name):
    model, call, _ = zoo.made(name)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, Spy(keep=0.5, contextual=0.5)) as session:
        first = zoo.logits(model, call)
        made = list(Spy.log)
        assert torch.equal(zoo.logits(model, call), first)
        zoo.tokens(model, call, num_beams=2)
        place = next(r for r in session.stats.sites if r.kind == "features")
        assert session.stats.executed == session.stats.planned
    assert first.shape[1] < stock.shape[1] and place.tokens_kept < place.tokens_in
    for kept in made:
        assert isinstance(kept, Kept) and (kept.indices.diff() > 0).all()
        assert len(kept.indices) == len(kept.features)
    for method in (VisionZip(keep=None), VisionZip(keep=9999)):
        with mmattn.attach(model, method):
            assert torch.equal(zoo.logits(model, call), stock)
            assert torch.equal(zoo.tokens(model, call), greedy)


def test_towers_without_a_class_token_are_scored_by_column_means():
    model, call, _ = zoo.made("idefics3")
    with mmattn.attach(model, Look(), sites="*vision*"):
        zoo.logits(model, call)
    q, k, scale = Look.log[1][0]
    mean = (q @ k.transpose(-1, -2) * scale).softmax(-1).mean((1, 2))
    # Two by two patches of a 4 x 4 grid are one token.
    cells = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    want = [
        sorted(torch.stack([row[c].mean() for c in cells]).topk(2).indices.tolist()) for row in mean
    ]
    with mmattn.attach(model, Spy(keep=2, contextual=0.0)):
        zoo.logits(model, call)
    assert [k.tolist() for k in Spy.log] == want


def test_the_class_token_can_be_ignored():
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, Look(), sites="*vision*"):
        zoo.logits(model, call)
    q, k, scale = Look.log[3][0]
    weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    for scores, flag in ((weights[:, :, 0].mean(1), True), (weights.mean((1, 2)), False)):
        Spy.log.clear()
        with mmattn.attach(model, Spy(keep=5, contextual=0.0, class_token=flag)):
            zoo.logits(model, call)
        want = [sorted(row[1:].topk(5).indices.tolist()) for row in scores]
        assert [kept.tolist() for kept in Spy.log] == want


def test_rows_do_not_see_each_other():
    model, call = zoo.llava(), zoo.llava_call((2, 1), (0, 3))
    with mmattn.attach(model, Spy(keep=6)):
        zoo.logits(model, call)
        together = list(Spy.log)
        Spy.log.clear()
        for i in range(3):
            one = {**zoo.llava_call((1,), (0,)), "pixel_values": call["pixel_values"][i : i + 1]}
            zoo.logits(model, one)
    for a, b in zip(Spy.log, together, strict=True):
        assert torch.equal(a.indices, b.indices) and distance(a.features, b.features) < 1e-5


def test_covers_the_image_better_than_dropping_alone():
    """Eight regions of alike tokens, and a tower that looks at one of them only."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(64) // 8
    centers = torch.randn(8, 16, generator=generator) * 4
    noise = torch.randn(64, 16, generator=generator)
    features = centers[groups] + noise
    places, sums = absorb(features, features, torch.arange(4), 8)

    def lost(shown):
        return float(torch.cdist(centers[groups], shown).amin(1).mean())

    chance = [torch.randperm(64, generator=generator)[:12] for _ in range(20)]
    zipped = torch.cat([features[:4], sums / 2])
    assert lost(zipped) < min(lost(features[c]) for c in chance)
    assert lost(zipped) < lost(torch.cat([features[:4], features[places]]))
    assert lost(zipped) < lost(features[:12]) / 2, "what its scores alone would keep"


def test_what_it_refuses():
    with pytest.raises(mmattn.NoSiteError, match="feeds a language model"):
        mmattn.attach(zoo.clip(), VisionZip())
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.llama(), VisionZip())
    for settings in ({"keep": 0}, {"contextual": 1.1}, {"contextual": -0.1}):
        with pytest.raises(mmattn.ConfigError):
            VisionZip(**settings)
    method = VisionZip(keep=0.2, contextual=0.3)
    assert VisionZip.from_dict(method.to_dict()) == method
    assert VisionZip(keep=1.0).passive and not method.passive
