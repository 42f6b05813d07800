"""SparseD: its choice against loops, when it is made, and how long it lasts."""

import math

import diffusers_zoo as zoo
import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods.sparsed import SparseD, block_shares
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID, BLOCK = (2, 5, 10), 16
S = 2 * 5 * 10
N = 7


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    """Plain torch instead of Triton's interpreter, which the kernels' own tests cover."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Bench:
    """One site whose clock is moved by hand."""

    def __init__(self, method, layout=None):
        self.method, self.clock = method, StepClock()
        self.run = Run(Root("", torch.nn.Identity()), (method,), self.clock, "error", 0)
        self.run.layout = layout or Layout(grid=GRID)
        self.clock.on_change.append(self.run.on_clock)
        self.site = Site(path="attn", kind="joint", module=torch.nn.Identity(), run=self.run)
        self.run.sites = [self.site]
        self.site.roles = {0: method.role(self.site)}

    def at(self, step, total, q, k, v):
        self.clock.set(step, total)
        self.site.phase = self.run.phases[0]

        def dense(q, k, v, mask=None, scale=None):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        return self.method.attend(q, k, v, mask=None, scale=None, site=self.site, dense=dense)

    @property
    def keep(self):
        return self.site.state["keep"]


def qkv(b=2, h=3, n=S, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) * w for w in (2.0, 2.0, 1.0)]


def oracle_shares(q, k, block):
    """Mean probability of every pair of blocks of one head ``[S, D]``, one pair of tokens at a time."""
    s = q.shape[0]
    n = -(-s // block)
    total = [[0.0] * n for _ in range(n)]
    q, k = q.double(), k.double()
    for i in range(s):
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(s)]
        peak = max(scores)
        weights = [math.exp(x - peak) for x in scores]
        for j in range(s):
            total[i // block][j // block] += weights[j] / sum(weights)
    size = [min(block, s - i * block) for i in range(n)]
    return [[total[i][j] / (size[i] * size[j]) for j in range(n)] for i in range(n)]


def test_the_choice_is_that_of_the_loops():
    q, k, v = qkv(1, 2)
    bench = Bench(SparseD(block=BLOCK, select=0.3, dense_steps=1))
    bench.at(0, 4, q, k, v)
    assert bench.keep.shape == (1, 2, N, N)
    for head in range(2):
        shares = oracle_shares(q[0, head], k[0, head], BLOCK)
        for i, row in enumerate(shares):
            best = sorted(range(N), key=lambda j: -row[j])[: int(N * 0.3) + 1]
            assert bench.keep[0, head, i].nonzero()[:, 0].tolist() == sorted(best)
        got = block_shares(q, k, BLOCK, 8**-0.5)[0, head]
        torch.testing.assert_close(got, torch.tensor(shares), atol=1e-6, rtol=1e-4)


def test_a_short_last_block_is_ranked_by_its_true_size():
    """All keys alike: nothing sets blocks apart, so a diluted mean would put the last one last."""
    q, k, _ = qkv(1, 1)
    shares = block_shares(q, torch.zeros_like(k), BLOCK, 1.0)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / S))


def test_one_choice_lasts_until_the_next_run():
    bench = Bench(SparseD(block=BLOCK, select=0.3, dense_steps=0.5))
    outs, keeps = [], []
    for step in range(8):
        q, k, v = qkv(seed=step)
        out = bench.at(step, 8, q, k, v)
        outs.append(torch.equal(out, F.scaled_dot_product_attention(q, k, v)))
        keeps.append(bench.site.state.get("keep"))
    assert outs == [True] * 4 + [False] * 4
    assert keeps[:3] == [None] * 3
    assert all(keep is keeps[3] for keep in keeps[4:])
    fresh = Bench(SparseD(block=BLOCK, select=0.3, dense_steps=1))
    fresh.at(0, 8, *qkv(seed=3))
    assert torch.equal(fresh.keep, keeps[3])
    assert sum(bench.site.meter.dense.values()) == 4
    bench.at(0, 8, *qkv())
    assert "keep" not in bench.site.state


@pytest.mark.parametrize(
    ("given", "total", "last"), [(0.2, 50, 9), (0.2, 4, 0), (0.0, 50, 0), (3, 50, 2), (0, 50, 0)]
)
def test_the_last_dense_step_chooses(given, total, last):
    method = SparseD(dense_steps=given)
    phases = [method.phase(step, total) for step in range(total)]
    assert phases == [0] * last + [1] + [2] * (total - last - 1)
    assert method.phase(None, None) is None


def test_density_is_the_share_kept_and_grows_with_select():
    q, k, v = qkv(n=96)
    last, before = 0.0, torch.zeros(2, 3, 6, 6, dtype=torch.bool)
    for select in (0.1, 0.3, 0.5, 0.8):
        bench = Bench(SparseD(block=BLOCK, select=select, dense_steps=1), Layout(grid=(2, 6, 8)))
        bench.at(0, 2, q, k, v)
        bench.at(1, 2, q, k, v)
        density = bench.site.meter.by_step("density")[1]
        assert density == pytest.approx((int(6 * select) + 1) / 6)
        assert last < density < 1 and bool((bench.keep | ~before).all())
        last, before = density, bench.keep


def test_another_grid_or_batch_size_chooses_anew_in_a_dense_call():
    bench = Bench(SparseD(block=BLOCK, dense_steps=1))
    q, k, v = qkv()
    bench.at(0, 9, q, k, v)
    bench.at(1, 9, q, k, v)
    one = [x[:1] for x in (q, k, v)]
    assert torch.equal(bench.at(2, 9, *one), F.scaled_dot_product_attention(*one))
    assert bench.keep.shape[0] == 1
    assert not torch.equal(bench.at(3, 9, *one), F.scaled_dot_product_attention(*one))
    bench.run.layout = Layout(grid=(2, 10, 5))
    full = F.scaled_dot_product_attention(*one)
    assert torch.equal(bench.at(4, 9, *one), full)
    assert not torch.equal(bench.at(5, 9, *one), full)
    reasons = bench.site.meter.dense
    assert [n for r, n in reasons.items() if "changed during the run" in r] == [2]


def test_a_run_that_begins_in_the_middle_chooses_in_its_first_call():
    bench = Bench(SparseD(block=BLOCK, dense_steps=0.2))
    q, k, v = qkv()
    full = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(bench.at(25, 50, q, k, v), full)
    assert not torch.equal(bench.at(26, 50, q, k, v), full)
    assert "began after its dense steps" in str(bench.site.meter.dense)


def test_text_changes_no_choice():
    q, k, v = qkv(n=S + 5)
    plain, mixed = (
        Bench(SparseD(block=BLOCK, dense_steps=1), layout)
        for layout in (None, Layout(grid=GRID, text="before"))
    )
    plain.at(0, 2, *(x[:, :, 5:] for x in (q, k, v)))
    mixed.at(0, 2, q, k, v)
    assert torch.equal(plain.keep, mixed.keep)


@torch.no_grad()
def test_guidance_branches_keep_their_own_choice_and_a_clock_is_needed():
    model = zoo.model("wan")
    x = zoo.inputs("wan", 2, (3, 4, 8))
    halves = [{k: v[i : i + 1] for k, v in x.items()} for i in range(2)]
    with mmattn.attach(model, SparseD(block=BLOCK, dense_steps=1)) as session:
        with pytest.raises(mmattn.UnsupportedCall, match="denoising step"):
            zoo.call(model, halves[0])
        for step in range(3):
            session.step(step, 3)
            for half in halves:
                zoo.call(model, half)
        run = session.runs[0]
        states = run.states_of(run.sites[0], 0)
        # 96 tokens are 6 blocks: 2 of 6 kept in two of three steps.
        assert session.stats.density == pytest.approx((1 + 2 * 2 / 6) / 3)
    assert set(states) == {(0, 0), (1, 0)}
    assert not torch.equal(states[0, 0]["keep"], states[1, 0]["keep"])


@pytest.mark.parametrize("select", [0, -0.1, 1.5])
def test_select_out_of_range_is_a_config_error(select):
    with pytest.raises(mmattn.ConfigError, match="select lies in"):
        SparseD(select=select)
