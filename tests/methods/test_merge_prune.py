"""MergePrune: rounds of matching against loops, exact budgets, whole models."""

import pytest
import torch
import transformers_zoo as zoo

import mmattn
from mmattn.methods.merge_prune import MergePrune, merged


def by_loops(features, budget):
    """Lists of the original tokens in each group, and the place where the group stands."""
    groups = [([i], i) for i in range(len(features))]
    while len(groups) > budget:
        means = [features[members].mean(0) for members, _ in groups]
        unit = [m / m.norm() for m in means]
        pairs = []
        for a in range(0, len(groups), 2):
            scores = [(float(unit[a] @ unit[b]), b) for b in range(1, len(groups), 2)]
            score, b = max(scores, key=lambda s: s[0])
            pairs.append((score, a, b))
        pairs.sort(key=lambda p: -p[0])
        gone = set()
        for _, a, b in pairs[: min(len(groups) - budget, len(groups) // 2)]:
            groups[b] = (groups[b][0] + groups[a][0], groups[b][1])
            gone.add(a)
        groups = [g for i, g in enumerate(groups) if i not in gone]
    return [place for _, place in groups], torch.stack([features[m].mean(0) for m, _ in groups])


@pytest.mark.parametrize(("tokens", "budget"), [(9, 8), (16, 5), (25, 1), (64, 21), (7, 6)])
def test_rounds_of_matching_are_those_of_the_loops(tokens, budget):
    features = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens)).double()
    places, new = merged(features, budget)
    want_places, want = by_loops(features, budget)
    assert places.tolist() == want_places and len(places) == budget
    assert (places[1:] > places[:-1]).all()
    torch.testing.assert_close(new, want)


def test_equal_tokens_merge_without_loss():
    """Four different tokens, each sixteen times: what is left are the four."""
    kinds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    features = kinds.repeat_interleave(16, 0)
    _, new = merged(features, 4)
    torch.testing.assert_close(new, kinds)
    random = features[torch.randperm(64, generator=torch.Generator().manual_seed(1))[:4]]
    lost = sum(not any(torch.allclose(k, r) for r in random) for k in kinds)
    assert lost > 0, "four tokens at random miss a kind"


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
def test_models(name):
    model, call, _ = zoo.made(name)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, MergePrune(keep=0.25)) as session:
        first = zoo.logits(model, call)
        assert torch.equal(zoo.logits(model, call), first)
        zoo.tokens(model, call, num_beams=2)
        row = next(r for r in session.stats.sites if r.kind == "features")
    assert first.shape[1] < stock.shape[1] and 0 < row.tokens_kept < row.tokens_in
    with mmattn.attach(model, MergePrune(keep=None)):
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
    assert torch.equal(zoo.logits(model, call), stock)


def test_settings():
    assert MergePrune.from_dict(MergePrune(keep=0.3).to_dict()) == MergePrune(keep=0.3)
    for keep in (0, 1.5, True):
        with pytest.raises(mmattn.ConfigError, match="keep is"):
            MergePrune(keep=keep)
