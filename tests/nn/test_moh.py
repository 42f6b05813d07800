"""Mixture-of-Head attention: golden numbers, gates, skipped heads, ViTs through timm, DiTs."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mmattn
from mmattn.nn import moh
from mmattn.nn.moh import (
    PLANS,
    Heads,
    MoHAttention,
    MoHDiT,
    balance_loss,
    checkpoint_filter_fn,
    official_keys,
    set_skipping,
)

OFFICIAL = {"router_routed": "wg", "router_balance": "wg_0", "router_shared": "wg_1"}


def official(name):
    for ours, theirs in OFFICIAL.items():
        name = name.replace(ours, theirs)
    return name


def layer(heads, dim=12, head_dim=4, seed=0, **knobs):
    torch.manual_seed(seed)
    return MoHAttention(dim, Heads(*heads), head_dim, **knobs).eval()


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(
    ("heads", "total", "norm", "first"),
    [
        (
            (6, 2, 2),
            0.7599073615,
            6.7260631837,
            [1.05912003, -0.65070564, 1.10489444, -0.1819744],
        ),
        (
            (3, 3, 0),
            -4.8853043548,
            5.2998869169,
            [-0.25366019, 0.1749104, 0.86588049, 0.06971099],
        ),
    ],
)
def test_the_authors_numbers(heads, total, norm, first, skips):
    """Sine-filled parameters in the order of the authors' names, cosine input, double precision."""
    attention = layer(heads, qkv_bias=True).double()
    attention.skips = skips
    named = sorted(attention.named_parameters(), key=lambda pair: official(pair[0]))
    for k, (_, p) in enumerate(named):
        at = torch.arange(p.numel(), dtype=torch.float64)
        p.data = (0.3 * torch.sin(1 + 0.7 * k + 0.37 * at)).view_as(p)
    x = torch.cos(0.11 * torch.arange(120, dtype=torch.float64) + 0.2).view(2, 5, 12)
    out = attention(x)
    assert out.sum().item() == pytest.approx(total, abs=1e-9)
    assert out.norm().item() == pytest.approx(norm, abs=1e-9)
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-7)


def test_gates_add_up_and_choose_exactly_the_routed():
    attention = layer((7, 3, 2))
    x = torch.randn(2, 9, 12)
    weight, chosen = attention.gates(x)
    both = 2 * attention.router_balance(x).softmax(-1)
    torch.testing.assert_close(weight[..., :3].sum(-1), 3 * both[..., 0])
    torch.testing.assert_close(weight[..., 3:].sum(-1), 2 * both[..., 1])
    assert (chosen.sum(-1) == 2).all() and torch.equal(weight[..., 3:] != 0, chosen)
    scores = attention.router_routed(x)
    best = torch.where(chosen, scores, -math.inf).amax(-1)
    assert torch.equal(best, scores.amax(-1))
    alone, _ = layer((5, 1, 2)).gates(x)  # one shared head has no router: its weight is the balance
    assert (alone[..., 0] > 0).all() and layer((5, 1, 2)).router_shared is None
    unshared = layer((5, 0, 2))
    assert unshared.router_balance is None
    torch.testing.assert_close(unshared.gates(x)[0].sum(-1), torch.full((2, 9), 2.0))


def test_zero_routers_and_all_heads_are_ordinary_attention():
    attention, x = layer((4, 1, 3)), torch.randn(2, 10, 12)
    for router in (attention.router_routed, attention.router_balance):
        torch.nn.init.zeros_(router.weight)
    q, k, v = attention.qkv(x).view(2, 10, 3, 4, 4).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(y))


