"""VMoBA in a Wan and a Flux: density per layer, guidance, dense steps and layers, compilation."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

import mmattn
from mmattn.methods.vmoba import VMoBA


def wan(layers=3):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return model.eval()


def wan_inputs(batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 4, 8, 12, generator=g),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=g),
    }


@torch.no_grad()
def test_wan_cycles_chunks_counts_density_and_detaches_bitwise():
    model, x = wan(), wan_inputs()
    before = model(**x).sample
    state = torch.get_rng_state()
    with mmattn.attach(model, VMoBA(topk=2, dense_steps=0)) as session:
        out = model(**x).sample
        stats = session.stats
    assert torch.equal(torch.get_rng_state(), state)
    assert stats.calls == 3 and stats.executed == 3
    assert [s.path for s in stats.sites] == [f"blocks.{i}.attn1" for i in range(3)]
    # GRID 4x4x6: 1-D 4 chunks, 2-D 4 x 6 windows, 3-D 2 x 4 x 6 cuboids.
    assert [round(s.density, 4) for s in stats.sites] == [0.5, round(2 / 24, 4), round(2 / 48, 4)]
    assert not torch.allclose(out, before)
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_cfg_batch_equals_two_calls():
    model = wan()
    x = wan_inputs(2)
    with mmattn.attach(model, VMoBA(dense_steps=0)) as session:
        both = model(**x).sample
        alone = [model(**{k: v[i : i + 1] for k, v in x.items()}).sample for i in range(2)]
        assert session.stats.density < 0.6
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dense_first_quarter_follows_the_clock_and_needs_one():
    model, x = wan(), wan_inputs()
    before = model(**x).sample
    with mmattn.attach(model, VMoBA(topk=1)) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        equal = []
        for step in range(8):
            session.step(step, 8)
            equal.append(torch.equal(model(**x).sample, before))
        reasons = session.stats.sites[0].dense
    assert equal == [True, True] + [False] * 6
    assert list(reasons.values()) == [2] and "first steps" in next(iter(reasons))
    assert VMoBA().phase(11, 50) is False and VMoBA().phase(12, 50) is True


@torch.no_grad()
def test_dense_layers_run_dense():
    model, x = wan(), wan_inputs()
    with mmattn.attach(model, VMoBA(topk=1, dense_steps=0, dense_layers=2)) as session:
        model(**x)
        assert [s.density == 1 for s in session.stats.sites] == [True, True, False]


@torch.no_grad()
def test_flux_joint_attention_runs_sparse():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    ids = torch.zeros(48, 3)
    ids[:, 1], ids[:, 2] = torch.arange(48) // 8, torch.arange(48) % 8
    x = {
        "hidden_states": torch.randn(1, 48, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }
    before = model(**x).sample
    with mmattn.attach(model, VMoBA(topk=2, dense_steps=0)) as session:
        out = model(**x).sample
        assert session.stats.executed == 3 and session.stats.density < 0.6
    assert not torch.allclose(out, before)
    assert torch.isfinite(out).all()


@torch.no_grad()
@pytest.mark.parametrize("regional", [True, False])
def test_compiles_without_graph_breaks(regional):
    model, x = wan(9 if regional else 3), wan_inputs()
    with mmattn.attach(model, VMoBA(threshold=0.25, kind="head", dense_steps=0)) as session:
        eager = model(**x).sample
        torch._dynamo.reset()
        if regional:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            compiled = model(**x).sample
        else:
            compiled = torch.compile(model, fullgraph=True, backend="eager")(**x).sample
        assert session.stats.calls == 2 * session.stats.planned
    torch.testing.assert_close(compiled, eager)


def test_recipe_round_trip():
    method = VMoBA(topk=(2, 6, 18), chunks=(3, (5, 13), (7, 5, 13)), dense_steps=0.0)
    assert VMoBA.from_dict(method.to_dict()) == method
    assert VMoBA.from_dict(json.loads(json.dumps(method.to_dict()))) == method
