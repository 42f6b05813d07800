"""SLAB: published golden numbers and sizes, the norm's three phases, folding, timm's manners."""

import math
import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.nn import slab
from mmattn.nn.slab import (
    PRepBN,
    SimplifiedLinearAttention,
    SLABDeiT,
    SLABSwin,
    convert_norms,
    fold,
)

SMALL = {
    "img_size": 48,
    "patch_size": 16,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "norm_steps": 4,
}
SWIN = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "window_size": 2,
    "num_classes": 5,
    "norm_steps": 4,
}
PUBLISHED = {
    "slab_deit_tiny": (6_198_401, 1.141),
    "slab_deit_small": (22_992_641, 4.363),
    "slab_swin_tiny": (29_216_605, 4.491),
    "slab_swin_small": (50_552_965, 8.745),
    "slab_swin_base": (89_029_373, 15.437),
}
"""Parameters and G multiply-accumulates."""


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters as the golden numbers want them: a sine over the elements, in order of names."""
    for k, (_, p) in enumerate(sorted(module.named_parameters())):
        ramp = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * ramp)).view(p.shape)
    return module.eval()


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights and statistics, as after training."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.3, 3.0)
        elif value.dtype.is_floating_point:
            value.normal_(std=0.3)
    return model.eval()


def test_golden_numbers_of_the_published_layer():
    layer = filled(SimplifiedLinearAttention(12, 3, (14, 14))).float()
    x = torch.cos(0.11 * torch.arange(196 * 12, dtype=torch.float64) + 0.2).view(1, 196, 12)
    out = layer(x.float()).detach().flatten()
    assert out.sum().item() == pytest.approx(-387.6004598, abs=1e-4)
    assert out.norm().item() == pytest.approx(26.1426487, abs=1e-5)
    first = [-0.70516902, -0.06876859, 0.50968188, -0.66895801]
    assert out[:4].tolist() == pytest.approx(first, abs=1e-6)


def quadratic(layer: SimplifiedLinearAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer with its weights of all pairs, one head at a time."""
    b, _, c = x.shape
    d = c // layer.num_heads
    q, k, v = layer.qkv(x).split(c, -1)
    q, k = q.relu(), (k + layer.positional_encoding).relu()
    out = []
    for h in range(layer.num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2)
        mixed = scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v[..., part]
        image = v[..., part].transpose(1, 2).view(b, d, *layer.grid)
        out.append(mixed + layer.dwc(image).flatten(2).transpose(1, 2))
    return layer.proj(torch.cat(out, -1))


def test_layer_equals_its_quadratic_form():
    layer = SimplifiedLinearAttention(12, 3, (4, 5)).double()
    torch.nn.init.normal_(layer.positional_encoding)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), quadratic(layer, x), rtol=1e-9, atol=1e-9)


def test_weights_are_an_average_that_ignores_the_length_of_queries():
    layer = SimplifiedLinearAttention(12, 3, (3, 3))
    torch.nn.init.zeros_(layer.dwc.weight)
    torch.nn.init.zeros_(layer.dwc.bias)
    layer.proj = torch.nn.Identity()
    with torch.no_grad():
        layer.qkv.bias[:24] = 1.0
        layer.qkv.weight[24:] = 0.0
        layer.qkv.bias[24:] = 7.0
        x = torch.randn(1, 9, 12)
        torch.testing.assert_close(layer(x), torch.full((1, 9, 12), 7.0), rtol=1e-4, atol=1e-4)
        layer.qkv.weight[24:].normal_()
        before = layer(x)
        layer.qkv.weight[:12] *= 3
        layer.qkv.bias[:12] *= 3
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def test_norm_goes_from_layer_norm_to_batch_norm():
    norm = PRepBN(6, steps=4, warm=2).train()
    x = torch.randn(3, 5, 6) * 2 + 1
    shares = []
    for _ in range(8):
        norm.advance()
        shares.append(norm.share.item())
        batch = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt()
        expected = shares[-1] * torch.nn.functional.layer_norm(x, (6,), eps=1e-6)
        expected = expected + (1 - shares[-1]) * (batch + x)
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    assert shares == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert norm.iter == 0 and norm.warm == 0 and norm.total_step == 4


def test_eval_is_batch_norm_only_and_affine():
    norm = PRepBN(6, steps=100)
    norm.train()(torch.randn(64, 6) * 3 + 2)
    norm.eval()
    torch.nn.init.normal_(norm.ln.weight)
    x = torch.randn(2, 4, 6)
    factor, summand = norm.repbn.affine()
    torch.testing.assert_close(norm(x), x * factor + summand)
    assert not torch.allclose(norm.repbn.bn.running_mean, torch.zeros(6), atol=0.05)


