"""Long video with SANA-Video in constant memory: chunks of frames that read what earlier ones left.

```python
from mmattn_pipelines.sana_stream import SanaStream, SanaStreamPipeline

out = SanaStreamPipeline(sana_video_pipeline)(["a boat at dawn", "the boat at noon"], latent_frames=40)
out.frames, out.memory_bytes
```
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from mmattn_kernels import LinearState, linear_apply, linear_state
from torch import Tensor, nn

from mmattn.errors import ConfigError, UnsupportedCall

TIMESTEPS = (1000, 960, 889, 727)
"""The four steps of the distilled model, in thousandths of pure noise."""


class _Memory:
    """What one block keeps of finished chunks: sums over their keys, and the last frame's input."""

    def __init__(self, window: int | None) -> None:
        self._states: deque[LinearState] = deque(maxlen=window)
        self._window = window
        self.tail: Tensor | None = None

    def past(self) -> LinearState | None:
        """The state of everything remembered; None before the first chunk."""
        if not self._states:
            return None
        first, *rest = self._states
        for state in rest:
            first = first + state
        return first

    def add(self, state: LinearState) -> None:
        past = self.past() if self._window is None else None
        if self._window is None:
            self._states.clear()
        self._states.append(state if past is None else past + state)

    def clear(self) -> None:
        self._states.clear()
        self.tail = None

    @property
    def bytes(self) -> int:
        held = [t for s in self._states for t in (s.products, s.sums, s.values, s.count)]
        held += [] if self.tail is None else [self.tail]
        return sum(t.numel() * t.element_size() for t in held)


