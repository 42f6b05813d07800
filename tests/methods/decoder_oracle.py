"""Dense attention of a decoder with its probabilities edited, patched into transformers' eager mode."""

import contextlib
import importlib
from dataclasses import dataclass, field

import torch
import transformers_zoo as zoo
from host_contract import distance

import mmattn

QWEN_IMAGE = 250
FAMILIES = ("llama", "qwen2_vl")


@dataclass
class Call:
    """One attention call, everything written out in fp32.

    Attributes:
        products: ``q . k`` unscaled, ``[B, H, Q, K]``.
        scores: scaled and masked.
        visible: ``[B, Q, K]``.
        image: ``[B, K]``.
        keys: ``[B, H, K, D]``.
        store: what the edit keeps for this layer; rows follow the beams.
    """

    layer: int
    products: torch.Tensor
    scores: torch.Tensor
    scale: float
    visible: torch.Tensor
    image: torch.Tensor
    keys: torch.Tensor
    store: dict = field(default_factory=dict)

    @property
    def past(self):
        return self.scores.shape[3] - self.scores.shape[2]

    @property
    def plain(self):
        return self.scores.softmax(-1)

    def rows(self):
        """``(b, i, column of the query)`` of every query that is no padding."""
        for b in range(self.scores.shape[0]):
            for i in range(self.scores.shape[2]):
                if self.visible[b, i, self.past + i]:
                    yield b, i, self.past + i


