"""ToMe: matching against a loop oracle, then timm ViTs, a UNet, SD3 and PixArt."""

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _merging as merging
from mmattn.methods.tome import ToMe
from mmattn.runs import Root, Run
from mmattn.sites import Site


def oracle(x, metric, src, dst, r):
    """New tokens of one row and where every old one went, by loops over pairs."""
    unit = F.normalize(metric.double(), dim=-1)
    best = {s: max(dst, key=lambda d: float(unit[s] @ unit[d])) for s in src}
    gone = sorted(src, key=lambda s: -float(unit[s] @ unit[best[s]]))[:r]
    kept = [i for i in range(len(x)) if i not in gone]
    target = [best[i] if i in gone else i for i in range(len(x))]
    tokens = [torch.stack([x[j] for j in range(len(x)) if target[j] == i]).mean(0) for i in kept]
    return torch.stack(tokens), [kept.index(t) for t in target]


@pytest.mark.parametrize("r", [0, 1, 7, 15])
def test_matching_agrees_with_the_loop_oracle(r):
    x, metric = torch.randn(3, 31, 5), torch.randn(3, 31, 4)
    src, dst = torch.arange(0, 31, 2)[:15], torch.arange(1, 31, 2)
    source = merging.match(metric, src, dst, r)
    size = torch.ones(3, 31)
    out = merging.average(x, source, size, 31 - r)
    for row in range(3):
        tokens, where = oracle(x[row], metric[row], src.tolist(), dst.tolist(), r)
        torch.testing.assert_close(out[row], tokens)
        assert source[row].tolist() == where
    counts = merging.sizes(source, size, 31 - r)
    assert (counts.sum(1) == 31).all()
    torch.testing.assert_close(  # the size-weighted mean over all tokens is kept
        (out * counts[..., None]).sum(1), x.sum(1), atol=1e-4, rtol=1e-4
    )


