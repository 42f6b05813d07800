"""Sliding window: the 1-D baseline against masks from the definition, text, models, knobs."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

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


def call(method, q, k, v, *, layout=None, kind="self", mask=None, probe=False):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0, probe)
    run.layout = layout or Layout(grid=GRID)
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), run=run)
    site.phase = run.phases[0]
    site.roles = {0: method.role(site)}

    def dense(q, k, v, mask=mask, scale=None):
        return sdpa(q, k, v, mask)

    out = method.attend(q, k, v, mask=mask, scale=None, site=site, dense=dense)
    return out, site.meter


def sdpa(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv(n=S, b=2, h=2, d=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(b, h, n, d, generator=g) for _ in range(3)]


def nearest(n, window, stride=1):
    """Bool ``[n, n]``: the `window` keys nearest to the middle one of every `stride` queries."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        group = range(i // stride * stride, min((i // stride + 1) * stride, n))
        leader = group[min(stride // 2, len(group) - 1)]
        # Of two keys equally far away, the earlier one.
        mask[i, sorted(range(n), key=lambda j: (abs(j - leader), j))[:window]] = True
    return mask


@pytest.mark.parametrize(
    ("knobs", "window", "stride"),
    [
        ({"window": 1}, 1, 1),
        ({"window": 9}, 9, 1),
        ({"window": 10}, 10, 1),
        ({"window": 0.3}, 32, 1),
        ({"window": 9, "stride": 4}, 9, 4),
        ({"window": 8, "stride": 20}, 8, 8),
        ({"window": S - 1}, S - 1, 1),
    ],
)
def test_every_query_sees_the_nearest_tokens_in_raster_order(knobs, window, stride):
    q, k, v = qkv()
    mask = nearest(S, window, stride)
    out, meter = call(SlidingWindow(**knobs), q, k, v, probe=True)
    torch.testing.assert_close(out, sdpa(q, k, v, mask))
    assert meter.mean("density") == pytest.approx(window / S) and not meter.dense
    mass = (q @ k.mT * 8**-0.5).softmax(-1)
    assert meter.mean("recall") == pytest.approx((mass * mask).sum(-1).mean().item(), rel=1e-5)
    assert list(meter.remarks) == (
        ["cut to the grid: window (8,), stride (8,), dilation (1,) on the axes of (105,) tokens"]
        if stride != knobs.get("stride", 1)
        else []
    )


def test_it_is_neighborhood_attention_on_a_row_and_nothing_else():
    q, k, v = qkv(11)
    row = Layout(grid=(1, 1, 11))
    ours, _ = call(SlidingWindow(window=5, stride=2), q, k, v, layout=row)
    theirs, _ = call(NeighborhoodAttention(window=5, stride=2), q, k, v, layout=row)
    assert torch.equal(ours, theirs)
    q, k, v = qkv()
    ours, flat = call(SlidingWindow(window=27), q, k, v)
    theirs, boxes = call(NeighborhoodAttention(window=3), q, k, v)
    assert flat.mean("density") == boxes.mean("density") and not torch.allclose(ours, theirs)


@pytest.mark.parametrize("window", [S, 10**6])
def test_a_window_over_all_tokens_is_dense_bitwise(window):
    q, k, v = qkv()
    out, meter = call(SlidingWindow(window=window), q, k, v)
    assert torch.equal(out, sdpa(q, k, v))
    assert meter.mean("density") == 1 and sum(meter.dense.values()) == 1


@pytest.mark.parametrize("text", ["before", "after"])
def test_text_is_dense_and_its_padding_is_honoured_row_by_row(text):
    q, k, v = qkv(S + 4)
    image = slice(4, S + 4) if text == "before" else slice(0, S)
    words = [i for i in range(S + 4) if not image.start <= i < image.stop]
    wanted = torch.ones(2, 1, S + 4, S + 4, dtype=torch.bool)
    wanted[:, :, image, image] = nearest(S, 11)
    wanted[1, ..., words[2:]] = False
    padding = wanted.any(2, keepdim=True)
    layout, method = Layout(grid=GRID, text=text), SlidingWindow(window=11)
    out, meter = call(method, q, k, v, layout=layout, kind="joint", mask=padding)
    torch.testing.assert_close(out, sdpa(q, k, v, wanted))
    assert meter.mean("density") == pytest.approx((S * 11 + 8 * S + 16) / (S + 4) ** 2)
    for row in range(2):
        own, mask = [x[row : row + 1] for x in (q, k, v)], padding[row : row + 1]
        alone, _ = call(method, *own, layout=layout, kind="joint", mask=mask)
        torch.testing.assert_close(alone, out[row : row + 1])


def test_gradients_are_those_of_masked_attention():
    q, k, v = (x.double().requires_grad_() for x in qkv(S, 1))
    out, _ = call(SlidingWindow(window=12, stride=5), q, k, v)
    g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    expected = sdpa(q, k, v, nearest(S, 12, 5))
    ours = torch.autograd.grad(out, (q, k, v), g)
    for a, b in zip(ours, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b)


def wan():
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
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model.eval()


def wan_inputs(batch=1):
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, 4, 8, 12, generator=g),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=g),
    }


@torch.no_grad()
def test_wan_runs_steps_and_layers_as_asked_and_detaches_bitwise():
    model, x = wan(), wan_inputs(2)
    before = model(**x).sample
    with mmattn.attach(model, SlidingWindow(window=24, dense_steps=2, dense_layers=1)) as session:
        with pytest.raises(mmattn.ConfigError, match="no step clock"):
            model(**x)
        equal, out = [], before
        for step in range(4):
            session.step(step, 4)
            out = model(**x).sample
            equal.append(torch.equal(out, before))
        first, second = session.stats.sites
        alone = [model(**{k: v[i : i + 1] for k, v in x.items()}).sample for i in range(2)]
    assert equal == [True, True, False, False]
    assert (first.density, second.density) == (1, pytest.approx((2 + 2 * 24 / 96) / 4))
    assert set(first.dense.values()) == {2} and sum(second.dense.values()) == 2
    torch.testing.assert_close(torch.cat(alone), out, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(**x).sample, before)


@torch.no_grad()
def test_compiles_without_graph_breaks():
    model, x = wan(), wan_inputs()
    with mmattn.attach(model, SlidingWindow()) as session:
        eager = model(**x).sample
        assert session.stats.density == 0.25
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(**x).sample, eager)
        assert session.stats.calls == 2 * session.stats.planned


def test_recipe_round_trip():
    method = SlidingWindow(window=0.1, stride=64, dense_steps=0.25, dense_layers=2)
    assert SlidingWindow.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"window": 0}, "window counts tokens"),
        ({"window": "all"}, "window counts tokens"),
        ({"window": 1.0}, "share of the tokens"),
        ({"stride": 0}, "stride"),
        ({"stride": 0.5}, "stride"),
        ({"dense_steps": 1.5}, "dense_steps"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        SlidingWindow(**knobs)
