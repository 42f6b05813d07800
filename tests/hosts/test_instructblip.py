"""InstructBLIP: logits at its inner language model, and pruning before its Q-Former, against stock runs."""

import math

import pytest
import torch
import transformers as hf
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import VCD, VHR, DoLa, HiPrune, ImageGuidance, LargePiG, VisionZip
from mmattn.methods.vcd import kept_share

LOGITS = [
    VCD(alpha=2.0),
    DoLa(layers=(0, 1)),
    LargePiG(scale=5000.0, layers=(0, 1)),
    ImageGuidance(gamma=2.0),
]
TRACE = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}


@pytest.fixture
def model():
    """A tiny model whose words depend on the picture; transformers' weights start out near zero."""
    model = zoo.instructblip()
    generator = torch.Generator().manual_seed(3)
    seeing = ("vision_model", "crossattention", "query_tokens", "language_projection")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and any(part in name for part in seeing):
                size = weight[0].numel() if weight.ndim != 3 else 1
                weight.copy_(torch.randn(weight.shape, generator=generator) * 2 / size**0.5)
    return model


@pytest.fixture
def call():
    return zoo.instructblip_call()


def rerun(model, call, ids, **kw):
    """What `forward` returns for a prompt and the words after it, at the positions of `generate`."""
    extra = ids.shape[1] - call["input_ids"].shape[1]
    mask = torch.nn.functional.pad(call["attention_mask"], (0, extra), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    more = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**{**call, **more}, **kw)


def steps(model, call, **kw):
    """Greedy tokens and logits ``[B, steps, V]``."""
    with torch.no_grad():
        out = model.generate(**call, **{**zoo.GREEDY, **TRACE, **kw})
    return out.sequences, torch.stack(out.logits, 1)


def same(got, want):
    """Equal where finite, minus infinity at the same places."""
    assert torch.equal(got.isinf(), want.isinf())
    return float((got - want)[want.isfinite()].abs().max())


