"""The probe of sinks and drift, on models whose attention is known, and on the embedded one."""

from __future__ import annotations

import pytest
import torch

import mmattn.mini
from mmattn.evals import sinks
from mmattn.evals._protocol import world
from mmattn.mini import vlm
from mmattn.mini.objects import CAPTION_PROMPT


@pytest.fixture
def level():
    """An untrained model whose decoder spreads attention evenly over what it sees."""
    model, processor = vlm.build(layers=2)
    for block in model.model.language_model.layers:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    model.generation_config.eos_token_id = None  # every answer is as long as it may be
    return model, processor


def looked_at(model, processor, words=12):
    images = vlm.to_images(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return sinks.probe(model, processor, images, CAPTION_PROMPT, max_new_tokens=words)


def test_even_attention_has_the_shares_of_counting(level):
    model, processor = level
    found = looked_at(model, processor)
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}],
            }
        ],
        add_generation_prompt=True,
    )
    prompt = len(processor.tokenizer(text)["input_ids"]) - 1 + vlm.IMAGE_TOKENS
    seen = [prompt + i for i in range(12)]
    for layer in range(2):
        assert found.first[layer] == pytest.approx([sum(1 / n for n in seen) / 12] * 4)
        assert found.image[layer] == pytest.approx([sum(64 / n for n in seen) / 12] * 4)
        early, late = sum(64 / n for n in seen[:8]) / 8, sum(64 / n for n in seen[8:]) / 4
        assert found.drift[layer] == pytest.approx([early, late])
    assert found.fall() == pytest.approx(late / early)
    assert found.words == 12
    assert found.sink_heads() == 0


def test_a_planted_sink_is_found(level):
    model, processor = level
    plain = looked_at(model, processor)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
    )
    start = processor.tokenizer(text)["input_ids"][0]
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words[start, 5] = 100.0
        for block in model.model.language_model.layers:
            # Queries are all alike in one direction, and dimension 5 makes the keys that match.
            attention = block.self_attn
            attention.q_proj.weight.zero_()
            attention.k_proj.weight.zero_()
            attention.k_proj.weight[15::32, 5] = 4.0
            words[:, 7] = 1.0
            attention.q_proj.weight[15::32, 7] = 4.0
    found = looked_at(model, processor)
    assert plain.sink_heads() == 0
    assert min(found.first[0]) > 2 * max(plain.first[0])
    assert found.massive[0] > 100 > plain.massive[0]
    assert found.standing_out[0] > 11 > 5 > plain.standing_out[0]
    assert found.image_standing_out[0] < 0.03  # chance alone makes 0.8 %


def test_the_model_is_left_as_it_was(level):
    model, processor = level
    model.train()
    before = model.config.get_text_config()._attn_implementation
    looked_at(model, processor, words=2)
    assert model.training
    assert model.config.get_text_config()._attn_implementation == before


def test_the_embedded_model_has_sinks_and_drifts():
    model, processor = mmattn.mini.load("vlm")
    found = sinks.probe(model, processor, world(6, 3).images, CAPTION_PROMPT, max_new_tokens=60)
    assert found.standing_out[0] < 4 and min(found.standing_out[1:]) > 9
    assert min(found.image_standing_out[1:]) > 0.1
    assert min(found.massive) > 30
    assert found.sink_heads() > 0.15
    assert found.fall() < 0.85


def test_a_model_without_sinks_has_none(level):
    found = looked_at(*level, words=2)
    assert max(found.standing_out) < 5 and max(found.image_standing_out) < 0.1