def test_folded_model_equals_the_model_and_has_no_norms():
    model = trained(SLABDeiT(**SMALL)).double()
    folded = fold(model)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, PRepBN) for m in folded.modules())
    assert any(isinstance(m, PRepBN) for m in model.modules())
    fewer = sum(p.numel() for p in folded.parameters())
    assert fewer == sum(p.numel() for p in model.parameters()) - 5 * (4 * 16 + 1)
    bare = SLABDeiT(**{**SMALL, "num_classes": 0}).double()
    bare = trained(bare)
    torch.testing.assert_close(fold(bare)(x), bare(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [64, 48])
def test_folded_swin_equals_the_model(size):
    model = trained(SLABSwin(**{**SWIN, "img_size": size})).double()
    folded = fold(model)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-8, atol=1e-8)
    # At 48 pixels the third map has 3 x 3 tokens and is padded to windows of 2 in both blocks.
    left = [name for name, m in folded.named_modules() if isinstance(m, PRepBN)]
    assert left == ([] if size == 64 else ["layers.2.blocks.0.norm1", "layers.2.blocks.1.norm1"])


def test_swin_is_linear_over_the_whole_map_in_two_stages():
    model = SLABSwin(**SWIN).eval()
    linear = [isinstance(stage.blocks[0].attn, SimplifiedLinearAttention) for stage in model.layers]
    assert linear == [True, True, False, False]
    x = torch.randn(1, 16, 16, 16)
    changed = x.clone()
    changed[0, 0, 0] += 1
    block = model.layers[0].blocks[0]
    assert (block(x) != block(changed)).any(-1).float().mean() > 0.9


def test_swin_takes_other_sizes_and_gives_features():
    model = trained(SLABSwin(**SWIN, strict_img_size=False))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)
    model.set_input_size((32, 64), window_size=2)
    assert model.layers[0].blocks[0].attn.positional_encoding.shape == (1, 8 * 16, 16)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 5)
    settings = {k: v for k, v in SWIN.items() if k != "num_classes"}
    model = timm.create_model("slab_swin_tiny", features_only=True, out_indices=(0, 2), **settings)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape for m in maps] == [(1, 16, 16, 16), (1, 64, 4, 4)]
    assert model.model.layers[0].blocks[0].norm1.iter == 3, "a training forward is a step"


def test_official_swin_state_dict_loads():
    model = trained(SLABSwin(**SWIN))
    official = {}
    for key, value in model.state_dict().items():
        key = re.sub(
            r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        key = re.sub(r"(norm\d?)\.ln\.", r"\1.norm1.", key).replace("head.fc.", "head.")
        official[re.sub(r"(norm\d?)\.repbn\.", r"\1.norm2.", key)] = value
    named = {"layers.0.downsample.norm.norm2.bn.bias", "patch_embed.norm.norm1.weight", "head.bias"}
    assert named <= set(official)
    other = SLABSwin(**SWIN)
    other.load_state_dict(slab.checkpoint_filter_fn(official, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), other.eval()(x))


def test_norms_of_any_model_convert_and_keep_their_weights():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, img_size=32)
    before = model.norm.weight
    x = torch.randn(1, 3, 32, 32)
    expected = model.train()(x)
    convert_norms(model, steps=10)
    assert model.norm.ln.weight is before and isinstance(model.blocks[0].norm1, PRepBN)
    torch.testing.assert_close(model(x), expected)


