"""Grouped-query attention: numbers of the published layer, shares, conversion, uptraining."""

import copy
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from mmattn.errors import ConfigError
from mmattn.nn.gqa import (
    GroupedQueryAttention,
    convert,
    key_lengths,
    key_shares,
    layers,
    pool_heads,
    uptrain,
)

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def vit(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT, **kwargs)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def filled(module):
    """Parameters as the golden numbers want them: a sine over the elements, in order of names."""
    for k, (_, p) in enumerate(sorted(module.named_parameters())):
        ramp = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * ramp)).view(p.shape)
    return module.eval()


def test_golden_numbers_of_the_published_layer():
    layer = filled(GroupedQueryAttention(16, 8, 4, "key"))
    x = torch.cos(0.11 * torch.arange(192, dtype=torch.float64) + 0.2).view(2, 6, 16)
    lengths = key_lengths(layer.k(x).unflatten(-1, (4, 2)).transpose(1, 2))
    expected = [4.513485, 6.978852, 6.996047, 4.557093]
    assert lengths.tolist() == pytest.approx(expected, abs=1e-6)
    out = layer(x).detach().flatten()
    assert out.sum().item() == pytest.approx(-2.4664772028, abs=1e-9)
    assert out.norm().item() == pytest.approx(10.1120826012, abs=1e-9)
    first = [-0.59803094, -0.55362052, -0.43751689, -0.26433712]
    assert out[:4].tolist() == pytest.approx(first, abs=1e-8)