@pytest.mark.parametrize("heads", [(6, 2, 2), (6, 0, 1), (8, 1, 5)])
def test_skipping_equals_computing_everything_and_computes_less(heads, monkeypatch):
    attention, x = layer(heads), torch.randn(3, 40, 12)
    rows = []
    plain = F.scaled_dot_product_attention

    def counting(q, *rest, **named):
        rows.append(q.shape[0] * q.shape[1] * q.shape[2])
        return plain(q, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    out = attention(x)
    skipped, rows[:] = sum(rows), []
    alone = torch.cat([attention(row[None]) for row in x])
    each, rows[:] = sum(rows), []
    attention.skips = False
    torch.testing.assert_close(out, attention(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=1e-5)
    total, shared, routed = heads
    assert sum(rows) == 3 * 40 * total
    assert each == 3 * 40 * (shared + routed)  # one row at a time, nothing is computed in vain
    assert each <= skipped < sum(rows)


def test_heads_nobody_chose_are_never_computed():
    attention, x = layer((4, 2, 1)), torch.randn(2, 6, 12).abs()
    attention.router_routed.weight.data[:] = torch.tensor([1.0, -1.0])[:, None]
    before = attention(x)
    attention.qkv.weight.data.view(3, 4, 4, 12)[0, 3] = math.nan  # the query of the last head
    out = attention(x)
    assert torch.equal(out, before)


def test_an_unchosen_head_does_not_reach_the_output():
    attention, x = layer((6, 2, 2)), torch.randn(1, 8, 12)
    _, chosen = attention.gates(x)
    before = attention(x)
    attention.proj.weight.data.view(12, 6, 4)[:, 2] += 1.0  # the first routed head
    same = (attention(x) == before).all(-1)[0]
    assert torch.equal(same, ~chosen[0, :, 0]) and 0 < int(same.sum()) < 8


@torch.no_grad()
def test_a_router_that_knows_the_strong_heads_beats_every_other_choice():
    """Two of six heads carry most of the output; routers see a constant channel and nothing else."""
    attention, x = layer((6, 0, 2)), torch.randn(2, 12, 12)
    x[..., 0] = 1.0
    strength = torch.tensor([0.1, 2.0, 0.1, 0.2, 2.0, 0.1])
    attention.qkv.weight.data.view(3, 6, 4, 12)[2] *= strength[:, None, None]
    q, k, v = attention.qkv(x).view(2, 12, 3, 6, 4).permute(2, 0, 3, 1, 4)
    whole = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    errors = {}
    for pair in itertools.combinations(range(6), 2):
        torch.nn.init.zeros_(attention.router_routed.weight)
        attention.router_routed.weight.data[list(pair), 0] = 9.0
        errors[pair] = float((attention(x) - whole).norm())
    assert min(errors, key=errors.get) == (1, 4)
    assert errors[1, 4] < 0.5 * sum(errors.values()) / len(errors)


def test_balance_loss():
    attention = layer((6, 2, 2)).train()
    x = torch.randn(2, 9, 12)
    with pytest.raises(ValueError, match="routed"):
        balance_loss(attention)
    attention(x)
    loss = balance_loss(attention)
    share = attention.router_routed(x).softmax(-1)
    _, chosen = attention.eval().gates(x)
    want = 16 * sum(share[..., e].mean() * chosen[..., e].float().mean() for e in range(4)) / 4
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert attention.router_routed.weight.grad.abs().sum() > 0
    attention(x)
    with pytest.raises(ValueError, match="routed"):
        balance_loss(attention)
    attention.train()
    torch.nn.init.zeros_(attention.router_routed.weight)
    attention(x)
    assert balance_loss(attention).item() == pytest.approx(2.0)  # even scores: the routed heads


@pytest.mark.parametrize("heads", [(4, 0, 0), (4, 3, 2), (4, 2, 0), (4, -1, 2)])
def test_impossible_heads(heads):
    with pytest.raises(ValueError, match="heads"):
        layer(heads)


# -- ViT ------------------------------------------------------------------------------------------

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_classes": 5, "patch_size": 8}
PLAN = ((4, 2, 1), (6, 1, 3))


def vit(**knobs):
    torch.manual_seed(0)
    return timm.create_model("moh_vit_tiny_patch16_224", **{**SMALL, "plan": PLAN, **knobs})


@pytest.mark.parametrize(
    ("size", "dim", "plan"),
    [("tiny", 192, "small-75"), ("small", 384, "small-75"), ("base", 768, "base-75")],
)
def test_vit_parameters_are_those_of_a_plain_vit_and_its_routers(size, dim, plan):
    with torch.device("meta"):
        ours = timm.create_model(f"moh_vit_{size}_patch16_224")
        plain = timm.create_model(f"vit_{size}_patch16_224")
    routers = sum(
        dim * ((h - s if r else 0) + (2 if r and s else 0) + (s if s > 1 else 0))
        for h, s, r in PLANS[plan]
    )
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, plain)]
    assert count[0] == count[1] + routers
    used = sum(s + r for _, s, r in PLANS[plan]) / sum(h for h, _, _ in PLANS[plan])
    assert used == pytest.approx(0.75, abs=0.01)


@torch.no_grad()
def test_vit_keeps_timms_manners():
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == (2, 17, 24)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    maps = vit(features_only=True, out_indices=(0, 1))(x)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2
    model.set_input_size(img_size=(48, 32))
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 3)
    assert vit(dynamic_img_size=True)(torch.randn(1, 3, 40, 24)).shape == (1, 5)
    with pytest.raises(ValueError, match="one per block"):
        vit(plan="small-75")
    with pytest.raises(ValueError, match="no plan"):
        vit(plan="huge")


