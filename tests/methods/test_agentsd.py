"""AgentSD: golden numbers, a reference by loops over tokens, then Stable Diffusion UNets."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers_zoo import inputs as zoo_inputs, model as zoo_model

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _agentsd_match as matching
from mmattn.methods.agentsd import AgentSD
from mmattn.methods.tome import ToMe
from mmattn.runs import Root, Run
from mmattn.sites import Site

STILL = {"random": False, "agent_steps": 1.0}


def site_of(method, grid, module=None):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = Layout(grid=grid)
    return Site(
        path="attn1", kind="self", module=module, run=run, phase=run.phases[0], host="diffusers"
    )


def around(method, x, grid, weights=None, *, heads=2):
    """Merge, project, attend, unmerge: ``[B, N, C]`` -> ``[B, N, C]``, and the meter."""
    site = site_of(method, grid)
    y = method.enter(x, site=site)
    c = x.shape[-1]
    q, k, v = (
        F.linear(y, w).unflatten(-1, (heads, c // heads)).transpose(1, 2)
        for w in weights or [torch.eye(c, dtype=x.dtype)] * 3
    )
    dense = F.scaled_dot_product_attention
    out = method.attend(q, k, v, mask=None, scale=None, site=site, dense=dense)
    return method.leave(out.transpose(1, 2).flatten(2), site=site), site.meter


def smooth(batch=2, grid=(8, 12), c=8, seed=0, dtype=torch.float32):
    """A map as images have: neighbours alike, some noise. ``[B, N, C]``."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, c, 3, 3, generator=g) * 2
    x = F.interpolate(coarse, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    return (x + 0.1 * torch.randn(x.shape, generator=g)).to(dtype)


# -- golden numbers of the published code ---------------------------------------------------------------


def wave(*shape, phase, step):
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (step * n + phase).reshape(shape)


def golden():
    return wave(2, 64, 8, phase=0.2, step=0.57).cos()


def golden_weights():
    """In the order of the published parameter names: to_k, to_out bias, to_out, to_q, to_v."""
    shapes = [(8, 8), (8,), (8, 8), (8, 8), (8, 8)]
    return [
        0.3 * wave(*shape, phase=1 + 0.7 * i, step=0.37).sin() for i, shape in enumerate(shapes)
    ]


def near(value, expected):
    assert float(value) == pytest.approx(expected, abs=2e-9 * max(1, abs(expected)))


def test_merging_gives_the_golden_numbers():
    x = golden()
    found = matching.match(x, matching.destinations((1, 8, 8), 4, None, x.device))
    features, agents = matching.merge(x, found, 25, 60)
    back = matching.spread(features, found, 25)
    assert (features.shape, agents.shape, back.shape) == ((2, 39, 8), (2, 4, 8), (2, 64, 8))
    near(features.sum(), 10.0544676104)
    near(features.norm(), 17.5816024013)
    near(agents.sum(), -0.8216421858)
    near(agents.norm(), 4.9731844783)
    near(back.sum(), -1.0497688463)
    near(back.norm(), 22.4160583039)
    first = torch.tensor([0.9441556, 0.64978672, 0.14995656, -0.39728958], dtype=torch.float64)
    torch.testing.assert_close(back.flatten()[:4], first, atol=1e-7, rtol=0)
    assert float(back.flatten()[-1]) == pytest.approx(0.51804414, abs=1e-7)


def test_attention_gives_the_golden_numbers():
    x, (k, bias, out, q, v) = golden(), golden_weights()
    method = AgentSD(ratio=25 / 64, agent_ratio=60 / 64, **STILL)
    site = site_of(method, (1, 8, 8))
    y = method.enter(x, site=site)
    assert y.shape == (2, 39 + 4, 8)
    heads = [F.linear(y, w).unflatten(-1, (2, 4)).transpose(1, 2) for w in (q, k, v)]
    z = method.attend(*heads, mask=None, scale=None, site=site, dense=None)
    z = F.linear(z.transpose(1, 2).flatten(2), out, bias)
    assert z.shape == (2, 39, 8)
    near(z.sum(), 18.6151108497)
    near(z.norm(), 5.5097327956)


# -- a reference by loops ---------------------------------------------------------------------------------


def groups(x, grid, cell, r, agents_r):
    """Of one row ``[N, C]``: which tokens every feature and every agent is the mean of."""
    _, height, width = grid
    rows, columns = height // cell * cell, width // cell * cell
    dst = [i * width + j for i in range(0, rows, cell) for j in range(0, columns, cell)]
    src = [i for i in range(len(x)) if i not in dst]
    cosine = {s: F.cosine_similarity(x[s], x[dst], dim=-1) for s in src}
    best = {s: dst[int(cosine[s].argmax())] for s in src}
    rank = sorted(src, key=lambda s: -float(cosine[s].max()))

    def merged(n):
        kept = [[s] for s in rank[n:]]
        return kept + [[d] + [s for s in rank[:n] if best[s] == d] for d in dst]

    return merged(r), merged(agents_r)


def reference(x, grid, cell, r, agents_r, weights, heads, kappa=0.3, shortcut=0.075):
    """Agent attention around one site in double precision, row by row and head by head; no out-projection."""
    outs = []
    for row in x.double():
        features, agents = groups(row.detach(), grid, cell, r, agents_r)
        f, g = (torch.stack([row[m].mean(0) for m in part]) for part in (features, agents))
        wq, wk, wv = (w.double() for w in weights)
        d = wq.shape[0] // heads
        parts = []
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            q, k, v, a = f @ wq.T[:, at], f @ wk.T[:, at], f @ wv.T[:, at], g @ wq.T[:, at]
            values = (a @ k.T * d**-0.5).softmax(-1) @ v
            parts.append((q @ a.T * d ** (-0.5 * kappa)).softmax(-1) @ values + shortcut * v)
        merged, out = torch.cat(parts, dim=-1), row.new_zeros(len(row), heads * d)
        for i, members in enumerate(features):
            out[members] = merged[i]
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.parametrize("k_scale2, k_shortcut", [(0.3, 0.075), (1.0, 0.0)])
@pytest.mark.parametrize(
    "size, cell, ratio, agent_ratio",
    [((8, 12), 4, 0.4, 0.95), ((9, 7), 4, 0.4, 0.9), ((9, 7), 2, 0.2, 0.7), ((6, 5), 3, 0.9, 0.5)],
)
def test_a_site_agrees_with_the_loops(size, cell, ratio, agent_ratio, k_scale2, k_shortcut):
    x, grid = smooth(grid=size, dtype=torch.float64).requires_grad_(), (1, *size)
    n = x.shape[1]
    sources = n - (size[0] // cell) * (size[1] // cell)
    r, agents_r = (min(sources, int(n * share)) for share in (ratio, agent_ratio))
    weights = [torch.randn(8, 8, dtype=torch.float64) for _ in range(3)]
    method = AgentSD(
        ratio=ratio,
        agent_ratio=agent_ratio,
        cell=cell,
        k_scale2=k_scale2,
        k_shortcut=k_shortcut,
        **STILL,
    )
    out, meter = around(method, x, grid, weights)
    if 2 * (n - agents_r) < n - r:
        expected = reference(x, grid, cell, r, agents_r, weights, 2, k_scale2, k_shortcut)
        torch.testing.assert_close(out, expected)
        toward = torch.randn_like(out)
        torch.testing.assert_close(
            *(torch.autograd.grad((o * toward).sum(), x)[0] for o in (out, expected))
        )
        assert meter.mean("agents") == n - agents_r
        assert meter.mean("density") == pytest.approx(2 * (n - r) * (n - agents_r) / n**2)
    else:
        assert (size, meter.mean("agents")) == ((6, 5), 0), "the case without agents"
        assert meter.mean("density") == pytest.approx(((n - r) / n) ** 2)
    assert meter.mean("kept") == n - r and meter.mean("of") == n


@pytest.mark.parametrize("grid, cell", [((1, 8, 8), 4), ((1, 9, 7), 2), ((3, 6, 5), 3)])
def test_one_destination_in_every_full_cell(grid, cell):
    t, y, x = grid
    count = t * (y // cell) * (x // cell)
    cpu = torch.device("cpu")
    places = torch.arange(count) % (cell * cell)
    for offsets in (None, places):
        where = matching.destinations(grid, cell, offsets, cpu)
        assert len(set(where.tolist())) == count
        chosen = torch.zeros(t * y * x).index_fill(0, where, 1).view(grid)
        whole = chosen[:, : y // cell * cell, : x // cell * cell]
        cells = whole.unflatten(2, (-1, cell)).unflatten(1, (-1, cell)).transpose(2, 3)
        cells = cells.reshape(count, cell * cell)
        expected = torch.zeros(count, dtype=torch.long) if offsets is None else places
        assert torch.equal(cells.argmax(1), expected) and (cells.sum(1) == 1).all()


@pytest.mark.parametrize(
    "side, features, agents", [(64, 2458, 256), (32, 615, 64), (65, 2535, 256), (96, 5530, 576)]
)
def test_the_defaults_make_the_published_numbers_of_tokens(side, features, agents):
    method = AgentSD(**STILL)
    site = site_of(method, (1, side, side))
    y = method.enter(torch.randn(1, side * side, 2), site=site)
    assert y.shape[1] == features + agents
    assert (site.meter.mean("kept"), site.meter.mean("agents")) == (features, agents)
    if side == 64:  # share of dense attention's work, as published
        density = 2 * features * agents / 4096**2
        assert density == pytest.approx(0.075, abs=1e-3)
        assert density / (features / 4096) ** 2 == pytest.approx(0.208, abs=1e-3)


def test_the_published_defaults_never_make_agents():
    """Cells of 2, 0.5 and 0.8 ask for exactly half as many agents as features, and fewer are needed."""
    x = smooth()
    stock = AgentSD(ratio=0.5, agent_ratio=0.8, cell=2, **STILL)
    out, meter = around(stock, x, (1, 8, 12))
    assert meter.mean("agents") == 0
    expected, _ = around(ToMe(ratio=0.5, random=False), x, (1, 8, 12))
    torch.testing.assert_close(out, expected)
    _, meter = around(AgentSD(ratio=0.45, agent_ratio=0.8, cell=2, **STILL), x, (1, 8, 12))
    assert meter.mean("agents") == 24
    _, meter = around(AgentSD(**STILL), x, (1, 8, 12))
    assert meter.mean("agents") == 6, "the defaults here do"


def test_later_steps_are_tome_of_the_same_ratio():
    x = smooth(seed=1)
    later, meter = around(AgentSD(agent_steps=0, random=False), x, (1, 8, 12))
    expected, _ = around(ToMe(ratio=0.4, random=False), x, (1, 8, 12))
    torch.testing.assert_close(later, expected)
    assert meter.mean("density") == pytest.approx((58 / 96) ** 2)


def test_constant_tokens_come_back_with_the_gain_of_the_shortcut():
    x = torch.randn(2, 1, 8).expand(-1, 96, -1).contiguous()
    out, meter = around(AgentSD(**STILL), x, (1, 8, 12))
    assert meter.mean("agents") == 6
    torch.testing.assert_close(out, 1.075 * x)
    x[:, 5] = 0  # no cosine there
    assert torch.isfinite(around(AgentSD(**STILL), x, (1, 8, 12))[0]).all()


def test_means_of_many_half_precision_tokens_do_not_drown():
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    found = matching.match(x, matching.destinations((1, 64, 64), 32, None, x.device))
    features, agents = matching.merge(x, found, 3000, 4092)
    assert features.dtype == agents.dtype == torch.bfloat16
    assert (features == 1).all() and (agents == 1).all()


def test_ranking_by_likeness_beats_a_random_ranking(monkeypatch):
    x = torch.cat([smooth(4, (16, 16), 16, seed) for seed in range(3)])
    full = F.scaled_dot_product_attention(*[x.unflatten(-1, (2, 8)).transpose(1, 2)] * 3)
    full = full.transpose(1, 2).flatten(2)

    def error():
        out, meter = around(AgentSD(k_shortcut=0.0, **STILL), x, (1, 16, 16))
        assert meter.mean("agents") == 16 and meter.mean("density") < 0.08
        return (out - full).square().mean().item()

    ours = error()
    stock, g = matching.match, torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        matching, "match", lambda metric, dst: stock(torch.randn(metric.shape, generator=g), dst)
    )
    assert ours < 0.2 * error()


def test_sequences_that_are_no_grid_are_refused():
    method = AgentSD(**STILL)
    site = site_of(method, (1, 8, 12))
    with pytest.raises(mmattn.UnsupportedCall, match="not the grid"):
        method.enter(torch.randn(1, 97, 8), site=site)
    with pytest.raises(mmattn.UnsupportedCall, match="hidden states"):
        method.enter(torch.randn(1, 8, 8, 12), site=site)


def test_bad_knobs_and_round_trip():
    for knobs in (
        {"ratio": 1.0},
        {"agent_ratio": -0.1},
        {"cell": 1},
        {"late_cell": 0},
        {"agent_steps": 1.5},
        {"agent_steps": -1},
        {"max_downsample": 0},
    ):
        with pytest.raises(mmattn.ConfigError):
            AgentSD(**knobs)
    with pytest.raises(TypeError):
        AgentSD(0.4)
    method = AgentSD(ratio=0.3, agent_steps=12)
    assert AgentSD.from_dict(method.to_dict()) == method


# -- UNets ---------------------------------------------------------------------------------------------


def unet(batch=2, *, sdxl=False, **knobs):
    """Attention at 16 x 12 and 8 x 6; as in SDXL, at the lower of them only."""
    torch.manual_seed(0)
    top = ("DownBlock2D", "UpBlock2D") if sdxl else ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    settings = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "down_block_types": (top[0], "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", top[1]),
        "use_linear_projection": sdxl,
    }
    model = UNet2DConditionModel(**{**settings, **knobs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), {
        "sample": torch.randn(batch, 4, 16, 12),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
    }


def rows(x, *which):
    return {k: v[list(which)] for k, v in x.items()}


def counts(session):
    return {(s.tokens_in, s.tokens_kept, s.notes["agents"]) for s in session.stats.sites}


@torch.no_grad()
def test_unet_sites_agree_with_the_loops():
    model, x = unet()
    seen = {}
    with mmattn.attach(model, AgentSD(**STILL), sites="*attn1") as session:
        site = next(s for s in session.runs[0].sites if "down_blocks.0" in s.path)
        handle = site.module.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(x=args[0], out=out), with_kwargs=True
        )
        model(**x)
        handle.remove()
    m = site.module
    expected = reference(
        seen["x"],
        (1, 16, 12),
        4,
        int(192 * 0.4),
        192 - 12,
        (m.to_q.weight, m.to_k.weight, m.to_v.weight),
        m.heads,
    )
    expected = F.linear(expected, m.to_out[0].weight.double(), m.to_out[0].bias.double())
    torch.testing.assert_close(seen["out"].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("random", [True, False])
@torch.no_grad()
def test_unet_counts_its_work_keeps_rows_apart_and_detaches_bitwise(random):
    model, x = unet(3)
    before = model(**x).sample
    state = torch.get_rng_state()
    with mmattn.attach(model, AgentSD(random=random), seed=3) as session:
        session.step(0, 50)
        odd = model(**x).sample
        stats = session.stats
        assert counts(session) == {(192, 116, 12), (48, 48, 0)}
        # An odd batch, guidance as one batch and as calls of their own: all the same numbers.
        session.step(0, 50)
        pair = model(**rows(x, 0, 1)).sample
        session.step(0, 50)
        alone = [model(**rows(x, i)).sample for i in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(pair, odd[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(alone), odd, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(odd, before, atol=1e-3)
    assert all(s.path.endswith("attn1") and s.calls == 1 for s in stats.sites)
    for s in stats.sites:
        acts = s.tokens_in == 192
        assert s.density == pytest.approx(2 * 116 * 12 / 192**2 if acts else 1.0)
        assert bool(s.dense) != acts
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_settings_that_merge_nothing_are_bitwise_the_untouched_model():
    model, x = unet()
    before = model(**x).sample
    for method in (
        AgentSD(ratio=0.0),
        AgentSD(ratio=0.004, **STILL),  # less than one token of 192
        AgentSD(cell=16, **STILL),  # no full cell
    ):
        with mmattn.attach(model, method) as session:
            assert torch.equal(model(**x).sample, before)
            assert method.passive or session.stats.dense_calls == session.stats.calls


@torch.no_grad()
def test_agents_follow_the_clock():
    model, x = unet(1)
    with mmattn.attach(model, AgentSD()) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        agents = []
        for step in range(5):
            session.step(step, 5)
            for site in session.runs[0].sites:
                site.meter.reset()
            model(**x)
            agents.append(counts(session) - {(48, 48, 0)})
    assert agents == [{(192, 116, 12)}] * 2 + [{(192, 116, 0)}] * 3
    assert [AgentSD().phase(i, 50) for i in (0, 19, 20, 49)] == [True, True, False, False]
    assert [AgentSD(agent_steps=1).phase(i, 50) for i in (0, 1)] == [True, False]
    assert AgentSD(agent_steps=1.0).phase(None, None) is True
    assert AgentSD(agent_steps=0).phase(None, None) is False


@torch.no_grad()
def test_seed_and_step_decide_the_places():
    model, x = unet(1)

    def outs(seed):
        with mmattn.attach(model, AgentSD(agent_steps=1.0), seed=seed) as session:
            found = []
            for step in (0, 1, 0):
                session.step(step, 2)
                found.append(model(**x).sample)
            return found

    first, second, again = outs(0)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(outs(0), (first, second, again), strict=True))
    assert not torch.equal(outs(1)[0], first)


@torch.no_grad()
def test_sdxl_needs_max_downsample_2():
    model, x = unet(sdxl=True)
    before = model(**x).sample
    with mmattn.attach(model, AgentSD(**STILL)) as session:
        assert torch.equal(model(**x).sample, before)
        assert counts(session) == {(48, 48, 0)}
        reason = next(iter(session.stats.sites[0].dense))
        assert "max_downsample" in reason
    with mmattn.attach(model, AgentSD(max_downsample=2, **STILL)) as session:
        assert not torch.allclose(model(**x).sample, before, atol=1e-3)
        assert counts(session) == {(48, 29, 3)} and session.stats.dense_calls == 0


@pytest.mark.parametrize("name", ["pixart", "dit"])
@torch.no_grad()
def test_transformers_without_rotary_positions_act_in_every_block(name):
    model, x = zoo_model(name), zoo_inputs(name, 2, (1, 8, 8))
    before = model(**x).sample
    with mmattn.attach(model, AgentSD(**STILL)) as session:
        assert not torch.allclose(model(**x).sample, before, atol=1e-3)
        assert counts(session) == {(64, 39, 4)} and session.stats.dense_calls == 0
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_a_call_that_broke_off_leaves_nothing_behind():
    model, x = unet(1)
    with mmattn.attach(model, AgentSD(**STILL)) as session:
        out = model(**x).sample
        site = next(s for s in session.runs[0].sites if "down_blocks.0" in s.path)
        handle = site.module.to_v.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**x)
        handle.remove()
        small = {**x, "sample": x["sample"][:, :, :4, :2]}
        assert model(**small).sample.shape == (1, 4, 4, 2), "no full cell of 4 here"
        assert torch.equal(model(**x).sample, out)


@torch.no_grad()
def test_rotary_models_and_added_inputs_are_left_alone_with_a_reason():
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
    with pytest.raises(mmattn.NoSiteError, match="joint"):
        mmattn.attach(model, AgentSD())
    site = site_of(AgentSD(), (1, 4, 4))
    site.tags = frozenset({"rotary"})
    assert "rotary positions" in AgentSD().accepts(site)
    site.tags, site.module = frozenset(), torch.nn.Identity()
    assert AgentSD().accepts(site) is None
    site.module.residual_connection = True
    assert "adds its own input" in AgentSD().accepts(site)


@torch.no_grad()
def test_a_whole_unet_compiles_without_graph_breaks():
    one = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model, x = unet(1, block_out_channels=(8,), mid_block_type=None, **one)
    with mmattn.attach(model, AgentSD(agent_steps=1.0)) as session:
        eager = model(**x).sample
        traced = torch.compile(model, fullgraph=True, backend="eager")(**x).sample
        assert session.stats.calls == 2 * session.stats.planned
    torch.testing.assert_close(traced, eager)


@torch.no_grad()
def test_blocks_compile_one_by_one_in_both_stages():
    model, x = unet(1)
    # Blocks share a graph, and with it what is drawn at random.
    with mmattn.attach(model, AgentSD(random=False, agent_steps=0.5)) as session:
        eager = []
        for step in (0, 1):
            session.step(step, 2)
            eager.append(model(**x).sample)
        for part in (model.down_blocks[0], model.up_blocks[1]):
            part.attentions[0].transformer_blocks[0].compile(fullgraph=True, backend="eager")
        for step in (0, 1):
            session.step(step, 2)
            torch.testing.assert_close(model(**x).sample, eager[step])
        assert session.stats.calls == 4 * session.stats.planned
    assert not torch.allclose(eager[0], eager[1], atol=1e-3)
