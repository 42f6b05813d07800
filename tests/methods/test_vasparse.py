"""VASparse: penalty, selection and contrast against a dense oracle, in whole models and in numbers."""

import itertools
import math

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import (
    alone,
    case,
    check,
    check_identity,
    check_rows,
    made,
    notes,
    patched,
    steps,
)
from host_contract import distance

import mmattn
from mmattn.methods._density_peaks import density_peaks
from mmattn.methods.vasparse import VASparse, contrast, select

KNOBS = {"keep": 0.7, "saliency": 0.5, "beta": 0.4}


def clustered(keys, count, neighbours):
    """Density-peak clusters of some keys: lists of their members, one point after the other."""
    size, dim = keys.shape
    if size == 1:
        return [[0]]
    apart = [[float((a - b).norm()) / dim**0.5 for b in keys] for a in keys]
    rho = []
    for i in range(size):
        near = sorted(apart[i][j] for j in range(size) if j != i)[:neighbours]
        rho.append(math.exp(-sum(d * d for d in near) / len(near)))
    weight = []
    for i in range(size):
        denser = [apart[i][j] for j in range(size) if (rho[j], -j) > (rho[i], -i)]
        weight.append(rho[i] * (min(denser) if denser else max(apart[i])))
    centres = sorted(range(size), key=lambda i: (-weight[i], i))[:count]
    groups = {c: [c] for c in centres}
    for i in range(size):
        if i not in groups:
            groups[min(sorted(centres), key=lambda c: apart[i][c])].append(i)
    return list(groups.values())


def sparse(keep, saliency, beta, clusters=0.0, neighbours=5):
    """The definition, from whole attention matrices; rows of all calls are kept."""

    def edit(call):
        plain = call.plain.nan_to_num()
        rows, heads, _, size = plain.shape
        if call.past == 0:
            call.store["sum"] = torch.zeros(rows, heads, size)
            call.store["looks"] = torch.zeros(rows, size)
            call.store["real"] = torch.zeros(rows, size, dtype=torch.bool)
        pad = torch.nn.functional.pad
        grown = {n: pad(x, (0, size - x.shape[-1])) for n, x in call.store.items()}
        for b, i, column in call.rows():
            grown["sum"][b] += plain[b, :, i]
            grown["looks"][b, column] = plain[b, -1, i][call.image[b]].sum()
            grown["real"][b, column] = True
        call.store.update(grown)
        weights = torch.zeros_like(plain)
        for b, i, _ in call.rows():
            keys = call.visible[b, i].nonzero().flatten()
            everything = grown["real"][b].nonzero().flatten()
            p = torch.zeros(size)
            p[everything] = grown["looks"][b, everything].softmax(-1)
            for h in range(heads):
                w = torch.zeros(size)
                w[everything] = grown["sum"][b, h, everything].softmax(-1)
                dots = call.products[b, h, i]
                used, groups = keys, []
                if call.past and keep < 1:
                    gain = dots[keys].square() + saliency * p[keys]
                    used = keys[gain.topk(int(keep * len(keys))).indices]
                    left = torch.tensor([j for j in keys.tolist() if j not in used.tolist()])
                    if clusters and len(left):
                        count = max(1, int(clusters * len(left)))
                        found = clustered(call.keys[b, h, left], count, neighbours)
                        groups = [left[group] for group in found]
                penalised = ((1 + beta) * dots - beta * w * dots) * call.scale
                # The weight of a sum of values is the weight of each of them.
                merged = torch.tensor([float(penalised[group].sum()) for group in groups])
                share = torch.cat([penalised[used], merged]).softmax(-1)
                weights[b, h, i, used] = share[: len(used)]
                for group, value in zip(groups, share[len(used) :], strict=True):
                    weights[b, h, i, group] = value
        return weights

    return edit


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name):
    stats = check(name, VASparse(**KNOBS, alpha=0.0), sparse(**KNOBS))
    assert all(0.6 < density < 0.7 for density in notes(stats, "density"))
    assert all(0 < w <= 1 for w in notes(stats, "penalty"))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_clusters_of_dropped_keys_equal_the_dense_formula(name):
    knobs = {**KNOBS, "keep": 0.5, "clusters": 0.4, "neighbours": 3}
    stats = check(name, VASparse(**knobs, alpha=0.0), sparse(**knobs))
    # Half of the keys, and two for five of the other half.
    assert all(0.6 < density < 0.72 for density in notes(stats, "density"))
    check_rows(name, VASparse(**knobs, alpha=0.0))


def test_as_many_clusters_as_keys_is_every_key_by_itself():
    model, call = made("llava")
    dropping = {"keep": 0.5, "beta": 0.3, "alpha": 0.0}
    results = []
    for knobs in ({**dropping, "clusters": 1.0}, {**dropping, "keep": 1.0}, dropping):
        with mmattn.attach(model, VASparse(**knobs)):
            results.append(steps(model, call)[1])
    assert distance(results[0], results[1]) < 1e-5 < 1e-3 < distance(results[2], results[1])


