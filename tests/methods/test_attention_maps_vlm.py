"""AttentionMaps in a LLaVA: maps over the prompt and the answer, against stock attention weights."""

import pytest
import torch

import mmattn
from mmattn.methods.attention_maps import AttentionMaps


def llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llava_maps_the_answers_attention_onto_the_picture(implementation):
    model = llava()
    model.set_attn_implementation(implementation)
    prompt = torch.tensor([[1, *[63] * 16, 5, 6, 7], [1, 4, 5, *[63] * 16, 7]])
    x = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    before = model.generate(**x)
    method = AttentionMaps()
    sites = ["*language_model.*self_attn"]
    with mmattn.attach(model, method, sites=sites) as session:
        out = model.generate(**x)
        maps = method.maps(session)
        stats = session.stats
    assert torch.equal(out, before)
    assert stats.planned == 2 and len(maps) == 4
    assert {m.grid for m in maps} == {(1, 4, 4)} and {m.token for m in maps} == {-1}
    assert all(0 < float(m.values.sum()) < 1 for m in maps)
    if implementation == "sdpa":
        return
    # By hand, with the stock attention weights of the whole sequence.
    whole = model(
        input_ids=before[:, :-1],
        attention_mask=torch.ones_like(before[:, :-1]),
        pixel_values=x["pixel_values"],
        output_attentions=True,
    )
    for one in maps:
        layer = int(one.path.split("layers.")[1].split(".")[0])
        rows = whole.attentions[layer][one.row].mean(0)[prompt.shape[1] - 1 :]
        expected = rows[:, : prompt.shape[1]][:, prompt[one.row] == 63].mean(0)
        torch.testing.assert_close(one.values.flatten(), expected, atol=1e-5, rtol=1e-4)
