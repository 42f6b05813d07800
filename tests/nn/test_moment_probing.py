"""Moment Probing: sums written out, published sizes, and what it adds on the embedded ViT."""

from __future__ import annotations

import pytest
import torch

from mmattn import mini
from mmattn.errors import ConfigError
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch
from mmattn.nn.moment_probing import MomentProbing
from mmattn.nn.probes import MeanToken, Probe, accuracy, features, fit


@pytest.mark.parametrize("compat", [False, True])
def test_moments_written_out(compat):
    torch.manual_seed(0)
    probe = MomentProbing(10, 3, hidden=24, heads=3, compat=compat).double()
    torch.nn.init.normal_(probe.norm.weight)
    torch.nn.init.normal_(probe.norm.bias)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    got = probe.moments(x)
    heads = [probe.norm(part) for part in probe.proj(x).split(8, dim=2)]
    for b in range(2):
        for h in range(2):
            one, two = heads[h][b], heads[h + 1][b]  # [N, D]
            if compat:
                one, two = one - one.mean(), two - two.mean()
            else:
                one, two = one - one.mean(0), two - two.mean(0)
            want = torch.stack(
                [torch.stack([(one[:, i] * two[:, j]).sum() for j in range(8)]) for i in range(8)]
            )
            want = want / 5
            want = want / want.norm(dim=0, keepdim=True)
            assert torch.allclose(got[b, h], want, atol=1e-12)


def test_published_sizes():
    probe = MomentProbing(768, 1000)
    assert probe.second.in_features == 2883
    heads = 768 * 512 + 512 + 2 * 128 + 2 * 3 * 3 * 9
    assert sum(p.numel() for p in probe.parameters()) == heads + 769_000 + 2_884_000


def test_order_of_the_tokens_does_not_matter_and_the_class_token_stands_apart():
    torch.manual_seed(0)
    probe, x = MomentProbing(12, 4, hidden=32), torch.randn(2, 9, 12)
    torch.nn.init.normal_(probe.second.weight)
    mixed = torch.cat([x[:, :1], x[:, 1 + torch.randperm(8)]], dim=1)
    assert torch.allclose(probe(x), probe(mixed), atol=1e-5)
    other = x.clone()
    other[:, 0] += 1
    assert torch.allclose(
        probe(other) - probe(x), (probe.first(other[:, 0]) - probe.first(x[:, 0])) / 2, atol=1e-5
    )
    shifted = x.clone()
    shifted[:, 1:] = torch.randn(2, 8, 12)
    assert not torch.allclose(probe(x), probe(shifted), atol=1e-3)


def test_refusals():
    with pytest.raises(ConfigError, match="two heads"):
        MomentProbing(8, 2, hidden=32, heads=1)
    with pytest.raises(ConfigError, match="two heads"):
        MomentProbing(8, 2, hidden=30, heads=4)
    with pytest.raises(ConfigError, match="narrow"):
        MomentProbing(8, 2, hidden=24, heads=4)


def test_more_than_a_linear_probe_on_the_mean():
    """Patch tokens of the third block, 3000 pictures: second moments know what the mean has lost."""
    model, sets = mini.load("vit"), []
    for count, seed in ((3000, 5000), (500, HELD_OUT_SEED)):
        pictures, labels = draw_batch(count, torch.Generator().manual_seed(seed))
        sets.append((features(model, pictures * 2 - 1, layer=2), labels))
    (tokens, labels), (held, truth) = sets
    right = {}
    torch.manual_seed(0)
    moments = MomentProbing(128, 48, hidden=128, class_token=False)
    for name, probe in (("moments", moments), ("mean", Probe(MeanToken(128), 48))):
        losses = fit(probe, tokens, labels, epochs=15)
        assert losses[-1] < losses[0]
        right[name] = accuracy(probe, held, truth)
    assert right["moments"] > right["mean"] + 0.05 and right["mean"] > 5 / 48, right
