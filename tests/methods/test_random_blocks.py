"""RandomBlocks: how many blocks, which ones, and what the draw depends on."""

import itertools

import diffusers_zoo as zoo
import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods._image_attention import Part
from mmattn.methods.random_blocks import RandomBlocks
from mmattn.runs import Root, Run
from mmattn.sites import Site
from tests.methods.test_vmoba_models import wan, wan_inputs

N, BLOCK = 12, 16
S = N * BLOCK
GRID = (2, 8, 12)


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    """Plain torch instead of Triton's interpreter, which the kernels' own tests cover."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def site_of(method, *, index=0, seed=0, step=None):
    clock = StepClock()
    run = Run(Root("", torch.nn.Identity()), (method,), clock, "error", seed)
    clock.on_change.append(run.on_clock)
    if step is not None:
        clock.set(step, 9)
    run.layout = Layout(grid=GRID)
    site = Site(path="attn", kind="self", module=torch.nn.Identity(), index=index, run=run)
    site.phase, site.roles = run.phases[0], {0: method.role(site)}
    return site


def draw(density=0.5, batch=2, **where):
    method = RandomBlocks(block=BLOCK, density=density)
    site = site_of(method, **where)
    q = torch.randn(batch, 3, S, 4)
    part = Part(q, q, q, 0, GRID, None, False, slice(0, batch), site)
    return method.choose(q, q, part)


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.99])
def test_every_row_keeps_its_own_block_and_as_many_as_asked(density):
    keep = draw(density)
    assert keep.shape == (1, 3, N, N)
    assert (keep.sum(-1) == max(1, int(N * density))).all()
    assert keep.diagonal(dim1=-2, dim2=-1).all()


def test_larger_densities_keep_what_smaller_ones_keep():
    keeps = [draw(d) for d in (0.1, 0.3, 0.6, 0.9)]
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(keeps))


def test_the_draw_depends_on_seed_layer_and_step_alone():
    base = draw()
    assert torch.equal(base, draw(batch=1)) and torch.equal(draw(step=3), draw(step=3))
    others = [draw(seed=1), draw(index=1), draw(step=0), draw(step=1)]
    assert not any(torch.equal(base, other) for other in others)
    assert not torch.equal(others[2], others[3])


def test_blocks_are_drawn_evenly():
    """Off the diagonal every block is kept equally often, by every head."""
    count = sum(draw(4 / N, step=i % 9, index=i).float() for i in range(200)) / 200
    off = count[0][:, ~torch.eye(N, dtype=torch.bool)]
    assert off.mean().item() == pytest.approx(3 / 11, abs=1e-6)
    assert (off - 3 / 11).abs().max() < 5 * (3 / 11 * 8 / 11 / 200) ** 0.5
    assert not torch.equal(draw()[:, 0], draw()[:, 1])


def test_output_is_masked_attention_and_leaves_random_numbers_alone():
    q, k, v = (torch.randn(2, 3, S, 8) for _ in range(3))
    method = RandomBlocks(block=BLOCK, density=0.25)
    site = site_of(method)
    state = torch.get_rng_state()
    out = method.attend(q, k, v, mask=None, scale=0.5, site=site, dense=None)
    assert torch.equal(torch.get_rng_state(), state)
    part = Part(q, k, v, 0, GRID, None, False, slice(0, 2), site)
    home = torch.arange(S) // BLOCK
    mask = method.choose(q, k, part)[..., home[:, None], home]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(out, expected)
    assert site.meter.mean("density") == pytest.approx(0.25)


@torch.no_grad()
def test_guidance_in_two_calls_draws_what_one_batch_draws():
    model, x = zoo.model("wan"), zoo.inputs("wan", 2, (3, 4, 8))
    with mmattn.attach(model, RandomBlocks(block=BLOCK, density=0.5)) as session:
        session.step(0, 2)
        both = zoo.call(model, x)
        session.step(0, 2)
        alone = [zoo.call(model, {k: v[i : i + 1] for k, v in x.items()}) for i in range(2)]
        session.step(1, 2)
        other = zoo.call(model, x)
        assert session.stats.density == 0.5
    apart = (both - torch.cat(alone)).abs().max()
    assert apart < 1e-5 and apart < 0.01 * (both - other).abs().max()


@torch.no_grad()
def test_traced_graphs_run_dense_where_that_is_allowed():
    model, x = zoo.model("wan"), zoo.inputs("wan", 1, (3, 4, 8))
    before = zoo.call(model, x)
    with mmattn.attach(model, RandomBlocks(block=BLOCK, density=0.5), unsupported="dense"):
        assert not torch.equal(zoo.call(model, x), before)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(zoo.call(compiled, x), before)


@pytest.mark.parametrize("density", [0, -1, 1.1])
def test_density_out_of_range_is_a_config_error(density):
    with pytest.raises(mmattn.ConfigError, match="density lies in"):
        RandomBlocks(density=density)


@torch.no_grad()
def test_one_draw_for_all_steps_where_that_is_asked():
    model = wan(1)
    x = wan_inputs()
    kept = {}
    for redraw in (True, False):
        method = RandomBlocks(density=0.3, block=8, redraw=redraw)
        with mmattn.attach(model, method) as session:
            outs = []
            for step in range(2):
                session.step(step, 2)
                outs.append(model(**x).sample)
            kept[redraw] = torch.equal(*outs)
    assert kept == {True: False, False: True}