def test_folding_gives_a_linear_layer_without_bias_one():
    norm, linear = PRepBN(4).eval(), torch.nn.Linear(4, 3, bias=False)
    norm.repbn.bn.running_mean.normal_()
    x = torch.randn(5, 4)
    torch.testing.assert_close(slab.fold_into(norm, linear)(x), linear(norm(x)))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_parameters_and_multiply_accumulates(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    norms = 0

    def count(module, inputs, _):
        nonlocal norms
        norms += 2 * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.register_forward_hook(count)
    ops = torch.ops.mmattn
    costs = {
        ops.linear_state: lambda k, v, *_, out_val=None, **__: 2 * math.prod(k) * v[3],
        ops.linear_apply: lambda q, p, *_, out_val=None, **__: 2 * math.prod(q) * (p[3] + 1),
    }
    with FlopCounterMode(display=False, custom_mapping=costs) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = PUBLISHED[name]
    # Published DeiTs store a class token and do not use it.
    unused = model.embed_dim if "deit" in name else 0
    assert sum(p.numel() for p in model.parameters()) + unused == params
    # The published counter charges 2 per element of a batch norm; these are below 0.1 % of the whole.
    assert counter.get_total_flops() / 2e9 + norms / 1e9 == pytest.approx(macs, abs=1e-3)


def test_every_training_forward_is_a_step_with_and_without_checkpointing():
    x, grads = torch.randn(4, 3, 48, 48), []
    start = SLABDeiT(**SMALL)
    torch.nn.init.normal_(start.blocks[0].norm1.repbn.alpha)
    for enable in (False, True):
        model = SLABDeiT(**SMALL)
        model.load_state_dict(start.state_dict())
        model.set_grad_checkpointing(enable)
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
        assert [m.iter.item() for m in model.modules() if isinstance(m, PRepBN)] == [2] * 5
        assert model.norm.share == 0.75
        grads.append([p.grad.clone() for p in model.parameters()])
        model.eval()(x)
        assert model.norm.iter == 2
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_rows_of_a_batch_are_independent_in_eval():
    model = trained(SLABDeiT(**SMALL))
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


def test_other_resolutions():
    model = trained(SLABDeiT(**SMALL, dynamic_img_size=True))
    assert model(torch.randn(1, 3, 80, 80)).shape == (1, 5)
    with pytest.raises(UnsupportedCall, match="call set_input_size"):
        model(torch.randn(1, 3, 32, 48))
    before = model.blocks[0].attn.positional_encoding.clone()
    model.set_input_size((32, 80))
    assert model(torch.randn(1, 3, 32, 80)).shape == (1, 5)
    assert model.blocks[0].attn.positional_encoding.shape == (1, 10, 16)
    assert not torch.equal(before, model.blocks[0].attn.positional_encoding)


def test_timm_manners():
    settings = {k: v for k, v in SMALL.items() if k != "num_classes"}
    model = timm.create_model("slab_deit_tiny", num_classes=7, in_chans=1, **settings).eval()
    x = torch.randn(1, 1, 48, 48)
    assert model(x).shape == (1, 7) and model.get_classifier().out_features == 7
    assert model.forward_features(x).shape == (1, 9, 16)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    assert {"pos_embed", "blocks.1.attn.positional_encoding"} <= model.no_weight_decay()
    features = timm.create_model(
        "slab_deit_tiny", features_only=True, out_indices=(0, 1), **settings
    )
    assert [m.shape for m in features(torch.randn(2, 3, 48, 48))] == [(2, 16, 3, 3)] * 2


def test_official_state_dict_loads_at_another_size():
    model = trained(SLABDeiT(**SMALL))
    official = {"cls_token": torch.zeros(1, 1, 16)}
    for key, value in model.state_dict().items():
        key = re.sub(r"(norm\d?)\.ln\.", r"\1.norm1.", key)
        official[re.sub(r"(norm\d?)\.repbn\.", r"\1.norm2.", key)] = value
    named = {
        "blocks.0.norm1.norm1.weight",
        "blocks.1.norm2.norm2.alpha",
        "blocks.1.norm2.norm2.bn.running_mean",
        "blocks.0.norm1.total_step",
        "norm.norm2.bn.weight",
        "blocks.0.attn.dwc.bias",
    }
    assert named <= set(official)
    other = SLABDeiT(**SMALL)
    other.load_state_dict(slab.checkpoint_filter_fn(official, other))
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(model(x), other.eval()(x))
    larger = SLABDeiT(**{**SMALL, "img_size": 80})
    larger.load_state_dict(slab.checkpoint_filter_fn(official, larger))
    assert larger.blocks[0].attn.positional_encoding.shape == (1, 25, 16)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_breaks(training):
    model = trained(SLABDeiT(**{**SMALL, "depth": 1})).train(training)
    x = torch.randn(2, 3, 48, 48)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert model.norm.iter == (3 if training else 4)


def test_leaves_the_meta_device_with_its_share():
    norm = PRepBN(4, device="meta").to_empty(device="cpu")
    norm.init_non_persistent_buffers()
    assert norm.share == 1.0


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="5 heads do not divide dim 12"):
        SimplifiedLinearAttention(12, 5, (2, 2))
    with pytest.raises(ConfigError, match="steps is 0"):
        PRepBN(4, steps=0)
    with pytest.raises(ConfigError, match="class_token=True was asked for"):
        SLABDeiT(**SMALL, class_token=True)
    with pytest.raises(ConfigError, match="'token' was asked for"):
        SLABDeiT(**SMALL, global_pool="token")
    with pytest.raises(UnsupportedCall, match="a mask was given"):
        SimplifiedLinearAttention(12, 3, (2, 2))(torch.randn(1, 4, 12), torch.ones(4, 4))
