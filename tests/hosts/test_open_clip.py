"""open_clip models: both towers, both attention modules, the native fast path, timm towers."""

import dataclasses
from typing import ClassVar

import open_clip
import pytest
import torch
from host_contract import (
    Calls,
    NoMasks,
    ShiftTokens,
    Zeroed,
    ZeroHeads,
    check_contract,
    distance,
    same,
)
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

import mmattn

VISION = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
TEXT = CLIPTextCfg(context_length=12, vocab_size=99, width=32, heads=2, layers=2)
OWN = {"block_type": "custom", "qk_norm": True}


def build(key):
    torch.manual_seed(0)
    vision, text, cls = VISION, TEXT, CLIP
    replace = dataclasses.replace
    if key == "custom-text":
        cls, text = CustomTextCLIP, replace(TEXT, embed_cls=True, pad_id=0)
    elif key == "own-attention":
        cls, vision, text = CustomTextCLIP, replace(VISION, **OWN), replace(TEXT, **OWN)
    elif key == "pool":
        vision = replace(VISION, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    elif key == "resnet":
        vision = replace(VISION, layers=(1, 1, 1, 1), head_width=64, image_size=64, width=16)
    elif key == "timm":
        vision = replace(
            VISION, timm_model_name="vit_tiny_patch16_224", timm_pool="token", image_size=224
        )
    model = cls(32, vision, text)
    return model.eval()


def inputs(model):
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    torch.manual_seed(1)
    return torch.randn(2, 3, height, width), torch.randint(1, 90, (2, 12))


def run(model):
    image, text = inputs(getattr(model, "_orig_mod", model))
    return model(image, text)


COUNTS = {"clip": 4, "custom-text": 4, "own-attention": 4, "pool": 5, "resnet": 3, "timm": 14}


@pytest.mark.parametrize("key", COUNTS)
def test_contract(key):
    check_contract(build(key), run, expect_sites=COUNTS[key])


@pytest.mark.parametrize("key", COUNTS)
def test_methods_act(key):
    model = build(key)
    with torch.no_grad():
        stock = run(model)
        with mmattn.attach(model, Calls()) as session:
            assert distance(run(model), stock) < 1e-5
        stats = session.stats
        assert stats.executed == COUNTS[key]
        heads = {row.site.path: row.site.heads for row in session.plan.rows}
        assert all(row.notes["head_count"] == heads[row.path] for row in stats.sites)
        for method in (Zeroed(), ZeroHeads()):
            with mmattn.attach(model, method):
                out = run(model)
            assert distance(out[0], stock[0]) > 1e-3 and distance(out[1], stock[1]) > 1e-3
        assert same(run(model), stock)


def test_towers_are_called_apart():
    model = build("clip")
    image, text = inputs(model)
    with torch.no_grad():
        for call, prefix in (
            (lambda: model.encode_image(image), "visual."),
            (lambda: model.encode_text(text), "transformer."),
        ):
            stock = call()
            with mmattn.attach(model, "identity") as session:
                assert torch.equal(call(), stock)
                used = {row.path for row in session.stats.sites if row.calls}
            assert len(used) == 2 and all(path.startswith(prefix) for path in used)


def test_a_site_that_is_not_reached_raises_per_tower():
    model = build("clip")
    image, text = inputs(model)
    model.visual.transformer.resblocks[1].forward = lambda x, attn_mask=None: x
    with (
        torch.no_grad(),
        pytest.raises(mmattn.SeamNotReached, match=r"1 of 2 planned sites of visual"),
        mmattn.attach(model, "identity"),
    ):
        model.encode_text(text)
        model.encode_image(image)


def test_methods_without_masks_act_on_the_image_tower_only_if_selected():
    model = build("clip")
    image, text = inputs(model)
    with torch.no_grad():
        with (
            pytest.raises(mmattn.UnsupportedCall, match="attention mask"),
            mmattn.attach(model, NoMasks()),
        ):
            model.encode_text(text)
        stock = model.encode_image(image)
        with mmattn.attach(model, NoMasks(), sites="visual.*") as session:
            assert distance(model.encode_image(image), stock) < 1e-5
            assert session.stats.planned == session.stats.executed == 2
        want = model.encode_text(text)
        with mmattn.attach(model, NoMasks(), unsupported="dense") as session:
            assert distance(model.encode_text(text), want) < 1e-6
            assert session.stats.dense_calls == 2


def test_kinds_tokens_and_grid():
    plan = mmattn.plan(build("pool"), "identity")
    kinds = {row.site.path: row.site.kind for row in plan.rows}
    assert kinds["visual.attn_pool.attn"] == "cross"
    assert kinds["visual.transformer.resblocks.0.attn"] == "self"
    assert kinds["transformer.resblocks.1.attn"] == "text"
    model, seen = build("clip"), []
    image, text = inputs(model)

    class Look(Calls):
        def attend(self, q, k, v, *, mask, scale, site, dense):
            seen.append((site.layout.grid, None if mask is None else tuple(mask.shape[-2:])))
            if site.kind == "self":
                assert site.layout.image_slice(q.shape[2]) == slice(1, 17)
            return dense(q, k, v)

    with torch.no_grad(), mmattn.attach(model, Look()):
        model.encode_image(image)
        assert seen == [((1, 4, 4), None)] * 2
        seen.clear()
        model.visual.forward_intermediates(image)
        assert seen == [((1, 4, 4), None)] * 2
        seen.clear()
        model.encode_text(text)
        assert seen == [(None, (12, 12))] * 2


@pytest.mark.parametrize("key", ["clip", "own-attention", "timm"])
def test_tokens_seam(key):
    model = build(key)
    image, _ = inputs(model)
    with torch.no_grad():
        stock = model.encode_image(image)
        with mmattn.attach(model, ShiftTokens(), sites="visual.*") as session:
            assert distance(model.encode_image(image), stock) > 1e-4
        rows = session.stats.sites
        assert all(row.tokens_kept for row in rows) and session.stats.executed == len(rows)
        with mmattn.attach(model, ShiftTokens(0.0), sites="visual.*"):
            assert torch.equal(model.encode_image(image), stock)


def test_the_fast_path_stays_where_nothing_acts(monkeypatch):
    model = build("clip")
    image, _ = inputs(model)
    native, real = [], torch._native_multi_head_attention
    monkeypatch.setattr(
        torch,
        "_native_multi_head_attention",
        lambda *a: native.append(1) or real(*a),
    )
    with torch.no_grad():
        with mmattn.attach(model, "identity"):
            model.encode_image(image)
        assert len(native) == 2
        with mmattn.attach(model, Calls()):
            model.encode_image(image)
        assert len(native) == 2, "a method acts, so the native kernel must not run"
        model.encode_image(image)
        assert len(native) == 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_training_mode_and_gradients():
    model = build("clip").train()
    image, text = inputs(model)

    def grads():
        model.zero_grad()
        sum(out.sum() for out in model(image, text)[:2]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = grads()
    with mmattn.attach(model, "identity"):
        got = grads()
    assert all(map(torch.equal, want, got))
    with mmattn.attach(model, Calls()):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, grads(), strict=True))


