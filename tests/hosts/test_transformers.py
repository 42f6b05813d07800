"""transformers: contract on tiny real models, generation, image positions, dropped tokens, twins."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as hf
import transformers_zoo as zoo
from host_contract import NoMasks, Zeroed, _check_compiled, check_contract, distance, same
from transformers_zoo import Watch, made

import mmattn
from mmattn.seams import Opaque, Seam


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


def test_a_pipeline_is_a_target():
    model, call, sites = made("vit")
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    pipe = hf.pipeline("image-classification", model=model, image_processor=processor)
    stock = zoo.logits(model, call)
    with mmattn.attach(pipe, "identity") as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert session.stats.executed == sites and session.plan.host.name == "transformers"


def test_a_peft_model_is_a_target():
    peft = pytest.importorskip("peft", reason="LoRA needs the extra [train]")
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


# -- logits ---------------------------------------------------------------------------------------


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
