"""FLOPs against published tables and against torch's own counter."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from mmattn.evals.flops import (
    attention_flops,
    cosine_ratios,
    gate_flops,
    linear_flops,
    llava_prefill_flops,
    neighborhood_flops,
    wan_forward_flops,
)
from mmattn.methods.pyramiddrop import PyramidDrop
from mmattn.methods.vmoba import VMoBA

TERA = 1e12

# VMoBA, arXiv 2506.23858: grid, chunks of the three patterns, density, FLOPs in the paper.
DENSE = [
    ((24, 36, 64), 705.02),
    ((36, 30, 52), 724.97),
    ((21, 45, 80), 1246.79),
    ((20, 24, 28), 67.73),
]
SPARSE = [
    ((24, 36, 64), (8, 48, 72), 0.19, 248.68),
    ((36, 30, 52), (12, 24, 36), 0.18, 248.39),
    ((21, 45, 80), (7, 40, 36), 0.31, 519.75),
    ((20, 24, 28), (10, 48, 60), 0.18, 40.48),
]


@pytest.mark.parametrize(("grid", "published"), DENSE)
def test_published_dense_rows_to_the_last_digit(grid, published):
    assert round(wan_forward_flops(grid) / TERA, 2) == published


@pytest.mark.parametrize(("grid", "chunks", "density", "published"), SPARSE)
def test_published_sparse_rows_within_a_tenth_of_a_percent(grid, chunks, density, published):
    got = wan_forward_flops(grid, density=density, chunks=sum(chunks) / 3) / TERA
    assert got == pytest.approx(published, rel=1e-3)
    # What remains is the rounding of the density: half a unit of its last digit is far more.
    slope = wan_forward_flops(grid, density=density + 0.005) - wan_forward_flops(
        grid, density=density
    )
    assert abs(got - published) < slope / TERA


def test_the_rows_of_the_paper_that_are_off():
    grid = (21, 30, 52)
    assert round(wan_forward_flops(grid) / TERA, 2) == 281.64  # printed as 282.64
    assert round(wan_forward_flops(grid, density=0.5) / TERA, 2) == 182.73
    gated = wan_forward_flops(grid, density=0.5, chunks=(7 + 24 + 72) / 3) / TERA
    assert round(gated, 2) == 182.84
    assert round(wan_forward_flops((20, 18, 32)) / TERA, 2) == 53.99  # 77 x 288 x 512, not 67.73


def test_chunk_counts_of_the_table_are_those_of_the_presets():
    from mmattn.methods import _vmoba_select as select

    for method, (grid, chunks, _, _) in zip(
        (VMoBA.train_576p(), VMoBA.train_480p(), VMoBA.wan_720p()), SPARSE, strict=False
    ):
        counts = tuple(select.count_chunks(grid, method.chunk(p, grid)) for p in range(3))
        assert counts == chunks


def wan(layers: int = 3) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=160,
            num_layers=layers,
            rope_max_seq_len=32,
        )


def test_agrees_with_torchs_counter_on_a_wan_model():
    model, grid, text, dim = wan(), (5, 6, 8), 7, 96
    x = {
        "hidden_states": torch.zeros(1, 4, 5, 12, 16, device="meta"),
        "timestep": torch.zeros(1, device="meta"),
        "encoder_hidden_states": torch.zeros(1, text, 32, device="meta"),
    }
    with FlopCounterMode(display=False) as counter:
        model(**x)
    counts = counter.get_flop_counts()
    blocks = sum(
        sum(counts[f"WanTransformer3DModel.blocks.{i}"].values()) for i in range(len(model.blocks))
    )
    mine = wan_forward_flops(grid, layers=3, dim=dim, ffn=160, text=text)
    assert mine == blocks

    # The rest of the model is what the docstring says is left out, and nothing else.
    s = prod(grid)
    patches = linear_flops(s, 4 * 4, dim) + linear_flops(s, dim, 4 * 4)
    words = linear_flops(text, 32, dim) + linear_flops(text, dim, dim)
    time = linear_flops(1, 16, dim) + linear_flops(1, dim, dim) + linear_flops(1, dim, 6 * dim)
    assert counter.get_total_flops() == mine + patches + words + time


def test_attention_agrees_with_torchs_counter():
    q = torch.zeros(2, 3, 40, 16, device="meta")
    k = torch.zeros(2, 3, 56, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == attention_flops(2, 3, 40, 56, 16)
    assert attention_flops(2, 3, 40, 56, 16, 0.25) == counter.get_total_flops() / 4


def test_windows_cost_their_share_of_dense_attention():
    grid, window = (16, 44, 80), (16, 32, 48)  # Cosmos 720p in arXiv 2504.16922: 56.4 % sparse
    s = prod(grid)
    sparse = neighborhood_flops(1, 32, s, 128, window)
    assert 1 - sparse / attention_flops(1, 32, s, s, 128) == pytest.approx(0.564, abs=5e-4)
    assert neighborhood_flops(1, 32, s, 128, grid) == attention_flops(1, 32, s, s, 128)


def test_gate_is_the_product_of_queries_and_chunk_means():
    with FlopCounterMode(display=False) as counter:
        torch.zeros(2, 3, 40, 16, device="meta") @ torch.zeros(2, 3, 16, 6, device="meta")
    assert counter.get_total_flops() == gate_flops(2, 3, 40, 16, 6)


# HiPrune, arXiv 2508.00553: image tokens of LLaVA-1.5-7B, FLOPs in the paper.
LLAVA = [(576, 8.63), (192, 3.56), (128, 2.71), (64, 1.87)]


@pytest.mark.parametrize(("tokens", "published"), LLAVA)
def test_published_rows_of_llava(tokens, published):
    assert round(llava_prefill_flops(tokens) / TERA, 2) == published


def test_no_other_number_of_text_tokens_gives_the_table():
    fits = [
        text
        for text in range(1, 200)
        if all(round(llava_prefill_flops(v, text=text) / TERA, 2) == want for v, want in LLAVA)
    ]
    assert fits == [49]


def test_llava_agrees_with_torchs_counter():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.zeros(1, 23, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    operations = counter.get_flop_counts()["Global"]
    # Attention and the rotary table are batched products, linear layers are plain ones.
    linear = sum(n for op, n in operations.items() if "bmm" not in str(op))
    mine = llava_prefill_flops(20, text=3, layers=3, dim=32, ffn=56, vocab=70, tower=False)
    assert mine == linear > 0


def test_layers_that_differ():
    paper = PyramidDrop()
    stages = [576 * paper.share(i, 32) for i in range(32)]
    assert round(sum(stages) / 32) == 270
    mean = llava_prefill_flops(270, vocab=0)
    assert llava_prefill_flops(stages, vocab=0) == pytest.approx(mean, rel=1e-9)
    assert llava_prefill_flops([576] * 32) == llava_prefill_flops(576)
    assert llava_prefill_flops(stages) < llava_prefill_flops(576) * 0.55
    with pytest.raises(ValueError, match="2 numbers of image tokens for 32 layers"):
        llava_prefill_flops([576, 288])


def test_published_average_of_pmod():
    ratios = cosine_ratios()
    assert round(sum(ratios) / 32, 4) == 0.5375
    assert ratios[:8] == [1.0] * 8 and ratios[8] < 0.85 and min(ratios) == ratios[-1] == 0.15
    assert all(a >= b for a, b in itertools.pairwise(ratios))
