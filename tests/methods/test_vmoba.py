"""VMoBA: chunks and choices against a loop oracle, invariants, execution, knobs."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _chunk_attention as execution, _vmoba_select as chunks
from mmattn.methods.vmoba import VMoBA
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID = (4, 4, 6)
S = 4 * 4 * 6


def site_for(method, layout, index=0, kind="self"):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), index=index, run=run)
    site.phase = run.phases[0]
    site.roles = {0: method.role(site)}
    return site


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def call(method, q, k, v, *, layout=None, index=0, kind="self", mask=None):
    site = site_for(method, layout or Layout(grid=GRID), index, kind)

    def dense(q, k, v, mask=mask, scale=None):
        return sdpa(q, k, v, mask, scale)

    out = method.attend(q, k, v, mask=mask, scale=None, site=site, dense=dense)
    return out, site.meter


def qkv(b=2, h=2, n=S, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=g) for _ in range(3)]


# -- the oracle: one pair at a time, in plain Python ------------------------------------------------


def oracle_chunks(grid, chunk):
    t, y, x = grid
    if isinstance(chunk, int):
        return [i // chunk for i in range(t * y * x)]
    named = [
        (a // chunk[0], b // chunk[1], c // chunk[2])
        for a, b, c in itertools.product(range(t), range(y), range(x))
    ]
    order = {name: i for i, name in enumerate(sorted(set(named)))}
    return [order[name] for name in named]


def pools(b, h, s, c, pool):
    """Lists of (b, h, i, c) that compete with each other."""
    if pool == "query_head":
        keys = {(bb, hh, i): [] for bb in range(b) for hh in range(h) for i in range(s)}
        key = lambda bb, hh, i, cc: (bb, hh, i)  # noqa: E731
    elif pool == "head_global":
        keys = {(bb, hh): [] for bb in range(b) for hh in range(h)}
        key = lambda bb, hh, i, cc: (bb, hh)  # noqa: E731
    elif pool == "overall":
        keys = {(bb,): [] for bb in range(b)}
        key = lambda bb, hh, i, cc: (bb,)  # noqa: E731
    else:
        keys = {(bb, cc): [] for bb in range(b) for cc in range(c)}
        key = lambda bb, hh, i, cc: (bb, cc)  # noqa: E731
    for entry in itertools.product(range(b), range(h), range(s), range(c)):
        keys[key(*entry)].append(entry)
    return list(keys.values())


def oracle_choice(q, k, ids, select, pool, value, compat=False):
    b, h, s, _ = q.shape
    c = max(ids) + 1
    gate = {}
    for bb, hh, cc in itertools.product(range(b), range(h), range(c)):
        rows = [i for i in range(s) if ids[i] == cc]
        mean = sum(k[bb, hh, i].double() for i in rows) / len(rows)
        for i in range(s):
            gate[bb, hh, i, cc] = float(q[bb, hh, i].double() @ mean)
    chosen = torch.zeros(b, h, s, c, dtype=torch.bool)
    for entries in pools(b, h, s, c, pool):
        own = [e for e in entries if ids[e[2]] == e[3]]
        others = [e for e in entries if ids[e[2]] != e[3]]
        kept = list(own)
        if select == "topk":
            queries = len(entries) // c
            ranked = sorted(others, key=lambda e: -gate[e])
            kept += ranked[: min(value, c) * queries - len(own)]
        else:
            low, high = min(gate[e] for e in entries), max(gate[e] for e in entries)
            spread = high - low if high - low > 1e-6 else 1.0
            u = {e: (gate[e] - low) / spread for e in entries}
            total = sum(u.values()) + 1e-6
            need = max(0.0, value - sum(u[e] for e in own) / total)
            ranked, run, reached = sorted(others, key=lambda e: -u[e]), 0.0, False
            for e in ranked:
                kept.append(e)
                run += u[e]
                if run / total >= need:
                    reached = True
                    break
            if not reached and compat and pool in ("query_head", "block"):
                kept = own + ranked[:2]
        for e in kept:
            chosen[e] = True
    return chosen


def oracle_attention(q, k, v, chosen, ids):
    out = torch.zeros_like(q, dtype=torch.float32)
    for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if chosen[b, h, i, ids[j]]]
        scores = (k[b, h, keys].float() @ q[b, h, i].float()) * q.shape[-1] ** -0.5
        out[b, h, i] = scores.softmax(0) @ v[b, h, keys].float()
    return out


CASES = [
    ("topk", "query_head", 2),
    ("topk", "head_global", 2),
    ("topk", "overall", 2),
    ("threshold", "query_head", 0.3),
    ("threshold", "head_global", 0.25),
    ("threshold", "overall", 0.25),
    ("threshold", "block", 0.25),
    ("threshold", "query_head", 0.0),
]


@pytest.mark.parametrize(("select", "pool", "value"), CASES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_choice_and_output_match_the_loop_oracle(select, pool, value, index):
    grid = (3, 2, 4)
    q, k, v = qkv(1, 2, 24, 4)
    method = VMoBA(
        temporal=1,
        spatial=(1, 2),
        cuboid=(1, 2, 2),
        select=select,
        pool=pool,
        dense_share=0,
        **{select: value},
    )
    chunk = method.chunk(index, grid)
    ids = chunks.chunk_ids(grid, chunk, q.device)
    assert ids.tolist() == oracle_chunks(grid, chunk)
    own = ids[:, None] == torch.arange(chunks.count_chunks(grid, chunk))
    expected = oracle_choice(q, k, ids.tolist(), select, pool, value)
    assert torch.equal(method.choose(q, k, own, index), expected)
    out, meter = call(method, q, k, v, layout=Layout(grid=grid), index=index)
    torch.testing.assert_close(out, oracle_attention(q, k, v, expected, ids.tolist()))
    sizes = torch.bincount(ids).float()
    assert meter.mean("density") == pytest.approx(float((expected.float() @ sizes).mean() / 24))
    assert meter.mean("density") < 1


def test_ragged_last_1d_chunk_is_an_ordinary_chunk():
    grid = (5, 2, 2)
    method = VMoBA(temporal=2, topk=2, pool="query_head", dense_share=0)
    q, k, v = qkv(1, 1, 20, 4)
    ids = chunks.chunk_ids(grid, method.chunk(0, grid), q.device)
    assert torch.bincount(ids).tolist() == [8, 8, 4]
    chosen = oracle_choice(q, k, ids.tolist(), "topk", "query_head", 2)
    out, _ = call(method, q, k, v, layout=Layout(grid=grid))
    torch.testing.assert_close(out, oracle_attention(q, k, v, chosen, ids.tolist()))


@pytest.mark.parametrize(
    ("threshold", "density"), [(0.15, 0.12), (0.25, 0.20), (0.35, 0.27), (0.5, 0.40)]
)
def test_density_of_gaussian_gates_is_the_papers(threshold, density):
    gate = torch.randn(1, 2, 1440, 72, generator=torch.Generator().manual_seed(1))
    own = torch.arange(1440)[:, None] // 20 == torch.arange(72)
    kept = chunks.choose_threshold(gate, own, "head_global", threshold).float().mean()
    assert float(kept) == pytest.approx(density, abs=0.015)


@pytest.mark.parametrize("pool", chunks.POOLS)
def test_invariants_own_chunk_monotone_and_never_empty(pool):
    q, k, _ = qkv(2, 2, 48, 8)
    ids = torch.arange(48) // 6
    own = ids[:, None] == torch.arange(8)
    gate = chunks.gate(q, k, own.float())
    before = torch.zeros(2, 2, 48, 8, dtype=torch.bool)
    for threshold in (0.0, 0.2, 0.4, 0.7, 1.5):
        kept = chunks.choose_threshold(gate, own, pool, threshold)
        assert (kept | ~own).all(), "own chunk is always kept"
        assert (kept | ~before).all(), "a higher threshold keeps a superset"
        assert kept.sum() > own.expand_as(kept).sum(), "at least one more"
        before = kept
    assert before.all(), "a threshold nobody can reach keeps everything"


def test_compat_reproduces_the_official_collapse_and_dense_fallback():
    q, k, v = qkv(1, 2, 48, 8)
    own = torch.arange(48)[:, None] // 6 == torch.arange(8)
    gate = chunks.gate(q, k, own.float())
    kept = chunks.choose_threshold(gate, own, "query_head", 1.5, compat=True)
    assert (kept.sum(-1) == 3).all()
    assert chunks.choose_threshold(gate, own, "head_global", 1.5, compat=True).all()
    ids = [i // 6 for i in range(48)]
    assert torch.equal(kept, oracle_choice(q, k, ids, "threshold", "query_head", 1.5, compat=True))
    knobs = {"temporal": 1, "topk": 1, "pool": "query_head", "dense_share": 0}
    q, k, v = qkv()
    assert torch.equal(call(VMoBA(**knobs, compat=True), q, k, v)[0], sdpa(q, k, v))
    out, meter = call(VMoBA(**knobs), q, k, v)
    assert meter.mean("density") == pytest.approx(0.25)
    assert not torch.allclose(out, sdpa(q, k, v), atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        VMoBA(temporal=1, topk=4, dense_share=0),
        VMoBA(temporal=1, topk=9, pool="query_head", dense_share=0),
        VMoBA(threshold=1.5, dense_share=0),
        VMoBA(temporal=4, dense_share=0),
    ],
)
def test_keep_all_is_dense_bitwise(method):
    q, k, v = qkv()
    out, meter = call(method, q, k, v)
    assert torch.equal(out, sdpa(q, k, v))
    assert sum(meter.dense.values()) == 1


def test_permuting_tokens_inside_a_chunk_changes_nothing():
    q, k, v = qkv(1, 2)
    order = torch.arange(S).view(4, 24)[:, torch.randperm(24)].flatten()
    method = VMoBA(temporal=1, threshold=0.25, dense_share=0)
    out, _ = call(method, q, k, v)
    moved, _ = call(method, q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(moved, out[:, :, order])


def test_query_head_ignores_other_queries_and_a_shift_of_all_keys():
    q, k, _ = qkv(1, 2, 48, 8)
    own = torch.arange(48)[:, None] // 6 == torch.arange(8)
    method = VMoBA(threshold=0.3, pool="query_head", dense_share=0)
    kept = method.choose(q, k, own, 0)
    other = q.clone()
    other[:, :, 1:] = torch.randn_like(other[:, :, 1:])
    assert torch.equal(method.choose(other, k, own, 0)[:, :, 0], kept[:, :, 0])
    assert torch.equal(method.choose(q, k + torch.randn(8), own, 0), kept)


@pytest.mark.parametrize(("select", "pool", "value"), CASES)
def test_rows_are_independent(select, pool, value):
    q, k, v = qkv()
    method = VMoBA(select=select, pool=pool, dense_share=0, **{select: value})
    both, _ = call(method, q, k, v, index=1)
    for row in range(2):
        alone, _ = call(method, *(t[row : row + 1] for t in (q, k, v)), index=1)
        torch.testing.assert_close(both[row : row + 1], alone)


def structured(seed=0):
    """Eight cuboids in four pairs; queries and keys of a pair share one direction."""
    g = torch.Generator().manual_seed(seed)
    topic = chunks.chunk_ids(GRID, (2, 2, 3), torch.device("cpu")) % 4
    spot = (torch.randn(2, 4, 16, generator=g) * 1.5)[:, topic]
    q, k, v = (spot + torch.randn(spot.shape, generator=g) * w for w in (0.5, 0.5, 1.0))
    return q[None], k[None], v[None]


@pytest.mark.parametrize(
    "method",
    [
        VMoBA(cuboid=(2, 2, 3), topk=3, pool="query_head", dense_share=0),
        VMoBA(cuboid=(2, 2, 3), threshold=0.45, dense_share=0),
    ],
)
def test_beats_random_chunks_of_equal_density(method):
    ours, random = 0.0, 0.0
    for seed in range(5):
        q, k, v = structured(seed)
        full = sdpa(q, k, v)
        out, meter = call(method, q, k, v, index=2)
        assert meter.mean("density") < 0.6
        ours += (out - full).square().mean().item()
        ids = chunks.chunk_ids(GRID, (2, 2, 3), q.device)
        own = ids[:, None] == torch.arange(8)
        budget = method.choose(q, k, own, 2).sum().item() - 2 * S
        free = (~own).expand(1, 2, S, 8)
        draw = torch.rand(free.shape, generator=torch.Generator().manual_seed(seed)) * free
        keep = torch.zeros(free.numel(), dtype=torch.bool)
        keep[draw.flatten().topk(budget).indices] = True
        mask = (keep.view(free.shape) | own)[..., ids]
        assert mask.float().mean() == pytest.approx(meter.mean("density"), abs=1e-4)
        random += (sdpa(q, k, v, mask) - full).square().mean().item()
    assert ours < 0.5 * random


@pytest.mark.parametrize("text", ["before", "after"])
def test_text_queries_stay_dense_and_text_keys_visible(text):
    q, k, v = qkv(n=S + 5)
    layout = Layout(grid=GRID, text=text)
    image = layout.image_slice(S + 5)
    method = VMoBA(temporal=1, topk=1, pool="query_head", dense_share=0)
    out, meter = call(method, q, k, v, layout=layout, kind="joint")
    full = sdpa(q, k, v)
    words = [i for i in range(S + 5) if not image.start <= i < image.stop]
    torch.testing.assert_close(out[:, :, words], full[:, :, words])
    ids = torch.arange(S) // 24
    mask = torch.ones(S, S + 5, dtype=torch.bool)
    mask[:, image] = ids[:, None] == ids
    torch.testing.assert_close(out[:, :, image], sdpa(q[:, :, image], k, v, mask))
    expected = (S * 24 + S * 5 + 5 * (S + 5)) / (S + 5) ** 2
    assert meter.mean("density") == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_text_keys_are_honoured(kind):
    q, k, v = qkv(n=S + 5)
    layout = Layout(grid=GRID, text="before")
    mask = torch.ones(2, 1, 1, S + 5, dtype=torch.bool)
    mask[0, ..., 2:5] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    method = VMoBA(temporal=1, topk=2, pool="query_head", dense_share=0)
    out, _ = call(method, q, k, v, layout=layout, kind="joint", mask=mask)
    k[0, :, 2:5], v[0, :, 2:5] = 1e3, 1e3
    again, _ = call(method, q, k, v, layout=layout, kind="joint", mask=mask)
    torch.testing.assert_close(out, again)
    wide = mask.expand(-1, -1, S + 5, -1)
    wide_out, _ = call(method, q, k, v, layout=layout, kind="joint", mask=wide)
    torch.testing.assert_close(out, wide_out)


def test_a_mask_per_query_is_honoured_together_with_the_choice():
    q, k, v = qkv(n=S + 5)
    layout = Layout(grid=GRID, text="after")
    mask = torch.rand(2, 1, S + 5, S + 5) > 0.3
    mask |= torch.eye(S + 5, dtype=torch.bool)
    method = VMoBA(temporal=1, topk=2, pool="query_head", dense_share=0)
    out, _ = call(method, q, k, v, layout=layout, kind="joint", mask=mask)
    ids = torch.arange(S) // 24
    own = ids[:, None] == torch.arange(4)
    both = mask.expand(-1, 2, -1, -1).clone()
    both[:, :, :S, :S] &= method.choose(q[:, :, :S], k[:, :, :S], own, 0)[..., ids]
    torch.testing.assert_close(out, sdpa(q, k, v, both))


def test_queries_may_be_the_image_tokens_of_the_keys():
    q, k, v = qkv(n=S + 5)
    layout = Layout(grid=GRID, text="before")
    method = VMoBA(threshold=0.25, dense_share=0)
    whole, _ = call(method, q, k, v, layout=layout, kind="joint")
    part, _ = call(method, q[:, :, 5:], k, v, layout=layout, kind="joint")
    torch.testing.assert_close(part, whole[:, :, 5:])


@pytest.mark.parametrize("text", ["none", "before", "after"])
def test_both_ways_of_execution_agree(monkeypatch, text):
    layout = Layout(grid=GRID, text=text)
    q, k, v = qkv(n=S + 5 * (text != "none"))
    image = layout.image_slice(q.shape[2])
    method = VMoBA(threshold=0.25, dense_share=0)
    ids = chunks.chunk_ids(GRID, method.chunk(2, GRID), q.device)
    own = ids[:, None] == torch.arange(int(ids.max()) + 1)
    chosen = method.choose(q[:, :, image], k[:, :, image], own, 2)
    gathered = execution.routed(q[:, :, image], k, v, chosen, ids, image, None)
    whole = execution.masked(q[:, :, image], k, v, chosen, ids, image, None, None)
    torch.testing.assert_close(gathered, whole)
    monkeypatch.setattr(execution, "_MASK_ENTRIES", 4 * q.shape[2] * 7)
    blocks = execution.masked(q[:, :, image], k, v, chosen, ids, image, None, None)
    torch.testing.assert_close(blocks, whole)
    half = execution.routed(
        *(t.bfloat16() for t in (q[:, :, image], k, v)), chosen, ids, image, None
    )
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, atol=3e-2, rtol=3e-2)


def test_gradient_is_that_of_masked_attention():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 1))
    method = VMoBA(temporal=1, topk=2, pool="query_head", dense_share=0)
    out, _ = call(method, q, k, v)
    ids = torch.arange(S) // 24
    chosen = method.choose(q.detach(), k.detach(), ids[:, None] == torch.arange(4), 0)
    expected = sdpa(q, k, v, chosen[..., ids])
    g = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), g),
        torch.autograd.grad(expected, (q, k, v), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_derived_chunks_are_the_papers_where_it_says():
    assert chunks.default_temporal((21, 30, 52)) == 3
    assert chunks.default_temporal((24, 36, 64)) == 3
    assert chunks.default_spatial((21, 30, 52)) == (5, 13)
    assert chunks.default_spatial((21, 45, 80)) == (9, 10)
    assert chunks.default_spatial((24, 36, 64)) == (6, 8)
    assert chunks.default_cuboid((21, 30, 52)) == (7, 5, 13)
    counts = [chunks.count_chunks((21, 30, 52), VMoBA().chunk(p, (21, 30, 52))) for p in range(3)]
    assert counts == [7, 24, 72]
    assert [VMoBA(select="topk")._k(p, c) for p, c in enumerate(counts)] == [2, 6, 18]
    assert chunks.count_chunks((1, 16, 16), VMoBA().chunk(0, (1, 16, 16))) == 8


def test_unfitting_boxes_and_calls_are_refused():
    q, k, v = qkv()
    with pytest.raises(mmattn.UnsupportedCall, match="do not divide"):
        call(VMoBA(spatial=(3, 2), dense_share=0), q, k, v, index=1)
    with pytest.raises(mmattn.UnsupportedCall, match="no token grid"):
        call(VMoBA(dense_share=0), q, k, v, layout=Layout(text="none"))
    with pytest.raises(mmattn.UnsupportedCall, match="different tokens"):
        call(VMoBA(dense_share=0), q[:, :, :9], k, v)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"select": "best"}, "select is"),
        ({"select": "topk", "threshold": 0.2}, "contradicts"),
        ({"topk": 3, "threshold": 0.2}, "contradicts"),
        ({"pool": "block", "topk": 2}, "pool='block'"),
        ({"pool": "heads"}, "pool is one of"),
        ({"topk": 0}, "topk"),
        ({"threshold": -1.0}, "threshold"),
        ({"spatial": (2,)}, "spatial"),
        ({"dense_share": 2.0}, "dense_share"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        VMoBA(**knobs)
