"""RandomPrune: budget, seeds, and that the global generator is left alone."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo

import mmattn
from mmattn import RandomPrune


@dataclass(frozen=True)
class Spy(RandomPrune):
    """RandomPrune that remembers what it kept."""

    name: ClassVar[str] = "spy-random"
    log: ClassVar[list] = []

    def features(self, tile, *, site):
        kept = super().features(tile, site=site)
        self.log.append(kept.tolist())
        return kept


def drawn(model, call, keep, seed=0, times=1):
    Spy.log.clear()
    with mmattn.attach(model, Spy(keep=keep), seed=seed) as session:
        for _ in range(times):
            zoo.logits(model, call)
        place = session.stats.sites[-1]
    return list(Spy.log), place


@pytest.mark.parametrize(
    "name", ["llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"]
)
def test_keeps_the_budget_in_order(name):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    kept, place = drawn(model, call, 0.25)
    assert kept and all(k == sorted(set(k)) for k in kept)
    assert place.kind == "features" and place.tokens_kept < place.tokens_in
    if name == "llava":
        assert [len(k) for k in kept] == [4, 4] and place.tokens_kept == 4
    if name.startswith("qwen"):
        assert [len(k) for k in kept] == [15, 6]
    if name in ("idefics3", "smolvlm"):
        assert [len(k) for k in kept] == [1, 1]


def test_the_seed_decides_and_nothing_else_does():
    model, call = zoo.llava(), zoo.llava_call()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = drawn(model, call, 5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    torch.manual_seed(2)
    assert drawn(model, call, 5)[0] == first
    assert drawn(model, call, 5, seed=1)[0] != first
    twice, _ = drawn(model, call, 5, times=2)
    assert twice[:2] == first and twice[2:] != first, "every image draws anew"
    with mmattn.attach(model, Spy(keep=5)) as session:
        Spy.log.clear()
        zoo.logits(model, call)
        session.reset()
        zoo.logits(model, call)
    assert Spy.log[:2] == Spy.log[2:] == first


def test_every_token_has_the_same_chance():
    model, call = zoo.llava(), zoo.llava_call((1,), (0,))
    kept, _ = drawn(model, call, 8, times=60)
    counts = torch.bincount(torch.tensor(kept).flatten(), minlength=16)
    assert counts.sum() == 480 and counts.min() > 12 and counts.max() < 48


def test_bad_settings():
    for keep in (0, -1, 0.0, 1.01, "all"):
        with pytest.raises(mmattn.ConfigError):
            RandomPrune(keep=keep)
    assert RandomPrune.from_dict(RandomPrune(keep=0.5).to_dict()) == RandomPrune(keep=0.5)
    assert RandomPrune(keep=None).passive
