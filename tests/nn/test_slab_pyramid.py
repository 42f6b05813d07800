"""SLAB-PVT and SLAB-CSwin: sizes summed up by hand, folding, official names, other resolutions."""

import math
import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmattn.nn import slab_pyramid
from mmattn.nn.agent_cswin import StripeAttention
from mmattn.nn.prepbn import PRepBN
from mmattn.nn.slab import fold
from mmattn.nn.slab_pyramid import SLABPVT, MapSLA, SLABCSwin

PVT = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "num_classes": 5,
    "norm_steps": 4,
}
CSWIN = {
    "img_size": 64,
    "embed_dim": 8,
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "num_classes": 5,
    "norm_steps": 4,
}
MODELS = {"pvt": (SLABPVT, PVT), "cswin": (SLABCSwin, CSWIN)}


def trained(model):
    """Random weights and statistics, as after training."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.3, 3.0, generator=generator)
        elif value.dtype.is_floating_point:
            value.normal_(std=0.2, generator=generator)
    return model.eval()


def pvt_by_hand(depths):
    """Parameters and multiply-adds of SLAB-PVT at 224 pixels, from channels and tokens."""
    dims, heads, ratios = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)
    params, macs, before = 0, 0, 3
    for i, c in enumerate(dims):
        n, patch, d, hidden = (56 >> i) ** 2, 16 if i == 0 else 4, c // heads[i], c * ratios[i]
        params += before * c * patch + c + (4 * c + 1) + n * c
        macs += n * before * c * patch
        for _ in range(depths[i]):
            params += (
                4 * c * c + 4 * c + n * c + 26 * d + 2 * c * hidden + c + hidden + 2 * (4 * c + 1)
            )
            # Projections, keys times values, queries times state and key sum, convolution, MLP.
            macs += n * (4 * c * c + c * d + c * (d + 1) + 25 * c + 2 * c * hidden)
        before = c
    return params + 512 * 1000 + 1000, macs + 512 * 1000


def cswin_by_hand(depths):
    """The same for SLAB-CSwin, whose stripes are 7 tokens wide."""
    params, macs, before = 0, 0, 3
    for i in range(4):
        c, n, h = 64 << i, (56 >> i) ** 2, 2 << i
        d, patch = c // h, 49 if i == 0 else 9
        params += before * c * patch + c + (4 * c + 1)
        macs += n * before * c * patch
        for _ in range(depths[i]):
            params += 12 * c * c + 9 * c + 2 * (4 * c + 1)
            macs += n * 12 * c * c + 9 * n * c
            params += 10 * c
            if i < 2:
                params += n * c + 26 * d
                macs += n * (c * d + c * (d + 1) + 25 * c)
            else:
                seen = 7 * 14 if i == 2 else 49
                macs += 2 * n * c * seen
        before = c
    return params + (4 * 512 + 1) + 512 * 1000 + 1000, macs + 512 * 1000


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("slab_pvt_tiny", pvt_by_hand((2, 2, 2, 2))),
        pytest.param("slab_pvt_small", pvt_by_hand((3, 4, 6, 3)), marks=pytest.mark.slow),
        pytest.param("slab_pvt_medium", pvt_by_hand((3, 4, 18, 3)), marks=pytest.mark.slow),
        ("slab_cswin_tiny", cswin_by_hand((2, 4, 18, 1))),
        pytest.param("slab_cswin_small", cswin_by_hand((2, 4, 32, 2)), marks=pytest.mark.slow),
    ],
)
def test_parameters_and_multiply_adds_are_those_of_the_published_settings(name, by_hand):
    model = timm.create_model(name, device="meta").eval()
    ops = torch.ops.mmattn
    costs = {
        ops.linear_state: lambda k, v, *_, out_val=None, **__: 2 * math.prod(k) * v[3],
        ops.linear_apply: lambda q, p, *_, out_val=None, **__: 2 * math.prod(q) * (p[3] + 1),
    }
    with FlopCounterMode(display=False, custom_mapping=costs) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = by_hand
    assert sum(p.numel() for p in model.parameters()) == params
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("kind", list(MODELS))
def test_folded_model_equals_the_model_and_has_no_norms(kind):
    cls, settings = MODELS[kind]
    model = trained(cls(**settings)).double()
    folded = fold(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, PRepBN) for m in folded.modules())
    assert any(isinstance(m, PRepBN) for m in model.modules())


def test_which_blocks_are_linear_over_the_whole_map():
    assert all(isinstance(b.attn, MapSLA) for s in SLABPVT(**PVT).stages for b in s.blocks)
    model = SLABCSwin(**CSWIN).eval()
    kinds = [type(stage.blocks[0].attn) for stage in model.stages]
    assert kinds == [MapSLA, MapSLA, StripeAttention, StripeAttention]
    assert [s.blocks[0].attn.stripe for s in model.stages[2:]] == [2, None]
    x = torch.randn(1, 16, 16, 8)
    changed = x.clone()
    changed[0, 0, 0] += 1
    block = model.stages[0].blocks[0]
    assert (block(x) != block(changed)).any(-1).float().mean() > 0.9


def test_layer_of_cswin_adds_both_convolutions():
    layer = trained(MapSLA(8, 2, (3, 4), value_conv=True)).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    both = layer(x, (3, 4))
    v = layer.qkv(x)[..., 16:].transpose(1, 2).unflatten(2, (3, 4))
    local = layer.value_conv(v).flatten(2).transpose(1, 2)
    layer.value_conv = None
    expected = layer(x, (3, 4)) + local @ layer.proj.weight.T
    torch.testing.assert_close(both, expected, rtol=1e-9, atol=1e-9)


def test_norms_have_the_published_steps_and_eps():
    pvt = timm.create_model("slab_pvt_tiny", device="meta")
    cswin = timm.create_model("slab_cswin_tiny", device="meta")
    for model, eps in ((pvt, 1e-6), (cswin, 1e-5)):
        norms = [m for m in model.modules() if isinstance(m, PRepBN)]
        assert {norm.ln.eps for norm in norms} == {eps}
    assert SLABPVT(**{**PVT, "norm_steps": 300_000}).stages[0].blocks[0].norm1.iter == 300_000
    settings = {k: v for k, v in CSWIN.items() if k != "norm_steps"}
    assert SLABCSwin(**settings).norm.iter == 120_000


def official(model, kind):
    """The state dict under the authors' names."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"(norm\d?)\.ln\.", r"\1.norm1.", key)
        key = re.sub(r"(norm\d?)\.repbn\.", r"\1.norm2.", key).replace("head.fc.", "head.")
        match = re.match(r"stages\.(\d)\.(downsample|blocks)\.", key)
        if not match:
            state[key] = value
            continue
        stage, rest = int(match[1]) + 1, key[match.end() :]
        if kind == "pvt":
            if rest == "pos_embed":
                state[f"pos_embed{stage}"] = value.flatten(1, 2)
                continue
            part = "patch_embed" if match[2] == "downsample" else "block"
            if "attn.qkv." in rest:
                kind_ = rest.rpartition(".")[2]
                c = value.shape[0] // 3
                base = f"block{stage}.{rest.split('.')[0]}.attn."
                state[f"{base}q.{kind_}"], state[f"{base}kv.{kind_}"] = value.split([c, 2 * c])
                continue
            state[f"{part}{stage}.{rest}"] = value
        elif match[2] == "downsample":
            if stage == 1:
                at = rest.replace("proj.", "0.").replace("norm.", "2.", 1)
                state[f"stage1_conv_embed.{at}"] = value
            else:
                state[f"merge{stage - 1}.{rest.replace('proj.', 'conv.')}"] = value
        else:
            rest = re.sub(r"attn\.(qkv|proj)\.", r"\1.", rest)
            rest = re.sub(r"attn\.value_conv\.(\d)\.", r"attns.\1.get_v.", rest)
            rest = rest.replace("attn.value_conv.", "attns.0.get_v.").replace("attn.", "attns.0.")
            state[f"stage{stage}.{rest}"] = value
            if rest.endswith("positional_encoding"):
                unread = rest.replace("positional_encoding", "scale")
                state[f"stage{stage}.{unread}"] = torch.zeros(1, 1, value.shape[-1])
    return state


