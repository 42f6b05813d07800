"""FastV: every logit that counts equals a model whose dropped keys are masked, whatever is generated."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn.methods._pruning import Columns, attend_left, best, last_row
from mmattn.methods.fastv import FastV


@dataclass(frozen=True)
class Masked(mmattn.Method):
    """Attention written out, without some keys per layer; `rows` are last rows before a layer's own drop."""

    name: ClassVar[str] = "masked"
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    keep: ClassVar[dict] = {}  # first layer -> [B, N]
    rows: ClassVar[dict] = {}

    def attend(self, q, k, v, *, mask, scale, site, dense):
        scores = q @ k.transpose(-1, -2) * scale
        n = k.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            seen = seen & (mask if mask.dtype == torch.bool else mask == 0)
        for first, keep in sorted(self.keep.items()):
            if first == site.index:
                self.rows[site.index] = self._row(scores, seen)  # what a stage ranks by
            if first <= site.index:
                later = keep.new_ones(len(keep), n - keep.shape[1])
                seen = seen & torch.cat([keep, later], 1)[:, None, None]
        self.rows.setdefault(site.index, self._row(scores, seen))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        return weights @ v

    @staticmethod
    def _row(scores, seen):
        return scores.masked_fill(~seen, -torch.inf)[:, :, -1].softmax(-1).mean(1)


def masked(model, call, keep):
    Masked.keep.clear()
    Masked.rows.clear()
    Masked.keep.update(keep)
    with mmattn.attach(model, Masked(), sites=lambda s: "decoder" in s.tags):
        return zoo.logits(model, call), dict(Masked.rows)


def ranked(row, image, count):
    """Columns of the `count` image tokens with most attention, one index at a time."""
    places = [j for j in range(len(row)) if image[j]]
    return set(sorted(places, key=lambda j: (-float(row[j]), j))[:count])


def keep_of(rows, image, counts):
    """``[B, N]``: text, and the best image tokens."""
    keep = ~image
    for b, count in enumerate(counts):
        for j in ranked(rows[b], image[b], count):
            keep[b, j] = True
    return keep


def image_of(name, call):
    return call["input_ids"] == (250 if "qwen" in name else zoo.IMAGE)


def longer(model, call, sequences, step):
    """The call that computes generated token `step` without a cache."""
    length = call["input_ids"].shape[1]
    ids = sequences[:, : length + step]
    out = {**call, "input_ids": ids}
    out["attention_mask"] = torch.nn.functional.pad(call["attention_mask"], (0, step), value=1)
    if "mm_token_type_ids" in call:
        out["mm_token_type_ids"] = torch.nn.functional.pad(call["mm_token_type_ids"], (0, step))
    return out