@torch.no_grad()
def test_vit_skipping_equals_dense_and_official_names_load():
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    out = model(x)
    set_skipping(model, False)
    torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)
    theirs = {official(k): v for k, v in model.state_dict().items()}
    assert any(".wg_1.weight" in k for k in theirs) and any(".wg.weight" in k for k in theirs)
    other = vit().eval()
    other.load_state_dict(checkpoint_filter_fn(theirs, other))
    set_skipping(other, False)
    assert torch.equal(other(x), model(x))


def test_vit_checkpointing_gives_the_same_gradients_and_learns():
    x = torch.randn(4, 3, 32, 32)
    grads = []
    for on in (False, True):
        model = vit().train()
        model.set_grad_checkpointing(on)
        loss = model(x).square().mean()
        (loss + 0.01 * balance_loss(model)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    assert grads[0]["blocks.1.attn.router_routed.weight"].abs().sum() > 0


@torch.no_grad()
def test_vit_compiles_whole():
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_methods_attach_and_see_all_heads():
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    with mmattn.attach(model, "identity") as session:
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        assert session.stats.executed == 2
    assert torch.equal(model(x), before)


# -- DiT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "dim", "head_dim", "parameters", "macs"),
    [
        ("xlarge-90", 1152, 72, 675_666_464, None),
        ("xlarge-75", 1152, 72, 675_689_504, None),
        ("large-90", 1024, 64, 458_512_416, 77.64),
        ("base-90", 768, 64, 130_638_368, 21.85),
        ("small-90", 384, 64, 32_997_152, 5.471),
    ],
)
def test_dit_parameters_and_multiply_adds(plan, dim, head_dim, parameters, macs):
    with torch.device("meta"):
        model = MoHDiT(dim, plan, head_dim).eval()
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if macs is None:
        return
    set_skipping(model, False)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    counts = counter.get_flop_counts()["Global"]
    # The published numbers leave the attention itself out, and count a norm as 4 operations per
    # element and the weighing of heads as 1.
    linear = sum(n for op, n in counts.items() if "bmm" not in str(op)) / 2
    norms = (2 * len(PLANS[plan]) + 1) * 256 * dim * 4
    gates = sum(h for h, _, _ in PLANS[plan]) * 256 * head_dim
    digits = 3 if macs < 10 else 2
    assert round((linear + norms + gates) / 1e9, digits) == macs


def test_dit_plans_use_the_published_share_of_heads():
    used = {
        name: sum(s + r for _, s, r in plan) / sum(h for h, _, _ in plan)
        for name, plan in PLANS.items()
    }
    assert used["xlarge-90"] == pytest.approx(403 / 448)
    assert used["xlarge-75"] == pytest.approx(336 / 448)
    assert used["large-90"] == pytest.approx(344 / 384)
    assert used["base-90"] == pytest.approx(129 / 144)
    assert used["small-90"] == pytest.approx(64 / 72)


def small_dit():
    torch.manual_seed(0)
    return MoHDiT(24, PLAN, 4, input_size=8, classes=10)


def test_dit_runs_starts_at_zero_and_checkpoints():
    model = small_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    assert model(x, t, y).shape == (2, 8, 8, 8) and not model(x, t, y).any()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model.train()(x, t, y).square().mean().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    model.eval()
    both = model(x, t, y)
    torch.testing.assert_close(both[:1], model(x[:1], t[:1], y[:1]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no plan"):
        MoHDiT(24, "huge")


def test_dit_official_keys_and_patches_land_where_they_came_from():
    model = small_dit()
    theirs = {official(k): v for k, v in model.state_dict().items()}
    for key in (
        "blocks.1.attn.wg.weight",
        "blocks.0.attn.wg_1.weight",
        "y_embedder.embedding_table.weight",
    ):
        assert key in theirs
    small_dit().load_state_dict(official_keys(theirs))
    # One linear layer per patch: a bias of the final layer shows at one place of every patch.
    model.final_layer.linear.bias.data.view(2, 2, 8)[1, 0, 5] = 1.0
    out = model(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert (out[0, 5, 1::2, ::2] == 1).all() and int(out.count_nonzero()) == 16


def test_positions_are_those_of_dit():
    """Columns first, rows second, sine before cosine."""
    table = moh._sincos(8, 3)[0].view(3, 3, 8)
    assert torch.allclose(table[2, 1, :2], torch.tensor([1.0, 0.01]).sin())
    assert torch.allclose(table[2, 1, 4:6], torch.tensor([2.0, 0.02]).sin())
    assert torch.allclose(table[2, 1, 6:], torch.tensor([2.0, 0.02]).cos())