class _Processor:
    """SANA-Video's linear attention over the running chunk and everything remembered."""

    def __init__(self, stream: SanaStream, memory: _Memory, stock: Any) -> None:
        self._stream, self._memory, self.stock = stream, memory, stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not self._stream.running:
            return self.stock(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        assert encoder_hidden_states is None and rotary_emb is not None
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        # diffusers repeats every angle for its pair of features.
        rope = (rotary_emb[0][0, :, 0, 0::2], rotary_emb[1][0, :, 0, 1::2])
        own = linear_state(k, v, feature_map="relu", rope=rope)
        past = self._memory.past()
        if past is not None and past.sums.shape[0] != own.sums.shape[0]:
            raise UnsupportedCall(
                f"this chunk has a batch of {own.sums.shape[0]} and the chunks before it had "
                f"{past.sums.shape[0]}; keep both branches of guidance in one batch, or call reset()"
            )
        state = own if past is None else past + own
        out = linear_apply(q, state, feature_map="relu", rope=rope)
        if self._stream.remembering:
            self._memory.add(own.detach())
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


class SanaStream:
    """Runs a SANA-Video transformer chunk by chunk, each chunk seeing all finished ones.

    SANA-Video's attention is linear: keys and values act through sums of a fixed size, so the past of a
    video of any length fits in one such sum per block (*SANA-Video: Efficient Video Generation with Block
    Linear Diffusion Transformer*, arXiv 2509.24695). Attention is bidirectional inside a chunk and causal
    across chunks; the temporal convolution of the feed-forward sees the last frame of the chunk before
    and nothing of the chunk after; rotary positions go on counting. Compared with a full forward whose
    attention and convolution are masked chunk by chunk. Deviation: the normaliser is summed in fp32 where
    diffusers sums it in the model's dtype. diffusers has the model and not the memory.

    The stock transformer is run with other processors and three kinds of hooks; calls that do not go
    through the stream stay stock bitwise while it is attached, and `detach` removes everything.

    Args:
        transformer: a `SanaVideoTransformer3DModel`.
        window: how many finished chunks are remembered; None keeps all, in one running sum. A window
            holds that many sums.

    Raises:
        ConfigError: for another model, a window below 1, or a model that streams already.
    """

    def __init__(
        self, transformer: SanaVideoTransformer3DModel, *, window: int | None = None
    ) -> None:
        if not isinstance(transformer, SanaVideoTransformer3DModel):
            raise ConfigError(
                f"SanaStream needs a SanaVideoTransformer3DModel, got {type(transformer).__name__}"
            )
        if window is not None and window < 1:
            raise ConfigError(f"window must be at least 1 chunk, or None for all, got {window}")
        blocks = list(transformer.transformer_blocks)
        if any(isinstance(block.attn1.processor, _Processor) for block in blocks):
            raise ConfigError("this transformer streams already; detach the other SanaStream first")
        self.transformer = transformer
        self.running = self.remembering = False
        self.frames = 0
        self._memories = [_Memory(window) for _ in blocks]
        self._shifted: tuple[int, nn.Module] | None = None
        self._hooks = [transformer.rope.register_forward_hook(self._positions)]
        for block, memory in zip(blocks, self._memories, strict=True):
            block.attn1.processor = _Processor(self, memory, block.attn1.processor)
            before, after = self._convolution(memory)
            self._hooks += [
                block.ff.register_forward_pre_hook(before),
                block.ff.register_forward_hook(after),
            ]

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        remember: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Predict the velocity of the next chunk.

        Args:
            latents: the chunk ``[B, C, F, H, W]``, any number of frames.
            timestep, encoder_hidden_states, kwargs: as the transformer takes them.
            remember: add this chunk to the memory; meant for its clean latents at timestep 0.

        Returns:
            The transformer's output ``[B, C, F, H, W]``.

        Raises:
            UnsupportedCall: the video would have more frames than the rotary table, the batch differs
                from the one remembered, or frames do not fill patches.
        """
        step = self.transformer.config.patch_size[0]
        count, limit = latents.shape[2] // step, self.transformer.rope.freqs_cos.shape[0]
        if latents.shape[2] % step or not count:
            raise UnsupportedCall(f"{latents.shape[2]} frames do not fill patches of {step}")
        if self.frames + count > limit:
            raise UnsupportedCall(
                f"frames {self.frames} to {self.frames + count} do not fit the rotary table of {limit}; "
                "call reset() and begin a new video"
            )
        self.running, self.remembering = True, remember
        try:
            out = self.transformer(
                latents,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                return_dict=False,
                **kwargs,
            )[0]
        finally:
            self.running = self.remembering = False
        self.frames += count if remember else 0
        return out  # type: ignore[no-any-return]

    @property
    def memory_bytes(self) -> int:
        """What is remembered, in bytes: it does not grow with the number of chunks."""
        return sum(memory.bytes for memory in self._memories)

    def reset(self) -> None:
        """Forget everything and begin a new video."""
        self.frames = 0
        for memory in self._memories:
            memory.clear()

    def detach(self) -> None:
        """Give the transformer its processors back and take the hooks off; a second call does nothing."""
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks = []
        for block in self.transformer.transformer_blocks:
            if isinstance(block.attn1.processor, _Processor):
                block.attn1.processor = block.attn1.processor.stock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _positions(self, rope: nn.Module, args: tuple[Tensor], output: Any) -> Any:
        if not self.running or not self.frames:
            return output
        if self._shifted is None or self._shifted[0] != self.frames:
            parts = [rope.t_dim, rope.h_dim, rope.w_dim]
            shifted = copy.copy(rope)
            shifted._buffers, shifted._forward_hooks = (
                dict(rope._buffers),
                type(rope._forward_hooks)(),
            )
            for name in ("freqs_cos", "freqs_sin"):
                time, *space = getattr(rope, name).split(parts, dim=1)
                shifted._buffers[name] = torch.cat([time.roll(-self.frames, 0), *space], dim=1)
            self._shifted = (self.frames, shifted)
        return self._shifted[1](*args)

    def _convolution(self, memory: _Memory) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Hooks that show a feed-forward the last frame of the chunk before, and hide its output.

        Everything before the temporal convolution works frame by frame, so one more frame of input is
        the same as the convolution's own memory.
        """
        prepended = False

        def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            nonlocal prepended
            (x,) = args  # [B, F, H, W, C]
            tail, prepended = memory.tail, False
            if not self.running:
                return None
            if self.remembering:
                memory.tail = x[:, -1:].detach().clone()
            if tail is None:
                return None
            prepended = True
            return (torch.cat([tail, x], dim=1),)

        def after(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            return output[:, 1:] if prepended else None

        return before, after


@dataclass
class SanaStreamOutput:
    """What `SanaStreamPipeline` returns.

    Args:
        frames: the clips, as `SanaVideoPipeline` has them for the same ``output_type``.
        chunks: latent frames of every chunk, in order.
        memory_bytes: what was remembered at the end.
    """

    frames: Any
    chunks: list[int]
    memory_bytes: int


class SanaStreamPipeline:
    """Text to long video with SANA-Video, chunk by chunk in constant memory, without guidance.

    The loop of LongSANA: a chunk starts from noise, is denoised in few steps with fresh noise between
    them, and is shown once more to the model when clean, which writes it into the memory. Made for
    weights distilled to few steps; others run and look as four steps look.

    Args:
        pipeline: a `SanaVideoPipeline`; its components are shared.
        window: finished chunks that are remembered; None for all.
    """

    def __init__(self, pipeline: SanaVideoPipeline, *, window: int | None = None) -> None:
        self.pipeline = pipeline
        self.window = window

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        latent_frames: int,
        height: int = 480,
        width: int = 832,
        chunk: int = 10,
        timesteps: Sequence[float] = TIMESTEPS,
        shift: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_chunk_end: Callable[[int, Tensor], None] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
    ) -> SanaStreamOutput:
        """Draw one clip.

        Args:
            prompt: a text, or one for every chunk; the last one holds for the chunks that follow.
            latent_frames: frames of the video in latents.
            height, width: pixels.
            chunk: latent frames drawn together; what does not divide is added to the first chunk.
            timesteps: where the model is asked, in thousandths of pure noise, falling.
            shift: turns a share ``s`` of noise into ``shift * s / (1 + (shift - 1) * s)``; 1 leaves it.
            generator: of the noise.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_chunk_end: called with the chunk's number and its clean latents
                ``[1, C, F, H, W]``, so that it can be shown or stored while the next one is drawn.
            prompt_embeds, prompt_attention_mask: instead of a prompt, ``[1, T, D]`` and ``[1, T]``.

        Raises:
            ConfigError: no prompt, more prompts than chunks, timesteps that do not fall, sizes that do
                not divide; before anything is encoded.
        """
        pipe = self.pipeline
        sizes = chunk_sizes(latent_frames, chunk)
        sigmas = _sigmas(timesteps, shift)
        texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if bool(texts) == (prompt_embeds is not None):
            raise ConfigError("give a prompt for each chunk (or one for all), or prompt_embeds")
        if len(texts) > len(sizes):
            raise ConfigError(f"{len(texts)} prompts for {len(sizes)} chunks of {sizes} frames")
        patch, scale = pipe.transformer.config.patch_size, pipe.vae_scale_factor_spatial
        if height % (scale * patch[1]) or width % (scale * patch[2]):
            raise ConfigError(
                f"{height} x {width} pixels do not divide into patches of "
                f"{scale * patch[1]} x {scale * patch[2]}"
            )
        device = pipe._execution_device
        texts_embedded = (
            [self._encode(text, device) for text in texts]
            if prompt_embeds is None
            else [(prompt_embeds, prompt_attention_mask)]
        )
        channels = pipe.transformer.config.in_channels
        done: list[Tensor] = []
        with SanaStream(pipe.transformer, window=self.window) as stream:
            for i, frames in enumerate(sizes):
                shape = (1, channels, frames, height // scale, width // scale)
                embeds, mask = texts_embedded[min(i, len(texts_embedded) - 1)]
                clean = _denoise(stream, shape, sigmas, generator, embeds, mask, device)
                done.append(clean)
                if callback_on_chunk_end is not None:
                    callback_on_chunk_end(i, clean)
            memory = stream.memory_bytes
        latents = torch.cat(done, dim=2)
        drawn = latents if output_type == "latent" else self._decode(latents, output_type)
        return SanaStreamOutput(drawn, sizes, memory)

    def _encode(self, text: str, device: torch.device) -> tuple[Tensor, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=device
        )
        return embeds, mask

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        vae = self.pipeline.vae
        mean = getattr(vae.config, "latents_mean", None)
        std = getattr(vae.config, "latents_std", None)
        latents = latents.to(vae.dtype)
        if mean is not None and std is not None:
            latents = latents * _per_channel(std, latents) + _per_channel(mean, latents)
        video = vae.decode(latents, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(video, output_type=output_type)


def chunk_sizes(frames: int, chunk: int) -> list[int]:
    """Frames of every chunk of a video; the first one takes what does not divide.

    Raises:
        ConfigError: when there are fewer frames than one chunk has, or no frame.
    """
    if chunk < 1 or frames < chunk:
        raise ConfigError(
            f"{frames} latent frames do not hold one chunk of {chunk}; lower chunk= or raise latent_frames="
        )
    count = frames // chunk
    return [chunk + frames % chunk, *[chunk] * (count - 1)]


def _sigmas(timesteps: Sequence[float], shift: float) -> list[float]:
    shares = [t / 1000 for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(shares))
    if not shares or not falling or not 0 < shares[-1] <= shares[0] <= 1:
        raise ConfigError(
            f"timesteps must fall from at most 1000 to above 0, got {list(timesteps)}"
        )
    if shift <= 0:
        raise ConfigError(f"shift must be above 0, got {shift}")
    return [shift * s / (1 + (shift - 1) * s) for s in shares]


def _denoise(
    stream: SanaStream,
    shape: tuple[int, ...],
    sigmas: Sequence[float],
    generator: torch.Generator | None,
    embeds: Tensor,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """One chunk from noise to clean latents, written into the memory at the end."""
    dtype = stream.transformer.dtype

    def predict(x: Tensor, sigma: float, **kwargs: Any) -> Tensor:
        t = torch.full((x.shape[0],), 1000 * sigma, device=device)
        return stream(x.to(dtype), t, embeds.to(dtype), encoder_attention_mask=mask, **kwargs)

    clean = torch.zeros(shape, device=device)
    for sigma in sigmas:
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        noisy = (1 - sigma) * clean + sigma * noise
        clean = noisy - sigma * predict(noisy, sigma).float()
    predict(clean, 0.0, remember=True)
    return clean


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
