"""Isolation and reposition: against the paper's hidden-state form in loops, and what leaks where."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

import mmattn
from mmattn.clock import StepClock
from mmattn.layout import Layout
from mmattn.methods._regions import boxed, moved, resized, without_overlaps
from mmattn.methods._word_maps import memories
from mmattn.methods.isolation_reposition import IsolationReposition, _rotated, _Scene
from mmattn.runs import Root, Run
from mmattn.sites import Site

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))
import diffusers_zoo as zoo

Y, X = 4, 6
N = Y * X
SOURCES = ((0.2, 0.1, 0.8, 0.7), (0.0, 0.3, 1.0, 0.9), (0.4, 0.4, 0.9, 0.9))
TARGETS = ((0.0, 0.0, 0.6, 0.34), (0.0, 0.34, 1.0, 0.67), (0.5, 0.67, 1.0, 1.0))
PLAIN = {"dropout": 0.0, "start_layer": 0}


def method(n=2, **knobs):
    return IsolationReposition(**{**PLAIN, "sources": SOURCES[:n], "targets": TARGETS[:n], **knobs})


def made_site(m, kind="self", layout=None, masks=None):
    run = Run(Root("", torch.nn.Identity()), (m,), StepClock(), "error", 0)
    run.layout = Layout(grid=(1, Y, X)) if layout is None else layout
    site = Site(path="attn", kind=kind, module=torch.nn.Identity(), run=run, phase=True)
    site.roles = {0: m.role(site)}
    if masks is not None:
        site.shared["masks"] = masks
    return site


def sdpa(q, k, v, *, mask=None, scale=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def run(m, q, k, v, mask=None, **site):
    dense = partial(sdpa, mask=mask)  # as a session's, which passes on the mask of the call
    return m.attend(q, k, v, mask=mask, scale=None, site=made_site(m, **site), dense=dense)


def regions(n):
    return boxed(SOURCES[:n], (Y, X)), boxed(TARGETS[:n], (Y, X))


# -- the paper's form: hidden states are cut out, resized and pasted before they are projected -----------


def box_of(region):
    cells = region.nonzero()
    (top, left), (bottom, right) = cells.amin(0).tolist(), cells.amax(0).tolist()
    return top, left, bottom + 1, right + 1


def pasted(values, source, target):
    """Crop `values [C, Y, X]` to the box of source, resize to the box of target, paste on zeros."""
    top, left, bottom, right = box_of(source)
    up, west, down, east = box_of(target)
    crop = (values * source)[None, :, top:bottom, left:right].float()
    canvas = torch.zeros_like(values)
    canvas[:, up:down, west:east] = F.interpolate(crop, (down - up, east - west), mode="nearest")[0]
    return canvas


def reference(attn, hidden, n, *, isolate, reposition, ref_bias=0.0):
    """One self-attention layer on ``hidden [n + 1, N, C]``, scores and masks written out for the scene."""
    source, target = regions(n)
    target = without_overlaps(target)
    plain = attn(hidden)
    x = hidden[n]
    bank = [x]
    keys_seen = [torch.ones(N, N, dtype=torch.bool)]
    if isolate:
        for i in range(n):
            for j in range(n):
                if i != j:
                    s_i, s_j = target[i].flatten(), target[j].flatten()
                    keys_seen[0] &= ~(s_i[:, None] & s_j[None])
    for i in reversed(range(n)) if reposition else ():
        grid = hidden[i].T.unflatten(-1, (Y, X))
        bank.insert(0, pasted(grid, source[i], target[i]).flatten(1).T)
        key_mask = pasted(torch.ones(1, Y, X), source[i], target[i]).flatten() > 0
        keys_seen.insert(0, target[i].flatten()[:, None] & key_mask[None])
    bank, seen = torch.cat(bank), torch.cat(keys_seen, 1)
    q, k, v = (
        part.unflatten(-1, (attn.heads, -1)).transpose(0, 1)
        for part in (attn.to_q(x), attn.to_k(bank), attn.to_v(bank))
    )
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    scores[..., :-N] += ref_bias
    weights = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
    scene = attn.to_out[0]((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat([plain[:n], scene[None]])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("parts", [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_self_attention_equals_repositioned_hidden_states(n, parts):
    isolate, reposition = parts
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, bias=True)
    hidden = torch.randn(n + 1, N, 16)
    for bias in (0.0, -1.5):
        m = method(n, isolate=isolate, reposition=reposition, ref_bias=bias)
        q, k, v = (
            p(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
            for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        got = attn.to_out[0](run(m, q, k, v).transpose(1, 2).flatten(2))
        want = reference(attn, hidden, n, isolate=isolate, reposition=reposition, ref_bias=bias)
        torch.testing.assert_close(got, want)
    if n > 1 or reposition:
        assert not torch.allclose(got[n], attn(hidden)[n])
    else:
        torch.testing.assert_close(got, attn(hidden))


def tensors(rows, length=N, seed=0):
    return tuple(zoo.rand(rows, 2, length, 8, seed=seed + i) for i in range(3))


def test_nothing_leaks_between_isolated_subjects():
    q, k, v = tensors(3)
    m = method(2, reposition=False)
    before = run(m, q, k, v)
    _, target = regions(2)
    first, second = (part.flatten() for part in target)
    k2, v2 = k.clone(), v.clone()
    k2[2][:, first], v2[2][:, first] = 7.0, -7.0
    after = run(m, q, k2, v2)
    assert torch.equal(after[2][:, second], before[2][:, second])
    assert not torch.allclose(after[2][:, first], before[2][:, first])
    background = ~first & ~second
    assert not torch.allclose(after[2][:, background], before[2][:, background])
    leaky = [
        run(method(2, isolate=False, reposition=False, mutual=0.5), q, *kv)
        for kv in ((k, v), (k2, v2))
    ]
    assert not torch.allclose(leaky[0][2][:, second], leaky[1][2][:, second])


def test_a_reference_reaches_only_its_own_subject_and_only_from_its_outline():
    q, k, v = tensors(3)
    m = method(2)
    before = run(m, q, k, v)
    source, target = regions(2)
    for i in (0, 1):
        v2 = v.clone()
        v2[i][:, source[i].flatten()] += 3
        change = (run(m, q, k, v2) - before)[2].abs().amax((0, 2)) > 0
        assert torch.equal(change, target[i].flatten())
        v3 = v.clone()
        v3[i][:, ~source[i].flatten()] += 3
        assert torch.equal(run(m, q, k, v3)[2], before[2])
    assert torch.equal(before[:2], sdpa(q[:2], k[:2], v[:2])), "references are as if drawn alone"


def test_groups_of_a_batch_are_scenes_of_their_own():
    q, k, v = tensors(6)
    m = method(2, dropout=0.5)
    together = run(m, q, k, v)
    for half in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(together[half], run(m, q[half], k[half], v[half]))
    with pytest.raises(mmattn.UnsupportedCall, match="4 rows, which are not groups of 3"):
        run(m, *(part[:4] for part in (q, k, v)))


def test_full_regions_are_plain_concatenation():
    q, k, v = tensors(2)
    whole = (((0.0, 0.0, 1.0, 1.0),),) * 2
    m = IsolationReposition(sources=whole[0], targets=whole[1], **PLAIN)
    want = sdpa(q[1:], torch.cat([k[:1], k[1:]], 2), torch.cat([v[:1], v[1:]], 2))
    torch.testing.assert_close(run(m, q, k, v)[1:], want)


def test_nothing_to_do_is_the_stock_attention_bitwise():
    q, k, v = tensors(3)
    stock = sdpa(q, k, v)
    off = method(2, isolate=False, reposition=False, mutual=0.0)
    assert off.passive and torch.equal(run(off, q, k, v), stock)
    empty = torch.zeros(2, Y, X)
    got = run(IsolationReposition(**PLAIN), q, k, v, masks=(empty, empty))
    torch.testing.assert_close(got, stock)
    assert torch.equal(run(IsolationReposition(), q, k, v), stock), "no subject was named"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_overlapping_masks_give_no_nan_and_belong_to_nobody(dtype):
    q, k, v = (part.to(dtype) for part in tensors(3))
    mask = torch.zeros(2, Y, X)
    mask[0, :, :4], mask[1, :, 2:] = 1, 1
    m = IsolationReposition(**PLAIN)
    out = run(m, q, k, v, masks=(mask, mask))
    assert torch.isfinite(out).all()
    full = torch.ones(2, Y, X)
    assert torch.isfinite(run(m, q, k, v, masks=(full, full))).all()
    got = without_overlaps(mask.bool())
    assert not got[:, :, 2:4].any() and got[0, :, :2].all() and got[1, :, 4:].all()


def test_dropout_thins_queries_never_to_none_and_the_same_in_all_layers():
    q, k, v = tensors(2)
    full = run(method(1, isolate=False), q, k, v)
    stock = sdpa(q, k, v)
    inside = boxed(TARGETS[:1], (Y, X))[0].flatten()
    counts = []
    for p in (0.5, 1.0):
        m = method(1, isolate=False, dropout=p)
        out = run(m, q, k, v)
        seeing = (out[1] - stock[1]).abs().amax((0, 2)) > 1e-5
        assert not (seeing & ~inside).any()
        torch.testing.assert_close(out[1][:, seeing], full[1][:, seeing])
        assert torch.equal(run(m, q, k, v), out)
        counts.append(int(seeing.sum()))
    assert 1 < counts[0] < int(inside.sum()) and counts[1] == 1


# -- mutual cross-attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_mutual_cross_attention_equals_mixing_after_the_projection(masked):
    torch.manual_seed(0)
    attn = Attention(16, cross_attention_dim=12, heads=2, dim_head=8, bias=True)
    hidden, text = torch.randn(3, N, 16), torch.randn(3, 5, 12)
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 3:], mask[2, ..., 4:] = not masked, not masked
    bias = mask[:, 0].float().sub(1).mul(1e9) if masked else None
    q = attn.to_q(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = (p(text).unflatten(-1, (2, 8)).transpose(1, 2) for p in (attn.to_k, attn.to_v))
    out = run(method(2, mutual=0.9), q, k, v, kind="cross", mask=mask if masked else None)
    got = attn.to_out[0](out.transpose(1, 2).flatten(2))
    own = attn(hidden, text, attention_mask=bias)
    torch.testing.assert_close(got[:2], own[:2])
    _, target = regions(2)
    want = own[2].clone()
    for i in range(2):
        part = None if bias is None else bias[i : i + 1]
        read = attn(hidden[2:], text[i : i + 1], attention_mask=part)[0]
        inside = target[i].flatten()
        want[inside] = 0.1 * own[2][inside] + 0.9 * read[inside]
    torch.testing.assert_close(got[2], want)
    pure = run(method(2, mutual=1.0), q, k, v, kind="cross")
    inside = target[0].flatten()
    torch.testing.assert_close(pure[2][:, inside], sdpa(q[2:], k[:1], v[:1])[0][:, inside])


# -- regions --------------------------------------------------------------------------------------------


def test_integer_growth_is_kron_and_crops_lose_what_is_outside():
    source = torch.zeros(8, 8, dtype=torch.bool)
    source[1:3, 2:5] = True
    source[1, 2] = False
    target = torch.zeros(8, 8, dtype=torch.bool)
    target[2:6, 1:7] = True
    where = moved(source, target)
    grown = torch.zeros(8, 8, dtype=torch.long) - 1
    grown.view(-1)[where.target] = where.source
    index = torch.arange(64).view(8, 8)
    want = torch.kron(index[1:3, 2:5], torch.ones(2, 2, dtype=torch.long))
    want[:2, :2] = -1
    assert torch.equal(grown[2:6, 1:7], want) and (grown >= 0).sum() == 5 * 4


def test_boxes_and_masks_never_vanish_on_coarse_grids():
    assert boxed([(0.4, 0.4, 0.45, 0.45)], (2, 2)).sum() == 1
    tiny = torch.zeros(1, 64, 64)
    tiny[0, 30:33, 10:13] = 1
    assert resized(tiny, (8, 8)).any()
    assert not resized(torch.zeros(1, 8, 8), (4, 4)).any()
    assert resized(torch.ones(1, 8, 8), (4, 4)).all()
    halves = torch.zeros(1, 8, 8)
    halves[:, :, 4:] = 1
    assert torch.equal(resized(halves, (4, 4)), halves[:, ::2, ::2] > 0)


# -- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "chroma", "flux2"])
def test_rotary_positions_move_with_their_tokens(name):
    model = zoo.shared(name)
    source, target = boxed([(0.0, 0.0, 0.6, 0.5)], (Y, X))[0], boxed([(0.4, 0.3, 1, 1)], (Y, X))[0]
    where = moved(source, target)
    axes = len(model.pos_embed.axes_dim)
    ids = zoo._ids(1, Y, X, axes)
    dim = sum(model.pos_embed.axes_dim)
    k = zoo.rand(1, 2, N, dim)
    rotary = model.pos_embed(ids)
    run = Run(Root("", model), (method(1),), StepClock(), "error", 0)
    site = Site(path="a", kind="joint", module=model, run=run, tags=frozenset({"rotary"}))
    got = _rotated(apply_rotary_emb(k, rotary)[:, :, where.source], where, X, site)
    there = tuple(part[where.target] for part in rotary)
    torch.testing.assert_close(got, apply_rotary_emb(k[:, :, where.source], there))
    assert (where.source != where.target).any()


@pytest.mark.parametrize("name", ["unet", "sd3", "pixart", "flux", "chroma", "flux2"])
@torch.no_grad()
def test_families(name):
    model = zoo.shared(name)
    kwargs = zoo.inputs(name, batch=3)
    stock = zoo.call(model, kwargs)
    with mmattn.attach(model, method(2, isolate=False, reposition=False, mutual=0.0)):
        assert torch.equal(zoo.call(model, kwargs), stock)
    with mmattn.attach(model, method(2)) as session:
        out = zoo.call(model, kwargs)
        stats = session.stats
    assert stats.executed == stats.planned == len(session.runs[0].sites)
    torch.testing.assert_close(out[:2], stock[:2])
    assert (out[2] - stock[2]).abs().max() > 1e-3
    assert torch.equal(zoo.call(model, kwargs), stock)
    assert any("references" in s.meter.sums for s in session.runs[0].sites)


def test_models_whose_rotary_positions_are_unknown_are_left_alone():
    with pytest.raises(mmattn.NoSiteError, match="BriaTransformer2DModel cannot be moved"):
        mmattn.attach(zoo.shared("bria"), method(2))


@torch.no_grad()
def test_layers_and_steps_are_counted_from_the_first_self_attention():
    model, kwargs = zoo.shared("unet"), zoo.inputs("unet", batch=2)
    for start, expected in ((0, 7), (5, 2), (0.5, 3), (1.0, 0)):
        with mmattn.attach(model, method(1, start_layer=start, start_step=1)) as session:
            edited = []
            for step in (0, 1):
                session.step(step, 2)
                zoo.call(model, kwargs)
                sites = session.runs[0].sites
                edited.append(sum(s.meter.counts.get("references", 0) for s in sites))
            assert edited == [0, expected]
    with (
        mmattn.attach(model, method(1, start_step=1)),
        pytest.raises(mmattn.ConfigError, match="start_step=1"),
    ):
        zoo.call(model, kwargs)


@torch.no_grad()
def test_reference_text_is_seen_in_joint_attention():
    q, k, v = tensors(3, length=N + 5)
    layout = Layout(grid=(1, Y, X), text="before")
    plain, more = (
        run(method(2, reference_text=on), q, k, v, kind="joint", layout=layout)
        for on in (False, True)
    )
    v2 = v.clone()
    v2[0][:, :5] += 3
    seen = run(method(2, reference_text=True), q, k, v2, kind="joint", layout=layout)
    _, target = regions(2)
    change = (seen - more)[2].abs().amax((0, 2)) > 0
    assert torch.equal(change[5:], target[0].flatten()) and not change[:5].any()
    assert torch.equal(run(method(2), q, k, v2, kind="joint", layout=layout)[2], plain[2])


def test_masks_reach_every_site_through_shared_memory():
    model, kwargs = zoo.shared("unet"), zoo.inputs("unet", batch=2)
    masks = (torch.ones(1, 16, 16), torch.zeros(1, 16, 16))
    masks[1][:, 4:12, 4:12] = 1
    with mmattn.attach(model, IsolationReposition(**PLAIN)) as session:
        hook = model.register_forward_pre_hook(
            lambda *_: (
                [m.update(masks=masks) for m in memories(session, IsolationReposition)] and None
            )
        )
        zoo.call(model, kwargs)
        hook.remove()
        known = memories(session, IsolationReposition)[0]["scenes"]
    assert {key[:2] for key in known} == {(8, 12), (4, 6)}
    assert all(
        isinstance(s, _Scene) and s.target.any() and not s.target.all() for s in known.values()
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {"sources": ((0, 0, 1, 1),)},
        {"sources": ((0, 0, 0, 1),), "targets": ((0, 0, 1, 1),)},
        {"sources": ((0, 0, 1),), "targets": ((0, 0, 1, 1),)},
        {"start_step": -1},
        {"start_layer": 1.5},
        {"start_layer": -1},
        {"dropout": 1.1},
        {"mutual": -0.1},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(mmattn.ConfigError):
        IsolationReposition(**knobs)


def test_settings_round_trip_and_calls_that_cannot_be_honoured():
    m = method(2, start_layer=3)
    assert IsolationReposition.from_dict(m.to_dict()) == m
    q, k, v = tensors(3)
    with pytest.raises(mmattn.UnsupportedCall, match="self-attention mask"):
        run(m, q, k, v, mask=torch.ones(1, 1, 1, N, dtype=torch.bool))
    with pytest.raises(mmattn.UnsupportedCall, match="2 frames"):
        run(m, q, k, v, layout=Layout(grid=(2, 2, 6)))