def steps_of(model, call, **kw):
    with torch.no_grad():
        return model.generate(
            **call, **{**zoo.GREEDY, **kw}, output_logits=True, return_dict_in_generate=True
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
def test_equals_masked_keys_in_prompt_and_decoding(name, implementation):
    model, call, _ = zoo.made(name, implementation)  # left-padded rows, grouped heads
    image, layer = image_of(name, call), 1
    stock, rows = masked(model, call, {})
    written = call["attention_mask"].bool()
    assert distance(stock[written], zoo.logits(model, call)[written]) < 1e-5
    counts = [round(0.5 * n) for n in image.sum(1).tolist()]
    keep = keep_of(rows[layer - 1], image, counts)
    want, _ = masked(model, call, {layer: keep})
    with mmattn.attach(model, FastV(layer=layer)) as session:
        got = zoo.logits(model, call)
        out = steps_of(model, call)
        assert session.stats.executed == session.stats.planned
        sites = session.stats.sites
    real = keep & written
    assert distance(got[real], want[real]) < 1e-5
    assert distance(got[:, -1], stock[:, -1]) > 1e-3, "the test cannot see dropped tokens"
    for i, logits in enumerate(out.logits):
        reference = longer(model, call, out.sequences, i)
        assert distance(logits, masked(model, reference, {layer: keep})[0][:, -1]) < 1e-5
    for site in sites[1:]:
        assert site.tokens_kept == sum(counts) / 2 < site.tokens_in
        assert 0 < site.density < 1


@pytest.mark.parametrize("given", ["none", "bool", "additive"])
def test_rows_with_and_without_gaps(given):
    """Rows that keep different numbers of tokens, without any padding in the prompt."""
    model = zoo.llava("eager" if given == "additive" else "sdpa")
    ids = zoo.llava_call((1, 2), (19, 0))["input_ids"]
    ids[0, ids[0] == 0] = 3
    extra = ids.shape[1] - int((ids[0] != 0).sum())
    assert extra == 0
    call = {"input_ids": ids, "pixel_values": zoo.pixels(3, 3, 56, 56)}
    call["attention_mask"] = torch.ones_like(ids)
    if given == "bool":
        call["attention_mask"][0, 0] = 0  # one padded token makes the host write a mask
    image = image_of("llava", call)
    _, rows = masked(model, call, {})
    keep = keep_of(rows[1], image, [4, 8])
    real = keep & call["attention_mask"].bool()
    want, _ = masked(model, call, {2: keep})
    with mmattn.attach(model, FastV(keep=0.25)) as session:
        got = zoo.logits(model, call)
        out = steps_of(model, call)
        assert session.stats.sites[-1].tokens_kept == 6
    assert distance(got[real], want[real]) < 1e-5
    assert torch.isfinite(got).all()
    for i, logits in enumerate(out.logits):
        reference = longer(model, call, out.sequences, i)
        assert distance(logits, masked(model, reference, {2: keep})[0][:, -1]) < 1e-5


@pytest.mark.parametrize("kind", ["beams", "sampling", "no cache", "static cache"])
def test_ways_to_generate(kind):
    model, call = zoo.llava(), zoo.llava_call((2, 1), (0, 3))
    image = image_of("llava", call)
    _, rows = masked(model, call, {})
    keep = keep_of(rows[1], image, [8, 4])
    ways = {
        "beams": {"num_beams": 3, "output_scores": True},
        "sampling": {"do_sample": True, "top_k": 8},
        "no cache": {"use_cache": False, "max_new_tokens": 2},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    with mmattn.attach(model, FastV(keep=0.25)):
        torch.manual_seed(3)
        got = steps_of(model, call, **ways[kind])
    if kind == "beams":
        # The best beams' own log-probabilities, from a model with masked keys.
        total = torch.zeros(2)
        length, end = call["input_ids"].shape[1], got.sequences.shape[1]
        for i in range(end - length):
            reference = longer(model, call, got.sequences, i)
            scores = masked(model, reference, {2: keep})[0][:, -1].log_softmax(-1)
            token = got.sequences[:, length + i]
            total += scores.gather(1, token[:, None])[:, 0] * (token != 0)
        written = (got.sequences[:, length:] != 0).sum(1)
        assert torch.allclose(total / written, got.sequences_scores, atol=1e-4)
        return
    for i, logits in enumerate(got.logits[: 1 if kind == "no cache" else None]):
        reference = longer(model, call, got.sequences, i)
        assert distance(logits, masked(model, reference, {2: keep})[0][:, -1]) < 1e-5
    if kind == "no cache":
        # Every step is a prompt that ranks anew, with its own last token.
        reference = longer(model, call, got.sequences, 1)
        _, rows = masked(model, reference, {})
        again = keep_of(rows[1], image_of("llava", reference), [8, 4])
        want = masked(model, reference, {2: again})[0]
        assert distance(got.logits[1], want[:, -1]) < 1e-5


def test_rows_do_not_see_each_other_and_prompts_not_their_predecessors():
    model, counts = zoo.llava(), (1, 2, 0)
    call, first = zoo.llava_call(counts, (0, 1, 4)), 0
    with mmattn.attach(model, FastV(keep=0.25)) as session:
        together = steps_of(model, call)
        for i, count in enumerate(counts):
            real = call["attention_mask"][i].bool()
            one = {k: call[k][i : i + 1, real] for k in ("input_ids", "attention_mask")}
            if count:
                one["pixel_values"] = call["pixel_values"][first : first + count]
            first += count
            session.reset()
            for a, b in zip(steps_of(model, one).logits, together.logits, strict=True):
                assert distance(a[0], b[i]) < 1e-5
            if count:
                assert session.stats.sites[-1].tokens_kept == 4 * count
    text = zoo.prompt((0, 0), 0, (0, 3))
    stock = zoo.logits(model, text)
    with mmattn.attach(model, FastV()):
        assert torch.equal(zoo.logits(model, text), stock), "no image, nothing to drop"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [None, 1.0, 9999])
def test_keeping_everything_is_bitwise_plain(implementation, keep):
    model, call, _ = zoo.made("llava", implementation)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, FastV(keep=keep)):
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)


def test_follow_up_text_on_the_same_cache():
    model, call = zoo.llava(), zoo.llava_call((1, 1), (2, 0))
    image = image_of("llava", call)
    keep = keep_of(masked(model, call, {})[1][1], image, [4, 4])
    more = torch.tensor([[7, 8, 9], [9, 8, 7]])
    whole = {**call, "input_ids": torch.cat([call["input_ids"], more], 1)}
    whole["attention_mask"] = torch.nn.functional.pad(call["attention_mask"], (0, 3), value=1)
    want = masked(model, whole, {2: keep})[0]
    with torch.no_grad(), mmattn.attach(model, FastV(keep=4)):
        out = model(**call, use_cache=True)
        got = model(input_ids=more, attention_mask=whole["attention_mask"], cache=out.cache).logits
        assert distance(got, want[:, -3:]) < 1e-5
        again = zoo.prompt((1, 1), 16)
        again["attention_mask"] = torch.nn.functional.pad(
            whole["attention_mask"], (0, again["input_ids"].shape[1]), value=1
        )
        with pytest.raises(mmattn.UnsupportedCall, match="one prompt after the other"):
            model(**again, pixel_values=call["pixel_values"], cache=out.cache)


