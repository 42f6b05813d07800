"""Head profiles: against heads silenced by hand, distances by loops, the embedded ViT."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mmattn import mini
from mmattn.errors import ConfigError, SelectorError
from mmattn.evals.vit_analytics import HeadProfile, attention_distance, head_importance
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch


def vit(depth=2, **knobs):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(48, 32),
        patch_size=8,
        embed_dim=24,
        num_heads=3,
        depth=depth,
        num_classes=5,
        **knobs,
    ).eval()


@pytest.fixture(scope="module")
def pictures():
    found, labels = draw_batch(96, torch.Generator().manual_seed(HELD_OUT_SEED + 1))
    return found * 2 - 1, labels


@torch.no_grad()
def test_output_change_equals_that_of_a_projection_with_the_heads_columns_at_zero():
    model, x = vit(), torch.randn(5, 3, 48, 32)
    profile = head_importance(model, x, batch=2)
    assert profile.paths == ("blocks.0.attn", "blocks.1.attn") and profile.values.shape == (2, 3)
    assert profile.baseline is None and "change" in profile.what
    before = model(x)
    for layer in range(2):
        for head in range(3):
            weight = model.blocks[layer].attn.proj.weight
            kept = weight.clone()
            weight[:, 8 * head : 8 * head + 8] = 0
            change = (model(x) - before).norm() / before.norm()
            weight.copy_(kept)
            assert profile.values[layer, head] == pytest.approx(float(change), rel=1e-4)
    assert (profile.values > 0).all()
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_accuracy_drops_count_from_the_untouched_model(pictures):
    x, labels = pictures
    model = mini.load("vit")
    profile = head_importance(model, x, labels, sites="blocks.[01].attn")
    assert profile.values.shape == (2, 4) and "accuracy" in profile.what
    assert profile.baseline == pytest.approx(float((model(x).argmax(-1) == labels).double().mean()))
    assert profile.baseline > 0.9
    assert (profile.values <= profile.baseline).all() and profile.values.max() > 0.02
    path, head, value = profile.ranking()[0]
    assert value == profile.values.max()
    weight = model.get_submodule(path).proj.weight
    weight[:, 32 * head : 32 * head + 32] = 0
    assert float((model(x).argmax(-1) == labels).double().mean()) == pytest.approx(
        profile.baseline - value
    )


@torch.no_grad()
def test_distances_equal_loops_over_pairs():
    model, x = vit(), torch.randn(3, 3, 48, 32)
    profile = attention_distance(model, x, batch=2)
    attn = model.blocks[0].attn
    y = model.blocks[0].norm1(model._pos_embed(model.patch_embed(x)))
    q, k, _ = attn.qkv(y).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    p = (q @ k.mT * 8**-0.5).softmax(-1)[:, :, 1:, 1:]  # 6 x 4 patches after the class token
    p = p / p.sum(-1, keepdim=True)
    for head in range(3):
        total = 0.0
        for i in range(24):
            for j in range(24):
                away = math.dist(divmod(i, 4), divmod(j, 4))
                total += float(p[:, head, i, j].mean()) * away / 24
        assert profile.values[0, head] == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_a_head_that_looks_at_itself_is_near_and_an_even_one_is_far():
    model = vit(depth=1)
    attn = model.blocks[0].attn
    attn.qkv.weight.zero_()
    attn.qkv.bias.zero_()
    # Head 0: query and key are the position code, scaled up. Heads 1 and 2 look everywhere alike.
    attn.qkv.weight[:8, :8] = attn.qkv.weight[24:32, :8] = 12 * torch.eye(8)
    model.pos_embed.normal_()
    model.patch_embed.proj.weight.zero_()
    near, even, other = attention_distance(model, torch.randn(2, 3, 48, 32)).values[0]
    grid = [divmod(i, 4) for i in range(24)]
    mean = np.mean([math.dist(a, b) for a in grid for b in grid])
    assert even == pytest.approx(mean, rel=1e-5) and other == pytest.approx(even)
    assert near < 0.2 * even


@torch.no_grad()
def test_observing_changes_nothing_and_modes_come_back():
    model, x = vit(), torch.randn(2, 3, 48, 32)
    before = model(x)
    model.train()
    model.blocks[0].eval()
    attention_distance(model, x)
    head_importance(model, x, sites="blocks.1.attn")
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert torch.equal(model.eval()(x), before)


@torch.no_grad()
def test_windows_are_measured_within_the_window():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 3, 3),
        num_classes=5,
    ).eval()
    found = attention_distance(model, torch.randn(2, 3, 32, 32))
    assert found.values.shape == (4, 3) and np.isnan(found.values[0, 2])
    assert 0 < np.nanmax(found.values) < math.hypot(3, 3)


@torch.no_grad()
def test_png_of_the_embedded_vit(pictures, tmp_path):
    profile = attention_distance(mini.load("vit"), pictures[0][:32])
    assert profile.values.shape == (6, 4)
    # This small model looks almost everywhere alike: no head is far from the distance of even attention.
    grid = [divmod(i, 8) for i in range(64)]
    even = np.mean([math.dist(a, b) for a in grid for b in grid])
    assert np.abs(profile.values / even - 1).max() < 0.15
    assert len(np.unique(profile.values.round(4))) > 20  # and yet no two heads are the same
    path = profile.save(tmp_path / "deep" / "distance.png")
    drawn = np.asarray(Image.open(path).convert("RGB"))
    assert drawn.shape[0] > 200 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20


def test_ranking_leaves_out_missing_heads():
    table = np.array([[0.1, 0.5], [0.3, np.nan]])
    assert HeadProfile("x", ("a", "b"), table).ranking() == [
        ("a", 1, 0.5),
        ("b", 0, 0.3),
        ("a", 0, 0.1),
    ]


def test_wrong_input():
    model, x = vit(), torch.randn(2, 3, 48, 32)
    with pytest.raises(ConfigError, match="one per image"):
        head_importance(model, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(SelectorError):
        head_importance(model, x, sites="layers.*")
