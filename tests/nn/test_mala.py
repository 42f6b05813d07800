"""MALA and MAViT: published golden numbers, sizes, invariants of the method, timm's manners."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

from mmattn.errors import ConfigError
from mmattn.nn import mala
from mmattn.nn.mala import MALA, GatedSoftmaxAttention, MAViT, grid_rope

SMALL = {
    "dims": (8, 16, 16, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "head_dim": 24,
    "num_classes": 5,
}
PUBLISHED = {
    "mavit_tiny": (16_449_128, 2.652),
    "mavit_small": (27_142_568, 4.925),
    "mavit_base": (49_792_648, 10.641),
    "mavit_large": (97_766_088, 17.303),
}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters as the golden numbers want them: a sine over the elements, in order of names."""
    for k, (_, p) in enumerate(sorted(module.named_parameters())):
        ramp = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * ramp)).view(p.shape)
    return module.double().eval()


def ramp_input(*shape: int) -> torch.Tensor:
    return torch.cos(0.11 * torch.arange(math.prod(shape), dtype=torch.float64) + 0.2).view(shape)


@pytest.mark.parametrize(
    ("layer", "total", "norm", "first", "last"),
    [
        (
            MALA,
            -5.6893620484,
            4.0564798498,
            [0.05317759, 0.07544411, 0.08503231, 0.07959187],
            0.30409412,
        ),
        (
            GatedSoftmaxAttention,
            -7.9662308980,
            4.6475694802,
            [0.20690731, 0.20675054, 0.20650004, 0.20682972],
            None,
        ),
    ],
)
def test_golden_numbers_of_the_published_layers(layer, total, norm, first, last):
    x = ramp_input(2, 16, 3, 5)
    out = filled(layer(16, 2))(x, grid_rope((3, 5), 8, x)).detach().flatten()
    assert out.sum().item() == pytest.approx(total, abs=2e-9)
    assert out.norm().item() == pytest.approx(norm, abs=2e-9)
    assert out[:4].tolist() == pytest.approx(first, abs=6e-9)
    if last is not None:
        assert out[-1].item() == pytest.approx(last, abs=6e-9)


