"""Image guidance against two explicit runs of the model, with the image tokens cut out by hand."""

import copy
import math

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import mini
from mmattn.methods.imageguidance import ImageGuidance

FAMILIES = ["llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"]
TRACE = {"return_dict_in_generate": True, "output_logits": True}


def text_of(call, image=zoo.IMAGE):
    """The text of every row, padded on the left."""
    pairs = zip(call["input_ids"], call["attention_mask"], strict=True)
    rows = [ids[(ids != image) & (mask > 0)] for ids, mask in pairs]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def rule(seeing, blind, gamma, cutoff):
    rows = []
    for a, b in zip(seeing.log_softmax(-1), blind.log_softmax(-1), strict=True):
        allowed = a >= a.max() + math.log(cutoff)
        rows.append(torch.where(allowed, gamma * (a - b) + b, torch.tensor(-torch.inf)))
    return torch.stack(rows)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def two_models(model, call, gamma, cutoff, pick, steps=6, image=zoo.IMAGE):
    """Logits ``[B, steps, V]`` and tokens of two runs that are fed the same tokens."""
    text = text_of(call, image)
    models = (model, copy.deepcopy(model))
    masks = [call["attention_mask"], text["attention_mask"]]
    outs = [
        m(**c, position_ids=positions(mask), use_cache=True)
        for m, c, mask in zip(models, (call, text), masks, strict=True)
    ]
    logits, tokens = [], []
    for _ in range(steps):
        logits.append(rule(*(out.logits[:, -1] for out in outs), gamma, cutoff))
        tokens.append(pick(logits[-1]))
        masks = [torch.cat([mask, torch.ones_like(mask[:, :1])], 1) for mask in masks]
        outs = [
            m(
                input_ids=tokens[-1],
                attention_mask=mask,
                position_ids=positions(mask)[:, -1:],
                cache=out.cache,
            )
            for m, out, mask in zip(models, outs, masks, strict=True)
        ]
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def same(got, want):
    """Equal where finite, minus infinity at the same places."""
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want)[want.isfinite()].abs().max())


@pytest.mark.parametrize(("gamma", "cutoff"), [(1.1, 0.1), (3.0, 0.5)])
@pytest.mark.parametrize("images", [((1, 1), (2, 0)), ((1, 2), (0, 3))])
@torch.no_grad()
def test_greedy_equals_two_models_fed_by_hand(gamma, cutoff, images):
    model, call = zoo.llava(), zoo.llava_call(*images)
    want, tokens = two_models(
        model, call, gamma, cutoff, lambda logits: logits.argmax(-1, keepdim=True)
    )
    stock = zoo.tokens(model, call, max_new_tokens=6, eos_token_id=None)
    with mmattn.attach(model, ImageGuidance(gamma=gamma, cutoff=cutoff)) as session:
        out = model.generate(
            **call, **TRACE, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=None
        )
        notes = session.stats.sites[-1].notes
    assert torch.equal(out.sequences[:, -6:], tokens)
    assert same(torch.stack(out.logits, 1), want) < 1e-5
    width = text_of(call)["input_ids"].shape[1]
    assert notes["second_stream_tokens"] == pytest.approx((width + 5) / 6)
    assert torch.equal(zoo.tokens(model, call, max_new_tokens=6, eos_token_id=None), stock)
    assert gamma < 2 or not torch.equal(stock, out.sequences)


