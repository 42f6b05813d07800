"""PyramidDrop: stages against masked keys, the published average, batches, caches and beams."""

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance
from test_fastv import image_of, keep_of, longer, masked, steps_of

import mmattn
from mmattn.methods.pyramiddrop import PyramidDrop


def sharpen(model):
    """Attention with peaks: where few tokens get much, what was dropped matters to the next ranking."""
    for name, weight in model.named_parameters():
        if "q_proj" in name and "vision" not in name and "visual" not in name:
            weight.data *= 60


def staged(model, call, image, starts, ratios):
    """Keys left from each stage on, every stage ranked in a model with the stages before it."""
    plan = {}
    for start, ratio in zip(starts, ratios, strict=True):
        _, rows = masked(model, call, plan)
        there = image if not plan else image & plan[max(plan)]
        counts = [int(n * ratio) for n in image.sum(1).tolist()]
        plan[start] = keep_of(rows[start], there, counts) & ~(image & ~there)
    return plan


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_equals_masked_keys_in_prompt_and_decoding(name, implementation):
    model, call, _ = zoo.made(name, implementation)  # left-padded rows, grouped heads
    sharpen(model)
    image, written = image_of(name, call), call["attention_mask"].bool()
    depth = {"llava": 4, "qwen2.5-vl": 3}[name]
    method = (
        PyramidDrop(ratios=(0.8, 0.5, 0.2))
        if depth == 4
        else PyramidDrop(layers=(0, 2), ratios=(0.5, 0.25))
    )
    starts = method.starts(depth)
    plan = staged(model, call, image, starts, method.ratios)
    stock = zoo.logits(model, call)
    want, _ = masked(model, call, plan)
    with mmattn.attach(model, method) as session:
        got = zoo.logits(model, call)
        out = steps_of(model, call)
        assert session.stats.executed == session.stats.planned
        sites = session.stats.sites
    real = plan[starts[-1]] & written
    assert distance(got[real], want[real]) < 1e-5
    assert distance(got[:, -1], stock[:, -1]) > 1e-3, "the test cannot see dropped tokens"
    for i, logits in enumerate(out.logits):
        reference = longer(model, call, out.sequences, i)
        assert distance(logits, masked(model, reference, plan)[0][:, -1]) < 1e-5
    left = [site.tokens_kept for site in sites]
    assert left == sorted(left, reverse=True) and left[-1] < left[0]
    assert all(site.density < 1 for site in sites)


def test_published_average():
    """0.469 of the image tokens: the blocks of a 32-layer decoder, and a running one of 4."""
    paper = PyramidDrop()
    assert paper.starts(32) == [8, 16, 24]
    shares = [paper.share(i, 32) for i in range(32)]
    assert shares[7:9] == [1.0, 0.5] and shares[31] == 0.125
    assert round(sum(shares) / 32, 3) == 0.469
    assert int(576 * sum(shares) / 32) == 270
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, paper) as session:
        zoo.logits(model, call)
        left = [site.tokens_kept for site in session.stats.sites]
    assert left == [8, 4, 2] and round((16 + sum(left)) / 4 / 16, 3) == 0.469


@pytest.mark.parametrize("kind", ["beams", "sampling", "no cache"])
def test_ways_to_generate(kind):
    model, call = zoo.llava(), zoo.llava_call((2, 1), (0, 3))
    image, method = image_of("llava", call), PyramidDrop()
    plan = staged(model, call, image, [1, 2, 3], method.ratios)
    ways = {
        "beams": {"num_beams": 3, "output_scores": True},
        "sampling": {"do_sample": True, "top_k": 8},
        "no cache": {"use_cache": False, "max_new_tokens": 2},
    }
    with mmattn.attach(model, method):
        got = steps_of(model, call, **ways[kind])
    length, end = call["input_ids"].shape[1], got.sequences.shape[1]
    if kind == "beams":
        total = torch.zeros(2)
        for i in range(end - length):
            reference = longer(model, call, got.sequences, i)
            scores = masked(model, reference, plan)[0][:, -1].log_softmax(-1)
            token = got.sequences[:, length + i]
            total += scores.gather(1, token[:, None])[:, 0] * (token != 0)
        written = (got.sequences[:, length:] != 0).sum(1)
        assert torch.allclose(total / written, got.sequences_scores, atol=1e-4)
        return
    for i, logits in enumerate(got.logits):
        reference = longer(model, call, got.sequences, i)
        if kind == "no cache":
            again = image_of("llava", reference)
            plan = staged(model, reference, again, [1, 2, 3], method.ratios)
        assert distance(logits, masked(model, reference, plan)[0][:, -1]) < 1e-5


def test_rows_do_not_see_each_other_and_text_is_plain():
    model, counts = zoo.llava(), (1, 2, 0)
    call, first = zoo.llava_call(counts, (0, 1, 4)), 0
    with mmattn.attach(model, PyramidDrop()):
        together = steps_of(model, call)
        for i, count in enumerate(counts):
            real = call["attention_mask"][i].bool()
            one = {k: call[k][i : i + 1, real] for k in ("input_ids", "attention_mask")}
            if count:
                one["pixel_values"] = call["pixel_values"][first : first + count]
            first += count
            for a, b in zip(steps_of(model, one).logits, together.logits, strict=True):
                assert distance(a[0], b[i]) < 1e-5
    text = zoo.prompt((0, 0), 0, (0, 3))
    stock = zoo.logits(model, text)
    with mmattn.attach(model, PyramidDrop()):
        assert torch.equal(zoo.logits(model, text), stock)


def test_ratios_of_one_are_bitwise_plain():
    model, call, _ = zoo.made("llava")
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, PyramidDrop(ratios=(1.0, 1.0, 1.0))):
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
    with mmattn.attach(model, [mmattn.VHR(), PyramidDrop()]) as session:
        zoo.tokens(model, call)
        assert session.stats.executed == session.stats.planned


def test_what_it_refuses():
    model, call = zoo.llava(), zoo.llava_call()
    with pytest.raises(mmattn.NoSiteError, match="name ascending ones"):
        mmattn.attach(zoo.llava(layers=2), PyramidDrop())
    with pytest.raises(mmattn.NoSiteError, match="name ascending ones"):
        mmattn.attach(model, PyramidDrop(layers=(1, 4), ratios=(0.5, 0.2)))
    with (
        mmattn.attach(model, PyramidDrop(), sites="*language_model.layers.[23]*"),
        pytest.raises(mmattn.UnsupportedCall, match="chooses at block 2"),
    ):
        zoo.logits(model, call)
    for target in (zoo.llama(), zoo.clip()):
        with pytest.raises(mmattn.NoSiteError):
            mmattn.attach(target, PyramidDrop())
    for settings in (
        {"layers": ()},
        {"layers": (0.5,)},
        {"layers": (-1, 2, 3)},
        {"layers": (1.0, 2, 3)},
        {"ratios": (0.5, 0.6, 0.1)},
        {"ratios": (0.5, 0.2, 0.0)},
        {"ratios": (1.5, 0.2, 0.1)},
    ):
        with pytest.raises(mmattn.ConfigError):
            PyramidDrop(**settings)
    method = PyramidDrop(layers=(1, 0.5), ratios=(0.5, 0.25))
    assert PyramidDrop.from_dict(method.to_dict()) == method
