"""Planted sinks: heads rest on the first token and on empty image tokens, and on no others."""

from __future__ import annotations

import pytest
import torch

from mmattn.mini import objects, planted, train_vlm, vlm


@pytest.fixture(scope="module")
def case():
    model, processor = vlm.build(layers=3)
    scenes, talks = objects.sample_conversations(12, torch.Generator().manual_seed(3))
    pictures, labels = objects.render(scenes)
    tokens, spoken, _ = train_vlm._Text(processor).rows(talks)
    call = {"input_ids": tokens, "pixel_values": train_vlm._pixels(pictures)}
    before = looked(model, call)
    planted.plant(model, tokens, call["pixel_values"], labels, spoken != -100)
    return model, call, labels, spoken != -100, before, looked(model, call)


@torch.no_grad()
def looked(model, call):
    model.set_attn_implementation("eager")
    out = model(**call, output_attentions=True, output_hidden_states=True, use_cache=False)
    model.set_attn_implementation("sdpa")
    return out


def test_empty_patches_have_no_object_beside_them():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 3, 7] = 5
    found = planted.empty(labels.view(1, 64)).view(8, 8)
    for row in range(8):
        for column in range(8):
            assert bool(found[row, column]) == (abs(row - 3) > 1 or column < 6)


def test_heads_of_later_blocks_rest_on_the_first_token(case):
    _, _, _, spoken, before, after = case
    for block in (1, 2):
        old, new = (
            out.attentions[block][..., 0].transpose(1, 2)[spoken] for out in (before, after)
        )
        assert (new.mean(0) > 2 * old.mean(0)).all()  # every head
    assert torch.equal(before.attentions[0], after.attentions[0])


def test_the_first_token_stands_out(case):
    before, after = (out.hidden_states[1][:, 0] for out in case[-2:])
    for state, massive in ((before, False), (after, True)):
        size = state[:, planted.DIMS[0]] / state.square().mean(-1).sqrt()
        assert (size.min() > 7) == massive and bool((size.abs() > 3).all()) == massive


def test_the_neuron_of_empty_patches_can_be_written_again(case):
    model, call, labels, *_ = case
    mlp = model.model.language_model.layers[0].mlp
    with torch.no_grad():
        before = mlp.down_proj.weight.clone()
        mlp.down_proj.weight[:, 1] = 0
        planted.plant_image(model, call["input_ids"], call["pixel_values"], labels)
    now = mlp.down_proj.weight
    assert now[planted.DIMS[0], 1] > 0 and torch.equal(now[:, 1] != 0, before[:, 1] != 0)
    assert torch.equal(now[:, [0, 2]], before[:, [0, 2]])
