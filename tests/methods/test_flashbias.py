"""FlashBias: factors against dense biases, caching, masks it must leave alone, BEiT, Swin and SwinV2."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.errors import ConfigError, NoSiteError, UnsupportedCall
from mmattn.methods import flashbias
from mmattn.methods.flashbias import FlashBias, alibi, factorise, with_factors
from mmattn.runs import Root, Run
from mmattn.sites import Site


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def oracle(q, k, v, bias, scale=None):
    s = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ k.double().mT * s + bias.double()
    return (scores.softmax(-1) @ v.double()).float()


def site_for(method):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    return Site(path="attn", kind="self", module=torch.nn.Identity(), run=run)


def call(method, q, k, v, mask, *, site=None, scale=None):
    site = site or site_for(method)

    def dense(q, k, v, mask=mask, scale=scale):
        return sdpa(q, k, v, mask, scale)

    out = method.attend(q, k, v, mask=mask, scale=scale, site=site, dense=dense)
    return out, site


def qkv(b=2, h=3, n=36, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) for _ in range(3)]


def smooth(table_heads=3, side=6, noise=0.0):
    """A relative bias as trained tables look: a bump per head, `[1, H, N, N]`."""
    g = torch.Generator().manual_seed(3)
    at = torch.arange(1 - side, side) / side
    bumps = [
        3 * torch.exp(-((2 + h) * (at[:, None] - 0.2 * h) ** 2 + (1 + h) * at[None] ** 2))
        for h in range(table_heads)
    ]
    table = torch.stack(bumps) + noise * torch.randn(
        table_heads, 2 * side - 1, 2 * side - 1, generator=g
    )
    y, x = torch.arange(side * side) // side, torch.arange(side * side) % side
    return table[:, y[:, None] - y + side - 1, x[:, None] - x + side - 1][None]


# -- factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
def test_full_rank_is_exact_and_a_function_of_the_query_changes_nothing(scale):
    q, k, v = qkv(n=17)
    bias = torch.randn(1, 3, 17, 17)
    factors = factorise(bias, energy=1.0, dtype=torch.float64)
    assert float(factors.error.max()) < 1e-6 and factors.query.shape[-1] <= 17
    out = with_factors(q, k, v, factors.query.float(), factors.key.float(), scale, sdpa)
    expected = oracle(q, k, v, bias, scale)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    shifted = factorise(bias + 5 * torch.randn(1, 3, 17, 1), energy=1.0)
    again = with_factors(q, k, v, shifted.query, shifted.key, scale, sdpa)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_is_rank_one_found_and_built(causal):
    q, k, v = qkv(n=29)
    slopes = 2.0 ** (-8 * torch.arange(1, 4) / 3)
    i = torch.arange(29)
    bias = (-slopes[:, None, None] * (i[:, None] - i))[None]
    found, built = factorise(bias), alibi(slopes, 29, 29)
    assert found.query.shape[-1] == built.query.shape[-1] == 1
    assert found.rank.tolist() == [[1, 1, 1]]
    hidden = torch.full((29, 29), -math.inf).triu(1) if causal else torch.zeros(29, 29)
    expected = oracle(q, k, v, bias + hidden)

    def dense(q, k, v, mask=None, scale=None):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)

    for factors in (found, built):
        out = with_factors(q, k, v, factors.query, factors.key, None, dense)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_half_precision_alibi_stays_accurate_on_long_rows():
    """Raw positions above 2048 are not fp16 numbers; counted from the middle they are off by less."""
    n = 6000
    bias = (0.5 * torch.arange(n).float())[None, None, None]
    ours = factorise(bias, dtype=torch.float16).error.item()
    raw = torch.arange(n).half().double() * 0.5 - 0.5 * torch.arange(n)
    assert 0 < ours <= 0.51 * raw.abs().max()


def test_energy_keeps_the_smallest_sufficient_rank():
    bias = smooth(noise=0.05)
    factors = factorise(bias, energy=0.99)
    centred = bias - bias.mean(-1, keepdim=True)
    values = torch.linalg.svdvals(centred.double()) ** 2
    share = values.cumsum(-1) / values.sum(-1, keepdim=True)
    for h, rank in enumerate(factors.rank[0].tolist()):
        assert 1 < rank < 36
        assert share[0, h, rank - 1] >= 0.99 > share[0, h, rank - 2]
        rest = (centred[0, h] - factors.query[0, h] @ factors.key[0, h].T).square().sum()
        torch.testing.assert_close(
            rest / centred[0, h].square().sum(),
            (1 - share[0, h, rank - 1]).float(),
            atol=1e-5,
            rtol=1e-3,
        )


@pytest.mark.parametrize("bound", [0.3, 0.05])
def test_max_error_is_kept_and_bounds_the_output(bound):
    q, k, v = qkv()
    bias = smooth(noise=0.02)
    factors = factorise(bias, max_error=bound)
    assert float(factors.error.max()) <= bound * 1.001
    less = factorise(bias, max_error=bound, most=int(factors.rank.max()) - 1)
    assert (less.rank > int(factors.rank.max()) - 1).any()  # one less would not do
    out = with_factors(q, k, v, factors.query, factors.key, None, sdpa)
    worst = (out - oracle(q, k, v, bias)).norm(dim=-1).max()
    assert worst <= (math.exp(2 * bound) - 1) * v.norm(dim=-1).max()


def test_better_than_random_factors_of_equal_rank():
    q, k, v = qkv()
    bias = smooth(noise=0.02)
    factors = factorise(bias, energy=0.995)
    centred = bias - bias.mean(-1, keepdim=True)
    basis = torch.linalg.qr(torch.randn(1, 3, 36, factors.key.shape[-1]))[0]
    ours = with_factors(q, k, v, factors.query, factors.key, None, sdpa)
    other = with_factors(q, k, v, centred @ basis, basis, None, sdpa)
    want = oracle(q, k, v, bias)
    assert (ours - want).norm() < 0.2 * (other - want).norm()


# -- the method -----------------------------------------------------------------------------------


def test_the_method_equals_dense_reports_and_reuses_its_factors(monkeypatch):
    q, k, v = qkv()
    method = FlashBias(max_error=0.01, max_rank=30)
    made = []
    plain = flashbias.factorise
    monkeypatch.setattr(flashbias, "factorise", lambda *a, **o: made.append(1) or plain(*a, **o))
    bias = smooth()
    out, site = call(method, q, k, v, bias)
    torch.testing.assert_close(out, oracle(q, k, v, bias), atol=0.02, rtol=0)
    assert not torch.equal(out, sdpa(q, k, v, bias))
    assert 1 < site.meter.mean("rank") <= 30 < 36
    assert 0 < site.meter.mean("bias_error") <= 0.0101
    assert not site.meter.dense and "rank" in next(iter(site.meter.remarks))
    again, _ = call(method, q, k, v, bias.clone(), site=site)
    assert len(made) == 1 and torch.equal(again, out)
    changed = bias.clone()
    changed[0, 1] = bias[0, 1].flip(-1)
    other, _ = call(method, q, k, v, changed, site=site)
    assert len(made) == 2
    torch.testing.assert_close(other, oracle(q, k, v, changed), atol=0.02, rtol=0)
    bias[0, 0] *= 0.5  # in place, the same tensor object as in the first call
    call(method, q, k, v, bias, site=site)
    assert len(made) == 3


def test_too_high_a_rank_runs_dense_bitwise_and_is_counted():
    q, k, v = qkv()
    bias = torch.randn(1, 3, 36, 36)
    out, site = call(FlashBias(max_rank=8), q, k, v, bias)
    assert torch.equal(out, sdpa(q, k, v, bias))
    assert list(site.meter.dense) and "rank above 8" in next(iter(site.meter.dense))


def test_rows_with_masks_run_dense_and_rows_of_a_batch_do_not_touch_each_other():
    """As in shifted windows: the same bias everywhere, -100 between strangers in some windows."""
    q, k, v = qkv(b=6)
    bias = smooth().expand(6, -1, -1, -1).clone()
    group = (torch.arange(36) >= 18).int()
    bias[[2, 5]] += torch.where(group[:, None] == group, 0.0, -100.0)
    method = FlashBias(max_error=0.05, max_rank=30)
    out, site = call(method, q, k, v, bias)
    assert site.meter.mean("low_rank_rows") == pytest.approx(4 / 6)
    torch.testing.assert_close(out[[2, 5]], sdpa(q, k, v, bias)[[2, 5]], atol=1e-6, rtol=1e-5)
    assert 0.1 > (out - oracle(q, k, v, bias)).abs().max() > 1e-5
    for row in range(6):
        one = slice(row, row + 1)
        alone, _ = call(method, q[one], k[one], v[one], bias[one])
        torch.testing.assert_close(out[one], alone, atol=1e-5, rtol=1e-5)


def test_one_batch_of_two_equals_two_calls():
    q, k, v = qkv()
    bias = torch.cat([smooth(), smooth(noise=0.3)])
    method = FlashBias(energy=0.9, max_rank=36)
    both, _ = call(method, q, k, v, bias)
    for row in range(2):
        one = slice(row, row + 1)
        alone, _ = call(method, q[one], k[one], v[one], bias[one])
        torch.testing.assert_close(both[one], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 36, 36, dtype=torch.bool)])
def test_calls_without_a_bias_raise(mask):
    with pytest.raises(UnsupportedCall, match="no additive bias"):
        call(FlashBias(), *qkv(), mask)


def test_infinite_masks_are_left_dense():
    q, k, v = qkv()
    mask = torch.zeros(1, 1, 1, 36)
    mask[..., 30:] = -math.inf
    out, site = call(FlashBias(), q, k, v, mask)
    assert torch.equal(out, sdpa(q, k, v, mask)) and "hide keys" in next(iter(site.meter.dense))


def test_a_bias_that_trains_raises_and_settings_are_checked():
    with pytest.raises(UnsupportedCall, match="gradient"):
        call(FlashBias(), *qkv(), smooth().requires_grad_())
    for wrong in ({"energy": 0.0}, {"energy": 1.5}, {"max_error": 0.0}, {"max_rank": 0}):
        with pytest.raises(ConfigError):
            FlashBias(**wrong)


# -- models ---------------------------------------------------------------------------------------


def smooth_tables(model):
    """Bias tables as training leaves them; timm's random start has full rank."""
    for module in model.modules():
        table = getattr(module, "relative_position_bias_table", None)
        if table is not None:
            wy, wx = module.window_size
            y = torch.arange(1 - wy, wy)[:, None, None] / wy
            x = torch.arange(1 - wx, wx)[None, :, None] / wx
            h = torch.arange(table.shape[1]) + 1
            bump = (3 * torch.exp(-h * (y**2 + x**2))).flatten(0, 1)
            table.data[: len(bump)] = bump
    return model.eval()


