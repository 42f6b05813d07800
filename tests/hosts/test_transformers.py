"""transformers: contract on tiny real models, generation, image positions, dropped tokens, twins."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as hf
import transformers_zoo as zoo
from host_contract import NoMasks, Zeroed, _check_compiled, check_contract, distance, same
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mmattn
from mmattn.hosts.transformers_features import window_order
from mmattn.seams import Opaque, Seam


@dataclass(frozen=True)
class EveryThird(mmattn.Method):
    """Keeps image tokens 0, 3, 6, ..."""

    name: ClassVar[str] = "every-third"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)

    def features(self, tile, *, site):
        return torch.arange(tile.features.shape[0])[::3]


@dataclass(frozen=True)
class Watch(mmattn.Method):
    """Keeps layouts, masks and shapes of every call in `log`; changes nothing."""

    name: ClassVar[str] = "watch"
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    opaque: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross")
    log: ClassVar[list] = []
    needs_twin: bool = False

    @property
    def twin(self):
        return self.needs_twin

    def attend(self, q, k, v, *, mask, scale, site, dense):
        self.log.append((site, site.layout, mask, q.shape, k.shape, site.causal))
        return dense(q, k, v)


@dataclass(frozen=True)
class Repeats(Watch):
    """Gets key and value heads repeated, and hands them back so."""

    name: ClassVar[str] = "repeats"
    observes: ClassVar[bool] = False
    grouped: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def _fresh_log():
    Watch.log.clear()


def cases(names, implementations=("sdpa", "eager")):
    return pytest.mark.parametrize(
        ("name", "implementation"), [(n, i) for n in names for i in implementations]
    )


def made(name, implementation="sdpa"):
    build, call, sites = zoo.ALL[name]
    model = build(implementation)
    return model, call(model), sites


@cases(zoo.ALL)
def test_contract(name, implementation):
    model, call, sites = made(name, implementation)
    check_contract(model, lambda m: zoo.logits(m, call), expect_sites=sites)


@pytest.mark.parametrize("name", ["llama", "clip", "siglip", "vit"])
def test_compiles_in_one_graph(name):
    model, call = zoo.one_block(name)
    model._is_torch_compile = True  # transformers leaves this mark on models that it compiles
    with torch.no_grad():
        _check_compiled(model, lambda m: m(**call)[0], ["identity"], {})


@cases([*zoo.VLMS, "llama"])
def test_generation_with_a_cache_is_untouched(name, implementation):
    model, call, sites = made(name, implementation)
    greedy, beams = zoo.tokens(model, call), zoo.tokens(model, call, num_beams=2)
    with mmattn.attach(model, "identity") as session:
        assert torch.equal(zoo.tokens(model, call), greedy)
        assert torch.equal(zoo.tokens(model, call, num_beams=2), beams)
        stats = session.stats
    assert stats.executed == stats.planned == sites
    decoders = [
        row.calls for row in stats.sites if "language" in row.path or "text_model" in row.path
    ]
    assert all(calls >= 10 for calls in decoders), "decoding steps did not go through the seam"


def test_sites_are_numbered_and_tagged_per_tower():
    model, _, _ = made("llava")
    rows = [row.site for row in mmattn.plan(model, "identity").rows]
    vision = [s for s in rows if "vision" in s.tags]
    decoder = [s for s in rows if "decoder" in s.tags]
    assert [s.index for s in vision] == [s.index for s in decoder] == [0, 1, 2, 3]
    assert {s.depth for s in rows} == {4} and {s.heads for s in rows} == {4}
    assert [s.index for s in vision if "output" in s.tags] == [3]
    assert all("multimodal" in s.tags for s in decoder)
    assert all("text" in r.site.tags for r in mmattn.plan(made("clip")[0], "identity").rows[:2])
    kinds = [r.site.kind for r in mmattn.plan(made("instructblip")[0], "identity").rows]
    assert kinds.count("cross") == 2
    windowed = [r.site for r in mmattn.plan(made("qwen2.5-vl")[0], "identity").rows]
    assert [s.index for s in windowed if "windowed" in s.tags] == [0, 2]


@pytest.mark.parametrize(("layer", "output"), [(-1, 3), (-2, 2), (2, 1), ([1, -2], 2)])
def test_the_block_that_feeds_the_language_model_is_tagged(layer, output):
    model = zoo.llava(vision_feature_layer=layer)
    sites = [row.site for row in mmattn.plan(model, "identity").rows]
    assert [s.index for s in sites if "output" in s.tags] == [output]


def test_all_encoder_blocks_run_even_when_features_come_from_the_second_last():
    model = zoo.llava(vision_feature_layer=-2)
    with mmattn.attach(model, "identity") as session:
        zoo.logits(model, zoo.llava_call())
        assert session.stats.executed == 8


def test_text_only_calls_leave_the_vision_tower_alone():
    model = zoo.llava()
    call = zoo.prompt((0, 0), 0, (0, 3))
    stock = zoo.logits(model, call)
    with mmattn.attach(model, "identity"):
        assert torch.equal(zoo.logits(model, call), stock)


def test_eager_weights_still_come_out():
    model, call, _ = made("llava", "eager")
    stock = model(**call, output_attentions=True).attentions
    with mmattn.attach(model, "identity"):
        assert same(model(**call, output_attentions=True).attentions, stock)


def test_padding_and_causality_reach_the_method():
    model, call, _ = made("llama")
    padded = zoo.logits(model, call)
    with mmattn.attach(model, Watch()):
        assert torch.equal(zoo.logits(model, call), padded)
        mask = Watch.log[0][2]
        assert mask.shape == (2, 1, 8, 8) and not mask[0, 0, -1, :3].any()
        Watch.log.clear()
        zoo.logits(model, {"input_ids": call["input_ids"][1:]})
        assert Watch.log[0][2] is None and Watch.log[0][5], "sdpa without a mask is causal"
        assert Watch.log[0][3][1] == 4 and Watch.log[0][4][1] == 2, "key heads are not repeated"
    with mmattn.attach(model, NoMasks()), pytest.raises(mmattn.UnsupportedCall, match="mask"):
        zoo.logits(model, call)
    with mmattn.attach(model, NoMasks(), unsupported="dense") as session:
        assert torch.equal(zoo.logits(model, call), padded)
        assert session.stats.dense_calls == 2
    model.set_attn_implementation("eager")
    with mmattn.attach(model, Watch()):
        Watch.log.clear()
        zoo.logits(model, {"input_ids": call["input_ids"][1:]})
        assert Watch.log[0][2] is not None and not Watch.log[0][5], "eager has it in the mask"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_repeated_heads_are_not_repeated_again(implementation):
    model, call, _ = made("llama", implementation)
    stock = zoo.logits(model, call)
    with mmattn.attach(model, Repeats()):
        assert distance(zoo.logits(model, call), stock) < 1e-5
    assert Watch.log[0][4][1] == 4


def test_a_method_that_replaces_attention_changes_the_output():
    model, call, _ = made("llava")
    stock = zoo.logits(model, call)
    with mmattn.attach(model, Zeroed(), sites="*vision_tower*"):
        assert distance(zoo.logits(model, call), stock) > 1e-3


@pytest.mark.slow  # flex attention compiles itself
def test_block_masks_pass_through_and_are_refused():
    model, call, _ = made("llama", "flex_attention")
    stock = zoo.logits(model, call)
    with mmattn.attach(model, "identity"):
        assert torch.equal(zoo.logits(model, call), stock)
    with mmattn.attach(model, Watch()):
        assert torch.equal(zoo.logits(model, call), stock)
        assert isinstance(Watch.log[0][2], Opaque)
    with mmattn.attach(model, NoMasks()), pytest.raises(mmattn.UnsupportedCall, match="BlockMask"):
        zoo.logits(model, call)


@pytest.mark.parametrize(
    ("mask", "rest"),
    [
        (torch.ones(2, 8), {}),
        (None, {"position_bias": torch.zeros(1, 4, 8, 8)}),
        (None, {"softcap": 9.0}),
    ],
)
def test_what_only_the_host_can_read_is_opaque(mask, rest):
    seen = []

    def original(module, q, k, v, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs))
        return v.transpose(1, 2), "weights"

    q = torch.randn(2, 4, 8, 16)
    for method, refused in ((Watch(), False), (NoMasks(), True)):
        model = zoo.llama()
        with mmattn.attach(model, method) as session:
            run = session.runs[0]
            seam = Seam(run)
            seam.here = run.sites[0]
            function = seam.interface(original, explicit=False)
            if refused:
                with pytest.raises(mmattn.UnsupportedCall, match="only itself can read"):
                    function(run.sites[0].module, q, q, q, mask, scaling=1.0, **rest)
                continue
            out, weights = function(run.sites[0].module, q, q, q, mask, scaling=1.0, **rest)
            run.sites[0].meter.reached = run.sites[1].meter.reached = True
        assert torch.equal(out, q.transpose(1, 2)) and weights == "weights"
        assert isinstance(Watch.log[0][2], Opaque) and seen[0][0] is mask
        assert all(seen[0][1][k] is v for k, v in rest.items())


def test_models_with_their_own_softmax_are_named():
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    model = hf.PvtModel(hf.PvtConfig(image_size=32, **sizes))
    with pytest.raises(mmattn.NoSiteError, match="PvtEfficientSelfAttention computes its softmax"):
        mmattn.attach(model, "identity")


def test_a_pipeline_and_a_peft_model_are_targets():
    peft = pytest.importorskip("peft")
    model, call, sites = made("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    stock = zoo.logits(wrapped, call)
    with mmattn.attach(wrapped, "identity") as session:
        assert torch.equal(zoo.logits(wrapped, call), stock)
        assert session.stats.executed == sites and session.plan.host.name == "transformers"


# -- image positions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.VLMS)
def test_image_mask_is_the_prompts_and_stays_while_decoding(name):
    model, call, _ = made(name)
    image = 250 if "qwen" in name else zoo.IMAGE
    expected = call["input_ids"] == image
    with mmattn.attach(model, Watch(), sites=lambda s: "decoder" in s.tags):
        zoo.tokens(model, call, max_new_tokens=3)
        layouts = [layout for _, layout, *_ in Watch.log]
        assert {layout.past for layout in layouts} == {0, expected.shape[1], expected.shape[1] + 1}
        assert all(torch.equal(layout.image_mask, expected) for layout in layouts)
        Watch.log.clear()
        zoo.tokens(model, call, num_beams=2, max_new_tokens=2)
        assert torch.equal(Watch.log[0][1].image_mask, expected.repeat_interleave(2, 0))
        Watch.log.clear()
        zoo.logits(model, call)
        assert torch.equal(Watch.log[0][1].image_mask, expected)


def test_images_added_to_a_running_cache_extend_the_mask():
    model = zoo.llava()
    one = zoo.llava_call((1,), (0,))
    with torch.no_grad(), mmattn.attach(model, Watch(), sites="*language_model*"):
        out = model(**one, use_cache=True)
        Watch.log.clear()
        longer = torch.ones(1, 2 * one["input_ids"].shape[1], dtype=torch.long)
        model(**{**one, "attention_mask": longer}, cache=out.cache)
        mask = Watch.log[0][1].image_mask
    assert torch.equal(mask, (one["input_ids"] == zoo.IMAGE).repeat(1, 2))


def test_vision_grids():
    for name, grid, extra in (("clip", (1, 4, 4), 1), ("siglip", (1, 4, 4), 0)):
        model, call, _ = made(name)
        with mmattn.attach(model, Watch(), sites="*vision*"):
            Watch.log.clear()
            zoo.logits(model, call)
        layout, count = Watch.log[0][1], Watch.log[0][3][2]
        assert layout.grid == grid
        assert layout.image_slice(count) == slice(extra, extra + 16)


# -- dropped image tokens -------------------------------------------------------------------------


def shortened(call, keep):
    """The call with dropped placeholders deleted from the ids; rows must stay equally long."""
    pick = {k: call[k] for k in ("input_ids", "attention_mask")}
    return {k: torch.stack([r[m] for r, m in zip(v, keep, strict=True)]) for k, v in pick.items()}


def kept_columns(call, image, counts):
    keep = torch.ones_like(call["input_ids"], dtype=torch.bool)
    flags = torch.cat([torch.arange(n) % 3 == 0 for n in counts])
    keep[call["input_ids"] == image] = flags
    return keep, flags


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llava_equals_the_prompt_without_these_placeholders(implementation):
    model, call, _ = made("llava", implementation)
    with torch.no_grad():
        rows = model.get_image_features(call["pixel_values"], return_dict=True).pooler_output
    keep, _ = kept_columns(call, zoo.IMAGE, [16, 16])
    short = shortened(call, keep)

    def features():
        kept = [row[::3] for row in rows]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=kept)}}

    want = zoo.logits(model, {**short, **features()})
    greedy = zoo.tokens(model, {**short, **features()})
    beams = zoo.tokens(model, {**short, **features()}, num_beams=3)
    length, full = short["input_ids"].shape[1], call["input_ids"].shape[1]
    with mmattn.attach(model, EveryThird()) as session:
        got = zoo.logits(model, call)
        assert got.shape[1] == length == full - 10
        assert torch.equal(got, want)
        assert torch.equal(zoo.tokens(model, call)[:, full:], greedy[:, length:])
        assert torch.equal(zoo.tokens(model, call, num_beams=3)[:, full:], beams[:, length:])
        row = next(r for r in session.stats.sites if r.kind == "features")
    assert row.calls == 3 and row.tokens_in == 16 and row.tokens_kept == 6
    assert row.methods == ("every-third",)


def test_decoding_by_hand_without_positions_or_mask():
    model, _, _ = made("llava")
    call = zoo.llava_call((1,), (0,))
    with torch.no_grad(), mmattn.attach(model, EveryThird()):
        steps = model.generate(
            **call, **zoo.GREEDY, output_logits=True, return_dict_in_generate=True
        )
        del call["attention_mask"]
        out = model(**call, use_cache=True)
        step = out.logits[:, -1:].argmax(-1)
        assert torch.equal(model(input_ids=step, cache=out.cache).logits[:, -1], steps.logits[1])


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2-vl", "qwen2.5-vl"])
@pytest.mark.parametrize("method", [mmattn.RandomPrune(keep=None), mmattn.HiPrune(keep=9999)])
def test_keeping_everything_is_bitwise_plain(name, method):
    model, call, _ = made(name)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, method) as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)
        row = next(r for r in session.stats.sites if r.kind == "features")
        assert row.tokens_kept == row.tokens_in > 0
    assert torch.equal(zoo.logits(model, call), stock)


def test_rows_with_different_image_counts_do_not_see_each_other():
    model, _, _ = made("llava")
    counts = (1, 2, 0)
    call = zoo.llava_call(counts, (0, 1, 4))
    first = 0
    with torch.no_grad(), mmattn.attach(model, EveryThird()):
        bare = zoo.logits(model, call)
        steps = model.generate(
            **call, **zoo.GREEDY, output_logits=True, return_dict_in_generate=True
        )
        for i, count in enumerate(counts):
            real = call["attention_mask"][i].bool()
            one = {k: call[k][i : i + 1, real] for k in ("input_ids", "attention_mask")}
            if count:
                one["pixel_values"] = call["pixel_values"][first : first + count]
            first += count
            alone = model.generate(
                **one, **zoo.GREEDY, output_logits=True, return_dict_in_generate=True
            )
            assert distance(zoo.logits(model, one)[0, -1], bare[i, -1]) < 1e-5
            for a, b in zip(alone.logits, steps.logits, strict=True):
                assert distance(a[0], b[i]) < 1e-5


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_qwen_equals_masked_keys_at_the_true_coordinates(name):
    model, call, _ = made(name)
    ids, padding, grids = call["input_ids"], call["attention_mask"], call["image_grid_thw"]
    keep, _ = kept_columns(call, 250, (grids.prod(1) // 4).tolist())
    positions, _ = model.model.get_rope_index(
        ids,
        image_grid_thw=grids,
        mm_token_type_ids=call["mm_token_type_ids"],
        attention_mask=padding,
    )
    with torch.no_grad(), mmattn.attach(model, EveryThird()):
        bare = zoo.logits(model, call)
        beams = zoo.tokens(model, call, num_beams=2)
        out = model.generate(**call, **zoo.GREEDY, output_logits=True, return_dict_in_generate=True)
    assert bare.shape[1] < ids.shape[1] and beams.shape[1] > ids.shape[1]
    for step, logits in enumerate(out.logits):
        more = torch.ones(2, step, dtype=torch.long)
        later = torch.cat([positions, *(positions[..., -1:] + 1 + i for i in range(step))], -1)
        reference = {
            "input_ids": out.sequences[:, : ids.shape[1] + step],
            "attention_mask": torch.cat([padding * keep, more], 1),
            "position_ids": later,
            "pixel_values": call["pixel_values"],
            "image_grid_thw": grids,
        }
        want = zoo.logits(model, reference)[:, -1]
        assert distance(logits, want) < 1e-5
        if step == 0:
            assert distance(bare[:, -1], want) < 1e-5
            plain = zoo.logits(model, call)[:, -1]
            assert distance(bare[:, -1], plain) > 1e-3, "the test cannot see dropped tokens"


def test_qwen_decoding_by_hand_continues_at_the_true_position():
    model, _, _ = made("qwen2.5-vl")
    call = zoo.qwen_call(((12, 20),))
    del call["attention_mask"]
    with torch.no_grad(), mmattn.attach(model, EveryThird()):
        steps = model.generate(
            **call, **zoo.GREEDY, output_logits=True, return_dict_in_generate=True
        )
        out = model(**call, use_cache=True)
        step = out.logits[:, -1:].argmax(-1)
        assert torch.equal(model(input_ids=step, cache=out.cache).logits[:, -1], steps.logits[1])


def test_llava_next_keeps_newlines_and_shares_the_budget_by_tile():
    model, call, _ = made("llava-next")
    with mmattn.attach(model, mmattn.RandomPrune(keep=16)) as session:
        assert zoo.logits(model, call).shape[1] < call["input_ids"].shape[1]
        zoo.tokens(model, call)
        row = next(r for r in session.stats.sites if r.kind == "features")
    # Two images of 1 + 4 and 1 + 2 tiles: at most 16 patches and the newlines survive.
    rows = model.get_image_features(call["pixel_values"], call["image_sizes"], return_dict=True)
    newline = model.model.image_newline
    breaks = sum(int((f == newline).all(-1).sum()) for f in rows.pooler_output) / 2
    assert breaks > 0 and breaks < row.tokens_kept <= 16 + breaks


def test_window_order_is_the_towers():
    from transformers.vision_utils import get_vision_window_index

    visual = zoo.qwen25().model.visual
    grids = torch.tensor([[1, 12, 20], [1, 8, 8], [1, 2, 34], [2, 10, 16]])
    want, _ = get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)
    assert torch.equal(window_order(visual, grids), want)


def test_what_pruning_refuses():
    model, call, _ = made("llava")
    with torch.no_grad():
        rows = model.get_image_features(call["pixel_values"], return_dict=True)
        other = model.get_image_features(call["pixel_values"] + 1, return_dict=True)
    ids = {k: v for k, v in call.items() if k != "pixel_values"}
    with mmattn.attach(model, EveryThird()):
        with pytest.raises(mmattn.UnsupportedCall, match="no image features"):
            zoo.logits(model, {**ids, "mm_encoder_outputs": {"image": rows}})
        zoo.logits(model, call)
        zoo.logits(model, {**ids, "mm_encoder_outputs": {"image": rows}})
        with pytest.raises(mmattn.UnsupportedCall, match="computed last"):
            zoo.logits(model, {**ids, "mm_encoder_outputs": {"image": other}})
        with pytest.raises(mmattn.UnsupportedCall, match="static cache"):
            zoo.tokens(model, call, cache_implementation="static")
    with mmattn.attach(model, EveryThird(), unsupported="dense") as session:
        stock = zoo.logits(model, {**ids, "mm_encoder_outputs": {"image": rows}})
        assert stock.shape[1] == call["input_ids"].shape[1]
        assert session.stats.dense_calls == 1
    for target in (zoo.clip(), zoo.llama(), zoo.instructblip()):
        with pytest.raises(mmattn.NoSiteError, match="no such place"):
            mmattn.attach(target, EveryThird())
    with pytest.raises(mmattn.ConflictError, match="both prune"):
        mmattn.attach(model, [EveryThird(), mmattn.RandomPrune()])


def test_copies_of_a_pruned_model_are_whole():
    model, call, _ = made("llava")
    stock = zoo.logits(model, call)
    with mmattn.attach(model, EveryThird()):
        twin = copy.deepcopy(model)
        assert torch.equal(zoo.logits(twin, call), stock)
        assert type(twin.model) is hf.LlavaModel
    assert type(model.model) is hf.LlavaModel
    assert torch.equal(zoo.logits(model, call), stock)


# -- twins and logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "instructblip"])
def test_twins_are_the_prompt_without_its_images_and_leave_no_trace(name):
    model, call, _ = made(name)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    image = 250 if name == "qwen2.5-vl" else zoo.IMAGE
    with torch.no_grad(), mmattn.attach(model, Watch(True), sites=lambda s: "decoder" in s.tags):
        assert distance(zoo.logits(model, call), stock) < 1e-5
        out = model(**call, use_cache=True)
        assert out.logits.shape == stock.shape
        if name != "instructblip":  # does not return its cache
            assert out.cache.layers[0].keys.shape[0] == 2
        assert torch.equal(zoo.tokens(model, call), greedy)
    rows = [shape[0] for _, _, _, shape, _, _ in Watch.log]
    assert set(rows) == {4, 2}, "twins belong to prompts only"
    layout, mask = Watch.log[0][1], Watch.log[0][2]
    assert layout.twins == 2 and not layout.image_mask[2:].any()
    text = ((call["input_ids"] != image) & (call["attention_mask"] > 0)).sum(1)
    assert torch.equal(mask[2:, 0, -1].sum(1), text)


def test_a_prompt_padded_on_the_right_has_no_last_position():
    model, _, _ = made("llava")
    call = {**zoo.prompt((1, 1), 16, (2, 0), left_pad=False)}
    call["pixel_values"] = zoo.pixels(2, 3, 56, 56)
    with (
        mmattn.attach(model, Watch(True), sites="*language_model*"),
        pytest.raises(mmattn.UnsupportedCall, match="padded on the right"),
    ):
        zoo.logits(model, call)


@dataclass(frozen=True)
class Bias(mmattn.Method):
    """Adds a large number to one token's logit."""

    name: ClassVar[str] = "bias"
    seams: ClassVar[tuple[str, ...]] = ("logits",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)

    def logits(self, logits, *, site):
        site.note("width", logits.shape[-1])
        out = logits.clone()
        out[..., 77] += 1000
        return out


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_logits_seam(name):
    model, call, _ = made(name)
    with mmattn.attach(model, Bias()):
        new = zoo.tokens(model, call)[:, call["input_ids"].shape[1] :]
    assert (new == 77).all()
