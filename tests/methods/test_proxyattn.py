"""ProxyAttn: scores and budgets against loops, nested sets, groups."""

import itertools
import math

import pytest
import torch

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods import proxyattn
from mmattn.methods._blocks import probe_rows
from mmattn.methods._image_attention import Part
from mmattn.methods.proxyattn import ProxyAttn, proxy_scores
from mmattn.runs import Root, Run
from mmattn.sites import Site

BLOCK = 8


def proxy(**knobs):
    return ProxyAttn(
        **{"block": BLOCK, "probe_blocks": 3, "probe_rows": 4, "min_budget": BLOCK} | knobs
    )


def choose(method, q, k):
    s = q.shape[2]
    run = Run(Root("", torch.nn.Identity()), (method,), StepClock(), "error", 0)
    run.layout = Layout(grid=(1, 1, s))
    site = Site(path="attn", kind="self", module=torch.nn.Identity(), run=run)
    part = Part(q, k, k, 0, (1, 1, s), None, False, slice(0, q.shape[0]), site)
    return method.choose(q, k, part)


def pair(b=1, h=4, s=67, d=8, size=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, s, d, generator=g) * size for _ in range(2)]


def oracle_scores(q, k, stride, block):
    """One proxy ``[S, D]``: greatest probability between sampled tokens of two blocks."""
    s = q.shape[0]
    n = -(-s // block)
    q, k = q.double(), k.double()
    best = [[0.0] * n for _ in range(n)]
    sampled = range(0, s, stride)
    for i in sampled:
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in sampled]
        peak = max(scores)
        weights = [math.exp(x - peak) for x in scores]
        for j, weight in zip(sampled, weights, strict=True):
            here = best[i // block]
            here[j // block] = max(here[j // block], weight / sum(weights))
    return best


def oracle_budget(q, k, method):
    """Blocks that one head needs, averaged over probed blocks and rounded up."""
    s, b = q.shape[0], method.block
    n = -(-s // b)
    q, k = q.double(), k.double()
    probes, counts = probe_rows(s, b, method.probe_blocks, method.probe_rows), []
    for rows in probes:
        share = [0.0] * n
        for r in rows:
            weights = [math.exp(float(q[r] @ k[j]) / math.sqrt(q.shape[1])) for j in range(s)]
            for j in range(s):
                share[j // b] += weights[j] / sum(weights) / len(rows)
        run, count = 0.0, 0
        for value in sorted(share, reverse=True):
            if run < method.gamma - 1e-12:
                run, count = run + value, count + 1
        counts.append(count)
    least = max(1, -(-method.min_budget // b))
    return min(n, max(least, math.ceil(sum(counts) / len(counts))))


@pytest.mark.parametrize("s", [64, 67])
@pytest.mark.parametrize("groups", [1, 2, None])
@pytest.mark.parametrize("stride", [1, 4])
def test_the_choice_is_that_of_the_loops(s, groups, stride):
    method = proxy(gamma=0.6, groups=groups, stride=stride)
    q, k = pair(s=s)
    keep, n, sizes = choose(method, q, k), -(-s // BLOCK), set()
    per = 4 // (groups or 4)
    for head in range(4):
        members = slice(head // per * per, head // per * per + per)
        scores = oracle_scores(q[0, members].mean(0), k[0, members].mean(0), stride, BLOCK)
        budget = oracle_budget(q[0, head], k[0, head], method)
        sizes.add(budget)
        for i in range(n):
            others = sorted((j for j in range(n) if j != i), key=lambda j: -scores[i][j])
            assert keep[0, head, i].nonzero()[:, 0].tolist() == sorted([i, *others[: budget - 1]])
    assert all(1 < size < n for size in sizes)


def test_identical_heads_have_the_score_of_their_proxy():
    q, k = (x[:, :1].expand(-1, 4, -1, -1) for x in pair())
    one = proxy_scores(q, k, 1, 4, BLOCK, 0.3)
    each = proxy_scores(q, k, 4, 4, BLOCK, 0.3)
    torch.testing.assert_close(one.expand_as(each), each)


def test_every_token_and_head_gives_exact_maxima():
    q, k = pair(s=67)
    exact = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    scores = proxy_scores(q, k, 4, 1, BLOCK, 0.3)
    for i in range(9):
        for j in range(9):
            cut = exact[:, :, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8]
            torch.testing.assert_close(scores[:, :, i, j], cut.amax((2, 3)))


def test_strips_of_any_size_give_the_same_scores(monkeypatch):
    q, k = pair(2, s=67)
    whole = proxy_scores(q, k, 2, 4, BLOCK, 0.3)
    monkeypatch.setattr(proxyattn, "_ENTRIES", 1)
    torch.testing.assert_close(proxy_scores(q, k, 2, 4, BLOCK, 0.3), whole)


def test_sets_of_a_group_are_nested_and_budgets_are_each_heads_own():
    q, k = pair(h=8, s=160)
    q = q * torch.linspace(0.05, 1.5, 8).view(8, 1, 1)
    keep = choose(proxy(gamma=0.7, groups=2), q, k)[0]
    sizes = keep.sum(-1)
    assert (sizes == sizes[:, :1]).all()
    for group in (keep[:4], keep[4:]):
        # Flat heads, which come first, need more blocks than sharp ones.
        assert len({int(head[0].sum()) for head in group}) > 1
        ordered = sorted(group, key=lambda head: int(head.sum()))
        for small, large in itertools.pairwise(ordered):
            assert bool((large | ~small).all())
    assert sizes[0, 0] > sizes[3, 0] and sizes[4, 0] > sizes[7, 0]


def test_own_blocks_are_kept_and_density_grows_with_the_knobs():
    q, k = pair(2, 4, 160)
    keeps = [choose(proxy(gamma=g), q, k) for g in (0.05, 0.3, 0.6, 0.9)]
    assert all(keep.diagonal(dim1=-2, dim2=-1).all() for keep in keeps)
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(keeps))
    assert keeps[0].sum() < keeps[-1].sum() < keeps[-1].numel()
    for least in (33, 80):
        keep = choose(proxy(gamma=0.05, min_budget=least), q, k)
        assert (keep.sum(-1) == -(-least // BLOCK)).all()


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(mmattn.UnsupportedCall, match="4 heads cannot be cut into 3"):
        choose(proxy(groups=3), *pair())


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"gamma": 0}, "gamma lies in"),
        ({"groups": 0}, "groups"),
        ({"stride": 3}, "stride must divide"),
        ({"stride": 0}, "stride must divide"),
        ({"min_budget": -1}, "min_budget"),
        ({"probe_rows": 0}, "probe_rows"),
    ],
)
def test_bad_knobs_are_config_errors(knobs, says):
    with pytest.raises(mmattn.ConfigError, match=says):
        ProxyAttn(**knobs)
