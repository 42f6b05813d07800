"""AgentAttention: the formula on raw tensors, then a ViT, Flux, SD3, Wan and a UNet."""

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods.agent_attention import AgentAttention
from mmattn.runs import Root, Run
from mmattn.sites import Site


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def call(method, q, k, v, *, layout, kind="self", mask=None, scale=None):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), run=run, phase=run.phases[0])

    def dense(q, k, v, mask=mask, scale=scale):
        return sdpa(q, k, v, mask, scale)

    out = method.attend(q, k, v, mask=mask, scale=scale, site=site, dense=dense)
    return out, site.meter


def qkv(b=2, h=2, n=60, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) for _ in range(3)]


def oracle(q, k, v, grid, cells, kappa=0.3, shortcut=0.075, scale=None):
    """Agents by explicit loops over the cells of torch's adaptive pooling; q are image queries."""
    t, y, x = grid
    volume = q.reshape(*q.shape[:2], t, y, x, -1)

    def edges(n, p):
        return [(i * n // p, -(-(i + 1) * n // p)) for i in range(p)]

    agents = torch.stack(
        [
            volume[:, :, a:b, c:d, e:f].mean(dim=(2, 3, 4))
            for a, b in edges(t, cells[0])
            for c, d in edges(y, cells[1])
            for e, f in edges(x, cells[2])
        ],
        dim=2,
    )
    s = q.shape[-1] ** -0.5 if scale is None else scale
    values = (agents @ k.transpose(-1, -2) * s).softmax(-1) @ v
    return (q @ agents.transpose(-1, -2) * s**kappa).softmax(-1) @ values


@pytest.mark.parametrize("scale", [None, 0.7])
def test_image_grid_matches_the_formula(scale):
    q, k, v = qkv()
    out, meter = call(
        AgentAttention(agents=9), q, k, v, layout=Layout(grid=(1, 6, 10)), scale=scale
    )
    expected = oracle(q, k, v, (1, 6, 10), (1, 3, 3), scale=scale) + 0.075 * v
    torch.testing.assert_close(out, expected)
    assert meter.mean("density") == pytest.approx(9 * 120 / 3600)


@pytest.mark.parametrize(("frames", "cells"), [(None, (3, 2, 2)), (2, (2, 2, 2)), (9, (3, 2, 2))])
def test_video_grid_has_agents_per_frame_or_fewer(frames, cells):
    q, k, v = qkv()
    method = AgentAttention(agents=4, agent_frames=frames, k_shortcut=0.0)
    out, _ = call(method, q, k, v, layout=Layout(grid=(3, 4, 5)))
    torch.testing.assert_close(out, oracle(q, k, v, (3, 4, 5), cells))


def test_grid_clips_the_agents_and_full_agents_are_the_queries():
    q, k, v = qkv(n=12)
    method = AgentAttention(agents=49, k_scale2=1.0, k_shortcut=0.0)
    out, meter = call(method, q, k, v, layout=Layout(grid=(1, 3, 4)))
    s = 8**-0.5
    expected = (q @ q.transpose(-1, -2) * s).softmax(-1) @ sdpa(q, k, v)
    torch.testing.assert_close(out, expected)
    assert meter.mean("density") == 2.0


def test_constant_values_come_back_with_the_shortcuts_gain():
    q, k, v = qkv()
    out, _ = call(
        AgentAttention(agents=4), q, k, torch.ones_like(v), layout=Layout(grid=(1, 6, 10))
    )
    torch.testing.assert_close(out, torch.full_like(v, 1.075))


@pytest.mark.parametrize("text", ["before", "after"])
def test_text_queries_stay_dense_and_agents_see_text_keys(text):
    q, k, v = qkv(n=65)
    layout = Layout(grid=(1, 6, 10), text=text)
    image = layout.image_slice(65)
    words = [i for i in range(65) if not image.start <= i < image.stop]
    out, meter = call(AgentAttention(agents=9), q, k, v, layout=layout, kind="joint")
    torch.testing.assert_close(out[:, :, words], sdpa(q, k, v)[:, :, words])
    expected = oracle(q[:, :, image], k, v, (1, 6, 10), (1, 3, 3)) + 0.075 * v[:, :, image]
    torch.testing.assert_close(out[:, :, image], expected)
    assert meter.mean("density") == pytest.approx((9 * (65 + 60) + 5 * 65) / 65**2)


def test_masked_keys_do_not_reach_the_agents():
    q, k, v = qkv(n=65)
    mask = torch.ones(2, 1, 1, 65, dtype=torch.bool)
    mask[0, ..., 61:] = False
    layout = Layout(grid=(1, 6, 10), text="after")
    out, _ = call(AgentAttention(agents=9), q, k, v, layout=layout, kind="joint", mask=mask)
    k[0, :, 61:], v[0, :, 61:] = 50.0, 50.0
    again, _ = call(AgentAttention(agents=9), q, k, v, layout=layout, kind="joint", mask=mask)
    torch.testing.assert_close(out[:, :, :60], again[:, :, :60])
    wide = mask.expand(-1, -1, 65, -1).clone()
    wide[:, :, 60:] = True  # text queries may have a mask of their own
    third, _ = call(AgentAttention(agents=9), q, k, v, layout=layout, kind="joint", mask=wide)
    torch.testing.assert_close(third[:, :, :60], again[:, :, :60])
    wide[0, :, 3, 4] = False
    with pytest.raises(mmattn.UnsupportedCall, match="differs from query to query"):
        call(AgentAttention(), q, k, v, layout=layout, kind="joint", mask=wide)


def test_square_windows_need_no_layout_and_others_are_refused():
    q, k, v = qkv(n=49)
    method = AgentAttention(agents=4, k_shortcut=0.0)
    out, _ = call(method, q, k, v, layout=Layout(), kind="window")
    torch.testing.assert_close(out, oracle(q, k, v, (1, 7, 7), (1, 2, 2)))
    with pytest.raises(mmattn.UnsupportedCall, match="not square"):
        call(method, *qkv(n=48), layout=Layout(), kind="window")
    with pytest.raises(mmattn.UnsupportedCall, match="no token grid"):
        call(method, q, k, v, layout=Layout())
    with pytest.raises(mmattn.UnsupportedCall, match="different tokens"):
        call(method, q[:, :, :5], k, v, layout=Layout(grid=(1, 7, 7)))


def test_queries_may_be_the_image_tokens_of_the_keys():
    q, k, v = qkv(n=65)
    layout = Layout(grid=(1, 6, 10), text="before")
    whole, _ = call(AgentAttention(agents=9), q, k, v, layout=layout, kind="joint")
    part, _ = call(AgentAttention(agents=9), q[:, :, 5:], k, v, layout=layout, kind="joint")
    torch.testing.assert_close(part, whole[:, :, 5:])


def test_strength_mixes_and_zero_is_dense_bitwise():
    q, k, v = qkv()
    layout = Layout(grid=(1, 6, 10))
    none, meter = call(AgentAttention(strength=0.0), q, k, v, layout=layout)
    assert torch.equal(none, sdpa(q, k, v)) and meter.mean("density") is None
    full, _ = call(AgentAttention(agents=9), q, k, v, layout=layout)
    half, meter = call(AgentAttention(agents=9, strength=0.5), q, k, v, layout=layout)
    torch.testing.assert_close(half, (full + none) / 2)
    assert meter.mean("density") == pytest.approx(1 + 9 * 120 / 3600)


def test_pooled_agents_beat_random_queries_as_agents():
    """Smooth maps, as images have: pooled queries represent the queries, random ones less so."""
    ours = random = 0.0
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        coarse = torch.randn(3, 8, 3, 3, generator=g) * 2
        maps = F.interpolate(coarse, size=(12, 12), mode="bicubic")
        q, k, v = (
            m.flatten(1).T[None, None] + torch.randn(1, 1, 144, 8, generator=g) for m in maps
        )
        full = sdpa(q, k, v)
        method = AgentAttention(agents=9, k_shortcut=0.0)
        out, _ = call(method, q, k, v, layout=Layout(grid=(1, 12, 12)))
        ours += (out - full).square().mean().item()
        agents = q[:, :, torch.randperm(144, generator=g)[:9]]
        out = sdpa(q, agents, sdpa(agents, k, v), scale=(8**-0.5) ** 0.3)
        random += (out - full).square().mean().item()
    assert ours < 0.9 * random


def test_gradients_flow_and_bad_knobs_are_errors():
    q, k, v = (t.requires_grad_() for t in qkv())
    out, _ = call(AgentAttention(agents=4), q, k, v, layout=Layout(grid=(1, 6, 10)))
    out.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in (q, k, v))
    for knobs in (
        {"agents": 10},
        {"strength": 2.0},
        {"start": 0.5, "stop": 0.2},
        {"agent_frames": 0},
    ):
        with pytest.raises(mmattn.ConfigError):
            AgentAttention(**knobs)
    method = AgentAttention(agents=16, stop=0.4)
    assert AgentAttention.from_dict(method.to_dict()) == method


# -- models -----------------------------------------------------------------------------------------


def awake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def flux():
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )

    def inputs(batch):
        ids = torch.zeros(48, 3)
        ids[:, 1], ids[:, 2] = torch.arange(48) // 8, torch.arange(48) % 8
        return {
            "hidden_states": torch.randn(batch, 48, 4),
            "encoder_hidden_states": torch.randn(batch, 5, 16),
            "pooled_projections": torch.randn(batch, 8),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
        }

    return model, inputs


