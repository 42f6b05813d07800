"""Block methods: shared functions against loops, and what every one of them must hold."""

import itertools
import math

import diffusers_zoo as zoo
import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _blocks
from mmattn.methods.flexprefill import FlexPrefill
from mmattn.methods.proxyattn import ProxyAttn
from mmattn.methods.random_blocks import RandomBlocks
from mmattn.methods.sparsed import SparseD
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID = (4, 6, 8)
S, BLOCK = 4 * 6 * 8, 16
PROBES = {"probe_blocks": 4, "probe_rows": 4, "min_budget": 16}
METHODS = {
    "sparsed": lambda **k: SparseD(block=BLOCK, dense_steps=1, **{"select": 0.25, **k}),
    "flexprefill": lambda **k: FlexPrefill(
        block=BLOCK, **PROBES, **{"gamma": 0.5, "tau": 0.3, **k}
    ),
    "proxyattn": lambda **k: ProxyAttn(block=BLOCK, **PROBES, **{"gamma": 0.5, **k}),
    "random-blocks": lambda **k: RandomBlocks(block=BLOCK, **{"density": 0.4, **k}),
}
KEEP_ALL = {
    "sparsed": {"select": 1},
    "flexprefill": {"gamma": 1},
    "proxyattn": {"gamma": 1},
    "random-blocks": {"density": 1},
}
EVERY = pytest.mark.parametrize("name", list(METHODS))


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    """Plain torch instead of Triton's interpreter, which the kernels' own tests cover."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class Bench:
    """One site whose clock is moved by hand; `keeps` collects what was chosen."""

    def __init__(self, method, layout=None, *, index=0, probe=False, kind="self", seed=0):
        self.method, self.clock = method, StepClock()
        self.run = Run(
            Root("", torch.nn.Identity()), (method,), self.clock, "error", seed, probe=probe
        )
        self.run.layout = layout or Layout(grid=GRID)
        self.clock.on_change.append(self.run.on_clock)
        self.site = Site(
            path="attn", kind=kind, module=torch.nn.Identity(), index=index, run=self.run
        )
        self.run.sites = [self.site]
        self.site.roles = {0: method.role(self.site)}

    def __call__(self, q, k, v, mask=None):
        self.site.phase = self.run.phases[0]

        def dense(q, k, v, mask=mask, scale=None):
            return sdpa(q, k, v, mask, scale)

        return self.method.attend(q, k, v, mask=mask, scale=None, site=self.site, dense=dense)

    def sparse(self, q, k, v, mask=None):
        """The second step of two, after a first one with the same tokens."""
        for step in range(2):
            self.clock.set(step, 2)
            out = self(q, k, v, mask)
        return out

    @property
    def density(self):
        return self.site.meter.by_step("density")[1]


@pytest.fixture
def kept(monkeypatch):
    """Every choice handed to `attend_blocks`, in order of the calls."""
    seen, original = [], _blocks.attend_blocks

    def attend_blocks(q, k, v, keep, **rest):
        seen.append(keep)
        return original(q, k, v, keep, **rest)

    monkeypatch.setattr(_blocks, "attend_blocks", attend_blocks)
    return seen


def qkv(b=2, h=4, n=S, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) * w for w in (2.0, 2.0, 1.0)]


def oracle_order(grid, tile):
    tiles = {}
    for i, place in enumerate(itertools.product(*(range(n) for n in grid))):
        home = tuple(p // e for p, e in zip(place, tile, strict=True))
        tiles.setdefault(home, []).append(i)
    return [i for home in sorted(tiles) for i in tiles[home]]


def token_mask(keep, block, order, words):
    """Image queries over image keys in raster order, then text: bool ``[b, H, S, S + words]``."""
    s = len(order)
    keep = keep.clone()
    if words and s % block:
        keep[..., -1] = True
    home = torch.empty(s, dtype=torch.long)
    for place, token in enumerate(order):
        home[token] = place // block
    pairs = keep[..., home[:, None], home]
    return F.pad(pairs, (0, words), value=True)


# -- shared functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(2, 2, 4), (3, 4, 3), (1, 1, 1), (9, 9, 9)])
def test_token_order_goes_tile_by_tile(tile):
    order = _blocks.token_order((4, 5, 7), tile, torch.device("cpu"))
    assert order.tolist() == oracle_order((4, 5, 7), tile)


def test_a_block_is_a_cuboid_where_tiles_fit():
    order = _blocks.token_order(GRID, (2, 2, 4), torch.device("cpu")).view(-1, 16)
    places = torch.stack([order // 48, order // 8 % 6, order % 8], -1)
    assert ((places.amax(1) - places.amin(1)) == torch.tensor([1, 1, 3])).all()


def test_block_numbers_divide_by_true_counts():
    x = torch.randn(2, 3, 21, 5)
    means, sums = _blocks.block_means(x, 8), _blocks.block_sums(x[..., 0], 8)
    for j, part in enumerate((slice(0, 8), slice(8, 16), slice(16, 21))):
        torch.testing.assert_close(means[:, :, j], x[:, :, part].mean(2))
        torch.testing.assert_close(sums[..., j], x[:, :, part, 0].sum(2))
    assert _blocks.block_sizes(21, 8, x.device).tolist() == [8, 8, 5]
    assert _blocks.block_sizes(16, 8, x.device).tolist() == [8, 8]


def test_needed_and_largest_against_loops():
    mass = torch.rand(5, 9)
    for share in (0.01, 0.3, 0.77, 1.0):
        for row, got in zip(mass.double(), _blocks.needed(mass, share).tolist(), strict=True):
            total, count = 0.0, 0
            for value in sorted(row.tolist(), reverse=True):
                total, count = total + value, count + 1
                if total >= share * float(row.sum()) - 1e-12:
                    break
            assert got == count
    counts = torch.tensor([1, 3, 9, 2, 5])
    for row, count, got in zip(mass, counts, _blocks.largest(mass, counts), strict=True):
        assert set(got.nonzero()[:, 0].tolist()) == set(row.topk(count).indices.tolist())
    tied = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])
    assert _blocks.largest(tied, 2).tolist() == [False, True, True, False, False]


def test_probe_rows_are_spread_and_inside():
    rows = _blocks.probe_rows(1000, 64, 5, 8)
    homes = [[r // 64 for r in block] for block in rows]
    assert all(len(set(home)) == 1 for home in homes)
    assert [home[0] for home in homes] == [1, 4, 8, 11, 14]
    assert all(len(set(block)) == 8 for block in rows)
    assert len({r % 8 for block in rows for r in block}) > 3
    short = _blocks.probe_rows(66, 64, 9, 4)
    assert len(short) == 2 and all(64 <= r < 66 for r in short[1])


@pytest.mark.parametrize(("s", "words"), [(48, 0), (48, 5), (41, 0), (41, 5), (41, 40)])
def test_attend_blocks_is_masked_attention_with_exact_density(s, words):
    n = -(-s // 16)
    q, k, v = qkv(2, 3, s + words)
    q = q[:, :, :s]
    keep = torch.rand(2, 3, n, n) > 0.5
    keep |= torch.eye(n, dtype=torch.bool)
    found = _blocks.attend_blocks(q, k, v, keep, block=16, want_lse=True)
    mask = token_mask(keep, 16, range(s), words)
    torch.testing.assert_close(found.out, sdpa(q, k, v, mask))
    scores = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(found.lse, scores.logsumexp(-1))
    assert float(found.density) == pytest.approx(mask[..., :s].double().mean().item(), abs=1e-12)
    assert found.density < 1


# -- what every method must hold ----------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("tile", [None, (2, 2, 4), (3, 4, 3)])
@pytest.mark.parametrize(("text", "words"), [("none", 0), ("before", 5), ("after", 5)])
@pytest.mark.parametrize("grid", [GRID, (3, 5, 11)])
def test_result_is_attention_over_the_kept_blocks(name, tile, text, words, grid, kept):
    s = grid[0] * grid[1] * grid[2]
    q, k, v = qkv(n=s + words, seed=1)
    layout = Layout(grid=grid, text=text)
    bench = Bench(METHODS[name](tile=tile), layout, kind="joint")
    out = bench.sparse(q, k, v)
    image = layout.image_slice(s + words)
    order = oracle_order(grid, tile or grid)
    mask = token_mask(kept[-1], BLOCK, order, words)
    rows = [i for i in range(s + words) if not image.start <= i < image.stop]
    ids = [*range(image.start, image.stop), *rows]
    expected = sdpa(q, k, v)
    expected[:, :, image] = sdpa(q[:, :, image], k[:, :, ids], v[:, :, ids], mask)
    torch.testing.assert_close(out, expected)
    share = mask[..., :s].double().mean()
    total = s + words
    assert bench.density == pytest.approx((share * s * s + total * total - s * s) / total**2)
    assert bench.density < 0.9
    assert kept[-1].any(-1).all()


@EVERY
def test_rows_of_the_batch_are_independent(name):
    q, k, v = qkv()
    both = Bench(METHODS[name]()).sparse(q, k, v)
    for row in range(2):
        alone = Bench(METHODS[name]()).sparse(*(x[row : row + 1] for x in (q, k, v)))
        torch.testing.assert_close(both[row : row + 1], alone)


@EVERY
@pytest.mark.parametrize("text", ["before", "after"])
def test_padded_text_is_as_if_it_were_not_there(name, text):
    words, real = 6, (6, 2)
    q, k, v = qkv(n=S + words)
    layout = Layout(grid=GRID, text=text)
    start = layout.image_slice(S + words).stop if text == "after" else 0
    mask = torch.ones(2, 1, 1, S + words, dtype=torch.bool)
    mask[1, ..., start + real[1] : start + words] = False
    out = Bench(METHODS[name](), layout, kind="joint").sparse(q, k, v, mask)
    for row, count in enumerate(real):
        seen = mask[row, 0, 0]
        some = [x[row : row + 1, :, seen] for x in (q, k, v)]
        alone = Bench(METHODS[name](), layout, kind="joint").sparse(*some)
        torch.testing.assert_close(out[row : row + 1, :, seen], alone)
        assert some[0].shape[2] == S + count


@EVERY
def test_the_choice_does_not_look_at_values(name, kept):
    q, k, v = qkv()
    Bench(METHODS[name]()).sparse(q, k, v)
    Bench(METHODS[name]()).sparse(q, k, torch.randn_like(v) * 100)
    assert torch.equal(kept[len(kept) // 2 - 1], kept[-1])


@pytest.mark.parametrize("name", ["sparsed", "flexprefill", "proxyattn"])
def test_heads_in_another_order_give_the_same_in_that_order(name):
    q, k, v = qkv()
    order = torch.tensor([2, 0, 3, 1])
    settings = {"groups": None} if name == "proxyattn" else {}
    out = Bench(METHODS[name](**settings)).sparse(q, k, v)
    moved = Bench(METHODS[name](**settings)).sparse(*(x[:, order] for x in (q, k, v)))
    torch.testing.assert_close(moved, out[:, order])


@EVERY
def test_keeping_everything_is_dense_bitwise(name):
    q, k, v = qkv()
    bench = Bench(METHODS[name](**KEEP_ALL[name]))
    assert torch.equal(bench.sparse(q, k, v), sdpa(q, k, v))
    assert bench.density == 1
    assert "keep every block" in str(bench.site.meter.dense)
    small = Bench(METHODS[name](), Layout(grid=(1, 3, 5)))
    q, k, v = qkv(n=15)
    assert torch.equal(small.sparse(q, k, v), sdpa(q, k, v))
    assert small.density == 1


@EVERY
def test_first_steps_and_layers_run_dense(name):
    q, k, v = qkv()
    full = sdpa(q, k, v)
    settings = METHODS[name]().to_dict() | {"dense_steps": 0.5, "dense_layers": 2}
    method = type(METHODS[name]()).from_dict(settings)
    bench = Bench(method, index=2)
    with pytest.raises(mmattn.ConfigError, match="no step clock"):
        bench(q, k, v)
    equal = []
    for step in range(6):
        bench.clock.set(step, 6)
        equal.append(torch.equal(bench(q, k, v), full))
    assert equal == [True] * 3 + [False] * 3
    assert any("first steps" in reason for reason in bench.site.meter.dense)
    early = Bench(method, index=1)
    early.clock.set(5, 6)
    assert torch.equal(early(q, k, v), full)
    assert list(early.site.meter.dense) == ["one of the first layers (dense_layers)"]


def structured(seed=0):
    """Four topics over twelve blocks; queries and keys of a topic share one direction."""
    g = torch.Generator().manual_seed(seed)
    topic = (torch.arange(S) // BLOCK * 7) % 4
    spot = torch.randn(1, 4, 4, 16, generator=g)[:, :, topic] * 2.0
    return [spot + torch.randn(spot.shape, generator=g) * 0.5 for _ in range(3)]


CHOOSY = {
    "sparsed": {},
    "flexprefill": {"gamma": 0.8, "tau": 0.5},
    "proxyattn": {"gamma": 0.8, "groups": None},
}


@pytest.mark.parametrize("name", list(CHOOSY))
@torch.no_grad()
def test_recalls_more_than_random_blocks_of_equal_density(name, kept):
    for seed in range(3):
        q, k, v = structured(seed)
        full = sdpa(q, k, v)
        bench = Bench(METHODS[name](**CHOOSY[name]), probe=True)
        ours = (bench.sparse(q, k, v) - full).square().mean()
        assert bench.density < 0.7
        share = math.ceil(bench.density * 12 - 1e-6) / 12
        random = Bench(METHODS["random-blocks"](density=share), probe=True)
        theirs = (random.sparse(q, k, v) - full).square().mean()
        assert random.density >= bench.density - 1e-6
        recall, luck = (b.site.meter.by_step("recall")[1] for b in (bench, random))
        assert recall > luck + 0.15 and recall > 0.75
        assert ours < 0.5 * theirs


@EVERY
def test_recall_is_that_of_the_probabilities(name, kept):
    words = 5
    q, k, v = qkv(n=S + words)
    bench = Bench(METHODS[name](), Layout(grid=GRID, text="after"), kind="joint", probe=True)
    bench.sparse(q, k, v)
    mask = token_mask(kept[-1], BLOCK, range(S), words)
    shares = (q[:, :, :S] @ k.transpose(2, 3) * 8**-0.5).softmax(-1)
    expected = (shares * mask).sum(-1).mean().item()
    assert 0.05 < expected < 0.95
    assert bench.site.meter.by_step("recall")[1] == pytest.approx(expected, abs=1e-5)


@EVERY
def test_gradient_is_that_of_masked_attention(name, kept):
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 4))
    out = Bench(METHODS[name]()).sparse(q, k, v)
    expected = sdpa(q, k, v, token_mask(kept[-1], BLOCK, range(S), 0))
    g = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), g),
        torch.autograd.grad(expected, (q, k, v), g),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@EVERY
def test_a_mask_over_image_tokens_is_refused(name):
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, S, dtype=torch.bool)
    mask[0, ..., 3] = False
    with pytest.raises(mmattn.UnsupportedCall, match="hides image tokens"):
        Bench(METHODS[name]()).sparse(q, k, v, mask)


@EVERY
def test_settings_round_trip(name):
    method = METHODS[name](tile=(2, 2, 4), dense_layers=3)
    settings = method.to_dict()
    assert settings["name"] == name
    assert type(method).from_dict(settings | {"tile": [2, 2, 4]}) == method
    with pytest.raises(mmattn.ConfigError, match="dense_layers"):
        type(method).from_dict({"dense_layer": 1})


@EVERY
@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"block": 0}, "block is a number"),
        ({"tile": (2, 2)}, "tile is three"),
        ({"dense_steps": 1.5}, "dense_steps"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
)
def test_bad_shared_knobs_are_config_errors(name, knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        type(METHODS[name]())(**knobs)


# -- in models ----------------------------------------------------------------------------------------


@torch.no_grad()
def run_steps(session, model, inputs):
    """The output in the second of two steps."""
    for step in range(2):
        session.step(step, 2)
        out = zoo.call(model, inputs)
    return out


@EVERY
@pytest.mark.parametrize(
    ("family", "grid", "kind"), [("wan", (3, 4, 8), "self"), ("flux", (1, 8, 12), "joint")]
)
def test_in_models_it_runs_sparse_and_detaches_bitwise(name, family, grid, kind):
    model, x = zoo.model(family), zoo.inputs(family, 2, grid)
    before, rng = zoo.call(model, x), torch.get_rng_state()
    with mmattn.attach(model, METHODS[name](tile=(1, 4, 4)), probe=True) as session:
        both = run_steps(session, model, x)
        stats = session.stats
        recall = [site.meter.mean("recall") for site in session.runs[0].sites]
    assert torch.equal(torch.get_rng_state(), rng)
    assert stats.executed == stats.planned == sum(s.kind == kind for s in stats.sites) > 0
    assert stats.density < 1 and all(s.density < 1 for s in stats.sites)
    assert all(0 < r < 1 for r in recall)
    assert not torch.allclose(both, before, atol=1e-5)
    assert torch.equal(zoo.call(model, x), before)
    with mmattn.attach(model, METHODS[name](tile=(1, 4, 4))) as session:
        halves = [{k: v[i : i + 1] if v.ndim and len(v) == 2 else v for k, v in x.items()}
                  for i in range(2)]  # fmt: skip
        for step in range(2):
            session.step(step, 2)
            alone = [zoo.call(model, half) for half in halves]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["flexprefill", "proxyattn", "sparsed"])
def test_compiles_without_graph_breaks(name):
    model, x = zoo.model("wan"), zoo.inputs("wan", 1, (3, 4, 8))
    with mmattn.attach(model, METHODS[name]()) as session:
        eager = run_steps(session, model, x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run_steps(session, compiled, x), eager)
        assert session.stats.calls == 4 * session.stats.planned