def loop(layer: MALA, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The scores of one image written out, one query and head at a time."""
    c, y, w = x.shape
    n, d = y * w, c // layer.num_heads
    q, k, v, gate = layer.qkvo(x[None])[0].view(4, c, n)
    local = layer.lepe(v.view(1, c, y, w))[0].view(c, n)
    turn = torch.complex(*rope)
    out = torch.zeros(c, n, dtype=x.dtype)
    for h in range(layer.num_heads):
        part = slice(h * d, (h + 1) * d)
        fq, fk = F.elu(q[part].T) + 1, F.elu(k[part].T) + 1
        tq, tk = (torch.view_as_complex(f.contiguous().view(n, -1, 2)) * turn for f in (fq, fk))
        for i in range(n):
            product = (tq[i] * tk.conj()).real.sum(-1)
            mass = fq[i] @ fk.sum(0)
            if layer.variant == "released":
                product, mass = product * d**-0.5 / n, mass * d**-0.5 / n
            constant = mass / n
            scores = product * (1 + 1 / (mass + 1e-6)) - constant
            out[part, i] = v[part] @ scores
    return layer.proj(((out + local) * gate).view(1, c, y, w))[0]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_layer_equals_the_scores_written_out(variant):
    layer = MALA(16, 2, variant).double()
    torch.nn.init.normal_(layer.qkvo.weight)
    x = torch.randn(2, 16, 2, 3, dtype=torch.float64)
    rope = grid_rope((2, 3), 8, x)
    for got, image in zip(layer(x, rope), x, strict=True):
        torch.testing.assert_close(got, loop(layer, image, rope), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_scores_sum_to_one_without_rope(variant):
    layer = MALA(16, 2, variant).double()
    q, k = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)
    v = torch.full((1, 2, 9, 8), 3.0, dtype=torch.float64)
    out = layer.attend(q, k, v, None)
    torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)


def test_length_of_a_query_counts():
    layer = MALA(16, 2).double()
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    q = q.abs()
    once, twice = layer.attend(q, k, v, None), layer.attend(3 * q, k, v, None)
    mean = v.mean(2, keepdim=True)
    assert ((twice - mean).norm(dim=-1) > 1.2 * (once - mean).norm(dim=-1)).float().mean() > 0.9


def test_rope_is_relative_and_turns_by_row_then_column():
    x = torch.randn(1, dtype=torch.float64)
    cos, sin = grid_rope((3, 4), 8, x)
    angle = torch.atan2(sin, cos)
    expected = torch.tensor([2.0, 2e-4, 3.0, 3e-4], dtype=torch.float64)
    torch.testing.assert_close(angle[2 * 4 + 3], expected, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        grid_rope((3, 4), 6, x)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_parameters_and_multiply_accumulates(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    norms = 0

    def count(module, inputs, _):
        # The published counter charges 5 per element of a layer norm and 2 of a batch norm.
        nonlocal norms
        norms += inputs[0].numel() * (5 if isinstance(module, torch.nn.LayerNorm) else 2)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d):
            module.register_forward_hook(count)
    ops = torch.ops.mmattn
    costs = {
        ops.linear_state: lambda k, v, *_, out_val=None, **__: 2 * math.prod(k) * v[3],
        ops.linear_apply: lambda q, p, *_, out_val=None, **__: 2 * math.prod(q) * (p[3] + 1),
    }
    with FlopCounterMode(display=False, custom_mapping=costs) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(counter.get_total_flops() / 2e9 + norms / 1e9, 3) == macs


def test_two_stages_are_linear():
    kinds = [type(stage.blocks[0].attn) for stage in MAViT(**SMALL).stages]
    assert kinds == [MALA, MALA, GatedSoftmaxAttention, GatedSoftmaxAttention]
    paper = MAViT(**SMALL, block={"variant": "paper"})
    assert paper.stages[0].blocks[0].attn.variant == "paper"


@pytest.mark.parametrize("size", [(32, 32), (65, 97)])
def test_any_resolution_and_independent_rows(size):
    model = MAViT(**SMALL).eval()
    x = torch.randn(2, 3, *size)
    out = model(x)
    assert out.shape == (2, 5)
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=1e-4, atol=1e-6)


def test_timm_manners():
    settings = {k: v for k, v in SMALL.items() if k != "num_classes"}
    model = timm.create_model("mavit_tiny", num_classes=7, in_chans=1, **settings).eval()
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7)
    assert model.forward_features(x).shape == (1, 24, 2, 2)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 24)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 24, 2, 2)
    assert model.pretrained_cfg["first_conv"] + ".weight" in model.state_dict()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == 4
    assert re.match(model.group_matcher()["stem"], "patch_embed.proj.0.weight")
    features = timm.create_model("mavit_tiny", features_only=True, out_indices=(0, 2), **settings)
    assert features.feature_info.channels() == [8, 16]
    maps = features(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 8, 16, 24), (1, 16, 4, 6)]


def test_layers_are_grouped_from_stem_to_head():
    model = MAViT(**SMALL)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    order = [model.patch_embed, *(b for stage in model.stages for b in stage.blocks), model.head]
    scales = [scale[id(next(module.parameters()))] for module in order]
    assert scales == sorted(set(scales)) and scales[-1] == 1.0


def test_official_state_dict_loads():
    model = MAViT(**SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    official = {"layers.0.RoPE.angle": torch.ones(4)}
    for key, value in model.state_dict().items():
        key = re.sub(
            r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        key = re.sub(r"^stages\.", "layers.", key)
        key = re.sub(r"\.norm([12])\.", r".norm\1.norm.", key)
        if ".ls" in key:
            key = re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", key)
            value = value.view(1, -1, 1, 1)
        if key.startswith("head."):
            key = key.replace("head.fc", "head")
            value = value[..., None, None] if value.ndim == 2 else value
        official[key] = value
    named = {
        "patch_embed.proj.10.weight",
        "layers.0.downsample.reduction.weight",
        "layers.1.blocks.1.norm2.norm.weight",
        "layers.3.blocks.0.gamma_2",
        "layers.2.blocks.0.ffn.dwconv.bias",
        "layers.0.blocks.0.attn.qkvo.weight",
        "layers.0.blocks.0.pos.weight",
    }
    assert named <= set(official) and official["head.weight"].shape == (5, 24, 1, 1)
    other = MAViT(**SMALL)
    other.load_state_dict(mala.checkpoint_filter_fn(official, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert mala.checkpoint_filter_fn(model.state_dict(), other).keys() == other.state_dict().keys()


def test_gradient_checkpointing_changes_nothing():
    model = MAViT(**SMALL, drop_path_rate=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_compiles_without_breaks():
    two = {k: v[1:3] for k, v in SMALL.items() if isinstance(v, tuple)}
    model = MAViT(**two, linear=(True, False), layer_scale=(1.0, 1.0), head_dim=8).eval()
    x = torch.randn(1, 3, 32, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_near():
    layer = MALA(16, 2)
    x = torch.randn(1, 16, 6, 6)
    rope = grid_rope((6, 6), 8, x)
    whole, half = layer(x, rope), layer.bfloat16()(x.bfloat16(), rope)
    assert half.dtype == torch.bfloat16 and (half - whole).norm() < 0.03 * whole.norm()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="3 heads do not divide dim 16"):
        MALA(16, 3)
    with pytest.raises(ConfigError, match="neither 'released' nor 'paper'"):
        MALA(16, 2, "official")
    with pytest.raises(ConfigError, match="one entry of each"):
        MAViT(**{**SMALL, "depths": (1, 1)})
