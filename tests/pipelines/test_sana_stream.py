"""SANA-Video in chunks: equal to a chunk-causal full forward, in memory that does not grow."""

from __future__ import annotations

import diffusers
import pytest
import torch
from mmattn_pipelines.sana_stream import SanaStream, SanaStreamPipeline, chunk_sizes
from torch import Tensor

from mmattn.errors import ConfigError, UnsupportedCall

HEADS, DIM, LAYERS, TEXT = 2, 12, 3, 5


def model(seed: int = 0) -> diffusers.SanaVideoTransformer3DModel:
    torch.manual_seed(seed)
    made = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        num_layers=LAYERS,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=DIM,
        cross_attention_dim=HEADS * DIM,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=40,
    ).eval()
    for p in made.parameters():  # stock initialisation keeps most branches near zero
        torch.nn.init.normal_(p, std=0.3)
    return made


def call(batch: int = 1, frames: int = 7, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, frames, 4, 6, generator=g)
    return x, torch.full((batch,), 500.0), torch.randn(batch, TEXT, 16, generator=g)


class MaskedAttention:
    """The formula with all pairs written out, and a mask that lets no chunk see a later one."""

    def __init__(self, chunk_of_frame: Tensor, window: int | None = None) -> None:
        self.chunk, self.window = chunk_of_frame, window

    def __call__(self, attn, hidden_states, rotary_emb=None, **_):
        tokens = hidden_states.shape[1]
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q).relu(), attn.norm_k(k).relu()
        q, k, v = (x.unflatten(2, (HEADS, DIM)).transpose(1, 2).double() for x in (q, k, v))

        def turned(x):
            cos, sin = (table[0, :, 0].double() for table in rotary_emb)
            other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
            return x * cos + other * sin

        owner = self.chunk.repeat_interleave(tokens // len(self.chunk))
        gap = owner[:, None] - owner[None, :]
        seen = (gap >= 0) if self.window is None else (gap >= 0) & (gap <= self.window)
        product = (turned(q) @ turned(k).transpose(-1, -2)).masked_fill(~seen, 0.0)
        mass = (q @ k.transpose(-1, -2)).masked_fill(~seen, 0.0).sum(-1, keepdim=True)
        out = (product @ v) / (mass + 1e-15)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](out)


def chunk_causal(transformer, x, t, text, sizes, window=None):
    """The full forward of a model whose attention and convolution are cut at chunk borders."""
    chunk_of_frame = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    stock = [block.attn1.processor for block in transformer.transformer_blocks]
    forwards = [block.ff.forward for block in transformer.transformer_blocks]

    def cut(forward):
        def run(h):
            out, start = [], 0
            for n in sizes:
                begin = max(start - 1, 0)
                part = h[:, begin : start + n].contiguous()
                out.append(forward(part)[:, start - begin :])
                start += n
            return torch.cat(out, dim=1)

        return run

    for block, forward in zip(transformer.transformer_blocks, forwards, strict=True):
        block.attn1.processor = MaskedAttention(chunk_of_frame, window)
        block.ff.forward = cut(forward)
    try:
        return transformer(x, encoder_hidden_states=text, timestep=t, return_dict=False)[0]
    finally:
        for block, processor in zip(transformer.transformer_blocks, stock, strict=True):
            block.attn1.processor = processor
            del block.ff.forward


def streamed(stream, x, t, text, sizes):
    return torch.cat([stream(c, t, text, remember=True) for c in x.split(sizes, dim=2)], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[3, 2, 2], [1, 1, 5], [7]])
def test_equals_a_chunk_causal_forward(sizes):
    transformer, (x, t, text) = model(), call(batch=2)
    expected = chunk_causal(transformer, x, t, text, sizes)
    stock = transformer(x, encoder_hidden_states=text, timestep=t, return_dict=False)[0]
    with SanaStream(transformer) as stream:
        got = streamed(stream, x, t, text, sizes)
        assert stream.frames == 7
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 2e-5 * scale
    if len(sizes) > 1:
        assert (expected - stock).abs().max() > 1e-2 * scale  # chunks do change the model
    else:
        assert (stock - expected).abs().max() < 2e-5 * scale


@torch.no_grad()
def test_a_window_forgets():
    transformer, (x, t, text) = model(), call()
    sizes = [2, 2, 3]
    expected = chunk_causal(transformer, x, t, text, sizes, window=1)
    everything = chunk_causal(transformer, x, t, text, sizes)
    with SanaStream(transformer, window=1) as stream:
        got = streamed(stream, x, t, text, sizes)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    assert torch.allclose(got[:, :, :4], everything[:, :, :4], atol=1e-4)
    assert (got - everything)[:, :, 4:].abs().max() > 1e-3