def by_loops(lengths, heads):
    """Shares with Python numbers and the published corrections."""
    low, high = min(lengths), max(lengths)
    if low == high:
        return [heads // len(lengths)] * len(lengths)
    weight = [(x - low) / (high - low) for x in lengths]
    shares = [round(w / sum(weight) * heads) for w in weight]
    while sum(shares) > heads:
        shares[shares.index(max(shares))] -= 1
    while sum(shares) < heads:
        shares[shares.index(min(shares))] += 1
    return shares


def test_shares_equal_those_of_loops_and_add_up():
    generator = torch.Generator().manual_seed(0)
    corrected = 0
    for heads, groups in ((8, 4), (12, 6), (16, 8), (6, 2), (12, 4), (4, 1)):
        for _ in range(50):
            lengths = torch.rand(groups, generator=generator, dtype=torch.float64) + 1
            shares = key_shares(lengths, heads)
            assert shares.tolist() == by_loops(lengths.tolist(), heads)
            assert shares.sum() == heads and shares.min() >= 0
            if groups > 1:
                w = lengths - lengths.min()
                corrected += int((w / w.sum() * heads).round().sum()) != heads
    assert corrected > 5
    assert key_shares(torch.full((4,), 3.0), 8).tolist() == [2, 2, 2, 2]


def test_static_groups_equal_repeated_keys():
    layer = filled(GroupedQueryAttention(16, 8, 4)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = layer.q(x), layer.k(x), layer.v(x)
    out = []
    for h in range(8):
        own, shared = slice(2 * h, 2 * h + 2), slice(2 * (h // 2), 2 * (h // 2) + 2)
        p = (q[..., own] @ k[..., shared].transpose(1, 2) * 2**-0.5).softmax(-1)
        out.append(p @ v[..., shared])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(out, -1)))


def test_equal_shares_are_static_and_unequal_ones_read_long_keys():
    static = filled(GroupedQueryAttention(16, 8, 2))
    driven = GroupedQueryAttention(16, 8, 2, "key").double().eval()
    driven.load_state_dict(static.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        for p in (driven.k.weight, driven.k.bias, static.k.weight, static.k.bias):
            p[2:] = p[:2]
    torch.testing.assert_close(driven(x), static(x))
    with torch.no_grad():
        driven.k.weight[:2] *= 2
        driven.k.bias[:2] *= 2
        assert driven.decide(driven.k(x).unflatten(-1, (2, 2)).transpose(1, 2)).tolist() == [8, 0]
        before = driven(x)
        driven.v.weight[2:] += 1
        assert torch.equal(driven(x), before), "nobody reads the second group"


def test_batch_decides_together():
    layer = filled(GroupedQueryAttention(16, 8, 4, "key"))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 5, 16, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(layer(x.flip(0)).flip(0), layer(x))
    alone = torch.cat([layer(row[None]) for row in x])
    assert not torch.allclose(alone, layer(x), atol=1e-3), "documented: company matters"
    static = filled(GroupedQueryAttention(16, 8, 4))
    torch.testing.assert_close(torch.cat([static(row[None]) for row in x]), static(x))


@pytest.mark.parametrize("kind", ["diff", "ema"])
def test_dynamic_shares_follow_the_cache_in_eval(kind):
    layer = filled(GroupedQueryAttention(16, 8, 4, kind))
    x = torch.cos(0.11 * torch.arange(192, dtype=torch.float64) + 0.2).view(2, 6, 16)
    k = layer.k(x).unflatten(-1, (4, 2)).transpose(1, 2)
    u = key_lengths(k)
    layer.cache.copy_(torch.tensor([0.0, 6.0, 1.0, 4.0]))
    before = layer.cache.double()
    weight = (before - u).abs() if kind == "diff" else 0.9 * u + 0.1 * before
    wanted = weight / weight.sum() * 8
    shares = layer.decide(k)
    assert shares.sum() == 8 and (shares - wanted).abs().max() <= 1.5
    torch.testing.assert_close(layer.cache.double(), u, rtol=1e-6, atol=0)
    layer.cache = layer.cache.double()
    layer.decide(k)
    same = layer.decide(k)
    if kind == "diff":
        assert torch.equal(same, layer.decide(k)), "no change: the shares stay, nothing is NaN"
    layer.live = False
    assert torch.equal(layer.decide(k.flip(1) * 3), same), "frozen"


def test_training_decides_at_every_window_once_even_with_checkpointing():
    model = convert(vit(), 2, "ema", window=3).train()
    model.set_grad_checkpointing()
    layer = layers(model)[0]
    caches = []
    for _ in range(7):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        caches.append(layer.cache.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(caches)]
    assert changed == [False, False, True, False, False, True]
    assert layer.step == 6 and layer.decided == 6 and caches[0].sum() > 0
    # One third of the lengths; deciding twice in a step would add another third.
    torch.manual_seed(1)
    plain = convert(vit(), 2, "ema", window=3).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    for m in (plain, again):
        m(x).sum().backward()
    assert torch.equal(layers(plain)[0].cache, layers(again)[0].cache)
    torch.testing.assert_close(
        [p.grad for p in plain.parameters()], [p.grad for p in again.parameters()]
    )


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    layer = filled(GroupedQueryAttention(16, 8, 4, "ema"))
    mine = torch.get_rng_state()
    layer.train()(torch.ones(1, 4, 16, dtype=torch.float64))
    layer.eval()(torch.ones(1, 4, 16, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), mine)
    torch.set_rng_state(state)


def test_as_many_groups_as_heads_change_nothing():
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(convert(model, 4)(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convert(model, 4, shuffle=5)(x), model(x), rtol=1e-4, atol=1e-5)
    assert not layers(model), "the original stays"


def test_conversion_averages_consecutive_heads_and_saves_parameters():
    model = vit()
    grouped = convert(model, 2)
    qkv, layer = model.blocks[1].attn.qkv, layers(grouped)[1]
    k = qkv.weight[32:64].view(4, 8, 32)
    torch.testing.assert_close(layer.k.weight[8:], (k[2] + k[3]) / 2)
    torch.testing.assert_close(layer.v.bias[:8], qkv.bias[64:].view(4, 8)[:2].mean(0))
    torch.testing.assert_close(layer.q.weight, qkv.weight[:32])
    torch.testing.assert_close(layer.proj.weight, model.blocks[1].attn.proj.weight)
    saved = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in grouped.parameters()
    )
    assert saved == 2 * 2 * (16 * 32 + 16)
    value = torch.arange(8.0)
    assert pool_heads(value, 4, 2, torch.tensor([0, 3, 1, 2])).tolist() == [3, 4, 3, 4]


def test_shuffled_groups_average_other_heads():
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    seeds = [convert(model, 2, shuffle=s)(x) for s in range(6)]
    assert any(not torch.allclose(out, convert(model, 2)(x), atol=1e-4) for out in seeds)


def test_uptraining_lowers_the_loss_and_counts_steps():
    model = convert(vit(), 2, "diff", window=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 32, 32, generator=generator)
    y = torch.randint(5, (16,), generator=generator)
    seen = []
    losses = uptrain(
        model,
        [(x, y)] * 12,
        learning_rate=4e-3,
        after=lambda i, loss: seen.append((i, loss)),
    )
    assert losses[-1] < 0.5 * losses[0] and len(seen) == 12
    assert not model.training and layers(model)[0].step == 11


@pytest.mark.parametrize("kind", ["static", "key", "ema"])
def test_compiles_without_breaks(kind):
    layer = GroupedQueryAttention(16, 8, 4, kind).eval()
    x = torch.randn(2, 6, 16)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x * 2), layer(x * 2))


def test_masks_are_honoured():
    layer = filled(GroupedQueryAttention(16, 8, 4))
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 3:] = False
    torch.testing.assert_close(layer(x, attn_mask=mask)[:, :3], layer(x[:, :3]))


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ConfigError, match="groups heads"):
        GroupedQueryAttention(16, 8, 3)
    with pytest.raises(ConfigError, match="none of"):
        GroupedQueryAttention(16, 8, 4, "other")
    with pytest.raises(ConfigError, match="window must be at least 1"):
        GroupedQueryAttention(16, 8, 4, window=0)
    with pytest.raises(ConfigError, match="has no timm Attention"):
        convert(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ConfigError, match="normalises or gates inside"):
        convert(vit(qk_norm=True), 2)


def test_scores_are_scaled_as_in_sdpa():
    layer = filled(GroupedQueryAttention(16, 8, 1))
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    q = layer.q(x).unflatten(-1, (8, 2)).transpose(1, 2) / math.sqrt(2)
    p = F.softmax(q @ layer.k(x)[:, None].transpose(-1, -2), -1)
    expected = (p @ layer.v(x)[:, None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(expected))
