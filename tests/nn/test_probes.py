"""Probes: the authors' numbers, invariants, fitting, and the embedded ViT with three seeds."""

import pytest
import timm
import torch

from mmattn import mini
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch
from mmattn.nn.probes import (
    ClassToken,
    EfficientProbing,
    MeanToken,
    Probe,
    accuracy,
    features,
    fit,
)


def test_the_authors_numbers():
    """Sine-filled parameters in the order of their names, cosine input, double precision."""
    pool = EfficientProbing(16, queries=4, shrink=2).double()
    for k, (_, p) in enumerate(sorted(pool.named_parameters())):
        at = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * at)).view_as(p)
    x = torch.cos(0.11 * torch.arange(224, dtype=torch.float64) + 0.2).view(2, 7, 16)
    out = pool(x)
    assert out.shape == (2, 8)
    assert out.sum().item() == pytest.approx(2.8504234420, abs=1e-9)
    assert out.norm().item() == pytest.approx(0.7555997935, abs=1e-9)
    first = [0.08599493, 0.14800251, 0.21543186, 0.24400678]
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-7)


def test_pooling_is_values_pooled_by_each_querys_attention():
    pool, x = EfficientProbing(12, queries=3), torch.randn(2, 5, 12)
    torch.nn.init.normal_(pool.queries)
    weight = pool.attention(x)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 3))
    values = pool.value(x)
    want = torch.cat(
        [(weight[:, m, :, None] * values[..., 4 * m : 4 * m + 4]).sum(1) for m in range(3)], dim=-1
    )
    torch.testing.assert_close(pool(x), want)
    torch.testing.assert_close(pool(x[:, torch.randperm(5)]), want)


def test_zero_queries_average_and_equal_tokens_pass_through():
    pool, x = EfficientProbing(12, queries=3), torch.randn(2, 5, 12)
    same = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(pool(same), pool.value(x[:, 0]))
    torch.nn.init.zeros_(pool.queries)
    torch.testing.assert_close(pool(x), pool.value(x).mean(1))


@pytest.mark.parametrize(("shrink", "count"), [(1, 614_400), (8, 24_576 + 73_728)])
def test_parameters_are_the_published_ones(shrink, count):
    pool = EfficientProbing(768, queries=32, shrink=shrink)
    assert sum(p.numel() for p in pool.parameters()) == count


@pytest.mark.parametrize("knobs", [{"queries": 5}, {"queries": 0}, {"shrink": 5}])
def test_channels_that_cannot_be_shared_out(knobs):
    with pytest.raises(ValueError, match="shared out"):
        EfficientProbing(12, **{"queries": 3, **knobs})


def needle(rows, seed, tokens=12, dim=16):
    """One token of each row is marked by channel 0 and carries the class; the others carry noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, dim, generator=g)
    x[..., 0] = 0
    labels = torch.randint(4, (rows,), generator=g)
    at = torch.randint(tokens, (rows,), generator=g)
    x[torch.arange(rows), at] = 0.5 * x[torch.arange(rows), at]
    x[torch.arange(rows), at, 0] = 6.0
    x[torch.arange(rows), at, 1 + labels] += 2.0
    return x, labels


def test_learned_queries_find_a_needle_that_the_mean_loses():
    (x, y), (held, truth) = needle(400, 0), needle(400, 1)
    scores, fell = {}, {}
    for pool in (EfficientProbing(16, queries=4), MeanToken(16)):
        probe = Probe(pool, 4)
        losses = fit(probe, x, y, epochs=20, lr=1e-2, batch=64)
        assert not probe.training
        scores[type(pool)] = accuracy(probe, held, truth)
        fell[type(pool)] = losses[-1] / losses[0]
    assert scores[EfficientProbing] > 0.9 and scores[MeanToken] < 0.5
    assert fell[EfficientProbing] < 0.3 < fell[MeanToken] < 1


def test_fitting_repeats_and_leaves_the_global_generator_alone():
    x, y = needle(65, 0)  # a last batch of one row
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        probe = Probe(EfficientProbing(16, queries=4), 4)
        before = torch.get_rng_state()
        fit(probe, x, y, epochs=2, batch=32, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(probe.head.weight.detach())
    assert torch.equal(*weights)
    with pytest.raises(ValueError, match="two rows"):
        fit(probe, x[:1], y[:1])


def test_features_are_frozen_tokens_of_any_block():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=2, num_classes=3
    ).train()
    images = torch.randn(5, 3, 32, 32)
    found = features(model, images, batch=2)
    assert found.shape == (5, 4, 12) and not found.requires_grad and model.training
    whole = features(model, images, prefix=True)
    assert torch.equal(whole[:, 1:], features(model, images))
    torch.testing.assert_close(whole, features(model, images, layer=1, prefix=True))
    assert not torch.allclose(features(model, images, layer=0), found, atol=1e-3)
    with pytest.raises(ValueError, match="tokens"):
        features(timm.create_model("resnet18", num_classes=3), images)


def drawn(count, seed):
    pictures, labels = draw_batch(count, torch.Generator().manual_seed(seed))
    return pictures * 2 - 1, labels


def test_embedded_vit_with_three_seeds():
    """Patch tokens of the third block, one picture of 48 classes: attending beats averaging."""
    model = mini.load("vit")
    (images, labels), (held, truth) = drawn(480, 5000), drawn(240, HELD_OUT_SEED)
    tokens, other = features(model, images, layer=2), features(model, held, layer=2)
    gains = []
    for seed in range(3):
        right = {}
        for pool in (EfficientProbing(128, queries=8), MeanToken(128)):
            torch.manual_seed(seed)
            probe = Probe(pool, 48)
            fit(probe, tokens, labels, epochs=15, seed=seed)
            right[type(pool)] = accuracy(probe, other, truth)
        gains.append(right[EfficientProbing] - right[MeanToken])
        assert right[EfficientProbing] > 0.6
    assert min(gains) > 0.03


def test_class_token_is_the_first():
    x = torch.randn(2, 3, 4)
    assert torch.equal(ClassToken(4)(x), x[:, 0])
