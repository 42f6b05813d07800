"""VCD against two explicit runs of the model, token by token, without mmattn."""

import copy
import math

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import mini
from mmattn.methods.vcd import VCD, kept_share

FAMILIES = ["llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"]
TRACE = {"return_dict_in_generate": True, "output_logits": True}


def noise_of_the_session(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=generator)[0]


def drowned(pixels, step):
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.005 - 1e-5) + 1e-5
    left = 1.0
    for b in beta[: step + 1].tolist():
        left *= 1 - b
    noise = noise_of_the_session(pixels.shape[1:])
    return torch.stack([math.sqrt(left) * p + math.sqrt(1 - left) * noise for p in pixels])


def rule(plain, noised, alpha, beta):
    rows = []
    for a, b in zip(plain, noised, strict=True):
        allowed = a >= a.max() + math.log(beta)
        rows.append(torch.where(allowed, (1 + alpha) * a - alpha * b, torch.tensor(-torch.inf)))
    return torch.stack(rows)


def two_models(model, call, other, combine, pick, steps=6):
    """Logits ``[B, steps, V]`` and tokens of two runs that are fed the same tokens."""
    first, second = model, copy.deepcopy(model)
    mask = call["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outs = [
        m(**c, position_ids=positions, use_cache=True)
        for m, c in ((first, call), (second, {**call, **other}))
    ]
    logits, tokens = [], []
    for _ in range(steps):
        logits.append(combine(*(out.logits[:, -1] for out in outs)))
        tokens.append(pick(logits[-1]))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.sum(1, keepdim=True) - 1
        outs = [
            m(
                input_ids=tokens[-1],
                attention_mask=mask,
                position_ids=positions,
                cache=out.cache,
            )
            for m, out in zip((first, second), outs, strict=True)
        ]
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def same(got, want):
    """Equal where finite, minus infinity at the same places."""
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want)[want.isfinite()].abs().max())


