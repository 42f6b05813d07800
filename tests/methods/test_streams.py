"""The second stream: its cache, its beams, what it refuses, and other methods beside it."""

import copy
import gc
import weakref

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import VHR, HiPrune
from mmattn.methods.imageguidance import ImageGuidance
from mmattn.methods.vcd import VCD
from mmattn.rebind import SLOT

BOTH = [VCD(alpha=2.0), ImageGuidance(gamma=3.0)]
LONG = {"eos_token_id": None, "max_new_tokens": 8}


def stream_of(session):
    run = session.runs[-1]
    memory = run.states_of(run.sites[-1], 0)
    return memory[(0, 0)]["stream"]


def step_of(call, out, token):
    mask = torch.nn.functional.pad(
        call["attention_mask"], (0, token.shape[1] + out - call["attention_mask"].shape[1]), value=1
    )
    return {"input_ids": token, "attention_mask": mask}


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
@torch.no_grad()
def test_the_second_cache_grows_by_one_token_a_step(method):
    model, call = zoo.llava(), zoo.llava_call()
    width = call["input_ids"].shape[1]
    with mmattn.attach(model, method) as session:
        out = model(**call, use_cache=True)
        stream = stream_of(session)
        start = width if method.name == "vcd" else width - 16
        assert stream.cache is not out.cache and stream.cache.get_seq_length() == start
        for i in range(1, 4):
            token = torch.full((2, 1), 7 + i)
            model(**step_of(call, width + i - 1, token), cache=out.cache)
            assert stream.cache.get_seq_length() == start + i
            assert out.cache.get_seq_length() == width + i
        # Several tokens at once are the same as one after the other.
        both = model(**call, use_cache=True)
        tokens = torch.tensor([[8, 9, 10]] * 2)
        together = model(**step_of(call, width, tokens), cache=both.cache).logits
        assert stream_of(session).cache.get_seq_length() == start + 3
        one = model(**call, use_cache=True)
        for i in range(3):
            part = step_of(call, width + i, tokens[:, i : i + 1])
            single = model(**part, cache=one.cache).logits
            both_finite = single[:, -1].isfinite() & together[:, i].isfinite()
            assert distance(single[:, -1][both_finite], together[:, i][both_finite]) < 1e-4
        held, cache = weakref.ref(stream_of(session)), out.cache
        assert type(cache).__name__ == "DynamicCache"
        assert SLOT not in copy.deepcopy(cache).__dict__
        model(**call, use_cache=True)
        gc.collect()
        assert held() is None, "a new prompt lets the old stream go"


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
@torch.no_grad()
def test_beams_are_followed(method):
    """Without a cache every step runs both prompts afresh, so nothing can be followed wrongly."""
    model = zoo.llava()
    moved = 0
    for seed in range(3):
        call = {**zoo.llava_call(), "pixel_values": zoo.pixels(2, 3, 56, 56, seed=seed)}
        with mmattn.attach(model, method):
            for beams in (2, 4):
                kept = zoo.tokens(model, call, num_beams=beams, **LONG)
                afresh = zoo.tokens(model, call, num_beams=beams, use_cache=False, **LONG)
                assert torch.equal(kept, afresh)
                moved += int(not torch.equal(kept, zoo.tokens(model, call, **LONG)))
            several = zoo.tokens(model, call, num_beams=3, num_return_sequences=2, **LONG)
            assert several.shape[0] == 4
            torch.manual_seed(3)
            kept = zoo.tokens(model, call, do_sample=True, num_return_sequences=2, **LONG)
            torch.manual_seed(3)
            afresh = zoo.tokens(
                model, call, do_sample=True, num_return_sequences=2, use_cache=False, **LONG
            )
            assert torch.equal(kept, afresh)
    assert moved, "beams have to differ from greedy search for this test"


def pruned_noise(model, method, call, settings):
    """Logits of the prompt under `settings`, and those of the noised picture under the same."""
    with mmattn.attach(model, settings):
        clean = zoo.logits(model, call)
    with mmattn.attach(model, method) as session:
        zoo.logits(model, call)
        noised = method.noised(call, session.runs[-1].sites[-1])
    with mmattn.attach(model, settings):
        return clean, zoo.logits(model, {**call, "pixel_values": noised})


@pytest.mark.parametrize("other", [HiPrune(keep=6), VHR(alpha=3.0)], ids=lambda m: m.name)
@pytest.mark.parametrize("order", [1, -1])
@torch.no_grad()
def test_vcd_beside_other_methods_contrasts_two_changed_models(other, order):
    model, call = zoo.llava(), zoo.llava_call()
    method = VCD(beta=0.0)
    clean, noised = pruned_noise(model, method, call, other)
    with mmattn.attach(model, [method, other][::order]) as session:
        got = zoo.logits(model, call)
        tokens = zoo.tokens(model, call, **LONG)
        twice = zoo.tokens(model, call, **LONG)
        beams = zoo.tokens(model, call, num_beams=3, **LONG)
        stats = {s.path: s for s in session.stats.sites}
    assert distance(got[:, -1], 2 * clean[:, -1] - noised[:, -1]) < 1e-5
    assert torch.equal(tokens, twice) and beams.shape == tokens.shape
    # With caches and their own dropped tokens, as without any cache.
    if other.name == "vhr":
        return
    kept = [s for s in stats.values() if s.tokens_kept is not None]
    assert kept and kept[0].tokens_kept == 6
    fresh = zoo.llava()
    with mmattn.attach(fresh, [method, other]):
        assert torch.equal(zoo.tokens(fresh, call, use_cache=False, **LONG), tokens)