@torch.no_grad()
def test_memory_does_not_grow_and_later_chunks_change_nothing():
    transformer, (x, t, text) = model(), call(frames=8)
    with SanaStream(transformer) as stream:
        sizes = []
        for part in x.split(2, dim=2):
            stream(part, t, text, remember=True)
            sizes.append(stream.memory_bytes)
        state = LAYERS * 4 * (HEADS * (DIM * DIM + DIM + DIM) + 1)
        tail = LAYERS * 4 * (2 * 3 * HEADS * DIM)
        assert sizes == [state + tail] * 4
        stream.reset()
        assert stream.memory_bytes == 0 == stream.frames
        other = x.clone()
        other[:, :, 4:] += 1
        first = streamed(stream, x, t, text, [2, 2, 2, 2])
        stream.reset()
        second = streamed(stream, other, t, text, [2, 2, 2, 2])
    assert torch.equal(first[:, :, :4], second[:, :, :4])
    assert not torch.allclose(first[:, :, 4:6], second[:, :, 4:6])


@torch.no_grad()
def test_looking_without_remembering_leaves_the_memory():
    transformer, (x, t, text) = model(), call()
    with SanaStream(transformer) as stream:
        stream(x[:, :, :3], t, text, remember=True)
        a = stream(x[:, :, 3:], t, text)
        stream(x[:, :, :2], t * 0, text)
        b = stream(x[:, :, 3:], t, text)
    assert torch.equal(a, b) and stream.frames == 3


@torch.no_grad()
def test_stock_calls_stay_stock_and_detach_leaves_nothing():
    transformer, (x, t, text) = model(), call()
    run = {"encoder_hidden_states": text, "timestep": t, "return_dict": False}
    before = transformer(x, **run)[0]
    processors = [block.attn1.processor for block in transformer.transformer_blocks]
    stream = SanaStream(transformer)
    stream(x, t, text, remember=True)
    assert torch.equal(transformer(x, **run)[0], before)
    with pytest.raises(ConfigError, match="streams already"):
        SanaStream(transformer)
    stream.detach()
    stream.detach()
    assert torch.equal(transformer(x, **run)[0], before)
    assert [block.attn1.processor for block in transformer.transformer_blocks] == processors
    assert not transformer.rope._forward_hooks
    assert not any(
        b.ff._forward_hooks or b.ff._forward_pre_hooks for b in transformer.transformer_blocks
    )


@torch.no_grad()
def test_refusals():
    transformer, (x, t, text) = model(), call(frames=30)
    with SanaStream(transformer) as stream:
        stream(x, t, text, remember=True)
        with pytest.raises(UnsupportedCall, match="rotary table of 40"):
            stream(x, t, text)
        with pytest.raises(UnsupportedCall, match="batch of 2"):
            stream(*call(batch=2, frames=2))
        assert not stream.running
    with pytest.raises(ConfigError, match="window"):
        SanaStream(transformer, window=0)
    with pytest.raises(ConfigError, match="Linear"):
        SanaStream(torch.nn.Linear(2, 2))


def pipeline() -> diffusers.SanaVideoPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 1.0, 2.0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.SanaVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=model(), scheduler=scheduler
    )


def test_pipeline_draws_chunk_by_chunk():
    pipe = pipeline()
    text = torch.randn(1, TEXT, 16, generator=torch.Generator().manual_seed(3))
    seen = []
    size = {"latent_frames": 7, "height": 32, "width": 48, "chunk": 2, "prompt_embeds": text}

    def draw(**kwargs):
        g = torch.Generator().manual_seed(0)
        return SanaStreamPipeline(pipe, **kwargs.pop("own", {}))(generator=g, **{**size, **kwargs})

    out = draw(output_type="latent", callback_on_chunk_end=lambda i, z: seen.append((i, z)))
    assert out.chunks == [3, 2, 2] and out.frames.shape == (1, 4, 7, 4, 6) and out.memory_bytes > 0
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(torch.cat([z for _, z in seen], 2), out.frames)
    assert torch.equal(draw(output_type="latent").frames, out.frames)
    short = draw(output_type="latent", latent_frames=5)  # the same chunks, the video ends sooner
    assert torch.equal(short.frames, out.frames[:, :, :5])
    forgetful = draw(output_type="latent", own={"window": 1})
    assert torch.equal(forgetful.frames[:, :, :5], out.frames[:, :, :5])
    assert not torch.equal(forgetful.frames, out.frames)
    clip = draw(output_type="np").frames
    assert clip.shape == (1, 25, 32, 48, 3)


def test_pipeline_refuses_before_work():
    pipe = SanaStreamPipeline(pipeline())
    size = {"latent_frames": 4, "height": 32, "width": 48, "chunk": 2}
    with pytest.raises(ConfigError, match="prompt"):
        pipe(**size)
    with pytest.raises(ConfigError, match="3 prompts for 2 chunks"):
        pipe(["a", "b", "c"], **size)
    with pytest.raises(ConfigError, match="fall"):
        pipe("a", timesteps=(500, 800), **size)
    with pytest.raises(ConfigError, match="divide"):
        pipe("a", **{**size, "height": 40})
    with pytest.raises(ConfigError, match="do not hold one chunk"):
        chunk_sizes(3, 4)
    assert chunk_sizes(43, 10) == [13, 10, 10, 10]