def drowned(pixels, step=500):
    share = kept_share(step)
    noise = torch.randn(1, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    return math.sqrt(share) * pixels + math.sqrt(1 - share) * noise


def rule_of(method, seeing, other):
    """The two contrasts, literally, one row of the batch after the other."""
    rows = []
    for a, b in zip(seeing, other, strict=True):
        allowed = a >= a.max() + math.log(0.1)
        if isinstance(method, VCD):
            value = (1 + method.alpha) * a - method.alpha * b
        else:
            a, b = a.log_softmax(-1), b.log_softmax(-1)
            value = method.gamma * (a - b) + b
        rows.append(torch.where(allowed, value, torch.tensor(-torch.inf)))
    return torch.stack(rows)


def expected(model, call, method, ids):
    """Logits ``[B, V]`` after `ids`, from stock runs; the second on other pixels, or on text alone."""
    seeing = rerun(model, call, ids).logits[:, -1]
    if isinstance(method, VCD):
        noised = {**call, "pixel_values": drowned(call["pixel_values"])}
        return rule_of(method, seeing, rerun(model, noised, ids).logits[:, -1]), seeing
    blind = []
    for row in ids:
        text = row[(row != zoo.IMAGE) & (row != 0)][None]
        with torch.no_grad():
            blind.append(model.language_model(input_ids=text).logits[0, -1])
    return rule_of(method, seeing, torch.stack(blind)), seeing


@pytest.mark.parametrize("method", [LOGITS[0], LOGITS[3]], ids=lambda m: m.name)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_second_streams_equal_two_stock_runs(model, call, method, implementation):
    model.set_attn_implementation(implementation)
    stock = zoo.tokens(model, call, eos_token_id=None)
    assert not call["attention_mask"].all(), "one row has to be padded"
    with mmattn.attach(model, method) as session:
        text, got = steps(model, call)
        bare = rerun(model, call, call["input_ids"]).logits
        stats = session.stats
    assert stats.executed == stats.planned == 1 and stats.sites[0].calls == 6
    start = call["input_ids"].shape[1]
    apart = []
    for i in range(5):
        want, seeing = expected(model, call, method, text[:, : start + i])
        assert same(got[:, i], want) < 1e-4
        apart.append(float((want - seeing)[want.isfinite()].abs().max()))
        if i == 0:
            assert same(bare[:, -1], want) < 1e-4
    assert max(apart) > 0.05, "the contrast has to matter"
    assert torch.equal(zoo.tokens(model, call, eos_token_id=None), stock)


@pytest.mark.parametrize("method", LOGITS, ids=lambda m: m.name)
def test_generate_and_forward_agree(model, call, method):
    stock = steps(model, call)[1]
    with mmattn.attach(model, method) as session:
        text, got = steps(model, call)
        start = call["input_ids"].shape[1]
        for i in range(5):
            bare = rerun(model, call, text[:, : start + i]).logits
            assert same(got[:, i], bare[:, -1]) < 1e-4
        assert session.stats.executed == session.stats.planned > 0
    assert not torch.equal(got, stock)


@torch.no_grad()
def test_dola_reads_the_inner_hidden_states(model, call):
    method = DoLa(layers=(0,), relative_top=0.0)
    with mmattn.attach(model, method):
        got = rerun(model, call, call["input_ids"]).logits[:, -1]
    out = rerun(model, call, call["input_ids"], output_hidden_states=True)
    first = out.language_model_outputs.hidden_states[0][:, -1]
    early = model.language_model.lm_head(first).log_softmax(-1)
    want = out.logits[:, -1].log_softmax(-1) - early
    assert same(got, want) < 1e-4


@pytest.mark.parametrize("method", [LOGITS[0], LOGITS[3]], ids=lambda m: m.name)
def test_scores_of_beams(model, call, method):
    """The score of every returned beam is the sum over its tokens of what stock runs say."""
    beams = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 4, "length_penalty": 0.0}
    more = {"output_scores": True, **zoo.GREEDY, **TRACE, **beams}
    with mmattn.attach(model, method), torch.no_grad():
        out = model.generate(**call, **more)
    start = call["input_ids"].shape[1]
    for row, (text, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        one = {k: v[row // 2 : row // 2 + 1] for k, v in call.items()}
        total = 0.0
        for i in range(4):
            want, _ = expected(model, one, method, text[None, : start + i])
            total += float(want.log_softmax(-1)[0, text[start + i]])
        assert abs(total - float(score)) < 1e-3
    stock = zoo.tokens(model, call, **beams, eos_token_id=None)
    assert not torch.equal(out.sequences, stock)


def test_rows_do_not_depend_on_each_other(model, call):
    for method in LOGITS:
        with mmattn.attach(model, method):
            numbers = steps(model, call)[1]
            for row in range(2):
                one = {k: v[row : row + 1] for k, v in call.items()}
                single = steps(model, one)[1][0]
                assert same(numbers[row][: len(single)], single) < 1e-4


def test_vhr_sees_the_text_alone(model, call):
    stock = steps(model, call)[1]
    with mmattn.attach(model, VHR()) as session:
        numbers = steps(model, call)[1]
        assert session.stats.executed == session.stats.planned == 1
    assert distance(numbers, stock) > 1e-3


def test_what_the_logits_refuse(model, call):
    with torch.no_grad():
        made = model.get_image_features(
            pixel_values=call["pixel_values"],
            qformer_input_ids=call["qformer_input_ids"],
            return_dict=True,
        )
    given = {**call, "pixel_values": None, "mm_encoder_outputs": {"image": made}}
    with (
        mmattn.attach(model, VCD()),
        pytest.raises(mmattn.UnsupportedCall, match="Pass pixel_values"),
    ):
        zoo.logits(model, given)
    with mmattn.attach(model, ImageGuidance(gamma=2.0)):
        assert torch.isfinite(zoo.logits(model, given)[:, 0]).all(), "text needs no pixels"
    text = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "vocab_size": 200,
    }
    config = model.config.to_dict()
    config["text_config"] = {"model_type": "t5", "decoder_start_token_id": 0, **text}
    encoder = hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(**config))
    for method in (VCD(), ImageGuidance()):
        with pytest.raises(mmattn.NoSiteError, match="an encoder and a decoder"):
            mmattn.attach(encoder, method)


# -- pruning --------------------------------------------------------------------------------------


class Masked:
    """A hook that hides patches from the Q-Former with its own mask; the reference of dropping them."""

    def __init__(self, model, kept):
        self.kept = torch.nn.functional.pad(kept, (1, 0), value=True)
        self.handle = model.qformer.register_forward_pre_hook(self.hide, with_kwargs=True)

    def hide(self, module, args, kwargs):
        return args, {**kwargs, "encoder_attention_mask": self.kept.long()}


def chosen(model, call, method):
    """Which patches the method keeps, ``[B, M]``, read off the Q-Former's input."""
    found = []

    def look(module, args, kwargs):
        found.append(kwargs["encoder_hidden_states"].clone())

    with torch.no_grad():
        stock = model.vision_model(call["pixel_values"])[0]
        with mmattn.attach(model, method):
            handle = model.qformer.register_forward_pre_hook(look, with_kwargs=True)
            model(**call)
            handle.remove()
    same = (stock[:, 1:, None] == found[0][:, None]).all(-1)
    return same.any(2), found[0]


PRUNING = [HiPrune(keep=6), mmattn.RandomPrune(keep=0.5), mmattn.UniformPrune(keep=5)]


@pytest.mark.parametrize("method", PRUNING, ids=lambda m: m.name)
def test_dropped_patches_are_keys_that_the_qformer_does_not_see(model, call, method):
    kept, shown = chosen(model, call, method)
    budget = {"hiprune": 6, "random-prune": 8, "uniform-prune": 5}[method.name]
    assert (kept.sum(1) == budget).all() and shown.shape[1] == budget + 1
    stock = zoo.logits(model, call)
    with mmattn.attach(model, method) as session:
        got, (text, numbers) = zoo.logits(model, call), steps(model, call)
        places = [row for row in session.stats.sites if row.path == "qformer.image_tokens"]
    assert (places[0].tokens_kept, places[0].tokens_in) == (budget, 16) and places[0].calls == 2
    if method.name == "random-prune":  # draws anew for every picture it sees
        return
    reference = Masked(model, kept)
    want, (words, values) = zoo.logits(model, call), steps(model, call)
    reference.handle.remove()
    assert distance(got, want) < 1e-4 and distance(want, stock) > 1e-3
    assert torch.equal(text, words) and distance(numbers, values) < 1e-4
    assert torch.equal(zoo.logits(model, call), stock)


def test_hiprune_keeps_what_the_attention_of_the_tower_says(model, call):
    """Registers alone, from the weights of the last block, over all queries and without the class key."""
    kept, _ = chosen(model, call, HiPrune(keep=5, alpha=0.0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.vision_model(call["pixel_values"], output_attentions=True)
    scores = out.attentions[-1].mean((1, 2))[:, 1:]
    for row, score in zip(kept, scores, strict=True):
        assert row.nonzero().flatten().tolist() == sorted(score.topk(5).indices.tolist())
    assert not torch.equal(kept[0], kept[1])


def test_visionzip_merges_what_it_drops(model, call):
    method = VisionZip(keep=6, contextual=0.5)
    kept, shown = chosen(model, call, method)
    # Three dominant patches stay as they are, and so does a contextual one that nothing joins.
    assert shown.shape[1] == 7 and ((kept.sum(1) >= 3) & (kept.sum(1) < 6)).all()
    with mmattn.attach(model, method) as session:
        zoo.tokens(model, call, num_beams=3)
        place = next(r for r in session.stats.sites if r.path == "qformer.image_tokens")
        assert place.tokens_kept == 6 and place.notes["contextual"] == 3


def test_keeping_all_is_the_stock_model_bitwise(model, call):
    stock, (text, numbers) = zoo.logits(model, call), steps(model, call)
    classes = {n: type(m) for n, m in model.named_modules()}
    for method in (HiPrune(keep=16), VisionZip(keep=None), mmattn.RandomPrune(keep=1.0)):
        with mmattn.attach(model, method):
            assert torch.equal(zoo.logits(model, call), stock)
            got = steps(model, call)
            assert torch.equal(got[0], text) and torch.equal(got[1], numbers)
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_pruning_beside_a_second_stream(model, call):
    """The noised picture is pruned by its own attention."""
    prune, method = HiPrune(keep=6, alpha=0.0), LOGITS[0]
    noised = {**call, "pixel_values": drowned(call["pixel_values"])}
    with mmattn.attach(model, [prune, method]):
        got = rerun(model, call, call["input_ids"]).logits[:, -1]
    with mmattn.attach(model, prune):
        a, b = (rerun(model, c, call["input_ids"]).logits[:, -1] for c in (call, noised))
    assert same(got, rule_of(method, a, b)) < 1e-4


def test_what_pruning_refuses(model, call):
    with (
        mmattn.attach(model, HiPrune(keep=6, text_share=0.2)),
        pytest.raises(mmattn.UnsupportedCall, match="there is none"),
    ):
        zoo.logits(model, call)
    with (
        mmattn.attach(model, mmattn.RandomPrune(keep=5)),
        pytest.raises(mmattn.ConflictError, match="already prunes"),
    ):
        mmattn.attach(model, mmattn.UniformPrune(keep=5))
    stock = zoo.logits(model, call)
    queries, states = model.query_tokens, torch.randn(1, 17, 32)
    with mmattn.attach(model, mmattn.UniformPrune(keep=5)) as session:
        with pytest.raises(mmattn.UnsupportedCall, match="patches to choose"):
            model.qformer(input_ids=None, query_embeds=queries, encoder_hidden_states=states)
        with session.disabled():
            assert torch.equal(zoo.logits(model, call), stock)
        assert not torch.equal(zoo.logits(model, call), stock)