@pytest.mark.parametrize("other", [HiPrune(keep=6), VHR(alpha=3.0)], ids=lambda m: m.name)
@torch.no_grad()
def test_guidance_beside_other_methods_goes_away_from_the_untouched_text(other):
    model, call = zoo.llava(), zoo.llava_call()
    method = ImageGuidance(gamma=2.0, cutoff=0.0)
    with mmattn.attach(model, method):
        plain = zoo.logits(model, call)[:, -1]
    blind = 2 * zoo.logits(model, call)[:, -1].log_softmax(-1) - plain
    with mmattn.attach(model, other):
        seeing = zoo.logits(model, call)[:, -1].log_softmax(-1)
        without = zoo.tokens(model, call, **LONG)
    with mmattn.attach(model, [other, method]):
        got = zoo.logits(model, call)[:, -1]
        zoo.tokens(model, call, num_beams=3, **LONG)
    assert distance(got, 2 * seeing - blind) < 1e-5
    # At a strength of nearly nothing the second stream runs and must not disturb the first.
    with mmattn.attach(model, [other, ImageGuidance(gamma=1 + 1e-7, cutoff=0.0)]):
        assert torch.equal(zoo.tokens(model, call, **LONG), without)


@torch.no_grad()
def test_two_second_streams_at_once():
    model, call = zoo.llava(), zoo.llava_call()
    vcd, guidance = VCD(beta=0.0), ImageGuidance(gamma=2.0, cutoff=0.0)
    stock = zoo.logits(model, call)[:, -1]
    with mmattn.attach(model, vcd):
        first = zoo.logits(model, call)[:, -1]
    with mmattn.attach(model, guidance):
        blind = 2 * stock.log_softmax(-1) - zoo.logits(model, call)[:, -1]
    with mmattn.attach(model, [vcd, guidance]):
        got = zoo.logits(model, call)[:, -1]
        tokens = zoo.tokens(model, call, **LONG)
        assert torch.equal(tokens, zoo.tokens(model, call, use_cache=False, **LONG))
        assert torch.equal(
            zoo.tokens(model, call, num_beams=3, **LONG),
            zoo.tokens(model, call, num_beams=3, use_cache=False, **LONG),
        )
    assert distance(got, 2 * first.log_softmax(-1) - blind) < 1e-5


@torch.no_grad()
def test_detaching_and_disabling_leave_no_trace():
    model, call = zoo.llava(), zoo.llava_call()
    classes = {n: type(m) for n, m in model.named_modules()}
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)

    def hooks():  # transformers leaves some of its own
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    for methods in ([BOTH[0]], [BOTH[1]], [*BOTH, HiPrune(keep=6)]):
        with mmattn.attach(model, methods) as session:
            assert not torch.equal(zoo.logits(model, call), stock)
            with session.disabled():
                assert torch.equal(zoo.logits(model, call), stock)
                assert torch.equal(zoo.tokens(model, call), greedy)
            twin = copy.deepcopy(model)
            assert torch.equal(zoo.tokens(twin, call), greedy)
            with pytest.raises(RuntimeError):  # broken off in the middle
                model(**{**call, "pixel_values": call["pixel_values"][:, :2]})
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
        assert {n: type(m) for n, m in model.named_modules()} == classes
        assert hooks() == before


@pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)
@torch.no_grad()
def test_what_cannot_be_followed_is_refused(method):
    model, call = zoo.llava(), zoo.llava_call()
    width = call["input_ids"].shape[1]
    token = torch.tensor([[7], [8]])
    before = model(**call, use_cache=True)
    right = {**zoo.prompt((1, 1), 16, (2, 0), left_pad=False), "pixel_values": call["pixel_values"]}
    with mmattn.attach(model, method) as session:
        with pytest.raises(mmattn.UnsupportedCall, match="has not seen"):
            model(**step_of(call, width, token), cache=before.cache)
        out = model(**call, use_cache=True)
        other = model(**call, use_cache=True)
        with pytest.raises(mmattn.UnsupportedCall, match="has not seen"):
            model(**step_of(call, width, token), cache=out.cache)
        other.cache.crop(-1)
        with pytest.raises(mmattn.UnsupportedCall, match="taken back"):
            model(**step_of(call, width - 1, token), cache=other.cache)
        with pytest.raises(mmattn.UnsupportedCall, match="Pad on the left"):
            model(**right)
        with pytest.raises(mmattn.UnsupportedCall, match="static cache"):
            zoo.tokens(model, call, cache_implementation="static")
        embeds = model.get_input_embeddings()(call["input_ids"])
        with pytest.raises(mmattn.UnsupportedCall, match="input_ids"):
            model(inputs_embeds=embeds, attention_mask=call["attention_mask"])
        with pytest.raises(mmattn.UnsupportedCall, match="must be a number"):
            model(**call, logits_to_keep=torch.tensor([3, 4]))
        with pytest.raises(mmattn.UnsupportedCall, match=r"at once|in the call"):
            zoo.tokens(model, call, prefill_chunk_size=8)
        session.reset()
        assert zoo.tokens(model, call).shape[0] == 2
    with mmattn.attach(zoo.vit(), method) as session, pytest.raises(mmattn.UnsupportedCall):
        zoo.logits(session.plan.target, {"pixel_values": zoo.pixels(2, 3, 32, 32)})
    llama, text = zoo.llama(), zoo.prompt((0, 0), 0, (0, 3))
    stock = zoo.tokens(llama, text)
    with mmattn.attach(llama, method):
        assert torch.equal(zoo.tokens(llama, text), stock), "no image, nothing to compare with"