def test_composes_with_pruning_before_the_decoder_and_with_heads():
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, [mmattn.HiPrune(keep=8), FastV(keep=0.5)]) as session:
        zoo.tokens(model, call, num_beams=2)
        assert session.stats.sites[-2].tokens_in == 8 and session.stats.sites[-2].tokens_kept == 4
    with mmattn.attach(model, [mmattn.VHR(), FastV(keep=4)]) as session:
        both = zoo.tokens(model, call)
        assert session.stats.executed == session.stats.planned
    assert both.shape[0] == 2


def test_keeps_what_matters_better_than_a_coin():
    """Keys of which a few are what the text asks for, in the ranking block and in the one after it."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    image = torch.zeros(1, 80, dtype=torch.bool)
    image[:, 4:68] = True
    q, k, v = torch.randn(3, 1, 4, 80, 16, generator=generator)
    told = 4 + torch.randperm(64, generator=generator)[:8]
    q[:, :, 68:] += 4 * topic
    k[:, :, told] += 4 * topic
    later = k + 0.3 * torch.randn(k.shape, generator=generator)
    site = SimpleNamespace(
        layout=SimpleNamespace(past=0), causal=True, path="x", note=lambda *_: None
    )

    def dense(q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    want = dense(q, later, v)[:, :, 68:]

    def error(columns):
        out = attend_left(columns, q, later, v, None, site=site, dense=dense)
        assert not out[:, :, 4:68][:, :, ~columns.keep[0, 4:68]].any()
        return distance(out[:, :, 68:], want)

    ours = error(FastV(keep=16)._choose(q, k, None, None, image))
    chance = [
        error(Columns.of(~image | best(torch.rand(1, 80, generator=generator), image, [16])))
        for _ in range(10)
    ]
    assert ours < min(chance) / 2


def test_last_row_and_best_against_loops():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        q, k = (
            torch.randn(2, 4, 9, 8, generator=generator),
            torch.randn(2, 2, 9, 8, generator=generator),
        )
        real = torch.ones(2, 9, dtype=torch.bool)
        real[1, :3] = False
        bool_mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & real[:, None, None]
        additive = torch.zeros(2, 1, 9, 9).masked_fill(~bool_mask, torch.finfo(torch.float32).min)
        for mask in (bool_mask, additive):
            row = last_row(q, k, mask, None)
            for b in range(2):
                want = sum(
                    (q[b, h, -1] @ k[b, h // 2].T * 8**-0.5)
                    .masked_fill(~real[b], -torch.inf)
                    .softmax(-1)
                    for h in range(4)
                )
                assert torch.allclose(row[b], want / 4, atol=1e-6)
        coarse = (torch.rand(2, 9, generator=generator) * 3).floor()
        among = torch.rand(2, 9, generator=generator) < 0.7
        counts = [3, 0]
        for b, count in enumerate(counts):
            want = ranked(coarse[b], among[b], count)
            assert set(best(coarse, among, counts)[b].nonzero().flatten().tolist()) == want


def test_what_it_refuses():
    model, call = zoo.llava(), zoo.llava_call()
    with torch.no_grad(), mmattn.attach(model, FastV()):
        embeds = model.get_input_embeddings().weight[call["input_ids"]]
        with pytest.raises(mmattn.UnsupportedCall, match="pass input_ids"):
            model(inputs_embeds=embeds, attention_mask=call["attention_mask"])
        right = {**zoo.prompt((1, 1), 16, (2, 0), left_pad=False)}
        right["pixel_values"] = call["pixel_values"]
        with pytest.raises(mmattn.UnsupportedCall, match="padded on the right"):
            zoo.logits(model, right)
        with pytest.raises(mmattn.UnsupportedCall, match="prefill_chunk_size"):
            zoo.tokens(model, call, prefill_chunk_size=10)
    with (
        mmattn.attach(model, FastV(), sites="*language_model.layers.[23]*"),
        pytest.raises(mmattn.UnsupportedCall, match="chooses at block 2"),
    ):
        zoo.logits(model, call)
    with mmattn.attach(model, FastV(), unsupported="dense") as session:
        assert torch.isfinite(zoo.logits(model, right)).all()
        assert session.stats.dense_calls > 0
    for target in (zoo.llama(), zoo.clip(), model.model.language_model):
        with pytest.raises(mmattn.NoSiteError):
            mmattn.attach(target, FastV())
    with pytest.raises(mmattn.NoSiteError, match="leaves none"):
        mmattn.attach(model, FastV(layer=4))
    for settings in ({"keep": 0}, {"keep": 1.5}, {"layer": 0}, {"layer": 0.5}):
        with pytest.raises(mmattn.ConfigError):
            FastV(**settings)
    assert FastV.from_dict(FastV(keep=3, layer=1).to_dict()) == FastV(keep=3, layer=1)
