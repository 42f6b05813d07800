"""FlexPrefill: its choice against loops, planted patterns, budgets, and when a head is query-aware."""

import itertools
import math

import pytest
import torch

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods._blocks import probe_rows
from mmattn.methods._image_attention import Part
from mmattn.methods.flexprefill import FlexPrefill
from mmattn.runs import Root, Run
from mmattn.sites import Site

BLOCK = 8


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    """Plain torch instead of Triton's interpreter, which the kernels' own tests cover."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def flex(**knobs):
    return FlexPrefill(
        **{"block": BLOCK, "probe_blocks": 3, "probe_rows": 4, "min_budget": BLOCK} | knobs
    )


def part_of(method, q, k, *, probe=False):
    s = q.shape[2]
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0, probe=probe)
    run.layout = Layout(grid=(1, 1, s))
    site = Site(path="attn", kind="self", module=torch.nn.Identity(), run=run)
    site.phase, site.roles = run.phases[0], {0: True}
    return Part(q, k, k, 0, (1, 1, s), None, probe, slice(0, q.shape[0]), site)


def choose(method, q, k):
    return method.choose(q, k, part_of(method, q, k))


def pair(b=2, h=3, s=67, d=8, size=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, s, d, generator=g) * size for _ in range(2)]


# -- the oracle: one head, one number at a time -------------------------------------------------------


def softmax(scores):
    peak = max(scores)
    weights = [math.exp(x - peak) for x in scores]
    return [w / sum(weights) for w in weights]


def until(values, gamma):
    """How many of the largest values reach the share."""
    run, total = 0.0, sum(values)
    for count, value in enumerate(sorted(values, reverse=True), 1):
        run += value
        if run >= gamma * total - 1e-12:
            return count
    return len(values)


def top(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def divergence(p, r):
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, r, strict=True)]
    return math.sqrt(max(0.0, (kl(p, middle) + kl(r, middle)) / 2))


def oracle(q, k, method):
    """Kept pairs of blocks of one head ``[S, D]``, and whether it is query-aware."""
    s, d, b = q.shape[0], q.shape[1], method.block
    n = -(-s // b)
    q, k = q.double(), k.double()
    scale = 1 / math.sqrt(d)
    spans = [range(i * b, min(s, (i + 1) * b)) for i in range(n)]
    k_mean = [k[list(span)].mean(0) for span in spans]
    q_mean = [q[list(span)].mean(0) for span in spans]

    def predict(query):
        return softmax(
            [float(query @ k_mean[j]) * scale + math.log(len(spans[j])) for j in range(n)]
        )

    seen, apart = {}, 0.0
    probes = probe_rows(s, b, method.probe_blocks, method.probe_rows)
    for p in probes:
        rows = [softmax([float(q[r] @ k[j]) * scale for j in range(s)]) for r in p]
        mean = [sum(row[j] for row in rows for j in span) / len(p) for span in spans]
        seen[p[0] // b] = mean
        apart += divergence(predict(q[p].mean(0)), mean) / len(probes)
    aware = apart < method.tau

    def blocks(line):
        kind, at = line
        pairs = {(i, at if kind == "column" else i + at) for i in range(n)}
        return {(i, j) for i, j in pairs if 0 <= j < n}

    def weight(line):
        return sum(seen[i][j] for i, j in blocks(line) if i in seen)

    diagonals = [("diagonal", o) for o in range(1 - n, n)]
    columns = [("column", j) for j in range(n)]
    taken = []
    if not aware:
        for line in sorted(diagonals + columns, key=lambda x: -weight(x)):
            held = set().union(*map(blocks, taken))
            if sum(seen[i][j] for i, j in held if i in seen) >= method.gamma * len(seen) - 1e-9:
                break
            taken.append(line)
    for group in (diagonals, columns):
        least = max(1, -(-method.min_budget // b))
        taken += sorted(group, key=lambda x: -weight(x))[:least]
    keep = {(i, i) for i in range(n)}.union(*map(blocks, taken))
    if aware:
        shares = [x for i in range(n) for x in predict(q_mean[i])]
        keep |= {divmod(x, n) for x in top(shares, until(shares, method.gamma))}
    return keep, aware


@pytest.mark.parametrize("s", [64, 67])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.3, 0.6])
def test_the_choice_is_that_of_the_loops(s, tau, gamma):
    method = flex(tau=tau, gamma=gamma)
    q, k = pair(1, 4, s)
    # The heads differ in sharpness, so that both kinds of head appear at the middle tau.
    q *= torch.tensor([0.1, 0.3, 0.6, 1.0]).view(4, 1, 1)
    keep, kinds = choose(method, q, k), set()
    for head in range(4):
        expected, aware = oracle(q[0, head], k[0, head], method)
        kinds.add(aware)
        assert {tuple(x) for x in keep[0, head].nonzero().tolist()} == expected
    assert kinds == ({False} if tau == 0 else {True} if tau == 1 else {False, True})


def planted(s=160, d=32, sink=77, seed=0):
    """Queries look at one sink and at their own place: an orthogonal code per token."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.nn.functional.normalize(torch.randn(s, d, generator=g), dim=-1)
    attract = torch.zeros(s, d + 1)
    attract[:, :d], attract[:, d] = codes * 12.0, 12.0
    keys = torch.zeros(s, d + 1)
    keys[:, :d] = codes * 12.0
    keys[sink, d] = 12.0
    return attract[None, None], keys[None, None]


