"""PAINT: labels from the vision tower and raised scores, against a dense oracle in whole models."""

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import alone, check, check_identity, check_rows, made, notes, patched, steps
from host_contract import distance

import mmattn
from mmattn.methods.paint import PAINT, label, place

KNOBS = {"alpha": 0.6, "beta": 1.2, "share": 0.4}


def literal(local, summary, share):
    """The sets as defined, one token at a time: summary by the box plot's rule, local without summary."""
    ordered = sorted(float(x) for x in summary)

    def quartile(p):
        at = p * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    limit = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    deep = {j for j, x in enumerate(summary) if float(x) > limit}
    ranked = sorted(range(len(local)), key=lambda j: (-float(local[j]), j))
    shallow = set(ranked[: int(len(local) * share)]) - deep
    return [2 if j in deep else 1 if j in shallow else 0 for j in range(len(local))]


def raised(labels, alpha, beta):
    """`labels`: one list per row, of its image tokens in order."""

    def edit(call):
        scores = call.scores.clone()
        copies = scores.shape[0] // len(labels)
        for b in range(scores.shape[0]):
            where = call.image[b].nonzero().flatten().tolist()
            for j, kind in zip(where, labels[b // copies], strict=True):
                s = call.products[b, :, -1, j] * call.scale
                scores[b, :, -1, j] = s + (0.0, alpha, beta)[kind] * s.abs()
        return scores.softmax(-1)

    return edit


def llava_labels(model, call, share):
    """From the attention maps of the eager tower; the class token's row, heads summed."""
    with torch.no_grad():
        maps = model.model.vision_tower(call["pixel_values"], output_attentions=True).attentions
    rows = [m[:, :, 0, 1:].sum(1) for m in maps]
    return [literal(rows[0][i], rows[-1][i], share) for i in range(len(rows[0]))]


def qwen_labels(model, call, share):
    """There is no class token: attention received, merged by fours, from whole matrices."""
    log = []

    class Dense(mmattn.Method):
        name, observes = "dense", True

        def attend(self, q, k, v, *, mask, scale, site, dense):
            weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
            log.append((site.index, weights.mean((1, 2)).view(-1, 4).mean(1)))
            return dense(q, k, v)

    with mmattn.attach(model, Dense(), sites="*visual*"):
        zoo.logits(model, call)
    pairs = zip(*[[x for i, x in log if i == block] for block in (0, 3)], strict=True)
    return [literal(a, b, share) for a, b in pairs]


def spread(model):
    """Larger query weights in the tower, so that some patches stand out."""
    for name, weight in model.named_parameters():
        if ("vision" in name and "q_proj.weight" in name) or (
            "visual.blocks" in name and "qkv" in name
        ):
            weight.data *= 12
    return model


@pytest.fixture
def sharp(monkeypatch):
    """Both models with towers in which patches stand out."""
    import decoder_oracle

    stock = decoder_oracle.made

    def sharper(name):
        model, call = stock(name)
        return spread(model), call

    monkeypatch.setattr(decoder_oracle, "made", sharper)
    return sharper


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_equals_the_dense_formula(name, sharp):
    model, call = sharp(name)
    labels = (llava_labels if name == "llava" else qwen_labels)(model, call, KNOBS["share"])
    kinds = [kind for row in labels for kind in row]
    assert 1 in kinds and (2 in kinds or name == "qwen2-vl") and labels[0] != labels[1]
    stats = check(name, PAINT(**KNOBS), raised(labels, 0.6, 1.2))
    assert notes(stats, "local") == [sum(row.count(1) for row in labels) / 2]
    assert notes(stats, "summary") == [sum(row.count(2) for row in labels) / 2]
    assert max(notes(stats, "won")) > 0


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rows_do_not_depend_on_each_other(name, sharp):
    check_rows(name, PAINT(**KNOBS))


def test_at_zero_nothing_changes():
    check_identity(PAINT(alpha=0.0, beta=0.0))


def test_alike_on_every_token_it_is_pai():
    from mmattn.methods.pai import PAI

    model, call = made("llava")
    with mmattn.attach(model, PAI(alpha=0.6)):
        want = zoo.logits(model, call)
    with mmattn.attach(model, PAINT(alpha=0.6, beta=0.6, share=1.0)):
        assert torch.equal(zoo.logits(model, call), want)
    with mmattn.attach(model, PAINT(alpha=0.6, beta=0.6, share=0.2)):
        assert distance(zoo.logits(model, call), want) > 1e-3


def test_only_the_last_row_changes_and_only_informed_tokens():
    model, call = made("llava")
    real = call["attention_mask"].bool()[:, :-1]
    stock = zoo.logits(model, call)
    with mmattn.attach(model, PAINT(**KNOBS)):
        got = zoo.logits(model, call)
    assert torch.equal(got[:, :-1][real], stock[:, :-1][real])
    assert distance(got[:, -1], stock[:, -1]) > 1e-4


@pytest.mark.parametrize("case", range(12))
def test_labels_are_those_of_the_definition(case):
    generator = torch.Generator().manual_seed(case)
    local, summary = torch.rand(2, 111 if case % 2 else 64, generator=generator)
    summary[[5, 40]] += 3
    if case % 3 == 0:  # ties go to the earlier token
        local = (local * 6).floor()
    labels = label(local, summary, 0.25)
    assert labels.tolist() == literal(local, summary, 0.25)
    assert (labels == 2).sum() >= 2 and (labels == 1).sum() <= len(local) // 4
    assert not (label(local, torch.ones_like(local), 0.0) > 0).any()


def test_informed_tokens_beat_random_ones():
    """The labelled patches hold more of the class token's attention than as many random patches."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.softmax(torch.randn(8, 64, generator=generator), -1)
    for local, summary in zip(scores[:4], scores[4:], strict=True):
        kept = label(local, summary, 0.25) == 1
        count = int(kept.sum())
        random = torch.stack(
            [local[torch.randperm(64, generator=generator)[:count]].sum() for _ in range(50)]
        )
        assert local[kept].sum() > random.max()


def test_placing_follows_rows_and_beams():
    image = torch.zeros(2, 6, dtype=torch.bool)
    image[0, 1:4] = image[1, 3:5] = True
    labels = [torch.tensor([1, 0, 2]), torch.tensor([2, 1])]
    want = torch.tensor([[0, 1, 0, 2, 0, 0], [0, 0, 0, 2, 1, 0]])
    assert torch.equal(place(labels, image), want)
    assert torch.equal(place(labels, image.repeat_interleave(3, 0)), want.repeat_interleave(3, 0))
    for bad in ([], labels[:1], [*labels, labels[0]]):
        with pytest.raises(mmattn.UnsupportedCall, match="vision tower informed"):
            place(bad, image)


def test_several_images_and_none():
    model = zoo.llava("eager")
    call, stock = zoo.llava_call((2, 0, 1), (0, 1, 3)), None
    with mmattn.attach(model, PAINT(**KNOBS)) as session:
        got, (_, numbers) = zoo.logits(model, call), steps(model, call)
        assert session.stats.executed == session.stats.planned
    stock = zoo.logits(model, call)
    real = call["attention_mask"][1].bool()
    assert distance(got[1, real], stock[1, real]) < 1e-5
    labels = llava_labels(model, call, KNOBS["share"])
    rows = [labels[0] + labels[1], [], labels[2]]
    with patched(model, call["input_ids"], raised(rows, 0.6, 1.2), PAINT().chosen(4)):
        want = steps(model, call)[1]
    assert distance(numbers, want) < 1e-5


def test_the_embedded_model():
    from mmattn.mini import load

    model, _ = load("vlm")
    ids = torch.tensor([[1, *[4] * 64, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
    }
    method = PAINT()
    model.set_attn_implementation("eager")
    labels = llava_labels(model, call, 0.25)
    with patched(model, ids, raised(labels, 0.7, 0.3), method.chosen(8)):
        text, want = steps(model, call)
    model.set_attn_implementation("sdpa")
    with mmattn.attach(model, method):
        got, numbers = steps(model, call)
    assert torch.equal(got, text) and distance(numbers, want) < 1e-5


def test_what_it_refuses():
    bad = [
        {"alpha": -1.0},
        {"beta": -0.1},
        {"share": 1.5},
        {"local_layer": -1},
        {"local_layer": 1.0},
    ]
    for settings in bad:
        with pytest.raises(mmattn.ConfigError):
            PAINT.from_dict(settings)
    method = PAINT(**KNOBS, layers=(1, -1))
    assert PAINT.from_dict(method.to_dict()) == method
    assert PAINT().chosen(32) == set(range(2, 32))
    qwen, llava, call = zoo.qwen25(), zoo.llava(), zoo.llava_call()
    with (
        mmattn.attach(qwen, PAINT()),
        pytest.raises(mmattn.UnsupportedCall, match="inside windows"),
    ):
        zoo.logits(qwen, zoo.qwen_call())
    with mmattn.attach(qwen, PAINT(local_layer=1)) as session:
        zoo.tokens(qwen, zoo.qwen_call())
        assert session.stats.executed == session.stats.planned
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.llama(), PAINT())
    with (
        mmattn.attach(llava, PAINT(), sites=["*vision*layers.3*", "*language*"]),
        pytest.raises(mmattn.UnsupportedCall, match="local block"),
    ):
        zoo.logits(llava, call)
    tiles = zoo.llava_next()
    with mmattn.attach(tiles, PAINT()), pytest.raises(mmattn.UnsupportedCall, match="one tile"):
        zoo.logits(tiles, zoo.llava_next_call(tiles))
    with mmattn.attach(llava, PAINT()):
        zoo.logits(llava, call)
        one = alone(call, 0)
        with torch.no_grad():
            features = llava.get_image_features(call["pixel_values"][:1], return_dict=True)
            del one["pixel_values"]
            zoo.logits(llava, {**one, "mm_encoder_outputs": {"image": features}})
            features.pooler_output = [x + 1 for x in features.pooler_output]
            with pytest.raises(mmattn.UnsupportedCall):
                zoo.logits(llava, {**one, "mm_encoder_outputs": {"image": features}})