def test_merging_twice_weighs_by_size():
    x = torch.randn(1, 8, 3)
    first = torch.tensor([[0, 0, 1, 1, 2, 3, 4, 5]])
    second = torch.tensor([[0, 0, 1, 2, 3, 4]])
    size = torch.ones(1, 8)
    once = merging.average(x, first, size, 6)
    twice = merging.average(once, second, merging.sizes(first, size, 6), 5)
    torch.testing.assert_close(twice[0, 0], x[0, :4].mean(0))


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 5, 7), (3, 2, 4)])
def test_one_destination_per_full_cell(grid):
    t, y, x = grid
    count = t * (y // 2) * (x // 2)
    still = merging.cells(grid, None, torch.device("cpu")).view(grid)
    assert int(still.sum()) == count and bool(still[:, 0, 0].all())
    drawn = merging.cells(grid, torch.randint(0, 4, (count,)), torch.device("cpu")).view(grid)
    whole = drawn[:, : y // 2 * 2, : x // 2 * 2].reshape(t, y // 2, 2, x // 2, 2)
    assert (whole.sum((2, 4)) == 1).all() and int(drawn.sum()) == count


# -- ViTs ---------------------------------------------------------------------------------------------


def vit(name="vit_tiny_patch16_224", depth=4, **knobs):
    torch.manual_seed(0)
    knobs = {"img_size": 96, "depth": depth, "num_classes": 5, **knobs}
    return timm.create_model(name, embed_dim=24, num_heads=3, **knobs).eval()


def picture(batch=2):
    """Blocks of flat colour, so that many patches are alike."""
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, 3, 3, 3, generator=g)
    return F.interpolate(flat, size=96, mode="nearest") + 0.1 * torch.randn(
        batch, 3, 96, 96, generator=g
    )


@torch.no_grad()
def test_vit_merges_r_per_block_keeps_its_shapes_and_detaches_bitwise():
    model, x = vit(), picture()
    before, features = model(x), model.forward_features(x)
    lengths = []
    hooks = [
        b.mlp.register_forward_hook(lambda m, a, o: lengths.append(o.shape[1]))
        for b in model.blocks
    ]
    with mmattn.attach(model, ToMe(r=6)) as session:
        out = model(x)
        stats = session.stats
        assert model.forward_features(x).shape == features.shape
    [h.remove() for h in hooks]
    assert lengths[:4] == [37, 31, 25, 19]
    assert [s.tokens_kept for s in stats.sites] == [37, 31, 25, 19]
    assert all(s.tokens_in == 37 and s.calls == 1 for s in stats.sites)
    assert not torch.equal(out, before)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_vit_ratio_spreads_over_the_blocks_and_half_is_the_most_per_block():
    model, x = vit(), picture()
    with mmattn.attach(model, ToMe(ratio=0.5)) as session:
        model(x)
        assert [s.tokens_kept for s in session.stats.sites] == [37, 33, 29, 25]
    with mmattn.attach(model, ToMe(r=100)) as session:
        model(x)
        assert [s.tokens_kept for s in session.stats.sites] == [37, 19, 10, 5 + 1]


@torch.no_grad()
def test_vit_equals_a_model_run_on_merged_tokens_by_hand():
    """Block by block: proportional attention, then size-weighted merging of the image tokens."""
    model, x = vit(depth=3), picture(1)
    tokens = model._pos_embed(model.patch_embed(x))
    size, where = torch.ones(1, 37), torch.arange(37)[None]
    for i, block in enumerate(model.blocks):
        y = block.norm1(tokens)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + size.log()[:, None, None]
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn.proj(y)
        tokens = tokens + block.mlp(block.norm2(tokens))
        if i == 2:
            break
        n = tokens.shape[1]
        source = []
        merged, where_row = oracle(
            tokens[0] * size[0, :, None],
            k.mean(1)[0],
            [j for j in range(1, n) if j % 2 == 0],
            [j for j in range(1, n) if j % 2 == 1],
            5,
        )
        source = torch.tensor([where_row])
        members = torch.zeros(1, n - 5).scatter_add_(1, source, torch.ones(1, n))
        total = torch.zeros(1, n - 5).scatter_add_(1, source, size)
        tokens, size = merged[None] * (members / total)[..., None], total
        where = source.gather(1, where)
    tokens = tokens.gather(1, where[..., None].expand(-1, -1, 24))
    expected = model.forward_head(model.norm(tokens))
    with mmattn.attach(model, ToMe(r=5)):
        out = model(x)
    torch.testing.assert_close(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_vit_duplicate_tokens_merge_without_loss(pool):
    """Equal patches without positions stay equal, so merging them with log-size bias loses nothing."""
    model = vit(global_pool=pool, class_token=pool == "token")
    torch.nn.init.zeros_(model.pos_embed)
    x = torch.randn(1, 3, 96, 16).repeat(1, 1, 1, 6)
    before = model(x)
    with mmattn.attach(model, ToMe(r=5)) as session:
        out = model(x)
        assert session.stats.sites[-1].tokens_kept < session.stats.sites[0].tokens_kept
    torch.testing.assert_close(out, before, atol=1e-5, rtol=1e-4)
    if pool == "token":
        with mmattn.attach(model, ToMe(r=5, proportional=False)):
            assert not torch.allclose(model(x), before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_vit_beats_random_merging(monkeypatch):
    model, x = vit(), picture(8)
    before = model.forward_features(x)

    def error():
        with mmattn.attach(model, ToMe(r=8)):
            return (model.forward_features(x) - before).square().mean().item()

    ours = error()
    stock = merging.match
    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        merging,
        "match",
        lambda metric, *a: stock(torch.randn(metric.shape, generator=g), *a),
    )
    assert ours < 0.6 * error()


@torch.no_grad()
def test_vit_rows_are_independent_and_identity_is_bitwise():
    model, x = vit(), picture(2)
    before = model(x)
    state = torch.get_rng_state()
    with mmattn.attach(model, ToMe(r=6)):
        both = model(x)
        alone = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(both, alone)
    for method in (ToMe(ratio=0.0), ToMe(r=0), ToMe(ratio=0.0, r=0)):
        with mmattn.attach(model, method):
            assert torch.equal(model(x), before)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_vit_some_blocks_only_and_recovery_after_an_error():
    model, x = vit(), picture()
    before = model(x)
    with mmattn.attach(model, ToMe(r=6), sites=["blocks.0.*", "blocks.1.*", "blocks.2.*"]) as s:
        out = model(x)
        assert [row.tokens_kept for row in s.stats.sites] == [37, 31, 25]
        handle = model.blocks[1].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        assert torch.equal(model(x), out)
        assert model(picture(3)).shape == (3, 5), "another batch size in the same session"
    assert torch.equal(model(x), before)


def test_vit_trains_through_merging():
    model, x = vit(), picture()
    with mmattn.attach(model, ToMe(r=6)):
        model(x).square().sum().backward()
    assert all(b.mlp.fc1.weight.grad.abs().sum() > 0 for b in model.blocks)


@torch.no_grad()
def test_rotary_vits_are_left_alone_with_a_reason():
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=56, depth=2, embed_dim=24, num_heads=3
    ).eval()
    with pytest.raises(mmattn.NoSiteError, match="rotary"):
        mmattn.attach(model, ToMe())


# -- diffusers --------------------------------------------------------------------------------------


def awake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def unet(batch=2):
    torch.manual_seed(0)
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
        "sample": torch.randn(batch, 4, 8, 12),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
    }


def sd3(batch=2):
    torch.manual_seed(0)
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
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return awake(model), {
        "hidden_states": torch.randn(batch, 4, 12, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), 500.0),
    }