@pytest.mark.parametrize("probe_blocks", [2, 8])
def test_a_planted_sink_and_band_need_the_least_budget(probe_blocks):
    q, k = planted()
    n, home = 160 // BLOCK, torch.arange(160) // BLOCK
    for least in (1, 3):
        method = flex(tau=0.0, gamma=0.95, min_budget=least * BLOCK, probe_blocks=probe_blocks)
        keep = choose(method, q, k)[0, 0]
        assert keep[:, 77 // BLOCK].all() and keep.diagonal().all()
        assert keep.all(0).sum() == least and keep.sum(1).max() <= 2 * least
    keep = choose(flex(tau=0.0, gamma=0.95, probe_blocks=probe_blocks), q, k)[0, 0]
    assert keep.sum() == 2 * n - 1
    shares = (q @ k.transpose(2, 3) * 33**-0.5).softmax(-1)[0, 0]
    assert (shares * keep[home[:, None], home]).sum(-1).mean() > 0.95
    ranks = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
    luck = ranks < keep.sum(1, keepdim=True)
    assert (shares * luck[home[:, None], home]).sum(-1).mean() < 0.4


@pytest.mark.parametrize("distance", [-21, -3, 5, 19])
def test_both_rows_of_blocks_that_a_diagonal_crosses_are_kept(distance):
    """Every query looks at one key at a fixed distance, which lies in one of two blocks."""
    s = 96
    codes = torch.nn.functional.normalize(torch.randn(s, 64), dim=-1) * 40
    q, k = codes[None, None], codes.roll(distance, 0)[None, None]
    keep = choose(flex(tau=0.0, gamma=0.9), q, k)[0, 0]
    assert keep.sum() < 0.6 * keep.numel()
    for query in range(s):
        if 0 <= query + distance < s:
            assert keep[query // BLOCK, (query + distance) // BLOCK]


def test_flat_attention_needs_a_density_of_gamma():
    q, k = pair(1, 2, 160, size=0.0)
    for gamma in (0.3, 0.5, 0.8):
        for tau in (0.0, 0.01):
            # Flat rows are predicted exactly, so every head is query-aware however small tau is.
            keep = choose(flex(tau=tau, gamma=gamma, min_budget=0), q, k)
            assert keep.float().mean().item() == pytest.approx(gamma, abs=0.12)


def test_density_grows_with_gamma_and_with_the_least_budget():
    q, k = pair(1, 3, 160)
    for tau in (0.0, 1.0):
        keeps = [choose(flex(tau=tau, gamma=g), q, k) for g in (0.1, 0.3, 0.6, 0.9, 0.999)]
        assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(keeps))
        assert keeps[0].float().mean() < 0.5 < keeps[-1].float().mean()
        keeps = [choose(flex(tau=tau, gamma=0.1, min_budget=m), q, k) for m in (1, 17, 80)]
        assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(keeps))
        assert keeps[0].sum() < keeps[1].sum() < keeps[2].sum()


def test_extreme_scores_give_no_nan():
    q, k = pair(1, 2, 67, size=200.0)
    for tau in (0.1, 1.0):
        keep = choose(flex(tau=tau, gamma=0.9), q, k)
        assert keep.diagonal(dim1=-2, dim2=-1).all() and not keep.all()
        for head in range(2):
            expected, _ = oracle(q[0, head], k[0, head], flex(tau=tau, gamma=0.9))
            assert {tuple(x) for x in keep[0, head].nonzero().tolist()} == expected


def test_heads_that_look_at_one_place_in_every_frame_get_all_its_diagonals():
    frame, frames = 64, 5
    codes = torch.nn.functional.normalize(torch.randn(frame, 48), dim=-1).repeat(frames, 1) * 30
    q = codes[None, None]
    keep = choose(flex(tau=0.0, gamma=0.9), q, q)[0, 0]
    home = torch.arange(frame * frames) // BLOCK
    shares = (q @ q.transpose(2, 3) * 48**-0.5).softmax(-1)[0, 0]
    recall = (shares * keep[home[:, None], home]).sum(-1).mean()
    assert recall > 0.9
    assert keep.float().mean() < 0.4


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"gamma": 0}, "gamma lies in"),
        ({"gamma": 1.1}, "gamma lies in"),
        ({"tau": 2}, "tau lies in"),
        ({"min_budget": -1}, "min_budget"),
        ({"probe_blocks": 1}, "probe_blocks"),
        ({"probe_rows": 0}, "probe_rows"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        FlexPrefill(**knobs)