def sd3():
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )

    def inputs(batch):
        return {
            "hidden_states": torch.randn(batch, 4, 12, 16),
            "encoder_hidden_states": torch.randn(batch, 5, 16),
            "pooled_projections": torch.randn(batch, 8),
            "timestep": torch.full((batch,), 500.0),
        }

    return model, inputs


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )

    def inputs(batch):
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 12),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 5, 16),
        }

    return model, inputs


def unet():
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )

    def inputs(batch):
        return {
            "sample": torch.randn(batch, 4, 8, 12),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 5, 16),
        }

    return model, inputs


@pytest.mark.parametrize("family", [flux, sd3, wan, unet])
@torch.no_grad()
def test_diffusers_families_act_count_and_detach_bitwise(family):
    model, inputs = family()
    model, x = awake(model), inputs(2)
    before = model(**x).sample
    state = torch.get_rng_state()
    with mmattn.attach(model, AgentAttention(agents=4)) as session:
        both = model(**x).sample
        stats = session.stats
        shared = ("img_ids", "txt_ids")
        alone = [
            model(**{k: v if k in shared else v[i : i + 1] for k, v in x.items()}).sample
            for i in range(2)
        ]
    assert torch.equal(torch.get_rng_state(), state)
    assert stats.calls >= stats.executed == stats.planned > 0
    assert stats.density < 1
    assert not torch.allclose(both, before, atol=1e-4)
    torch.testing.assert_close(torch.cat(alone), both, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(**x).sample, before)
    with mmattn.attach(model, AgentAttention(strength=0.0)):
        assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_timm_vit_keeps_its_class_token_dense():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=24, num_heads=3, num_classes=5
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    before = model(x)
    with mmattn.attach(model, AgentAttention(agents=4)) as session:
        out = model(x)
        assert session.stats.calls == 2 and session.stats.density < 0.5
    assert not torch.equal(out, before)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_start_and_stop_follow_the_clock():
    model, inputs = flux()
    model, x = awake(model), inputs(1)
    before = model(**x).sample
    with mmattn.attach(model, AgentAttention(agents=4, start=0.2, stop=0.6)) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        same = []
        for step in range(5):
            session.step(step, 5)
            same.append(torch.equal(model(**x).sample, before))
        assert sum(session.stats.sites[0].dense.values()) == 3
    assert same == [True, False, False, True, True]


@torch.no_grad()
@pytest.mark.parametrize("target", ["wan", "wan-regional", "vit"])
def test_compiles_without_graph_breaks(target):
    if target == "vit":
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=24, num_heads=3, num_classes=5
        ).eval()
        x = {"x": torch.randn(1, 3, 96, 96)}
    else:
        model, inputs = wan()
        model, x = model.eval(), inputs(1)
    with mmattn.attach(model, AgentAttention(agents=4)) as session:
        eager = model(**x)
        torch._dynamo.reset()
        if target == "wan-regional":
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            compiled = model(**x)
        else:
            compiled = torch.compile(model, fullgraph=True, backend="eager")(**x)
        assert session.stats.calls == 2 * session.stats.planned
    if target != "vit":
        eager, compiled = eager.sample, compiled.sample
    torch.testing.assert_close(compiled, eager)