def pixart(batch=2):
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return awake(model), {
        "hidden_states": torch.randn(batch, 4, 12, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def row(x, i):
    return {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("family", [unet, sd3, pixart])
@torch.no_grad()
def test_diffusers_families_merge_half_and_detach_bitwise(family, random):
    model, x = family()
    before = model(**x).sample
    state = torch.get_rng_state()
    with mmattn.attach(model, ToMe(random=random)) as session:
        both = model(**x).sample
        stats = session.stats
        # Guidance as one batch or as two calls: the same corners, so the same numbers.
        alone = torch.cat([model(**row(x, i)).sample for i in range(2)])
    assert torch.equal(torch.get_rng_state(), state)
    full = 96 if family is unet else 48
    assert {(s.tokens_in, s.tokens_kept) for s in stats.sites} == (
        {(96, 48), (24, 24)} if family is unet else {(48, 24)}
    )
    assert all(s.calls == 1 for s in stats.sites) and max(s.tokens_in for s in stats.sites) == full
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, before, atol=1e-4)
    assert torch.equal(model(**x).sample, before)
    with mmattn.attach(model, ToMe(ratio=0.0)):
        assert torch.equal(model(**x).sample, before)


def test_text_in_the_sequence_is_never_merged():
    method = ToMe(random=False)
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    site = Site(path="attn", kind="joint", module=torch.nn.Identity(), run=run)
    x = torch.randn(2, 24 + 5, 8)
    for text in ("before", "after"):
        run.layout = Layout(grid=(1, 4, 6), text=text)
        words = slice(0, 5) if text == "before" else slice(24, 29)
        y = method.enter(x, site=site)
        assert y.shape[1] == 12 + 5
        torch.testing.assert_close(y[:, :5] if text == "before" else y[:, -5:], x[:, words])
        z = method.leave(y, site=site)
        assert z.shape == x.shape
        torch.testing.assert_close(z[:, words], x[:, words])


@torch.no_grad()
def test_unet_max_downsample_opens_the_lower_resolutions():
    model, x = unet()
    with mmattn.attach(model, ToMe(max_downsample=2)) as session:
        model(**x)
        assert {(s.tokens_in, s.tokens_kept) for s in session.stats.sites} == {(96, 48), (24, 12)}
        assert all(s.path.endswith("attn1") for s in session.stats.sites)


@torch.no_grad()
def test_unet_seed_and_step_decide_the_corners():
    model, x = unet(1)

    def runs(seed):
        with mmattn.attach(model, ToMe(), seed=seed) as session:
            outs = []
            for step in (0, 1, 0):
                session.step(step, 2)
                outs.append(model(**x).sample)
            return outs

    a, b, again = runs(0)
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(runs(0), (a, b, again), strict=True))
    assert not torch.equal(runs(1)[0], a)


def test_grid_merging_alike_tokens_beats_merging_random_ones(monkeypatch):
    """Around one attention call on a smooth map: merge, attend, unmerge."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 16, 2, 3, generator=g) * 2
    x = F.interpolate(coarse, size=(8, 12), mode="bicubic").flatten(2).transpose(1, 2)
    x = x + 0.1 * torch.randn(x.shape, generator=g)
    method = ToMe(random=False)
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = Layout(grid=(1, 8, 12))
    site = Site(path="attn", kind="self", module=torch.nn.Identity(), run=run)
    full = F.scaled_dot_product_attention(x, x, x)

    def error():
        y = method.enter(x, site=site)
        assert y.shape == (4, 48, 16)
        out = method.leave(F.scaled_dot_product_attention(y, y, y), site=site)
        return (out - full).square().mean().item()

    ours = error()
    stock = merging.match
    monkeypatch.setattr(
        merging, "match", lambda metric, *a: stock(torch.randn(metric.shape, generator=g), *a)
    )
    assert ours < 0.5 * error()


@torch.no_grad()
def test_rotary_dits_are_left_alone_with_a_reason():
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
    with pytest.raises(mmattn.NoSiteError, match="rotary positions"):
        mmattn.attach(model, ToMe())


@torch.no_grad()
@pytest.mark.parametrize("target", ["vit", "vit-regional", "sd3", "sd3-regional"])
def test_compiles_without_graph_breaks(target):
    if target.startswith("vit"):
        depth = 12 if target == "vit-regional" else 3
        model, x, method = vit(depth=depth), {"x": picture()}, ToMe(r=3)
    else:
        (model, x), method = sd3(), ToMe(random=target == "sd3")
    with mmattn.attach(model, method) as session:
        eager = model(**x)
        torch._dynamo.reset()
        if target.endswith("regional"):
            for block in model.blocks if target.startswith("vit") else model.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
            compiled = model(**x)
        else:
            compiled = torch.compile(model, fullgraph=True, backend="eager")(**x)
        assert session.stats.calls == 2 * session.stats.planned
    if not target.startswith("vit"):
        eager, compiled = eager.sample, compiled.sample
    torch.testing.assert_close(compiled, eager)


def test_bad_knobs_and_round_trip():
    for knobs in ({"ratio": 0.9}, {"r": -1}, {"max_downsample": 0}):
        with pytest.raises(mmattn.ConfigError):
            ToMe(**knobs)
    assert ToMe.from_dict(ToMe(r=8, random=False).to_dict()) == ToMe(r=8, random=False)