def test_coca_decoder_has_self_and_cross_sites():
    torch.manual_seed(0)
    vision = dataclasses.replace(
        VISION,
        attentional_pool=True,
        attn_pooler_queries=4,
        attn_pooler_heads=2,
        output_tokens=True,
    )
    text = dataclasses.replace(TEXT, embed_cls=True, output_tokens=True, pad_id=0)
    decoder = MultimodalCfg(width=32, heads=2, layers=1, context_length=12, vocab_size=99)
    model = CoCa(32, decoder, text, vision).eval()
    image, tokens = inputs(model)
    check_contract(model, lambda m: m(image, tokens), expect_sites=7, interrupt=False)
    kinds = {row.site.path: row.site.kind for row in mmattn.plan(model, "identity").rows}
    assert kinds["text_decoder.cross_attn.0.attn"] == "cross"
    assert kinds["text_decoder.resblocks.0.attn"] == "text"


def test_compiles_without_a_graph_break():
    model = build("clip")
    image, _ = inputs(model)
    check_contract(
        model.visual, lambda m: m(image), deep_copy=False, interrupt=False, compiled=True
    )
    with torch.no_grad(), mmattn.attach(model.visual, Calls()) as session:
        torch._dynamo.reset()
        out = torch.compile(model.visual, fullgraph=True, backend="eager")(image)
        assert distance(out, model.visual(image)) < 1e-5
        assert session.stats.calls == 4 and session.stats.executed == 2


def test_a_single_tower_is_a_target():
    model = build("custom-text")
    assert mmattn.plan(model.text, "identity").rows[0].site.kind == "text"
    assert mmattn.plan(model.visual, "identity").rows[0].site.kind == "self"


def test_registered_architectures_have_sites():
    with torch.device("meta"):
        for name in ("ViT-B-32", "RN50", "ViT-B-16-SigLIP"):
            model = open_clip.create_model(name, pretrained=None, device="meta")
            plan = mmattn.plan(model, "identity")
            assert {r.site.path.split(".")[0] for r in plan.rows} >= {"visual"}, name


def test_logits_seam_sees_what_each_tower_returns():
    @dataclasses.dataclass(frozen=True)
    class Negate(mmattn.Method):
        """Flips the sign of the output."""

        name: ClassVar[str] = "negate"
        seams: ClassVar[tuple[str, ...]] = ("logits",)

        def logits(self, logits, *, site):
            return -logits

    model = build("clip")
    image, text = inputs(model)
    with torch.no_grad():
        stock = model.encode_image(image)
        with mmattn.attach(model, Negate()) as session:
            assert torch.equal(model.encode_image(image), -stock)
            model.encode_text(text)
            assert session.stats.executed == 2
        assert torch.equal(model.encode_image(image), stock)