NAMED = {
    "pvt": {
        "patch_embed1.norm.norm1.weight",
        "pos_embed3",
        "block2.1.attn.q.weight",
        "block2.0.attn.kv.bias",
        "block4.0.attn.positional_encoding",
        "block1.0.attn.dwc.weight",
        "block1.0.norm2.norm2.bn.running_var",
        "head.bias",
    },
    "cswin": {
        "stage1_conv_embed.0.weight",
        "stage1_conv_embed.2.norm1.weight",
        "stage1_conv_embed.2.norm2.alpha",
        "stage1.0.qkv.weight",
        "stage2.1.attns.0.positional_encoding",
        "stage1.0.attns.0.dwc.bias",
        "stage1.0.attns.0.get_v.weight",
        "stage1.0.attns.0.scale",
        "stage3.0.attns.1.get_v.bias",
        "stage4.0.attns.0.get_v.bias",
        "merge1.conv.weight",
        "merge3.norm.norm2.bn.bias",
        "norm.norm1.bias",
    },
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_official_state_dict_loads_at_its_size_and_at_another(kind):
    cls, settings = MODELS[kind]
    model = trained(cls(**settings))
    state = official(model, kind)
    assert NAMED[kind] <= set(state)
    other = cls(**settings).eval()
    other.load_state_dict(slab_pyramid.checkpoint_filter_fn({"model": state}, other))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), other(x))
    again = slab_pyramid.checkpoint_filter_fn(model.state_dict(), other)
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    larger = cls(**{**settings, "img_size": 96})
    larger.load_state_dict(slab_pyramid.checkpoint_filter_fn(state, larger))
    assert larger.stages[0].blocks[0].attn.positional_encoding.shape == (1, 576, 8)