@pytest.mark.parametrize("seed", range(4))
def test_density_peaks(seed):
    """Against the definition, point by point, and on points whose clusters are plain to see."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 20, 4, generator=generator)
    members = torch.stack([torch.randperm(20, generator=generator) < 9 for _ in range(3)])
    count = 2 + seed
    found = density_peaks(x, members, torch.full((3,), count), 3)
    for row in range(3):
        where = members[row].nonzero().flatten()
        groups = clustered(x[row, where], count, 3)
        want = sorted(sorted(where[group].tolist()) for group in groups)
        got = {}
        for j in where.tolist():
            got.setdefault(int(found[row, j]), []).append(j)
        assert all(centre in group for centre, group in got.items())
        assert sorted(got.values()) == want and len(want) == count
        outside = ~members[row]
        assert torch.equal(found[row][outside], torch.arange(20)[outside])
    label = torch.arange(20) % 3
    tight = label[:, None] * 10.0 + torch.randn(20, 4, generator=generator) * 0.1
    home = density_peaks(tight, torch.ones(20, dtype=torch.bool), torch.tensor(3), 3)
    assert torch.equal(label[home], label) and len(home.unique()) == 3


@pytest.mark.parametrize("part", [{"keep": 0.5}, {"beta": 1.5}])
def test_each_part_alone(part):
    knobs = {"keep": 1.0, "saliency": 0.1, "beta": 0.0, **part}
    if "keep" in part:
        # A prompt is left alone; the oracle's check of it would find no change.
        model, call = made("llava")
        stock, (_, plain) = zoo.logits(model, call), steps(model, call)
        with patched(model, call["input_ids"], sparse(**knobs), range(4)):
            text, want = steps(model, call)
        with mmattn.attach(model, VASparse(**knobs, alpha=0.0)):
            assert torch.equal(zoo.logits(model, call), stock)
            got, numbers = steps(model, call)
        assert torch.equal(got, text) and distance(numbers, want) < 1e-5
        assert distance(numbers, plain) > 1e-4
    else:
        check("llava", VASparse(**knobs, alpha=0.0), sparse(**knobs))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name):
    model, call = made(name)
    model.set_attn_implementation("sdpa")
    check_rows(name, VASparse(**KNOBS, alpha=0.0))
    # The contrast rules tokens out with minus infinity, which no distance can be taken of.
    with mmattn.attach(model, VASparse(alpha=0.2)):
        text, numbers = steps(model, call)
        for row in range(2):
            single = steps(model, alone(call, row))[1][0]
            ruled = numbers[row] == -torch.inf
            assert torch.equal(ruled, single == -torch.inf)
            assert distance(single[~ruled], numbers[row][~ruled]) < 1e-5
    assert text.shape[0] == 2


def test_with_every_part_off_nothing_changes():
    check_identity(VASparse(keep=1.0, beta=0.0, alpha=0.0))


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_the_contrast_is_with_the_last_tokens_embedding(name):
    model, call = made(name)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    table.data *= 20  # a random model's embeddings say next to nothing
    method = VASparse(keep=1.0, beta=0.0, alpha=3.0, plausible=0.7, layers=())
    with mmattn.attach(model, method) as session:
        text, got = steps(model, call)
        assert session.stats.executed == session.stats.planned
    fresh = text.shape[1] - call["input_ids"].shape[1]
    whole = {**call, "input_ids": text}
    for key in {"attention_mask", "mm_token_type_ids"} & set(call):
        whole[key] = torch.nn.functional.pad(call[key], (0, fresh), value=int(key[0] == "a"))
    with torch.no_grad():
        plain = model(**whole).logits[:, -fresh - 1 : -1]
        blind = table[text[:, -fresh - 1 : -1]] @ head.T
    want, share = 4.0 * plain - 3.0 * blind, plain.softmax(-1)
    want[share < 0.7 * share.amax(-1, keepdim=True)] = -torch.inf
    ruled = want == -torch.inf
    assert torch.equal(ruled, got == -torch.inf) and 0 < ruled.sum() < ruled.numel()
    assert distance(got[~ruled], want[~ruled]) < 1e-4
    assert distance(want[~ruled], plain[~ruled]) > 0.1
    beams = steps(model, call, num_beams=3)[0]
    with mmattn.attach(model, method):
        assert steps(model, call, num_beams=3)[0].shape[0] == beams.shape[0]


def test_contrast():
    logits, plain = torch.randn(2, 2, 1, 50, generator=torch.Generator().manual_seed(0)) * 4
    out = contrast(logits, plain, 0.3, float(torch.tensor(0.1).log()))
    share = logits.softmax(-1)
    assert torch.equal(out == -torch.inf, share < 0.1 * share.amax(-1, keepdim=True))
    assert torch.isfinite(out.amax(-1)).all()
    open_ = contrast(logits, plain, 0.3, -torch.inf)
    assert distance(open_, 1.3 * logits - 0.3 * plain) < 1e-6
    assert distance(contrast(logits, plain, 0.0, -torch.inf), logits) == 0


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_the_best_of_all_sets(seed):
    """Theorem 1: no other set of its size has a smaller error, tried one after the other."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 2, 4, generator=generator), torch.randn(1, 2, 7, 4, generator=generator)
    products = torch.einsum("bhd,bhkd->bhk", q, k)
    salience = torch.randn(1, 7, generator=generator).softmax(-1)
    visible = torch.ones(1, 7, dtype=torch.bool)
    visible[0, seed % 3] = seed % 2 == 0
    weight = (0.1, 3.0, 1e6)[seed % 3]
    kept = select(products, salience, 0.6, weight, visible)
    size = int(0.6 * int(visible.sum()))
    keys = visible[0].nonzero().flatten().tolist()

    def error(h, chosen):
        dropped = [j for j in range(7) if j not in chosen]
        lost = sum(float(products[0, h, j]) ** 2 for j in dropped)
        return lost - weight * sum(float(salience[0, j]) for j in chosen)

    for h in range(2):
        best = min(itertools.combinations(keys, size), key=lambda s: error(h, s))
        assert kept[0, h].nonzero().flatten().tolist() == list(best)
        if weight == 1e6:
            assert set(best) == set(sorted(keys, key=lambda j: -float(salience[0, j]))[:size])
    # And it keeps more of (q . k)^2 than random sets of its size do on average.
    if weight == 0.1:
        squares = products[0].square()
        held = (squares * kept[0]).sum()
        assert held > squares[:, visible[0]].mean() * size * 2