@contextlib.contextmanager
def patched(model, ids, edit, layers):
    """Inside, decoder attention at `layers` uses the probabilities that ``edit(call)`` returns.

    Yields a list with one entry per step of beam search: whether it moved any row.
    """
    image = ids == (QWEN_IMAGE if "Qwen" in type(model).__name__ else model.config.image_token_id)
    stores, undo, moves = {}, [], []

    def forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kw):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        products = query.float() @ key.float().transpose(-1, -2)
        visible = torch.ones(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            visible &= attention_mask[:, 0] > -1e30
        scores = (products * scaling).masked_fill(~visible[:, None], -torch.inf)
        places = image.repeat_interleave(query.shape[0] // image.shape[0], 0)
        places = torch.nn.functional.pad(places, (0, key.shape[2] - places.shape[1]))
        if key.shape[2] == query.shape[2]:
            stores[module.layer_idx] = {}
        store = stores[module.layer_idx]
        call = Call(module.layer_idx, products, scores, scaling, visible, places, key, store)
        weights = (edit(call) if module.layer_idx in layers else call.plain).nan_to_num()
        return (weights @ value.float()).transpose(1, 2).to(query.dtype), weights

    for family in FAMILIES:
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        stock = modeling.eager_attention_forward

        def choose(module, *args, stock=stock, **kw):
            decoder = getattr(module, "layer_idx", None) is not None
            return (forward if decoder else stock)(module, *args, **kw)

        modeling.eager_attention_forward = choose
        undo.append((modeling, "eager_attention_forward", stock))
    from transformers import DynamicCache

    reorder = DynamicCache.reorder_cache

    def follow(self, order):
        reorder(self, order)
        moves.append(not torch.equal(order, torch.arange(len(order))))
        for store in stores.values():
            store.update({name: x[order] for name, x in store.items()})

    DynamicCache.reorder_cache = follow
    undo.append((DynamicCache, "reorder_cache", reorder))
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield moves
    finally:
        model.set_attn_implementation(before)
        for owner, name, value in undo:
            setattr(owner, name, value)


def sharpen(model, factor=25.0):
    """Larger query weights, so that random models attend to some keys more than to others."""
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight") and "vision" not in name and "visual" not in name:
            weight.data *= factor
    return model


def made(name):
    """A tiny model that attends sharply, and a call with two rows, one of them padded."""
    if name == "llava":
        call = zoo.llava_call((1, 1), (0, 3))
        ids = call["input_ids"][
            1
        ]  # <s> a, three words, the image, more words: the three go behind it
        call["input_ids"][1] = torch.cat([ids[:2], ids[5:-3], ids[2:5], ids[-3:]])
        return sharpen(zoo.llava("eager")), call
    return sharpen(zoo.qwen2("eager")), zoo.qwen_call(((8, 12), (8, 8)))


def alone(call, row):
    """One row of a call, without padding."""
    real = call["attention_mask"][row].bool()
    one = {}
    for key, value in call.items():
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            one[key] = value[row : row + 1, real]
    if "image_grid_thw" in call:
        sizes = call["image_grid_thw"].prod(1).tolist()
        one["image_grid_thw"] = call["image_grid_thw"][row : row + 1]
        one["pixel_values"] = call["pixel_values"].split(sizes)[row]
    else:
        one["pixel_values"] = call["pixel_values"][row : row + 1]
    return one


def steps(model, call, **kw):
    """Generated ids, and the logits of every step."""
    more = {"output_logits": True, "return_dict_in_generate": True, **zoo.GREEDY, **kw}
    with torch.no_grad():
        out = model.generate(**call, **more)
    return out.sequences, torch.stack(out.logits, 1)


def beams_of(model, call):
    """Ids and scores of four beams, three of which are returned."""
    more = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 8, "output_scores": True}
    with torch.no_grad():
        out = model.generate(**call, **{**zoo.GREEDY, **more}, return_dict_in_generate=True)
    return out.sequences, out.sequences_scores


def check(name, method, edit):
    """Logits, greedy and beam search equal those of the oracle, with eager and with sdpa.

    Returns the stats of the last session.
    """
    model, call = made(name)
    depth = model.config.text_config.num_hidden_layers
    layers, ids = method.chosen(depth), call["input_ids"]
    real = call["attention_mask"].bool()
    stock = zoo.logits(model, call)
    with patched(model, ids, edit, layers) as moves:
        want, (text, logits) = zoo.logits(model, call), steps(model, call)
        beam_text, beam_scores = beams_of(model, call)
    assert sum(moves[1:]) > 2, "no beam overtook another"
    assert distance(want[real], stock[real]) > 1e-3, "the oracle changes nothing"
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with mmattn.attach(model, method) as session:
            assert distance(zoo.logits(model, call)[real], want[real]) < 1e-5
            got, numbers = steps(model, call)
            assert torch.equal(got, text) and distance(numbers, logits) < 1e-5
            got, numbers = beams_of(model, call)
            assert torch.equal(got, beam_text) and distance(numbers, beam_scores) < 1e-5
            stats = session.stats
        assert stats.executed == stats.planned > 0
    model.set_attn_implementation("eager")
    assert torch.equal(zoo.logits(model, call), stock), "detaching did not restore the model"
    return stats


def check_rows(name, method):
    """Every row of a padded batch is what it is alone, from the prompt to the last token."""
    model, call = made(name)
    model.set_attn_implementation("sdpa")
    with mmattn.attach(model, method):
        _, numbers = steps(model, call)
        for row in range(2):
            _, single = steps(model, alone(call, row))
            assert distance(single[0], numbers[row]) < 1e-5


def check_identity(method):
    """With these settings both models are bitwise the untouched ones."""
    for name in ("llava", "qwen2-vl"):
        model, call = made(name)
        model.set_attn_implementation("sdpa")
        stock, (text, numbers) = zoo.logits(model, call), steps(model, call)
        with mmattn.attach(model, method) as session:
            assert torch.equal(zoo.logits(model, call), stock)
            got, values = steps(model, call)
            assert torch.equal(got, text) and torch.equal(values, numbers)
            assert session.stats.executed == session.stats.planned > 0


def notes(stats, name):
    """What the sites noted under `name`."""
    return [row.notes[name] for row in stats.sites if name in row.notes]


def case(seed=0, rows=2, heads=4, kv_heads=2, queries=9, dim=8, pads=(0, 2)):
    """Random ``q, k, v``, a bool mask of left-padded causal rows, and the visible keys."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, queries, dim, generator=generator) * 2
    k, v = torch.randn(2, rows, kv_heads, queries, dim, generator=generator)
    real = torch.arange(queries) >= torch.tensor(pads)[:, None]
    mask = torch.ones(queries, queries, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    return q, k, v, mask, real
