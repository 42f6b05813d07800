"""Neighborhood attention: windows against masks from the definition, text, schedules, models, presets."""

import json
import tomllib
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods.neighborhood import NeighborhoodAttention
from mmattn.methods.sliding_window import SlidingWindow
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID = (3, 5, 7)
S = 3 * 5 * 7


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    """The CPU path of users: Triton's interpreter, tested with the op itself, is very slow."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def call(method, q, k, v, *, layout=None, index=0, kind="self", mask=None, probe=False):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0, probe)
    run.layout = layout or Layout(grid=GRID)
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), index=index, run=run)
    site.phase = run.phases[0]
    site.roles = {0: method.role(site)}

    def dense(q, k, v, mask=mask, scale=None):
        return sdpa(q, k, v, mask, scale)

    out = method.attend(q, k, v, mask=mask, scale=None, site=site, dense=dense)
    return out, site.meter


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def qkv(n=S, b=2, h=2, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) for _ in range(3)]


# -- the definition, one pair of positions at a time -------------------------------------------------


def seen_along(n, w, s, d, causal):
    """Pairs (i, j) of positions of one axis such that query i sees key j."""
    pairs = set()
    for i in range(n):
        mates = [j for j in range(n) if j % d == i % d]  # what dilation leaves of the axis
        at = mates.index(i)
        group = [p for p in range(len(mates)) if p // s == at // s]
        if causal:
            keys = range(group[-1] - w + 1, at + 1)
        else:
            leader = group[min(s // 2, len(group) - 1)]
            wanted = leader - w // 2
            first = min(range(len(mates) - w + 1), key=lambda a: abs(a - wanted))
            keys = range(first, first + w)
        pairs |= {(i, mates[p]) for p in keys if p >= 0}
    return pairs


def window_mask(grid, w, s=(1, 1, 1), d=(1, 1, 1), causal=(False,) * 3):
    """Bool ``[S, S]``: a query sees a key when it does so on every axis."""
    axes = [seen_along(*each) for each in zip(grid, w, s, d, causal, strict=True)]
    tokens = list(product(*map(range, grid)))
    return torch.tensor(
        [
            [all((a, b) in axis for a, b, axis in zip(i, j, axes, strict=True)) for j in tokens]
            for i in tokens
        ]
    )


CASES = [
    (GRID, {"window": 3}, ((3, 3, 3),)),
    (GRID, {"window": (2, 3, 4)}, ((2, 3, 4),)),
    (GRID, {"window": (1, 3, 5)}, ((1, 3, 5),)),
    (GRID, {"window": (0.5, 0.2, 0.6)}, ((2, 1, 4),)),
    (GRID, {"window": (2, 4, 4), "stride": (2, 3, 4)}, ((2, 4, 4), (2, 3, 4))),
    (GRID, {"window": 2, "dilation": (1, 2, 3)}, ((2, 2, 2), (1, 1, 1), (1, 2, 3))),
    (
        (2, 9, 8),
        {"window": (2, 3, 2), "stride": (1, 2, 2), "dilation": (1, 2, 3)},
        ((2, 3, 2), (1, 2, 2), (1, 2, 3)),
    ),
    (
        GRID,
        {"window": (2, 3, 3), "stride": (2, 2, 1), "is_causal": (True, False, False)},
        ((2, 3, 3), (2, 2, 1), (1, 1, 1), (True, False, False)),
    ),
    (GRID, {"window": 3, "is_causal": True}, ((3, 3, 3), (1,) * 3, (1,) * 3, (True,) * 3)),
    ((1, 7, 9), {"window": 3, "stride": 2}, ((1, 3, 3), (1, 2, 2))),
    ((1, 7, 9), {"window": (18, 4, 3)}, ((1, 4, 3),)),
    ((1, 1, 11), {"window": 3}, ((1, 1, 3),)),
    ((4, 1, 6), {"window": 3, "is_causal": True}, ((3, 1, 3), (1,) * 3, (1,) * 3, (True,) * 3)),
]


@pytest.mark.parametrize(("grid", "knobs", "definition"), CASES)
def test_windows_density_and_recall_are_those_of_the_definition(grid, knobs, definition):
    mask = window_mask(grid, *definition)
    assert not mask.all()
    q, k, v = qkv(len(mask))
    out, meter = call(NeighborhoodAttention(**knobs), q, k, v, layout=Layout(grid), probe=True)
    torch.testing.assert_close(out, sdpa(q, k, v, mask))
    assert meter.mean("density") == pytest.approx(mask.float().mean().item())
    assert NeighborhoodAttention(**knobs).density(grid) == meter.mean("density")
    mass = (q @ k.mT * 8**-0.5).softmax(-1)
    assert meter.mean("recall") == pytest.approx((mass * mask).sum(-1).mean().item(), rel=1e-5)
    assert not meter.dense


def test_what_does_not_fit_is_cut_and_said():
    q, k, v = qkv()
    method = NeighborhoodAttention(window=(8, 2, 4), stride=(4, 4, 1), dilation=(3, 2, 9))
    out, meter = call(method, q, k, v)
    torch.testing.assert_close(
        out, sdpa(q, k, v, window_mask(GRID, (3, 2, 4), (3, 2, 1), (1, 2, 1)))
    )
    assert list(meter.remarks) == [
        "cut to the grid: window (3, 2, 4), stride (3, 2, 1), dilation (1, 2, 1) on the axes of "
        "(3, 5, 7) tokens"
    ]
    _, fitting = call(NeighborhoodAttention(window=(3, 2, 4)), q, k, v)
    assert not fitting.remarks


@pytest.mark.parametrize("grid", [GRID, (1, 5, 7), (1, 1, 1)])
def test_a_window_over_the_whole_grid_is_dense_bitwise(grid):
    q, k, v = qkv(grid[0] * grid[1] * grid[2])
    method = NeighborhoodAttention(window=7, dilation=2)
    out, meter = call(method, q, k, v, layout=Layout(grid), probe=True)
    assert torch.equal(out, sdpa(q, k, v))
    assert meter.mean("density") == 1
    assert meter.dense == {"the window covers the whole grid": 1}
    if grid == GRID:
        out, meter = call(replace(method, is_causal=(True, False, False)), q, k, v)
        assert not meter.dense and meter.mean("density") == pytest.approx(6 / 9)


# -- text --------------------------------------------------------------------------------------------


def joint_mask(image_mask, text, padded=()):
    """Image queries see their windows and all text that is not padding; text queries see all of it."""
    n = len(image_mask) + 5
    image = slice(5, n) if text == "before" else slice(0, n - 5)
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[image, image] = image_mask
    words = [i for i in range(n) if not image.start <= i < image.stop]
    mask[:, [words[i] for i in padded]] = False
    return mask


@pytest.mark.parametrize("text", ["before", "after"])
@pytest.mark.parametrize("form", ["bool", "float", "per query"])
def test_text_is_seen_by_all_sees_all_and_its_padding_is_honoured(text, form):
    q, k, v = qkv(S + 5)
    image_mask = window_mask(GRID, (2, 3, 3), (1, 2, 1))
    wanted = torch.stack([joint_mask(image_mask, text, pad) for pad in ((), (2, 3, 4))])[:, None]
    padding = wanted.any(2, keepdim=True)
    mask = padding
    if form == "float":
        mask = torch.zeros(padding.shape).masked_fill(~padding, float("-inf"))
    elif form == "per query":
        mask = padding.expand(-1, -1, S + 5, -1)
    method = NeighborhoodAttention(window=(2, 3, 3), stride=(1, 2, 1))
    layout = Layout(grid=GRID, text=text)
    out, meter = call(method, q, k, v, layout=layout, kind="joint", mask=mask, probe=True)
    torch.testing.assert_close(out, sdpa(q, k, v, wanted))
    pairs = joint_mask(image_mask, text).float().mean().item()
    assert meter.mean("density") == pytest.approx(pairs) and pairs < 0.4
    for row in range(2):
        own = [x[row : row + 1] for x in (q, k, v)]
        alone, _ = call(method, *own, layout=layout, kind="joint", mask=mask[row : row + 1])
        torch.testing.assert_close(alone, out[row : row + 1])


def test_queries_may_be_the_image_tokens_of_the_keys():
    q, k, v = qkv(S + 5)
    layout = Layout(grid=GRID, text="before")
    whole, _ = call(NeighborhoodAttention(window=3), q, k, v, layout=layout, kind="joint")
    part, _ = call(NeighborhoodAttention(window=3), q[:, :, 5:], k, v, layout=layout, kind="joint")
    torch.testing.assert_close(part, whole[:, :, 5:])


def test_calls_that_cannot_be_honoured_are_refused():
    q, k, v = qkv()
    with pytest.raises(mmattn.UnsupportedCall, match="no token grid"):
        call(NeighborhoodAttention(), q, k, v, layout=Layout())
    with pytest.raises(mmattn.UnsupportedCall, match="different tokens"):
        call(NeighborhoodAttention(), q[:, :, :9], k, v)
    hides = torch.ones(1, 1, 1, S, dtype=torch.bool)
    hides[..., 3] = False
    with pytest.raises(mmattn.UnsupportedCall, match="hides image tokens"):
        call(NeighborhoodAttention(), q, k, v, mask=hides)


def test_gradients_are_those_of_masked_attention():
    q, k, v = (x.double().requires_grad_() for x in qkv(S + 5, 1, 2))
    method = NeighborhoodAttention(window=(2, 3, 2), stride=(1, 2, 1), dilation=(1, 1, 2))
    out, _ = call(method, q, k, v, layout=Layout(GRID, "after"), kind="joint")
    mask = joint_mask(window_mask(GRID, (2, 3, 2), (1, 2, 1), (1, 1, 2)), "after")
    g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, (q, k, v), g)
    for a, b in zip(ours, torch.autograd.grad(sdpa(q, k, v, mask), (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b)


# -- does it keep the right keys? --------------------------------------------------------------------


def test_local_attention_is_kept_better_than_by_random_keys_or_a_1d_window():
    grid, n = (6, 8, 8), 6 * 8 * 8
    where = torch.tensor(list(product(*map(range, grid))), dtype=torch.float32)
    errors = dict.fromkeys(("ours", "flat", "random"), 0.0)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        # Random Fourier features: a product of two of them falls with their distance like a Gaussian.
        angles = where @ (torch.randn(3, 64, generator=g) / 1.5)
        # Scaled so that a score is 8 at distance 0.
        features = torch.cat([angles.cos(), angles.sin()], 1) * (8 * 128**0.5 / 64) ** 0.5
        q, k = (features + 0.1 * torch.randn(1, 1, n, 128, generator=g) for _ in "qk")
        v = torch.randn(1, 1, n, 128, generator=g)
        full = sdpa(q, k, v)
        both = (NeighborhoodAttention(window=(3, 5, 5)), SlidingWindow(window=75))
        (ours, meter), (flat, flat_meter) = (
            call(m, q, k, v, layout=Layout(grid), probe=True) for m in both
        )
        assert meter.mean("recall") > 0.9 > 0.7 > flat_meter.mean("recall")
        keep = torch.rand(n, n, generator=g).topk(75).indices
        random = sdpa(q, k, v, torch.zeros(n, n, dtype=torch.bool).scatter_(1, keep, True))
        assert meter.mean("density") == flat_meter.mean("density") == 75 / n
        for name, out in zip(errors, (ours, flat, random), strict=True):
            errors[name] += ((out - full).square().sum() / full.square().sum()).item() / 3
    assert 0 < errors["ours"] < 0.05 * errors["flat"]
    assert errors["flat"] < 0.3 * errors["random"]


# -- models ------------------------------------------------------------------------------------------


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


def wan_inputs(batch=1, frames=4, rows=4):
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, frames, 2 * rows, 12, generator=g),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=g),
    }


SCHEDULE = NeighborhoodAttention(window=[(4, 1, 1), 3, (1, 4, 6)], dense_layers=1)


@torch.no_grad()
def test_wan_follows_the_schedule_counts_density_and_detaches_bitwise():
    model, x = wan(5), wan_inputs()
    before = model(**x).sample
    state = torch.get_rng_state()
    with mmattn.attach(model, SCHEDULE) as session:
        out = model(**x).sample
        stats = session.stats
    assert torch.equal(torch.get_rng_state(), state)
    assert [s.path for s in stats.sites] == [f"blocks.{i}.attn1" for i in range(5)]
    # Grid 4 x 4 x 6; the first layer is dense and still counts.
    assert [s.density for s in stats.sites] == pytest.approx([1, 27 / 96, 1 / 4, 1 / 24, 27 / 96])
    assert stats.calls == stats.executed == 5 and stats.dense_calls == 1
    assert not torch.allclose(out, before)
    assert torch.equal(model(**x).sample, before)


def test_roles_are_few():
    sites = [Site("attn", "self", torch.nn.Identity(), index=i) for i in range(7)]
    assert [SCHEDULE.role(s) for s in sites] == [None, 1, 2, 0, 1, 2, 0]
    repeated = NeighborhoodAttention(
        window=[(3, 3, 3), (3, 3, 3), (5, 5, 5)], stride=[1, (1, 1, 1)]
    )
    assert [repeated.role(s) for s in sites] == [0, 0, 2, 0, 0, 2, 0]
    both = NeighborhoodAttention(window=[(3, 3, 3), 5], stride=[1, 1, (2, 2, 2)])
    assert [both.role(s) for s in sites] == [0, 1, 2, 1, 0, 5, 0]


@torch.no_grad()
def test_recall_in_the_report_is_the_dense_mass_in_the_windows():
    model = wan(2)
    seen = {}

    @dataclass(frozen=True)
    class Capture(mmattn.Method):
        name: ClassVar[str] = "capture"
        observes: ClassVar[bool] = True
        masks: ClassVar[bool] = True

        def attend(self, q, k, v, *, mask, scale, site, dense):
            seen[site.path] = (q, k)
            return dense(q, k, v)

    with mmattn.attach(model, [Capture(), NeighborhoodAttention(window=3)], probe=True) as session:
        model(**wan_inputs(2))
        stats = session.stats
    mask = window_mask((4, 4, 6), (3, 3, 3))
    for site in stats.sites:
        q, k = seen[site.path]
        mass = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        expected = (mass * mask).sum(-1).mean().item()
        assert 0 < expected < 1
        assert site.recall == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_cfg_batch_equals_two_calls():
    model, x = wan(), wan_inputs(2)
    with mmattn.attach(model, NeighborhoodAttention()) as session:
        both = model(**x).sample
        alone = [model(**{k: v[i : i + 1] for k, v in x.items()}).sample for i in range(2)]
        assert session.stats.density == pytest.approx(1 / 8)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dense_steps", [2, 0.25])
def test_dense_steps_follow_the_clock_and_need_one(dense_steps):
    model, x = wan(1), wan_inputs()
    before = model(**x).sample
    with mmattn.attach(model, NeighborhoodAttention(dense_steps=dense_steps)) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        equal = []
        for step in range(8):
            session.step(step, 8)
            equal.append(torch.equal(model(**x).sample, before))
        reasons = session.stats.sites[0].dense
    assert equal == [True] * 2 + [False] * 6
    assert reasons == {"one of the first steps (dense_steps)": 2}


@torch.no_grad()
def test_flux_images_have_no_window_over_time():
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
    with mmattn.attach(model, NeighborhoodAttention(window=(1, 3, 4), stride=2)) as session:
        out = model(**x).sample
        assert session.stats.executed == 3 and session.stats.dense_calls == 0
        pairs = 48 * 12 + 2 * 48 * 5 + 25
        assert session.stats.density == pytest.approx(pairs / 53**2)
    assert torch.isfinite(out).all() and not torch.allclose(out, before)
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
@pytest.mark.parametrize("regional", [True, False])
def test_compiles_without_graph_breaks_at_two_resolutions(regional):
    method = replace(SCHEDULE, dense_layers=0) if regional else SCHEDULE
    model, sizes = wan(4 if regional else 2), ({}, {"frames": 3, "rows": 5})
    with mmattn.attach(model, method) as session:
        eager = [model(**wan_inputs(**size)).sample for size in sizes]
        torch._dynamo.reset()
        compiled = model
        if regional:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        else:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
        for size, expected in zip(sizes, eager, strict=True):
            torch.testing.assert_close(compiled(**wan_inputs(**size)).sample, expected)
        assert session.stats.calls == 4 * session.stats.planned


# -- knobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "grid", "sparsity", "steps"),
    [
        ("flux_4k", (1, 256, 256), 90.2, (9, 28)),
        ("hunyuan_720p", (30, 48, 80), 91.0, (15, 50)),
        ("cosmos_720p", (16, 44, 80), 56.4, (12, 35)),
        ("wan_720p", (21, 45, 80), 90.9, (15, 50)),
    ],
)
def test_presets_have_the_documented_sparsity_and_dense_steps(preset, grid, sparsity, steps):
    method = getattr(NeighborhoodAttention, preset)()
    assert round(100 * (1 - method.density(grid)), 1) == sparsity
    first, total = steps
    assert [method.phase(i, total) for i in (0, first - 1, first)] == [False, False, True]
    assert NeighborhoodAttention.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_expected_speedups_are_the_documented_ones():
    hunyuan, flux = NeighborhoodAttention.hunyuan_720p(), NeighborhoodAttention.flux_4k()
    tiles = ((30, 48, 80), (4, 8, 8), (2, 8, 8))
    assert hunyuan.expected_speedup(*tiles) == pytest.approx(11.11, abs=0.006)
    assert replace(hunyuan, stride=1).expected_speedup(*tiles) == pytest.approx(3.27, abs=0.006)
    found = flux.expected_speedup((1, 256, 256), (1, 16, 16), (1, 16, 8))
    assert found == pytest.approx(10.24, abs=0.006)
    ours = NeighborhoodAttention.wan_720p().expected_speedup((21, 45, 80), (4, 8, 8), (4, 4, 4))
    assert ours == pytest.approx(8.57, abs=0.006)


def test_nested_settings_round_trip_through_json_and_toml(tmp_path):
    method = NeighborhoodAttention(
        window=[[3, 7, 7], 0.5, (1, 0.25, 9)], stride=[1, 2, 1], is_causal=[True, False, False]
    )
    assert method.window == ((3, 7, 7), (0.5, 0.5, 0.5), (1, 0.25, 9)) and hash(method)
    assert NeighborhoodAttention.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    toml = tomllib.loads("window = [[3, 7, 7], 0.5, [1, 0.25, 9]]\nstride = [1, 2, 1]")
    toml["is_causal"] = [True, False, False]
    assert NeighborhoodAttention.from_dict(toml) == method


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"window": 0}, "window counts tokens"),
        ({"window": True}, "window counts tokens"),
        ({"window": "3"}, "window counts tokens"),
        ({"window": 1.0}, r"share of the tokens in \(0, 1\)"),
        ({"window": (3, 3)}, "one value per axis"),
        ({"window": ()}, "one value per axis"),
        ({"window": [(3, 3, 3), (3, 3)]}, "one value per axis"),
        ({"stride": 0.5}, "stride counts tokens"),
        ({"dilation": (1, 0, 1)}, "dilation counts tokens"),
        ({"is_causal": (True, False)}, "is_causal"),
        ({"is_causal": 1}, "is_causal"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        NeighborhoodAttention(**knobs)
