"""transformers: image tokens dropped before the language model, and twin rows without images."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as hf
import transformers_zoo as zoo
from host_contract import distance
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers_zoo import Watch, made

import mmattn
from mmattn.hosts.transformers_features import Idefics3, window_order
from mmattn.layout import Kept


@dataclass(frozen=True)
class EveryThird(mmattn.Method):
    """Keeps image tokens 0, 3, 6, ..."""

    name: ClassVar[str] = "every-third"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)

    def features(self, tile, *, site):
        return torch.arange(tile.features.shape[0])[::3]


@dataclass(frozen=True)
class Third(mmattn.Method):
    """Keeps image tokens 0, 3, 6, ... with features of its own, and remembers its tiles."""

    name: ClassVar[str] = "third"
    seams: ClassVar[tuple[str, ...]] = ("features",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    tiles: ClassVar[list] = []

    def features(self, tile, *, site):
        self.tiles.append(tile)
        indices = torch.arange(tile.features.shape[0])[::3]
        return Kept(indices, tile.features[indices] * 2 + 1)


@pytest.fixture(autouse=True)
def _fresh_log():
    Watch.log.clear()
    Third.tiles.clear()


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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_replaced_features_stand_where_their_tokens_stood(implementation):
    model, _, _ = made("llava", implementation)
    call = zoo.llava_call((2, 2), (2, 0))
    with torch.no_grad():
        rows = model.get_image_features(call["pixel_values"], return_dict=True).pooler_output
    keep, _ = kept_columns(call, zoo.IMAGE, [16] * 4)
    short = shortened(call, keep)

    def features():
        kept = [row[::3] * 2 + 1 for row in rows]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=kept)}}

    want = zoo.logits(model, {**short, **features()})
    greedy = zoo.tokens(model, {**short, **features()})
    beams = zoo.tokens(model, {**short, **features()}, num_beams=3)
    length, full = short["input_ids"].shape[1], call["input_ids"].shape[1]
    with mmattn.attach(model, Third()):
        assert torch.equal(zoo.logits(model, call), want)
        assert torch.equal(zoo.tokens(model, call)[:, full:], greedy[:, length:])
        assert torch.equal(zoo.tokens(model, call, num_beams=3)[:, full:], beams[:, length:])
    with mmattn.attach(model, EveryThird()):
        assert distance(zoo.logits(model, call), want) > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(rows, again(model, call), strict=True))


def again(model, call):
    with torch.no_grad():
        return model.get_image_features(call["pixel_values"], return_dict=True).pooler_output


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
def test_what_a_tile_knows(name):
    model, call, _ = made(name)
    image = call["input_ids"] == (250 if "qwen" in name else zoo.IMAGE)
    texts = call["attention_mask"].bool() & ~image
    with mmattn.attach(model, Third()):
        zoo.logits(model, call)
        bare = list(Third.tiles)
        Third.tiles.clear()
        zoo.tokens(model, call, num_beams=2)
    owners = [0] * 5 + [1] * 3 if name == "llava-next" else [0, 1]
    table = model.get_input_embeddings().weight
    for tile, beam, row in zip(bare, Third.tiles, owners, strict=True):
        assert torch.equal(tile.text, table[call["input_ids"][row][texts[row]]])
        assert torch.equal(beam.text, tile.text) and torch.equal(beam.features, tile.features)
        assert tile.tiles == {"llava-next": owners.count(row)}.get(name, 1)
        if "llava" in name:
            with torch.no_grad():
                assert distance(tile.project(tile.raw), tile.features) < 1e-6
        else:
            assert tile.raw is None and tile.project is None


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_idefics_rows_with_different_numbers_of_tiles(name):
    model, _, _ = made(name)
    values = zoo.pixels(2, 3, 3, 56, 56)
    values[1, 1:] = 0  # filled up
    # Two rows of 3 tiles and of 1: every tile four tokens.
    call = {**zoo.prompt((3, 1), 4, (0, 3)), "pixel_values": values}
    stock = zoo.logits(model, call)
    with mmattn.attach(model, Third()) as session:
        both = zoo.logits(model, call)
        row = next(r for r in session.stats.sites if r.kind == "features")
        assert [t.tiles for t in Third.tiles] == [3, 3, 3, 1]
        assert {t.grid for t in Third.tiles} == {(2, 2)}
        assert row.tokens_in == 8 and row.tokens_kept == 4
        for i, tiles in enumerate((3, 1)):
            real = call["attention_mask"][i].bool()
            one = {k: call[k][i : i + 1, real] for k in ("input_ids", "attention_mask")}
            one["pixel_values"] = values[i : i + 1, :tiles]
            assert distance(zoo.logits(model, one)[0, -1], both[i, -1]) < 1e-5
    assert both.shape[1] == stock.shape[1] - 2  # the row with one tile keeps its padding
    with mmattn.attach(model, mmattn.RandomPrune(keep=6)) as session:
        zoo.logits(model, call)  # two tokens of each of three tiles, and all four of the only one
        row = next(r for r in session.stats.sites if r.kind == "features")
    assert row.tokens_kept == (6 + 4) / 2


def test_idefics_patches_are_put_together_as_the_connector_does():
    model = zoo.idefics3().model
    connector, family = model.connector, Idefics3()
    side, scale = 6, 2
    numbers = torch.arange(2.0 * side * side).view(2, side * side, 1).repeat(1, 1, 3)
    shuffled = connector.pixel_shuffle(numbers, scale)
    tokens = torch.zeros(2, 9, 5)
    got = family.per_token(model, {}, tokens, [numbers[..., 0]])
    assert torch.equal(got, shuffled.mean(-1).flatten())
    wide = family.per_token(model, {}, tokens, [numbers[:1], numbers[1:]])
    assert wide.shape == (18, 3) and torch.equal(wide[:, 1], got)
    with pytest.raises(mmattn.UnsupportedCall, match="same call"):
        family.per_token(model, {}, tokens, [numbers[:1]])


@pytest.mark.parametrize(
    "name", ["llava", "llava-next", "qwen2-vl", "qwen2.5-vl", "idefics3", "smolvlm"]
)
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
    for target in (zoo.clip(), zoo.llama()):
        with pytest.raises(mmattn.NoSiteError, match="no such place"):
            mmattn.attach(target, EveryThird())
    with pytest.raises(mmattn.ConflictError, match="both prune"):
        mmattn.attach(model, [EveryThird(), mmattn.RandomPrune()])
    with mmattn.attach(model, EveryThird()):
        with pytest.raises(mmattn.ConflictError, match="already prunes"):
            mmattn.attach(model, mmattn.RandomPrune())
        zoo.logits(model, call)


def test_a_step_of_another_prompts_cache_is_refused():
    model, call, _ = made("llava")
    with torch.no_grad(), mmattn.attach(model, EveryThird()):
        first, second = (model(**call, use_cache=True) for _ in range(2))
        step = {"input_ids": torch.tensor([[7], [8]])}
        step["attention_mask"] = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
        model(**step, cache=second.cache)
        with pytest.raises(mmattn.UnsupportedCall, match="other than that of the last prompt"):
            model(**step, cache=first.cache)


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
    rows = [entry[3][0] for entry in Watch.log]
    assert set(rows) == {4, 2}, "twins belong to prompts only"
    layout, mask = Watch.log[0][1], Watch.log[0][2]
    assert layout.twins == 2 and not layout.image_mask[2:].any()
    text = ((call["input_ids"] != image) & (call["attention_mask"] > 0)).sum(1)
    assert torch.equal(mask[2:, 0, -1].sum(1), text)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen2.5-vl", "idefics3"])
def test_a_twin_computes_what_the_text_alone_computes(name):
    model, call, _ = made(name)
    image = 250 if "qwen" in name else zoo.IMAGE
    with mmattn.attach(model, Watch(True), sites=lambda s: "decoder" in s.tags):
        zoo.logits(model, call)
        twins = [entry[6][2:, :, -1] for entry in Watch.log]
        for row in range(2):
            Watch.log.clear()
            ids = call["input_ids"][row]
            ids = ids[(ids != image) & (ids != 0)][None]
            zoo.logits(model, {"input_ids": ids})
            alone = [entry[6][0, :, -1] for entry in Watch.log]
            assert len(alone) == len(twins) > 1
            for a, b in zip(twins, alone, strict=True):
                assert distance(a[row], b) < 1e-6


def test_a_prompt_padded_on_the_right_has_no_last_position():
    model, _, _ = made("llava")
    call = {**zoo.prompt((1, 1), 16, (2, 0), left_pad=False)}
    call["pixel_values"] = zoo.pixels(2, 3, 56, 56)
    with (
        mmattn.attach(model, Watch(True), sites="*language_model*"),
        pytest.raises(mmattn.UnsupportedCall, match="padded on the right"),
    ):
        zoo.logits(model, call)
