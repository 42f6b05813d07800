"""AttentionMaps: values against a full softmax, then Flux, SD3, Wan, a UNet and a ViT."""

import pytest
import timm
import torch
from diffusers import (
    DDIMScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from PIL import Image

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _weights
from mmattn.methods.attention_maps import AttentionMaps
from mmattn.methods.tome import ToMe
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID = (2, 3, 4)
N = 24


def record(method, q, k, *, layout, kind, mask=None, causal=False, calls=1):
    """Run `attend` on raw tensors and return the recorded mean ``[B, heads, tokens, N]``."""
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), run=run, phase=True)
    site.causal = causal
    result = torch.randn(1)
    for _ in range(calls):
        out = method.attend(q, k, k, mask=mask, scale=None, site=site, dense=lambda q, k, v: result)
        assert out is result
    return site.state["sum"] / site.state["count"], site


def full(q, k, mask=None, causal=False):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), float("-inf"))
    return scores.softmax(-1)


@pytest.fixture(params=[1 << 24, 100], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(_weights, "_ENTRIES", request.param)


@pytest.mark.parametrize("text", ["before", "after"])
@pytest.mark.usefixtures("blocks")
def test_joint_maps_are_columns_of_the_softmax(text):
    q, k = torch.randn(2, 3, N + 5, 8), torch.randn(2, 3, N + 5, 8)
    layout = Layout(grid=GRID, text=text)
    image = layout.image_slice(N + 5)
    words = [i for i in range(N + 5) if not image.start <= i < image.stop]
    weights = full(q, k)[:, :, image]
    got, _ = record(AttentionMaps(tokens=(1, -1)), q, k, layout=layout, kind="joint")
    expected = weights[..., [words[1], words[4]]].mean(1, keepdim=True).transpose(2, 3)
    torch.testing.assert_close(got, expected)
    got, _ = record(AttentionMaps(), q, k, layout=layout, kind="joint")
    torch.testing.assert_close(got[:, 0, 0], weights[..., words].sum(-1).mean(1))
    got, _ = record(AttentionMaps(tokens=(2,), per_head=True), q, k, layout=layout, kind="joint")
    torch.testing.assert_close(got[:, :, 0], weights[..., words[2]])
    # Image queries alone, as in PRX.
    method = AttentionMaps(tokens=(2,), per_head=True)
    part, _ = record(method, q[:, :, image], k, layout=layout, kind="joint")
    torch.testing.assert_close(part, got)


@pytest.mark.usefixtures("blocks")
def test_cross_maps_honour_masks_and_grouped_heads():
    q, k = torch.randn(2, 4, N, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        got, _ = record(
            AttentionMaps(tokens=(0, 3)), q, k, layout=Layout(grid=GRID), kind="cross", mask=given
        )
        expected = full(q, k, mask)[..., [0, 3]].mean(1, keepdim=True).transpose(2, 3)
        torch.testing.assert_close(got, expected)
        assert (got[1, 0, 1] == 0).all()


@pytest.mark.usefixtures("blocks")
def test_self_maps_are_rows_or_the_mean_received():
    q, k = torch.randn(2, 3, N + 2, 8), torch.randn(2, 3, N + 2, 8)
    layout = Layout(grid=GRID, text="before")
    got, _ = record(AttentionMaps(), q, k, layout=layout, kind="self")
    torch.testing.assert_close(got[:, 0, 0], full(q, k)[:, :, 0, 2:].mean(1))
    got, _ = record(AttentionMaps(tokens=(1, 7)), q, k, layout=layout, kind="self")
    torch.testing.assert_close(got[:, 0], full(q, k)[:, :, [1, 7], 2:].mean(1))
    q, k = q[:, :, 2:], k[:, :, 2:]
    got, _ = record(AttentionMaps(), q, k, layout=Layout(grid=GRID), kind="self")
    torch.testing.assert_close(got[:, 0, 0], full(q, k).mean((1, 2)))


def test_decoder_maps_read_the_last_query_causally_over_prompt_and_answer():
    seen = torch.zeros(2, 12, dtype=torch.bool)
    seen[0, 2:6], seen[1, 5:9] = True, True
    method = AttentionMaps()
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    prompt, site = record(
        method, q, k, layout=Layout(image_mask=seen, past=0), kind="self", causal=True
    )
    torch.testing.assert_close(prompt[:, 0, 0], full(q, k, causal=True)[:, :, -1].mean(1))
    k = torch.randn(2, 2, 13, 8)
    site.run.layout, site.causal = Layout(image_mask=seen, past=12), False
    method.attend(q[:, :, -1:], k, k, mask=None, scale=None, site=site, dense=lambda *a: a[0])
    answer = full(q[:, :, -1:], k)[:, :, 0, :12].mean(1)
    both = site.state["sum"] / site.state["count"]
    torch.testing.assert_close(both[:, 0, 0], (prompt[:, 0, 0] + answer) / 2)
    early = AttentionMaps(tokens=(4,))
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    got, site = record(
        early, q, k, layout=Layout(image_mask=seen, past=0), kind="self", causal=True
    )
    assert (got[:, 0, 0, 5:] == 0).all() and got[0, 0, 0, 2] > 0, (
        "a query sees nothing after itself"
    )
    site.run.layout = Layout(image_mask=seen, past=12)
    early.attend(q[:, :, -1:], k, k, mask=None, scale=None, site=site, dense=lambda *a: a[0])
    assert float(site.state["count"]) == 1, "the query of the prompt is not in a decoding call"


def test_no_matrix_of_all_pairs_is_ever_held(monkeypatch):
    """Blocks of queries stay within the entry budget."""
    monkeypatch.setattr(_weights, "_ENTRIES", 2 * 3 * 29 * 4)
    largest = 0
    stock = _weights._scores

    def watched(*args):
        nonlocal largest
        out = stock(*args)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(_weights, "_scores", watched)
    q, k = torch.randn(2, 3, N + 5, 8), torch.randn(2, 3, N + 5, 8)
    layout = Layout(grid=GRID, text="after")
    got, _ = record(AttentionMaps(tokens=(0,)), q, k, layout=layout, kind="joint")
    assert 0 < largest <= 2 * 3 * 29 * 4
    assert got.numel() == 2 * N


def test_bad_indices_and_knobs_say_so():
    q, k = torch.randn(1, 2, N, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(mmattn.UnsupportedCall, match="no text token 5; this call has 5"):
        record(AttentionMaps(tokens=(5,)), q, k, layout=Layout(grid=GRID), kind="cross")
    for knobs in ({"tokens": ()}, {"steps": ()}, {"steps": (-1,)}):
        with pytest.raises(mmattn.ConfigError):
            AttentionMaps(**knobs)
    method = AttentionMaps(tokens=(1, 2), steps=(0, 3))
    assert AttentionMaps.from_dict(method.to_dict()) == method


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
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    ids = torch.zeros(48, 3)
    ids[:, 1], ids[:, 2] = torch.arange(48) // 8, torch.arange(48) % 8
    return awake(model), {
        "hidden_states": torch.randn(1, 48, 4),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }


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
    return awake(model), {
        "hidden_states": torch.randn(1, 4, 12, 16),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
    }


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
        num_layers=1,
        rope_max_seq_len=32,
    )
    return awake(model), {
        "hidden_states": torch.randn(1, 4, 3, 12, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }


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
    return awake(model), {
        "sample": torch.randn(1, 4, 6, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }


FAMILIES = {
    flux: {(1, 6, 8)},
    sd3: {(1, 6, 8)},
    wan: {(3, 6, 8)},
    unet: {(1, 6, 8), (1, 3, 4)},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_diffusers_families_give_maps_and_the_same_bits(family, tmp_path):
    torch.manual_seed(0)
    model, x = family()
    before = model(**x).sample
    method = AttentionMaps(tokens=(1, 3))
    with mmattn.attach(model, method) as session:
        assert torch.equal(model(**x).sample, before)
        assert torch.equal(model(**x).sample, before)
        stats = session.stats
    assert stats.executed == stats.planned > 0
    maps = method.maps(session)
    assert len(maps) == 2 * stats.planned, "the last call only, without a clock"
    assert {m.grid for m in maps} == FAMILIES[family]
    assert {m.token for m in maps} == {1, 3} and {m.steps for m in maps} == {()}
    for one in maps:
        assert one.values.shape == one.grid and torch.isfinite(one.values).all()
        assert 0 <= float(one.values.min()) < float(one.values.max()) <= 1
    paths = method.save(session, tmp_path / "maps")
    assert len(set(paths)) == len(maps)
    assert all(Image.open(p).mode == "RGB" for p in paths)
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_a_text_token_that_draws_one_corner_shows_there():
    """The map is the right way round: the key of token 2 equals the queries of the top right corner."""
    q = torch.randn(1, 2, 24, 8) * 0.1
    corner = torch.zeros(4, 6, dtype=torch.bool)
    corner[:2, 4:] = True
    q[:, :, corner.flatten()] += 2
    k = torch.randn(1, 2, 5, 8) * 0.1
    k[:, :, 2] += 2
    layout = Layout(grid=(1, 4, 6))
    got, _ = record(AttentionMaps(tokens=(2,)), q, k, layout=layout, kind="cross")
    values = got[0, 0, 0].view(4, 6)
    assert values[corner].min() > 2 * values[~corner].max()


@torch.no_grad()
def test_the_clock_selects_steps_averages_and_separates_branches():
    model, x = flux()
    method = AttentionMaps(steps=(1, 2))
    with mmattn.attach(model, method) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        with pytest.raises(mmattn.ConfigError, match="no attention map was recorded"):
            method.maps(session)
        for step in range(4):
            session.step(step, 4)
            for scale in (1.0, 0.5):
                model(**{**x, "hidden_states": x["hidden_states"] * scale * (step + 1)})
        maps = method.maps(session)
        assert {(m.branch, m.steps) for m in maps} == {(0, (1, 2)), (1, (1, 2))}
        assert {m.token for m in maps} == {None}
        one = [m.values for m in maps if m.branch == 0]
        session.step(0, 4)
        with pytest.raises(mmattn.ConfigError):
            method.maps(session)  # a new run forgets the last one
    singles = []
    for step in (1, 2):
        with mmattn.attach(model, AttentionMaps()) as session:
            model(**{**x, "hidden_states": x["hidden_states"] * (step + 1)})
            singles.append([m.values for m in AttentionMaps.maps(session)])
    for mean, a, b in zip(one, *singles, strict=True):
        torch.testing.assert_close(mean, (a + b) / 2)


@torch.no_grad()
def test_a_scheduler_drives_the_steps():
    from diffusers import DDIMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    pipe = DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)
    with mmattn.attach(pipe, "attention-maps") as session:
        pipe(num_inference_steps=3)
        maps = AttentionMaps.maps(session)
    assert {m.steps for m in maps} == {(0, 1, 2)} and {m.grid for m in maps} == {(1, 8, 8)}
    assert all(m.values.sum() == pytest.approx(1) for m in maps), "mean received sums to one"


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=(64, 96), depth=2, embed_dim=24, num_heads=3, num_classes=5
    ).eval()


@torch.no_grad()
def test_vit_class_token_maps_per_head_and_row():
    model, x = vit(), torch.randn(2, 3, 64, 96)
    before = model(x)
    method = AttentionMaps(per_head=True)
    with mmattn.attach(model, method) as session:
        assert torch.equal(model(x), before)
        maps = method.maps(session)
    assert len(maps) == 2 * 2 * 3 and {m.grid for m in maps} == {(1, 4, 6)}
    assert {(m.row, m.head) for m in maps} == {(r, h) for r in range(2) for h in range(3)}
    assert len({m.file_name for m in maps}) == len(maps)
    # By hand, for the first block.
    block = model.blocks[0]
    y = block.norm1(model._pos_embed(model.patch_embed(x)))
    q, k, _ = block.attn.qkv(y).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    weights = full(q, k)[:, :, 0, 1:]
    for one in maps[:6]:
        torch.testing.assert_close(one.values.flatten(), weights[one.row, one.head])


@torch.no_grad()
def test_composes_with_a_method_that_changes_the_model():
    model, x = sd3()
    with mmattn.attach(model, ToMe(ratio=0.0)):
        before = model(**x).sample
    with mmattn.attach(model, [mmattn.AgentAttention(agents=4), AttentionMaps()]) as session:
        changed = model(**x).sample
        assert len(AttentionMaps.maps(session)) == 2
    assert not torch.allclose(changed, before)
    with mmattn.attach(model, mmattn.AgentAttention(agents=4)):
        assert torch.equal(model(**x).sample, changed)
    with (
        mmattn.attach(model, "identity") as session,
        pytest.raises(mmattn.ConfigError, match="no AttentionMaps"),
    ):
        AttentionMaps.maps(session)


@torch.no_grad()
def test_cross_sites_need_tokens_and_say_so():
    model, _ = wan()
    plan = mmattn.plan(model, AttentionMaps())
    assert plan.planned == 1 and "need tokens=" in str(plan)


@torch.no_grad()
@pytest.mark.parametrize("target", ["wan", "vit"])
def test_compiles_without_graph_breaks_and_records_the_same(target):
    if target == "vit":
        model, x = vit(), {"x": torch.randn(1, 3, 64, 96)}
    else:
        model, x = wan()
    with mmattn.attach(model, AttentionMaps()) as session:
        eager = model(**x)
        wanted = [m.values for m in AttentionMaps.maps(session)]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        again = compiled(**x)
        got = [m.values for m in AttentionMaps.maps(session)]
    if target == "wan":
        eager, again = eager.sample, again.sample
    torch.testing.assert_close(again, eager)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