def test_rows_select_from_their_own_keys():
    products = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 20, dtype=torch.bool)
    visible[1, :9] = False
    kept = select(products, torch.ones(2, 20) / 20, 0.9, 0.1, visible)
    assert (kept[0].sum(-1) == 18).all() and (kept[1].sum(-1) == 9).all()
    assert not kept[1][:, :9].any()
    alone_ = select(products[1:, :, 9:], torch.ones(1, 11) / 20, 0.9, 0.1, visible[1:, 9:])
    assert torch.equal(alone_[0], kept[1][:, 9:])
    assert select(products, torch.ones(2, 20), 1.0, 0.1, visible)[1].sum() == 33
    assert (select(products, torch.ones(2, 20), 0.01, 0.1, visible).sum(-1) == 1).all()


def test_the_penalty_is_a_factor_of_the_keys():
    q, k, v, mask, real = case(queries=30, dim=16, pads=(0, 4))
    k[:, :, [0, 4]] = q.mean((1, 2), keepdim=True) + 3
    log = []

    class Layout:
        past, twins, image_mask = 0, 0, real & (torch.arange(30) > 8) & (torch.arange(30) < 20)

    class Site:
        layout, state, causal, index, depth, path, module = Layout, {}, False, 0, 1, "site", None

        def note(self, *_):
            pass

    def dense(q, k, v):
        log.append(k)
        return q

    VASparse(beta=0.3).attend(q, k, v, mask=mask, scale=None, site=Site(), dense=dense)
    factor = (log[0] / k.repeat_interleave(2, 1)).mean(-1)
    w = 1 - (factor - 1) / 0.3
    assert (factor >= 1 - 1e-5).all() and (factor <= 1.3 + 1e-5).all()
    assert torch.allclose((w * real[:, None]).sum(-1), torch.ones(()), atol=1e-3)


def test_the_embedded_model():
    from mmattn.mini import load

    model, _ = load("vlm")
    ids = torch.tensor([[1, *[4] * 64, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
    }
    method = VASparse(alpha=0.0)
    with patched(model, ids, sparse(0.9, 0.1, 0.1), range(8)):
        text, want = steps(model, call)
    with mmattn.attach(model, method):
        got, numbers = steps(model, call)
    assert torch.equal(got, text) and distance(numbers, want) < 2e-5


def test_what_it_refuses():
    bad = [{"keep": 0.0}, {"keep": 1.1}, {"saliency": -1.0}, {"beta": -1.0}, {"alpha": -1.0}]
    bad += [{"clusters": 1.1}, {"clusters": -0.1}, {"neighbours": 0}]
    for settings in [*bad, {"plausible": 2.0}, {"layers": (0.5,)}]:
        with pytest.raises(mmattn.ConfigError):
            VASparse.from_dict(settings)
    method = VASparse(**KNOBS, layers=(1, -1))
    assert VASparse.from_dict(method.to_dict()) == method
    model, call = made("llava")
    with (
        mmattn.attach(model, VASparse(), sites="*language_model.layers.2*"),
        pytest.raises(mmattn.UnsupportedCall, match="first block"),
    ):
        zoo.logits(model, call)
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.llama(), VASparse())
    with mmattn.attach(model, VASparse(**KNOBS, layers=(2,))) as session:
        steps(model, call)
        sites = [row.path.split(".")[-2] for row in session.stats.sites if row.kind == "self"]
    assert sites == ["0", "2"]