@pytest.mark.parametrize(("alpha", "beta", "step"), [(1.0, 0.1, 500), (2.5, 0.7, 999)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_greedy_equals_two_models_fed_by_hand(alpha, beta, step, implementation):
    model, call = zoo.llava(implementation), zoo.llava_call()
    other = {"pixel_values": drowned(call["pixel_values"], step)}
    want, tokens = two_models(
        model,
        call,
        other,
        lambda a, b: rule(a, b, alpha, beta),
        lambda logits: logits.argmax(-1, keepdim=True),
    )
    stock = zoo.tokens(model, call, max_new_tokens=6, eos_token_id=None)
    with mmattn.attach(model, VCD(alpha=alpha, beta=beta, noise_step=step)) as session:
        out = model.generate(
            **call, **TRACE, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=None
        )
        notes = session.stats.sites[-1].notes
    assert torch.equal(out.sequences[:, -6:], tokens)
    assert same(torch.stack(out.logits, 1), want) < 1e-5
    assert not torch.equal(stock, out.sequences), "the contrast has to matter for this test"
    # One prompt, then one token at a time.
    assert notes["second_stream_tokens"] == pytest.approx((call["input_ids"].shape[1] + 5) / 6)
    assert torch.equal(zoo.tokens(model, call, max_new_tokens=6, eos_token_id=None), stock)


@torch.no_grad()
def test_sampling_equals_two_models_sampled_by_hand():
    model, call = zoo.llava(), zoo.llava_call()
    other = {"pixel_values": drowned(call["pixel_values"], 500)}

    def sample(logits):
        return torch.multinomial(logits.softmax(-1), 1)

    torch.manual_seed(7)
    _, tokens = two_models(model, call, other, lambda a, b: rule(a, b, 1.0, 0.1), sample)
    with mmattn.attach(model, VCD()):
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
    other = {"pixel_values": drowned(call["pixel_values"], 500)}
    want, tokens = two_models(
        model,
        call,
        other,
        lambda a, b: rule(a, b, 1.0, 0.1),
        lambda logits: logits.argmax(-1, keepdim=True),
        steps=12,
    )
    with mmattn.attach(model, VCD()):
        out = model.generate(**call, **TRACE, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(out.sequences[:, -12:], tokens)
    assert same(torch.stack(out.logits, 1), want) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_prompt_and_its_cache_in_every_family(name):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    pixels = call["pixel_values"]
    if pixels.ndim == 2:  # a patch holds the same picture twice
        shape = (len(pixels), 3, 2, 14 * 14)
        pixels = pixels.view(shape)[:, :, :1].expand(shape).reshape(pixels.shape)
        call = {**call, "pixel_values": pixels}
    stock = zoo.logits(model, call)
    method = VCD(noise_step=700)
    with mmattn.attach(model, method) as session:
        got = zoo.logits(model, call)
        table = next(iter(session.runs[-1].shared_of(session.runs[-1].sites[-1])["noise"].values()))
        plain = zoo.tokens(model, call, eos_token_id=None)
        again = zoo.tokens(model, call, eos_token_id=None, use_cache=False)
        beams = zoo.tokens(model, call, eos_token_id=None, num_beams=2)
        apart = zoo.tokens(model, call, eos_token_id=None, num_beams=2, use_cache=False)
    share = kept_share(700)
    if pixels.ndim == 2:
        counts = call["image_grid_thw"].prod(-1).tolist()
        noise = torch.cat([table[:n].expand(-1, -1, 2, -1).flatten(1) for n in counts])
    else:
        noise = table if pixels.ndim == 5 else table[0]
    noised = {**call, "pixel_values": share**0.5 * pixels + (1 - share) ** 0.5 * noise}
    want = rule(stock[:, -1], zoo.logits(model, noised)[:, -1], 1.0, 0.1)
    assert same(got[:, -1], want) < 1e-5
    assert torch.equal(got[:, :-1], stock[:, :-1])
    assert distance(got[:, -1][want.isfinite()], stock[:, -1][want.isfinite()]) > 1e-3
    assert torch.equal(plain, again) and torch.equal(beams, apart)


@torch.no_grad()
def test_the_noise_grows_with_the_step_and_keeps_the_variance():
    assert kept_share(0) > 0.999 and 0.07 < kept_share(999) < 0.1
    assert kept_share(100) > kept_share(500) > kept_share(900)
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, VCD()) as session:
        zoo.logits(model, call)
        site = session.runs[-1].sites[-1]
        moved = [
            distance(VCD(noise_step=n).noised(call, site), call["pixel_values"])
            for n in (0, 300, 600, 999)
        ]
    assert moved == sorted(moved) and moved[0] < 0.1 < moved[3]


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_at_alpha_zero_nothing_changes(name):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, VCD(alpha=0.0)) as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
        assert "second_stream_tokens" not in session.stats.sites[-1].notes


@torch.no_grad()
def test_rows_do_not_depend_on_each_other_or_on_earlier_prompts():
    model = zoo.llava()
    mixed, text = zoo.llava_call((1, 0, 2), (0, 2, 1)), zoo.prompt((0, 0), 0, (0, 3))
    stock, stock_text = zoo.logits(model, mixed), zoo.logits(model, text)
    with mmattn.attach(model, VCD()) as session:
        whole = zoo.logits(model, mixed)
        tokens = zoo.tokens(model, mixed, eos_token_id=None)[:, -5:]
        assert torch.equal(zoo.logits(model, text), stock_text)
        before = session.stats.sites[-1].calls
        zoo.tokens(model, text, eos_token_id=None)
        assert session.stats.sites[-1].calls == before + 5
        for row, pictures in ((0, slice(0, 1)), (2, slice(1, 3))):
            one = {k: v[row : row + 1] for k, v in mixed.items() if k != "pixel_values"}
            real = one["attention_mask"][0].bool()
            one = {k: v[:, real] for k, v in one.items()}
            one["pixel_values"] = mixed["pixel_values"][pictures]
            alone = zoo.logits(model, one)
            assert same(alone[:, -1], whole[row : row + 1, -1]) < 1e-5
            assert torch.equal(zoo.tokens(model, one, eos_token_id=None)[0, -5:], tokens[row])
    assert torch.equal(whole[1], stock[1]) and not torch.equal(whole[0], stock[0])


def test_settings_and_targets():
    for settings in ({"alpha": -1.0}, {"beta": 2.0}, {"noise_step": 1000}, {"noise_step": 0.5}):
        with pytest.raises(mmattn.ConfigError):
            VCD(**settings)
    method = VCD(alpha=0.5, beta=0.2)
    assert VCD.from_dict(method.to_dict()) == method
    model = zoo.llava()
    with torch.no_grad(), mmattn.attach(model, VCD()):
        call = zoo.llava_call()
        features = model.get_image_features(call.pop("pixel_values"), return_dict=True)
    with torch.no_grad(), mmattn.attach(model, VCD()), pytest.raises(mmattn.UnsupportedCall):
        model(**call, mm_encoder_outputs={"image": features})
    with mmattn.attach(model, VCD()), pytest.raises(mmattn.ConflictError, match="already"):
        mmattn.attach(model, VCD())
