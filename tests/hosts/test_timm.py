"""timm models: the host contract on one small model per family, and what a method sees there."""

import copy
import functools
import re

import pytest
import timm
import torch
from host_contract import (
    Calls,
    NoMasks,
    ShiftTokens,
    Zeroed,
    ZeroHeads,
    check_contract,
    distance,
)

import mmattn

# name -> (timm model, arguments, image height and width, number of sites, kinds)
ZOO = {
    "sam": (
        "samvit_base_patch16",
        {
            "img_size": 64,
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "global_attn_indexes": (1,),
            "window_size": 3,
        },
        (64, 64),
        2,
        "self window",
    ),
    "nest": (
        timm.models.nest.Nest,
        {"img_size": 32, "embed_dims": (16, 32, 64), "num_heads": (2, 4, 4), "depths": (1, 1, 1)},
        (32, 32),
        3,
        "window",
    ),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, (32, 32), 2, "self"),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, (32, 32), 2, "self"),
    "deit3": ("deit3_small_patch16_224", {"img_size": 32, "depth": 2}, (32, 32), 2, "self"),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}, (28, 28), 2, "self"),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 2}, (32, 48), 2, "self"),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, (28, 28), 2, "self"),
    "siglip": (
        "vit_base_patch16_siglip_224",
        {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 4},
        (32, 32),
        3,
        "self cross",
    ),
    "parallel": (
        "vit_small_patch16_224",
        {
            "img_size": 32,
            "depth": 2,
            "block_fn": timm.models.vision_transformer.ParallelScalingBlock,
        },
        (32, 32),
        2,
        "self",
    ),
    "beit": (
        "beit_base_patch16_224",
        {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 4},
        (32, 32),
        2,
        "self",
    ),
    "relpos": ("vit_relpos_small_patch16_224", {"img_size": 32, "depth": 2}, (32, 32), 2, "self"),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, (32, 32), 4, "self cross"),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": 64, "stages": (1, 1, 2, 1)},
        (64, 64),
        5,
        "self window cross",
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": (2,), "embed_dim": 24, "num_heads": (2,)},
        (56, 56),
        2,
        "window",
    ),
    "maxvit": (
        "maxvit_pico_rw_256",
        {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)},
        (64, 64),
        4,
        "window",
    ),
    "pit": ("pit_ti_224", {"img_size": 64}, (64, 64), 12, "self"),
    "cait": ("cait_xxs24_224", {"img_size": 32, "depth": 2}, (32, 32), 2, "cross"),
    "twins": (
        "twins_svt_small",
        {"img_size": 64, "depths": (2, 2, 2, 2)},
        (64, 64),
        8,
        "self window cross",
    ),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "depth": 2}, (32, 32), 4, "channel cross"),
    "davit": (
        "davit_tiny",
        {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)},
        (64, 64),
        2,
        "window",
    ),
    "naflex": (
        "naflexvit_base_patch16_gap",
        {"depth": 2, "embed_dim": 64, "num_heads": 4},
        (32, 32),
        2,
        "self",
    ),
}


def build(key):
    name, kwargs, size, count, kinds = ZOO[key]
    torch.manual_seed(0)
    make = name if callable(name) else functools.partial(timm.create_model, name)
    model = make(num_classes=7, **kwargs).eval()
    # Some families start with zero scales or biases, which would hide what attention does.
    for parameter in model.parameters():
        if parameter.ndim <= 1 or "gamma" in str(parameter):
            torch.nn.init.normal_(parameter, 0.5, 0.1)
    torch.nn.init.normal_(
        next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear)).weight
    )
    image = torch.randn(2, 3, *size)
    return model, (lambda m: m(image)), count, set(kinds.split())


@pytest.mark.parametrize("key", ZOO)
def test_contract(key):
    model, call, count, kinds = build(key)
    check_contract(model, call, expect_sites=count)
    plan = mmattn.plan(model, "identity")
    assert {row.site.kind for row in plan.rows} == kinds
    assert all(row.site.heads for row in plan.rows)


@pytest.mark.parametrize("key", ZOO)
def test_methods_act(key):
    model, call, count, _ = build(key)
    with torch.no_grad():
        stock = call(model)
        scale = float(stock.abs().max())
        with mmattn.attach(model, Calls()) as session:
            out = call(model)
        assert distance(out, stock) < 1e-5 * max(1.0, scale)
        assert session.stats.executed == count and session.stats.sites[0].notes["queries"] > 0
        heads = {row.site.path: row.site.heads for row in session.plan.rows}
        assert all(row.notes["head_count"] == heads[row.path] for row in session.stats.sites)
        for method in (Zeroed(), ZeroHeads()):
            with mmattn.attach(model, method) as session:
                assert distance(call(model), stock) > 1e-4 * scale, method
            assert session.stats.executed == count
        assert torch.equal(call(model), stock)