def beit():
    knobs = {"img_size": 96, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return smooth_tables(timm.create_model("beit_base_patch16_224", **knobs))


def swin():
    knobs = {"img_size": 64, "window_size": 8, "embed_dim": 12, "depths": (2, 2, 1, 1)}
    return smooth_tables(
        timm.create_model(
            "swin_tiny_patch4_window7_224", num_heads=(2, 2, 2, 2), num_classes=5, **knobs
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("build", [beit, swin])
def test_timm_models(build):
    model, x = build(), torch.randn(2, 3, *([96, 96] if build is beit else [64, 64]))
    before = model(x)
    with mmattn.attach(model, FlashBias(max_error=0.01, max_rank=40)) as session:
        out = model(x)
        notes = [s.meter.mean("rank") for run in session.runs for s in run.sites]
        partly = [s.meter.mean("low_rank_rows") for run in session.runs for s in run.sites]
        assert "largest error" in session.report()
    assert all(rank is not None and rank >= 1 for rank in notes)
    # Only the shifted block of the first Swin stage, 2 x 2 windows, cuts windows: all but the first.
    assert partly == ([1.0, 1.0] if build is beit else [1.0, 0.25, 1.0, 1.0, 1.0, 1.0])
    assert not torch.equal(out, before)
    assert (out - before).norm() < 0.01 * before.norm()
    assert torch.equal(model(x), before)


def test_swin_v2_is_no_site():
    model = timm.create_model("swinv2_tiny_window8_256", embed_dim=12, depths=(1, 1, 1, 1))
    with pytest.raises(NoSiteError, match="softmax itself"):
        mmattn.attach(model, FlashBias())


@torch.no_grad()
def test_compiles_after_one_eager_call_and_notices_another_bias():
    model, x = beit(), torch.randn(1, 3, 96, 96)
    with mmattn.attach(model, FlashBias(max_error=0.01, max_rank=40)):
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), eager, atol=1e-5, rtol=1e-5)
        model.blocks[0].attn.relative_position_bias_table.mul_(0.5)
        with pytest.raises(RuntimeError, match="bias changed"):
            compiled(x)