@torch.no_grad()
def test_sampling_equals_two_models_sampled_by_hand():
    model, call = zoo.llava(), zoo.llava_call()
    torch.manual_seed(7)
    _, tokens = two_models(
        model, call, 2.0, 0.1, lambda logits: torch.multinomial(logits.softmax(-1), 1)
    )
    with mmattn.attach(model, ImageGuidance(gamma=2.0)):
        torch.manual_seed(7)
        out = zoo.tokens(model, call, do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(out[:, -6:], tokens)


def questions(processor):
    """A caption and two questions about three pictures, of different lengths."""
    from mmattn.mini import objects
    from mmattn.mini.vlm import to_images

    scenes = objects.sample_scenes(3, torch.Generator().manual_seed(3), 0.2)
    texts = [
        objects.CAPTION_PROMPT,
        "Is there an apple in the image?",
        "Is there a leaf in the image?",
    ]
    turns = [[{"type": "image"}, {"type": "text", "text": text}] for text in texts]
    chats = [
        processor.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)
        for t in turns
    ]
    images = to_images(objects.render(scenes)[0])
    made = processor(images=images, text=chats, padding=True, return_tensors="pt")
    return {k: made[k] for k in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def test_the_embedded_model_answers_as_two_models_fed_by_hand():
    model, processor = mini.load("vlm")
    call = questions(processor)
    assert not call["attention_mask"].all()
    want, tokens = two_models(
        model,
        call,
        2.0,
        0.1,
        lambda logits: logits.argmax(-1, keepdim=True),
        steps=12,
        image=model.config.image_token_id,
    )
    with mmattn.attach(model, ImageGuidance(gamma=2.0)):
        out = model.generate(**call, **TRACE, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(out.sequences[:, -12:], tokens)
    assert same(torch.stack(out.logits, 1), want) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_prompt_and_its_cache_in_every_family(name):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    stock = zoo.logits(model, call)
    text = text_of(call, 250 if "qwen" in name else zoo.IMAGE)
    blind = zoo.logits(model, {**text, "position_ids": positions(text["attention_mask"])})
    with mmattn.attach(model, ImageGuidance(gamma=2.0)):
        got = zoo.logits(model, call)
        plain = zoo.tokens(model, call, eos_token_id=None)
        again = zoo.tokens(model, call, eos_token_id=None, use_cache=False)
        beams = zoo.tokens(model, call, eos_token_id=None, num_beams=2)
        apart = zoo.tokens(model, call, eos_token_id=None, num_beams=2, use_cache=False)
    want = rule(stock[:, -1], blind[:, -1], 2.0, 0.1)
    assert same(got[:, -1], want) < 1e-5
    assert torch.equal(got[:, :-1], stock[:, :-1])
    seeing = stock[:, -1].log_softmax(-1)
    assert distance(got[:, -1][want.isfinite()], seeing[want.isfinite()]) > 1e-3
    assert torch.equal(plain, again) and torch.equal(beams, apart)


@torch.no_grad()
def test_a_bare_loop_over_the_model_sees_its_own_positions():
    """Qwen keeps position offsets on the module; the second stream must not replace them."""
    model, call = zoo.qwen25(), zoo.qwen_call(((8, 12), (8, 12)))
    assert call.pop("attention_mask").all()
    step = {"input_ids": torch.tensor([[7], [8]])}
    out = model(**call, use_cache=True)
    stock, deltas = model(**step, cache=out.cache).logits, model.model.rope_deltas.clone()
    with mmattn.attach(model, ImageGuidance(gamma=2.0, cutoff=0.0)):
        out = model(**call, use_cache=True)
        assert torch.equal(model.model.rope_deltas, deltas)
        got = model(**step, cache=out.cache).logits
    assert not torch.allclose(got.log_softmax(-1), stock.log_softmax(-1), atol=1e-3)
    # What the image adds is the only difference: at gamma near 1 it vanishes.
    with mmattn.attach(model, ImageGuidance(gamma=1.0 + 1e-6, cutoff=0.0)):
        out = model(**call, use_cache=True)
        near = model(**step, cache=out.cache).logits
    assert torch.allclose(near, stock.log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_at_gamma_one_nothing_changes(name):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, ImageGuidance(gamma=1.0)) as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
        assert "second_stream_tokens" not in session.stats.sites[-1].notes


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    model = zoo.llava()
    mixed, text = zoo.llava_call((1, 0, 2), (0, 2, 1)), zoo.prompt((0, 0), 0, (0, 3))
    stock, stock_text = zoo.logits(model, mixed), zoo.logits(model, text)
    with mmattn.attach(model, ImageGuidance(gamma=2.0)):
        whole = zoo.logits(model, mixed)
        tokens = zoo.tokens(model, mixed, eos_token_id=None)[:, -5:]
        assert torch.equal(zoo.logits(model, text), stock_text)
        for row, pictures in ((0, slice(0, 1)), (2, slice(1, 3))):
            real = mixed["attention_mask"][row].bool()
            one = {k: v[row : row + 1, real] for k, v in mixed.items() if k != "pixel_values"}
            one["pixel_values"] = mixed["pixel_values"][pictures]
            assert same(zoo.logits(model, one)[:, -1], whole[row : row + 1, -1]) < 1e-5
            assert torch.equal(zoo.tokens(model, one, eos_token_id=None)[0, -5:], tokens[row])
    assert torch.equal(whole[1], stock[1]) and not torch.equal(whole[0], stock[0])


def test_settings():
    for settings in ({"gamma": -1.0}, {"cutoff": 1.5}):
        with pytest.raises(mmattn.ConfigError):
            ImageGuidance(**settings)
    method = ImageGuidance(gamma=1.5)
    assert ImageGuidance.from_dict(method.to_dict()) == method