_SLOW = [
    pytest.param(k, marks=pytest.mark.slow) for k in ("dinov3", "siglip", "pvt_v2", "parallel")
]


@pytest.mark.parametrize("key", ["vit", "swin", *_SLOW])
def test_compiles_without_a_graph_break(key):
    model, call, _, _ = build(key)
    check_contract(model, call, deep_copy=False, interrupt=False, compiled=True)
    with torch.no_grad():
        stock = call(model)
        with mmattn.attach(model, Zeroed()) as session:
            torch._dynamo.reset()
            out = call(torch.compile(model, fullgraph=True, backend="eager"))
            assert distance(out, call(model)) < 1e-5 * float(stock.abs().max() + 1)
            assert session.stats.executed == session.stats.planned
        assert torch.equal(call(model), stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_grid_inside_a_compiled_graph(when):
    model, _, _, _ = build("dinov3")
    images = [torch.randn(1, 3, 32, 48), torch.randn(1, 3, 48, 32)]

    class LastCell(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            _, y, x = site.layout.grid
            return dense(q, k, v * (1 + y / x))

    torch._dynamo.reset()
    with torch.no_grad():
        optimised = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        if when == "after":
            optimised(images[0])
        with mmattn.attach(model, LastCell()):
            want = [model(image) for image in images]
            got = [optimised(image) for image in images]
    assert all(distance(a, b) < 1e-4 for a, b in zip(want, got, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("key", ["swin", "xcit"])
def test_the_switched_off_sdpa_branch_is_on_only_while_a_method_acts(key):
    model, call, _, _ = build(key)
    off = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]
    assert off
    with torch.no_grad(), mmattn.attach(model, Calls()) as session:
        call(model)
        with session.disabled():
            assert all(m.fused_attn is False for m in off)
        assert all(m.fused_attn is True for m in off)
        assert all(m.__dict__["fused_attn"] is False for m in off)
    assert all(m.fused_attn is False for m in off)


def test_fused_attn_set_to_false_by_hand():
    model, call, _, _ = build("vit")
    for block in model.blocks:
        block.attn.fused_attn = False
    check_contract(model, call, expect_sites=2)
    with torch.no_grad():
        stock = call(model)
        with mmattn.attach(model, Calls()) as session:
            assert distance(call(model), stock) < 1e-4 and session.stats.executed == 2


@pytest.mark.parametrize(
    ("key", "size", "grid", "prefix"),
    [
        ("vit", (32, 32), (1, 2, 2), 1),
        ("deit", (32, 32), (1, 2, 2), 2),
        ("dinov2", (28, 28), (1, 2, 2), 5),
        ("dinov3", (32, 48), (1, 2, 3), 5),
        ("dinov3", (64, 32), (1, 4, 2), 5),
        ("siglip", (32, 32), (1, 2, 2), 0),
    ],
)
def test_grid_of_the_running_call(key, size, grid, prefix):
    model, _, _, _ = build(key)
    seen = []

    class Look(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            if site.kind == "self":
                seen.append((site.layout.grid, site.layout.image_slice(q.shape[2]), q.shape[2]))
            return dense(q, k, v)

    with torch.no_grad(), mmattn.attach(model, Look()):
        for run in (model, model.forward_features):
            seen.clear()
            run(torch.randn(1, 3, *size))
            n = grid[1] * grid[2] + prefix
            assert seen == [(grid, slice(prefix, n), n)] * 2


def test_grid_follows_dynamic_image_sizes():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()
    grids = []

    class Look(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            grids.append(site.layout.grid)
            assert site.layout.image_slice(q.shape[2]).start == 1
            return dense(q, k, v)

    with torch.no_grad(), mmattn.attach(model, Look()):
        for size in ((32, 64), (48, 16), (40, 33)):
            model(torch.randn(1, 3, *size))
    assert grids == [(1, 2, 4), (1, 3, 1), (1, 3, 3)]


@pytest.mark.parametrize("key", ["swin", "hiera", "pvt_v2", "pit"])
def test_hierarchical_models_have_no_grid_and_no_token_blocks(key):
    model, call, _, _ = build(key)
    grids = []

    class Look(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            grids.append(site.layout.grid)
            return dense(q, k, v)

    with torch.no_grad(), mmattn.attach(model, Look()):
        call(model)
    assert grids and set(grids) == {None}
    with pytest.raises(mmattn.NoSiteError, match=r"no block with \[B, N, C\] hidden states"):
        mmattn.attach(model, ShiftTokens())


@pytest.mark.parametrize("key", ZOO)
def test_kinds_agree_with_the_lengths_of_the_call(key):
    model, call, _, _ = build(key)
    with torch.no_grad(), mmattn.attach(model, Calls()) as session:
        call(model)
    for row in session.stats.sites:
        queries, keys = row.notes["queries"], row.notes["keys"]
        if row.kind == "self":
            assert queries == keys, row
        if row.kind == "cross" and key not in ("pvt_v2", "twins"):
            assert queries < keys, row


@pytest.mark.parametrize("key", ["vit", "dinov3", "eva02", "beit", "parallel", "naflex"])
def test_tokens_seam_of_plain_blocks(key):
    model, call, count, _ = build(key)
    with torch.no_grad():
        stock = call(model)
        with mmattn.attach(model, ShiftTokens()) as session:
            out = call(model)
            stats = session.stats
        assert distance(out, stock) > 1e-4
        assert stats.executed == count and all(row.tokens_kept for row in stats.sites)
        with mmattn.attach(model, ShiftTokens(0.0)) as session:
            assert torch.equal(call(model), stock) and session.stats.calls == count
        assert torch.equal(call(model), stock)


@pytest.mark.parametrize("key", ["beit", "relpos", "swin"])
def test_position_bias_is_a_mask_that_methods_must_declare(key):
    model, call, count, _ = build(key)
    with torch.no_grad():
        stock = call(model)
        with (
            pytest.raises(mmattn.UnsupportedCall, match="attention mask"),
            mmattn.attach(model, NoMasks()),
        ):
            call(model)
        assert torch.equal(call(model), stock)
        with mmattn.attach(model, NoMasks(), unsupported="dense") as session:
            assert distance(call(model), stock) < 1e-4 * float(stock.abs().max() + 1)
        assert session.stats.dense_calls == count


def test_models_without_sdpa_say_so():
    for name, match in (
        (
            "levit_128s",
            r"LevitDistilled \(timm\) has no attention site.*computes the softmax itself",
        ),
        ("swinv2_cr_tiny_ns_224", r"WindowMultiHeadAttention computes the softmax itself"),
        ("resnet18", r"has no attention site mmattn can reach"),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(mmattn.NoSiteError, match=re.compile(match, re.S)):
            mmattn.attach(model, "identity")


def test_partly_reachable_models_list_what_is_left_out():
    with torch.device("meta"):
        model = timm.create_model("cait_xxs24_224", depth=2)
    text = str(mmattn.plan(model, "identity"))
    assert "blocks_token_only.0.attn" in text
    assert "2 attention modules are no sites" in text and "TalkingHeadAttn" in text


def test_grouped_rows_are_independent():
    model, _, _, _ = build("swin")
    image = torch.randn(3, 3, 56, 56)
    with torch.no_grad(), mmattn.attach(model, Calls()):
        whole = model(image)
        alone = torch.cat([model(row[None]) for row in image])
    assert distance(whole, alone) < 1e-4 * float(whole.abs().max() + 1)


def test_gradients_equal_the_stock_model():
    model, _, _, _ = build("vit")
    image = torch.randn(1, 3, 32, 32)

    def grads():
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = grads()
    with mmattn.attach(model, "identity"):
        got = grads()
    assert len(want) == len(got) and all(map(torch.equal, want, got))


def test_logits_seam():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Temperature(mmattn.Method):
        """Divides the logits."""

        name: ClassVar[str] = "temperature"
        seams: ClassVar[tuple[str, ...]] = ("logits",)
        by: float = 2.0

        def logits(self, logits, *, site):
            return logits / self.by

    model, call, _, _ = build("vit")
    with torch.no_grad():
        stock = call(model)
        with mmattn.attach(model, Temperature()) as session:
            assert torch.equal(call(model), stock / 2)
            with session.disabled():
                assert torch.equal(call(model), stock)
            assert session.stats.calls == session.stats.executed == 1
        assert torch.equal(call(model), stock) and not model._forward_hooks
        with mmattn.attach(model, [Temperature(), Calls()]) as session:
            assert distance(call(model), stock / 2) < 1e-4 * float(stock.abs().max() + 1)
            assert session.stats.executed == 2
            calls = session.stats.calls
            assert torch.equal(call(copy.deepcopy(model)), stock)
            assert session.stats.calls == calls, "the copy's hook must be inert"
