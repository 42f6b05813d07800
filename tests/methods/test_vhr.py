"""VHR: heads and logits against explicit forward passes with hooks on the output projection."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn
from mmattn import VHR
from mmattn.methods.vhr import reinforced, without_image

HEADS = 4


@dataclass(frozen=True)
class Spy(VHR):
    """VHR that remembers the factors of every call."""

    name: ClassVar[str] = "spy-vhr"
    log: ClassVar[list] = []

    def heads(self, out, *, site):
        scaled = super().heads(out, site=site)
        self.log.append((site.index, out.shape[2], site.state["factor"].flatten(1)))
        return scaled


@pytest.fixture(autouse=True)
def _fresh_log():
    Spy.log.clear()


def decoder_layers(model):
    names = ("language_model", "text_model")
    return next(
        m for n, m in model.named_modules() if n.endswith(".layers") and any(k in n for k in names)
    )


def without(call, image):
    """The text of every row, padded on the left."""
    pairs = zip(call["input_ids"], call["attention_mask"], strict=True)
    rows = [ids[(ids != image) & (mask > 0)] for ids, mask in pairs]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def forward(model, call, factors):
    """Logits, and head outputs ``[B, H, D]`` of the last position per layer, before scaling."""
    seen, hooks = {}, []
    for i, layer in enumerate(decoder_layers(model)):

        def scale(module, args, i=i):
            heads = args[0].view(*args[0].shape[:2], HEADS, -1)
            seen[i] = heads[:, -1]
            if i in factors:
                heads = heads * factors[i][:, None, :, None]
            return (heads.reshape(args[0].shape),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(scale))
    logits = zoo.logits(model, call)
    for hook in hooks:
        hook.remove()
    return logits, seen


def chosen_by_hand(seeing, blind, outliers=True):
    """The sheet's rule, row by row and head by head."""
    rows = []
    for a, b in zip(seeing, blind, strict=True):
        vhd = torch.stack([(x - y).square().sum().sqrt() for x, y in zip(a, b, strict=True)])
        alone = torch.stack([y.square().sum() for y in b])
        if outliers:
            high = (vhd > vhd.mean() + vhd.std()) & (alone > alone.mean() + alone.std())
            vhd = torch.where(high, torch.zeros(()), vhd)
        middle = vhd.sort().values[(len(vhd) - 1) // 2]
        rows.append(vhd > middle)
    return torch.stack(rows)


def reference(model, call, text, layers, alpha, both):
    factors = {}
    for layer in sorted(layers):
        seeing = forward(model, call, factors)[1][layer]
        blind = forward(model, text, factors if both else {})[1][layer]
        factors[layer] = torch.where(chosen_by_hand(seeing, blind), alpha, 1.0)
    return forward(model, call, factors)[0], factors


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
@pytest.mark.parametrize("stream", ["delete", "two_pass"])
def test_equals_explicit_passes_over_the_prompt_with_and_without_images(name, stream):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    text = without(call, 250 if "qwen" in name else zoo.IMAGE)
    method = Spy(text_stream=stream)
    layers = method.chosen(len(decoder_layers(model)))
    want, factors = reference(model, call, text, layers, 2.0, stream == "delete")
    stock = zoo.logits(model, call)
    with mmattn.attach(model, method):
        got = zoo.logits(model, call)
    assert distance(got, want) < 1e-5
    assert distance(got, stock) > 1e-2
    for layer, _, factor in Spy.log:
        assert torch.equal(factor, factors[layer])
        assert ((factor == 2).sum(1) == HEADS // 2).all()
    assert {layer for layer, _, _ in Spy.log} == layers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_streams_differ_only_where_heads_do(implementation):
    model, call = zoo.llava(implementation), zoo.llava_call()
    with mmattn.attach(model, Spy(text_stream="delete", layers=(1,))):
        one = zoo.logits(model, call)
    with mmattn.attach(model, Spy(text_stream="two_pass", layers=(1,))):
        two = zoo.logits(model, call)
    assert torch.equal(one, two), "with one layer the text stream is not reinforced before it"


def test_reinforcing_equals_scaled_output_projections():
    model, call = zoo.llava(), zoo.llava_call((1,), (0,))
    with mmattn.attach(model, Spy(alpha=3.0)):
        got = zoo.logits(model, call)
    for layer, _, factor in Spy.log:
        weight = decoder_layers(model)[layer].self_attn.o_proj.weight
        weight.data *= factor[0].repeat_interleave(weight.shape[1] // HEADS)
    assert distance(zoo.logits(model, call), got) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_local_masks_the_image_keys_of_the_last_query(implementation):
    model, call = zoo.llava(implementation), zoo.llava_call()
    with mmattn.attach(model, Spy(text_stream="local")) as session:
        zoo.logits(model, call)
        assert session.runs[1].layout.twins == 0
    assert all(((f == 2).sum(1) == HEADS // 2).all() for _, _, f in Spy.log)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 2:5] = image[1, 4:6] = True
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :2] = False
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive):
        out = without_image(q, k, v, mask, None, image)
        for b in range(2):
            use = real[b] & ~image[b]
            for h in range(4):
                weights = (q[b, h, -1] @ k[b, h // 2, use].T * 8**-0.5).softmax(-1)
                assert torch.allclose(out[b, h], weights @ v[b, h // 2, use], atol=1e-5)


@pytest.mark.parametrize("stream", ["delete", "two_pass", "local"])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_at_one_nothing_changes(name, stream):
    build, make, _ = zoo.ALL[name]
    model = build()
    call = make(model)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, VHR(alpha=1.0, text_stream=stream)) as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
        assert session.stats.executed == session.stats.planned > 0


@pytest.mark.parametrize("stream", ["delete", "local"])
def test_heads_are_chosen_once_and_kept_while_decoding(stream):
    model, call = zoo.llava(), zoo.llava_call()
    with mmattn.attach(model, Spy(text_stream=stream)):
        zoo.tokens(model, call)
        prompt = {layer: f for layer, n, f in Spy.log if n > 1}
        steps = [(layer, f) for layer, n, f in Spy.log if n == 1]
        assert len(prompt) == 3 and len(steps) == 12
        assert all(torch.equal(f, prompt[layer]) for layer, f in steps)
        beams = zoo.tokens(model, call, num_beams=3)
        assert beams.shape[0] == 2 and Spy.log[-1][2].shape == (6, HEADS)
        Spy.log.clear()
        zoo.tokens(model, {**call, "pixel_values": zoo.pixels(2, 3, 56, 56, seed=9)})
        again = {layer: f for layer, n, f in Spy.log if n > 1}
    assert any(not torch.equal(again[layer], prompt[layer]) for layer in prompt)


@pytest.mark.parametrize("stream", ["delete", "local"])
def test_prompts_without_images_are_plain_and_rows_do_not_mix(stream):
    model = zoo.llava()
    text = zoo.prompt((0, 0), 0, (0, 3))
    mixed = zoo.llava_call((1, 0), (0, 2))
    stock, stock_mixed = zoo.logits(model, text), zoo.logits(model, mixed)
    with mmattn.attach(model, Spy(text_stream=stream)):
        assert torch.equal(zoo.logits(model, text), stock)
        assert all((f == 1).all() for _, _, f in Spy.log)
        assert torch.equal(zoo.tokens(model, text), zoo.tokens(model, text))
        Spy.log.clear()
        out = zoo.logits(model, mixed)
        assert all((f[1] == 1).all() and (f[0] == 2).sum() == 2 for _, _, f in Spy.log)
        alone = zoo.logits(model, zoo.llava_call((1,), (0,)))
    real = mixed["attention_mask"][1].bool()
    assert distance(out[1, real], stock_mixed[1, real]) < 1e-5
    assert distance(out[0, -1], alone[0, -1]) < 1e-5


def test_rule_against_the_definition():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        seeing, blind = torch.randn(2, 3, 32, 16, generator=generator)
        blind[:, 5] *= 6
        seeing[:, 5] += 20
        for outliers in (True, False):
            got = reinforced(seeing, blind, outliers=outliers)
            assert torch.equal(got, chosen_by_hand(seeing, blind, outliers))
            assert (got.sum(1) == 16).all()
            assert bool(got[:, 5].any()) is not outliers
    assert not reinforced(blind, blind).any()


def test_layers():
    paper = VHR()
    assert paper.chosen(32) == {1, *range(18, 32)}
    assert paper.chosen(40) == {1, *range(26, 40)}
    assert paper.chosen(8) == {1, 4, 5, 6, 7}
    assert paper.chosen(24) == {1, *range(14, 24)}
    assert paper.chosen(2) == {1} and paper.chosen(1) == {0}
    assert VHR(layers=(0, -1)).chosen(6) == {0, 5}
    model = zoo.llava()
    plan = mmattn.plan(model, VHR(layers=(0, -1)))
    rows = [row.site.path.split(".")[-2] for row in plan.rows if row.methods]
    assert rows == ["0", "3"]


def test_what_it_refuses():
    model, call = zoo.llava(), zoo.llava_call()
    with torch.no_grad(), mmattn.attach(model, VHR()):
        out = model(**call, use_cache=True)
        more = torch.tensor([[7, 8], [7, 8]])
        longer = torch.cat([call["attention_mask"], torch.ones_like(more)], 1)
        with pytest.raises(mmattn.UnsupportedCall, match="fed whole"):
            model(input_ids=more, attention_mask=longer, cache=out.cache)
    with torch.no_grad(), mmattn.attach(model, VHR(), sites="*language_model*"):
        step = more[:, :1]
        with pytest.raises(mmattn.UnsupportedCall, match="fed whole"):
            model(input_ids=step, attention_mask=longer[:, :-1], cache=out.cache)
    with torch.no_grad(), mmattn.attach(model, VHR(text_stream="local")):
        embeds = model.get_input_embeddings().weight[call["input_ids"]]
        with pytest.raises(mmattn.UnsupportedCall, match="pass input_ids"):
            model(inputs_embeds=embeds, attention_mask=call["attention_mask"])
    for target in (zoo.llama(), zoo.clip(), model.model.language_model):
        with pytest.raises(mmattn.NoSiteError):
            mmattn.attach(target, VHR())
    for settings in ({"alpha": -1.0}, {"text_stream": "remove"}, {"layers": (0.5,)}):
        with pytest.raises(mmattn.ConfigError):
            VHR(**settings)
    method = VHR(layers=(1, 2), text_stream="local")
    assert VHR.from_dict(method.to_dict()) == method