@pytest.mark.parametrize("kind", list(MODELS))
def test_other_resolutions_and_rows(kind):
    cls, settings = MODELS[kind]
    model = trained(cls(**settings))
    x = torch.randn(2, 3, 96, 128)
    out = model(x)
    assert out.shape == (2, 5)
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(MODELS))
def test_timm_manners_and_steps(kind):
    _, settings = MODELS[kind]
    settings = {k: v for k, v in settings.items() if k != "num_classes"}
    name = f"slab_{kind}_tiny"
    model = timm.create_model(name, num_classes=7, in_chans=1, **settings)
    x = torch.randn(2, 1, 64, 64)
    model.set_grad_checkpointing()
    model(x).sum().backward()
    steps = [m.iter.item() for m in model.modules() if isinstance(m, PRepBN)]
    assert set(steps) == {3}, "a training forward is one step, with checkpointing too"
    assert all(p.grad is not None for n, p in model.named_parameters() if ".repbn." not in n)
    assert "stages.1.blocks.0.attn.positional_encoding" in model.no_weight_decay()
    model.reset_classifier(3)
    assert model.eval()(x).shape == (2, 3)
    maps = timm.create_model(name, features_only=True, out_indices=(0, 3), **settings).eval()
    sizes = [(1, 8, 16, 16), (1, 32 if kind == "pvt" else 64, 2, 2)]
    assert [m.shape for m in maps(torch.randn(1, 3, 64, 64))] == sizes


@pytest.mark.parametrize("kind", list(MODELS))
def test_compiles_without_breaks(kind):
    cls, settings = MODELS[kind]
    model = trained(cls(**{**settings, "depths": (1, 1, 1, 1)}))
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
