"""VMoBA: chunks and choices against a loop oracle, invariants, execution, knobs."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import _chunk_attention as execution, _vmoba_select as select
from mmattn.methods.vmoba import VMoBA
from mmattn.runs import Root, Run
from mmattn.sites import Site

GRID = (4, 4, 6)
S = 4 * 4 * 6
FRAMES = (1, (2, 2), (2, 2, 2))


def site_for(method, layout, index=0, kind="self", probe=False):
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0, probe)
    run.layout = layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), index=index, run=run)
    site.phase = run.phases[0]
    site.roles = {0: method.role(site)}
    return site


def sdpa(q, k, v, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def call(method, q, k, v, *, layout=None, index=0, kind="self", mask=None, probe=False):
    site = site_for(method, layout or Layout(grid=GRID), index, kind, probe)

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


def pools(b, h, s, c, kind):
    """Lists of (b, h, i, c) that compete with each other."""
    if kind == "query":
        keys = {(bb, hh, i): [] for bb in range(b) for hh in range(h) for i in range(s)}
        key = lambda bb, hh, i, cc: (bb, hh, i)  # noqa: E731
    elif kind == "head":
        keys = {(bb, hh): [] for bb in range(b) for hh in range(h)}
        key = lambda bb, hh, i, cc: (bb, hh)  # noqa: E731
    elif kind == "overall":
        keys = {(bb,): [] for bb in range(b)}
        key = lambda bb, hh, i, cc: (bb,)  # noqa: E731
    else:
        keys = {(bb, cc): [] for bb in range(b) for cc in range(c)}
        key = lambda bb, hh, i, cc: (bb, cc)  # noqa: E731
    for entry in itertools.product(range(b), range(h), range(s), range(c)):
        keys[key(*entry)].append(entry)
    return list(keys.values())


def oracle_choice(q, k, ids, mode, kind, value, compat=False):
    b, h, s, _ = q.shape
    c = max(ids) + 1
    gate = {}
    for bb, hh, cc in itertools.product(range(b), range(h), range(c)):
        rows = [i for i in range(s) if ids[i] == cc]
        mean = sum(k[bb, hh, i].double() for i in rows) / len(rows)
        for i in range(s):
            gate[bb, hh, i, cc] = float(q[bb, hh, i].double() @ mean)
    chosen = torch.zeros(b, h, s, c, dtype=torch.bool)
    for entries in pools(b, h, s, c, kind):
        own = [e for e in entries if ids[e[2]] == e[3]]
        others = [e for e in entries if ids[e[2]] != e[3]]
        kept = list(own)
        if mode == "topk":
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
            if not reached and compat and kind in ("query", "block"):
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
    ("topk", "query", 2),
    ("topk", "head", 2),
    ("topk", "overall", 2),
    ("threshold", "query", 0.3),
    ("threshold", "head", 0.25),
    ("threshold", "overall", 0.25),
    ("threshold", "block", 0.25),
    ("threshold", "query", 0.0),
]


@pytest.mark.parametrize(("mode", "kind", "value"), CASES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_choice_and_output_match_the_loop_oracle(mode, kind, value, index):
    grid = (3, 2, 4)
    q, k, v = qkv(1, 2, 24, 4)
    method = VMoBA(
        chunks=(1, (1, 2), (1, 2, 2)),
        kind=kind,
        dense_steps=0,
        **{mode: value},
    )
    chunk = method.chunk(index, grid)
    ids = select.chunk_ids(grid, chunk, q.device)
    assert ids.tolist() == oracle_chunks(grid, chunk)
    own = ids[:, None] == torch.arange(select.count_chunks(grid, chunk))
    expected = oracle_choice(q, k, ids.tolist(), mode, kind, value)
    assert torch.equal(method.choose(q, k, own, index), expected)
    out, meter = call(method, q, k, v, layout=Layout(grid=grid), index=index)
    torch.testing.assert_close(out, oracle_attention(q, k, v, expected, ids.tolist()))
    sizes = torch.bincount(ids).float()
    assert meter.mean("density") == pytest.approx(float((expected.float() @ sizes).mean() / 24))
    assert meter.mean("density") < 1


def test_ragged_last_1d_chunk_is_an_ordinary_chunk():
    grid = (5, 2, 2)
    method = VMoBA(chunks=(2, (1, 1), (1, 1, 1)), topk=2, kind="query", dense_steps=0)
    q, k, v = qkv(1, 1, 20, 4)
    ids = select.chunk_ids(grid, method.chunk(0, grid), q.device)
    assert torch.bincount(ids).tolist() == [8, 8, 4]
    chosen = oracle_choice(q, k, ids.tolist(), "topk", "query", 2)
    out, _ = call(method, q, k, v, layout=Layout(grid=grid))
    torch.testing.assert_close(out, oracle_attention(q, k, v, chosen, ids.tolist()))


@pytest.mark.parametrize(
    ("threshold", "density"), [(0.15, 0.12), (0.25, 0.20), (0.35, 0.27), (0.5, 0.40)]
)
def test_density_of_gaussian_gates_is_the_papers(threshold, density):
    gate = torch.randn(1, 2, 1440, 72, generator=torch.Generator().manual_seed(1))
    own = torch.arange(1440)[:, None] // 20 == torch.arange(72)
    kept = select.choose_threshold(gate, own, "head", threshold).float().mean()
    assert float(kept) == pytest.approx(density, abs=0.015)


@pytest.mark.parametrize("kind", select.KINDS)
def test_invariants_own_chunk_monotone_and_never_empty(kind):
    q, k, _ = qkv(2, 2, 48, 8)
    ids = torch.arange(48) // 6
    own = ids[:, None] == torch.arange(8)
    gate = select.gate(q, k, own)
    before = torch.zeros(2, 2, 48, 8, dtype=torch.bool)
    for threshold in (0.0, 0.2, 0.4, 0.7, 1.5):
        kept = select.choose_threshold(gate, own, kind, threshold)
        assert (kept | ~own).all(), "own chunk is always kept"
        assert (kept | ~before).all(), "a higher threshold keeps a superset"
        assert kept.sum() > own.expand_as(kept).sum(), "at least one more"
        before = kept
    assert before.all(), "a threshold nobody can reach keeps everything"


def test_compat_reproduces_the_official_collapse_and_dense_fallback():
    q, k, v = qkv(1, 2, 48, 8)
    own = torch.arange(48)[:, None] // 6 == torch.arange(8)
    gate = select.gate(q, k, own)
    kept = select.choose_threshold(gate, own, "query", 1.5, compat=True)
    assert (kept.sum(-1) == 3).all()
    assert select.choose_threshold(gate, own, "head", 1.5, compat=True).all()
    ids = [i // 6 for i in range(48)]
    assert torch.equal(kept, oracle_choice(q, k, ids, "threshold", "query", 1.5, compat=True))
    knobs = {"chunks": FRAMES, "topk": 1, "kind": "query", "dense_steps": 0}
    q, k, v = qkv()
    assert torch.equal(call(VMoBA(**knobs, compat=True), q, k, v)[0], sdpa(q, k, v))
    out, meter = call(VMoBA(**knobs), q, k, v)
    assert meter.mean("density") == pytest.approx(0.25)
    assert not torch.allclose(out, sdpa(q, k, v), atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        VMoBA(chunks=FRAMES, topk=4, dense_steps=0),
        VMoBA(chunks=FRAMES, topk=9, kind="query", dense_steps=0),
        VMoBA(threshold=1.5, dense_steps=0),
        VMoBA(chunks=(4, (2, 2), (2, 2, 2)), dense_steps=0),
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
    method = VMoBA(chunks=FRAMES, threshold=0.25, kind="head", dense_steps=0)
    out, _ = call(method, q, k, v)
    moved, _ = call(method, q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(moved, out[:, :, order])


def test_query_head_ignores_other_queries_and_a_shift_of_all_keys():
    q, k, _ = qkv(1, 2, 48, 8)
    own = torch.arange(48)[:, None] // 6 == torch.arange(8)
    method = VMoBA(threshold=0.3, kind="query", dense_steps=0)
    kept = method.choose(q, k, own, 0)
    other = q.clone()
    other[:, :, 1:] = torch.randn_like(other[:, :, 1:])
    assert torch.equal(method.choose(other, k, own, 0)[:, :, 0], kept[:, :, 0])
    assert torch.equal(method.choose(q, k + torch.randn(8), own, 0), kept)


@pytest.mark.parametrize(("mode", "kind", "value"), CASES)
def test_rows_are_independent(mode, kind, value):
    q, k, v = qkv()
    method = VMoBA(kind=kind, dense_steps=0, **{mode: value})
    both, _ = call(method, q, k, v, index=1)
    for row in range(2):
        alone, _ = call(method, *(t[row : row + 1] for t in (q, k, v)), index=1)
        torch.testing.assert_close(both[row : row + 1], alone)


def structured(seed=0):
    """Eight cuboids in four pairs; queries and keys of a pair share one direction."""
    g = torch.Generator().manual_seed(seed)
    topic = select.chunk_ids(GRID, (2, 2, 3), torch.device("cpu")) % 4
    spot = (torch.randn(2, 4, 16, generator=g) * 1.5)[:, topic]
    q, k, v = (spot + torch.randn(spot.shape, generator=g) * w for w in (0.5, 0.5, 1.0))
    return q[None], k[None], v[None]


@pytest.mark.parametrize(
    "method",
    [
        VMoBA(chunks=(1, (2, 2), (2, 2, 3)), topk=3, kind="query", dense_steps=0),
        VMoBA(chunks=(1, (2, 2), (2, 2, 3)), threshold=0.45, kind="head", dense_steps=0),
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
        ids = select.chunk_ids(GRID, (2, 2, 3), q.device)
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
    method = VMoBA(chunks=FRAMES, topk=1, kind="query", dense_steps=0)
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
    method = VMoBA(chunks=FRAMES, topk=2, kind="query", dense_steps=0)
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
    method = VMoBA(chunks=FRAMES, topk=2, kind="query", dense_steps=0)
    out, _ = call(method, q, k, v, layout=layout, kind="joint", mask=mask)
    ids = torch.arange(S) // 24
    own = ids[:, None] == torch.arange(4)
    both = mask.expand(-1, 2, -1, -1).clone()
    both[:, :, :S, :S] &= method.choose(q[:, :, :S], k[:, :, :S], own, 0)[..., ids]
    torch.testing.assert_close(out, sdpa(q, k, v, both))


def test_queries_may_be_the_image_tokens_of_the_keys():
    q, k, v = qkv(n=S + 5)
    layout = Layout(grid=GRID, text="before")
    method = VMoBA(threshold=0.25, kind="head", dense_steps=0)
    whole, _ = call(method, q, k, v, layout=layout, kind="joint")
    part, _ = call(method, q[:, :, 5:], k, v, layout=layout, kind="joint")
    torch.testing.assert_close(part, whole[:, :, 5:])


@pytest.mark.parametrize("text", ["none", "before", "after"])
def test_both_ways_of_execution_agree(monkeypatch, text):
    layout = Layout(grid=GRID, text=text)
    q, k, v = qkv(n=S + 5 * (text != "none"))
    method = VMoBA(threshold=0.25, kind="head", dense_steps=0)
    whole, _ = call(method, q, k, v, layout=layout, index=2, kind="joint")
    monkeypatch.setattr(execution, "_MASK_ENTRIES", 4 * q.shape[2] * 7)
    blocks, _ = call(method, q, k, v, layout=layout, index=2, kind="joint")
    torch.testing.assert_close(blocks, whole)
    monkeypatch.setattr(execution, "_GATHER_FROM", 1)
    monkeypatch.setattr(execution, "masked", None)
    gathered, _ = call(method, q, k, v, layout=layout, index=2, kind="joint")
    torch.testing.assert_close(gathered, whole)
    half, _ = call(method, *(t.bfloat16() for t in (q, k, v)), layout=layout, index=2, kind="joint")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("text", ["none", "after"])
def test_recall_is_the_share_of_dense_mass_on_the_kept_chunks(monkeypatch, gather, text):
    monkeypatch.setattr(execution, "_GATHER_FROM", 1 if gather else 1 << 30)
    layout = Layout(grid=GRID, text=text)
    q, k, v = qkv(n=S + 5 * (text != "none"))
    mask = None
    if text != "none":
        mask = torch.ones(2, 1, 1, S + 5, dtype=torch.bool)
        mask[1, ..., -2:] = False
    method = VMoBA(dense_steps=0)
    out, meter = call(method, q, k, v, layout=layout, index=1, kind="joint", mask=mask, probe=True)
    plain, _ = call(method, q, k, v, layout=layout, index=1, kind="joint", mask=mask)
    torch.testing.assert_close(out, plain)
    ids = select.chunk_ids(GRID, method.chunk(1, GRID), q.device)
    own = ids[:, None] == torch.arange(int(ids.max()) + 1)
    kept = method.choose(q[:, :, :S], k[:, :, :S], own, 1)[..., ids]
    kept = F.pad(kept, (0, q.shape[2] - S), value=True)
    scores = q[:, :, :S] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) * kept).sum(-1).mean()
    assert 0.05 < float(expected) < 0.95
    assert meter.mean("recall") == pytest.approx(float(expected), abs=1e-5)


def test_boxes_that_do_not_divide_leave_smaller_chunks_and_say_so():
    grid = (3, 5, 7)
    q, k, v = qkv(1, 2, 105, 4)
    method = VMoBA(topk=3, chunks=(1, (2, 3), (2, 4, 9)), dense_steps=0)
    for index, box in ((1, (3, 2, 3)), (2, (2, 4, 7))):
        assert method.chunk(index, grid) == box
        ids = select.chunk_ids(grid, box, q.device)
        assert ids.tolist() == oracle_chunks(grid, box)
        chosen = oracle_choice(q, k, ids.tolist(), "topk", "query", 3)
        out, meter = call(method, q, k, v, layout=Layout(grid=grid), index=index)
        torch.testing.assert_close(out, oracle_attention(q, k, v, chosen, ids.tolist()))
        sizes = torch.bincount(ids).float()
        assert meter.mean("density") == pytest.approx(float((chosen.float() @ sizes).mean() / 105))
        assert "do not divide the grid (3, 5, 7)" in next(iter(meter.remarks))
    with pytest.raises(mmattn.UnsupportedCall, match="do not divide"):
        compat = VMoBA(topk=3, chunks=(1, (2, 3), (2, 4, 9)), dense_steps=0, compat=True)
        call(compat, q, k, v, layout=Layout(grid=grid), index=1)


@pytest.mark.parametrize(("mode", "value"), [("topk", 2), ("threshold", 0.25)])
@pytest.mark.parametrize("kind", ["head", "overall"])
def test_compat_pools_over_the_whole_batch(mode, value, kind):
    """The official code lets both halves of a CFG batch compete for one budget."""
    q, k, _ = qkv(2, 2, 24, 4)
    q[1] *= 3
    ids = torch.arange(24) // 6
    own = ids[:, None] == torch.arange(4)
    kept = VMoBA(kind=kind, dense_steps=0, compat=True, **{mode: value}).choose(q, k, own, 0)
    apart = VMoBA(kind=kind, dense_steps=0, **{mode: value}).choose(q, k, own, 0)
    assert not torch.equal(kept, apart)
    gate = select.gate(q.double(), k.double(), own)
    for heads in ([0], [1]) if kind == "head" else ([0, 1],):
        entries = list(itertools.product(range(2), heads, range(24), range(4)))
        others = [e for e in entries if ids[e[2]] != e[3]]
        values = {e: float(gate[e]) for e in entries}
        ranked = sorted(others, key=lambda e: -values[e])
        if mode == "topk":
            chosen = set(ranked[: 2 * 24 * value * len(heads) - 2 * 24 * len(heads)])
        else:
            low, high = min(values.values()), max(values.values())
            u = {e: (values[e] - low) / (high - low) for e in entries}
            total = sum(u.values()) + 1e-6
            need = value - sum(u[e] for e in entries if e not in set(others)) / total
            chosen, run = set(), 0.0
            for e in ranked:
                chosen.add(e)
                run += u[e]
                if run / total >= need:
                    break
        assert {e for e in others if kept[e]} == chosen


def test_gradient_is_that_of_masked_attention():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 1))
    method = VMoBA(chunks=FRAMES, topk=2, kind="query", dense_steps=0)
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
    assert select.default_temporal((21, 30, 52)) == 3
    assert select.default_temporal((24, 36, 64)) == 3
    assert select.default_spatial((21, 30, 52)) == (5, 13)
    assert select.default_spatial((21, 45, 80)) == (9, 10)
    assert select.default_spatial((24, 36, 64)) == (6, 8)
    assert select.default_cuboid((21, 30, 52)) == (7, 5, 13)
    counts = [select.count_chunks((21, 30, 52), VMoBA().chunk(p, (21, 30, 52))) for p in range(3)]
    assert counts == [7, 24, 72]
    assert [VMoBA()._k(p, c) for p, c in enumerate(counts)] == [2, 6, 18]
    assert select.count_chunks((1, 16, 16), VMoBA().chunk(0, (1, 16, 16))) == 8


def test_presets_are_the_papers_tables():
    for method, grid, counts, ks in (
        (VMoBA.wan_480p(), (21, 30, 52), (7, 24, 72), (2, 6, 18)),
        (VMoBA.wan_720p(), (21, 45, 80), (7, 40, 36), (2, 10, 9)),
        (VMoBA.train_576p(), (24, 36, 64), (8, 48, 72), None),
        (VMoBA.train_480p(), (36, 30, 52), (12, 24, 36), None),
    ):
        boxes = [method.chunk(p, grid) for p in range(3)]
        assert not any(select.uneven(grid, box) for box in boxes)
        assert tuple(select.count_chunks(grid, box) for box in boxes) == counts
        assert method.topk == ks
        assert method.kind == ("head" if ks is None else "query")
        assert method.threshold == (0.25 if ks is None else None)
        assert method.dense_steps == (0 if ks is None else 0.25)
    assert VMoBA.wan_480p(dense_steps=0).dense_steps == 0


def test_topk_is_a_number_or_a_share_rounded_up():
    assert [VMoBA(topk=0.25)._k(0, n) for n in (4, 5, 24, 72)] == [1, 2, 6, 18]
    assert [VMoBA(topk=(0.1, 3, 0.99))._k(p, 10) for p in range(3)] == [1, 3, 10]
    q, k, v = qkv()
    _, meter = call(VMoBA(topk=0.5, chunks=FRAMES, dense_steps=0), q, k, v)
    assert meter.mean("density") == pytest.approx(0.5)


def test_dense_steps_are_a_share_or_a_number():
    assert [VMoBA().phase(i, 50) for i in (11, 12)] == [False, True]
    assert [VMoBA(dense_steps=3).phase(i, 50) for i in (2, 3)] == [False, True]
    assert VMoBA(dense_steps=1.0).phase(49, 50) is False
    assert VMoBA().phase(None, None) is None and VMoBA(dense_steps=0).phase(None, None) is True


def test_unfitting_calls_are_refused():
    q, k, v = qkv()
    with pytest.raises(mmattn.UnsupportedCall, match="no token grid"):
        call(VMoBA(dense_steps=0), q, k, v, layout=Layout(text="none"))
    with pytest.raises(mmattn.UnsupportedCall, match="different tokens"):
        call(VMoBA(dense_steps=0), q[:, :, :9], k, v)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"topk": 3, "threshold": 0.2}, "not both"),
        ({"kind": "block", "topk": 2}, "kind='block'"),
        ({"kind": "heads"}, "kind is one of"),
        ({"topk": 0}, "topk"),
        ({"topk": (1, 2)}, "topk"),
        ({"topk": 1.5}, "topk"),
        ({"topk": True}, "topk"),
        ({"threshold": -1.0}, "threshold"),
        ({"chunks": (1, (2,), (1, 2, 3))}, "chunks is"),
        ({"chunks": 3}, "chunks is"),
        ({"chunks": (0, (2, 2), (1, 2, 3))}, "chunks is"),
        ({"dense_steps": 2.0}, "dense_steps"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_layers": -1}, "dense_layers"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        VMoBA(**knobs)
