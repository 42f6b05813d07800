"""Train the embedded text-to-video model: a small Wan that draws the clips of `mmattn.mini.scenes`.

    python -m mmattn.mini.train_t2v --out weights/t2v

The causal autoencoder is learned in two steps: on single frames, where it is a picture autoencoder
and fifteen times cheaper, then on whole clips of 17 frames, because a chunk position that training
never shows decodes badly. After that, clips are encoded once, and the transformer and the text encoder
are trained together from the flow-matching loss, first on the clips' first frames and then on more.
Last, the decoder alone is trained on, which sharpens pictures and leaves the latents alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from mmattn.mini.oracle import judge_clips, rates
from mmattn.mini.recipe import (
    Checkpoint,
    Ema,
    Log,
    MuonAdamW,
    Plan,
    Progress,
    cosine,
    log_to_stderr,
    look_at_neighbours,
    psnr,
    save_half,
    silent,
    trainer_arguments,
    write_record,
)
from mmattn.mini.scenes import Clip, draw_clips, make_clips
from mmattn.mini.text import t5_tokenizer, tie_cases

SIZE = 48
"""Frame side in pixels."""

FRAMES = 17
"""Frames per clip: one, and four chunks of four."""

TEXT_LENGTH = 16
"""Text tokens per prompt; sampling uses the length that training used."""

CURRICULUM: tuple[tuple[float, int], ...] = ((0.35, 1), (0.6, 3), (2.0, 5))
"""How many latent frames the transformer trains on until which share of its time.

A clip's first latent frame is a picture by itself and costs a tenth of the clip, so colours and shapes
are learned there, and motion after that.
"""

HELD_OUT_SEED = 900_000
"""The first seed for judging; training never uses the seeds from here to 999_999."""


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder: 4 frames of 4 x 4 pixels to one cell of 8 channels, the first frame by
    itself.
    """
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    _start_per_frame(vae)
    return vae


@torch.no_grad()
def _start_per_frame(vae: AutoencoderKLWan) -> None:
    """Let an untrained autoencoder treat every frame by itself, so that what it learns on pictures
    holds for clips.

    Convolutions look at the present frame only, halving time averages two frames, and doubling it
    repeats one. Training on clips starts from there and learns what the past adds.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] != 3:
            continue
        if not name.endswith("time_conv"):
            module.weight *= math.sqrt(3)
            module.weight[:, :, :-1] = 0
            continue
        module.weight *= 0.1
        module.bias.zero_()
        channels = module.in_channels
        same = torch.eye(channels)
        if module.out_channels == channels:
            module.weight[:, :, 1:, 0, 0] += 0.5 * same[:, :, None]
        else:
            module.weight[:, :, -1, 0, 0] += torch.cat([same, same])
    vae.quant_conv.bias[vae.config.z_dim :] = -4.0


def _decode_picture(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode single frames as `vae.decode` does, but without its clamp, which has no gradient where
    it acts.
    """
    vae.clear_cache()
    drawn: Tensor = vae.decoder(
        vae.post_quant_conv(latents), feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True
    )
    vae.clear_cache()
    return drawn


def train_vae(
    vae: AutoencoderKLWan,
    progress: Progress,
    *,
    seed: int,
    frames: int,
    batch: int,
    lr: float,
    decoder_only: bool = False,
    log: Log = silent,
) -> float:
    """Train the autoencoder on clips of `frames` frames (1 trains on pictures); return its PSNR in dB.

    The first frame has no past to lean on and is one in seventeen, and an object covers a tenth of a
    frame: the error of either counts four times. With `decoder_only` the latents stay what they are,
    and so does a transformer that was trained on them: that is for sharpening a finished model.
    """
    torch.manual_seed(seed)
    trained = [vae.decoder, vae.post_quant_conv] if decoder_only else [vae]
    parameters = [parameter for part in trained for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    check = draw_clips(make_clips(16, HELD_OUT_SEED), SIZE, FRAMES) * 2 - 1
    weight = torch.ones(1, 1, frames, 1, 1)
    weight[:, :, 0] = min(4.0, frames)
    weight /= weight.mean()
    while not progress.done:
        clips = make_clips(batch, seed * 1_000_000 + progress.step)
        if frames == 1:
            clips = [_cut(clip, (progress.step % FRAMES) / (FRAMES - 1)) for clip in clips]
        pixels = draw_clips(clips, SIZE, frames) * 2 - 1
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(progress.fraction)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()
        drawn = _decode_picture(vae, latents) if frames == 1 else vae.decode(latents).sample
        error = drawn - pixels
        corner = pixels[..., :1, :1]  # no object reaches it
        near = 1 + 3 * ((pixels - corner).abs().amax(1, keepdim=True) > 0.05)
        loss = ((error.abs() + error.square()) * weight * near).mean()
        loss = loss + 1e-5 * posterior.kl().mean() / posterior.mean.shape[2]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.step += 1
        progress.samples += batch
        if progress.step % 50 == 0:
            progress.curve.append((progress.step, loss.item()))
        if progress.step % 100 == 0:
            quality = vae_psnr(vae, check if frames > 1 else check[:, :, :1])
            log(f"vae {frames} step {progress.step} loss {loss.item():.4f} dB {quality}")
    return vae_psnr(vae, check)["all"]


def _cut(clip: Clip, moment: float) -> Clip:
    """The clip from `moment` (0 is its start, 1 its end) on."""
    x, y = (a + (b - a) * moment for a, b in zip(clip.start, clip.end, strict=True))
    return replace(clip, start=(x, y))


@torch.no_grad()
def vae_psnr(vae: AutoencoderKLWan, clips: Tensor) -> dict[str, float]:
    """PSNR in dB of encoded and decoded clips `[B, 3, T, Y, X]` in [-1, 1]: of the first frame, and
    of all.
    """
    drawn = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return {
        "first": round(psnr(drawn[:, :, 0], clips[:, :, 0]), 2),
        "all": round(psnr(drawn, clips), 2),
    }


def build_pipeline(vae: AutoencoderKLWan | None = None, *, seed: int = 0) -> WanPipeline:
    """Build the untrained pipeline around `vae` (a new one if None), in fp32 on the CPU."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=96,
        freq_dim=128,
        ffn_dim=384,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=256,
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    look_at_neighbours(text_encoder)
    return WanPipeline(
        tokenizer=t5_tokenizer(TEXT_LENGTH),
        text_encoder=text_encoder,
        vae=build_vae() if vae is None else vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
    )


def _tokens(pipe: WanPipeline, captions: Sequence[str]) -> Tensor:
    """Token ids, padded as `WanPipeline` pads them."""
    ids: Tensor = pipe.tokenizer(
        list(captions),
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


@torch.no_grad()
def encode_clips(pipe: WanPipeline, n: int, seed: int, *, log: Log = silent) -> dict[str, Tensor]:
    """Encode `n` clips once, `[B, C, T, Y, X]`, with token ids; sets the autoencoder's latent mean
    and deviation.
    """
    clips = make_clips(n, seed)
    latents = []
    for start in range(0, n, 16):
        pixels = draw_clips(clips[start : start + 16], SIZE, FRAMES) * 2 - 1
        latents.append(pipe.vae.encode(pixels).latent_dist.mode())
        if start % 1600 == 0:
            log(f"encoded {start} of {n}")
    z = torch.cat(latents)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    z = (z - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    return {"latents": z.half(), "t5": _tokens(pipe, [clip.caption for clip in clips])}


def _hidden(name: str) -> bool:
    """Whether a parameter is a matrix inside a block of the transformer (not of a text encoder)."""
    return "blocks." in name and "norm" not in name


def train_flow(
    pipe: WanPipeline,
    data: dict[str, Tensor],
    progress: Progress,
    *,
    seed: int,
    batch: int = 32,
    muon_lr: float = 3e-3,
    adamw_lr: float = 1.5e-3,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    checkpoint: Checkpoint | None = None,
    log: Log = silent,
) -> None:
    """Train transformer and text encoder on encoded clips; leaves the averaged weights in `pipe`."""
    modules = [pipe.transformer, pipe.text_encoder]
    for module in modules:
        module.train().to(device)
    optimizer = MuonAdamW(modules, hidden=_hidden, muon_lr=muon_lr, adamw_lr=adamw_lr)
    ema = Ema(modules, 0.998)
    generator = torch.Generator().manual_seed(seed)
    empty_ids = _tokens(pipe, [""])
    size = len(data["latents"])
    order = torch.randperm(size, generator=generator)
    running = None
    while not progress.done:
        at = progress.step * batch % (size - batch + 1)
        if progress.step and at < batch:
            order = torch.randperm(size, generator=generator)
        rows = order[at : at + batch]
        length = next(length for until, length in CURRICULUM if progress.fraction < until)
        z = data["latents"][rows, :, :length].float()
        empty = torch.rand(batch, 1, generator=generator) < 0.1
        ids = torch.where(empty, empty_ids, data["t5"][rows]).to(device)
        noise = torch.randn(z.shape, generator=generator)
        moment = torch.sigmoid(torch.randn(batch, generator=generator) * 1.3 + 0.6)
        z, noise, t = z.to(device), noise.to(device), moment.to(device)
        with torch.autocast(
            torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None
        ):
            mask = (ids != 0).long()
            text = pipe.text_encoder(ids, mask).last_hidden_state * mask[..., None]
            blend = t.view(-1, 1, 1, 1, 1)
            velocity = pipe.transformer(
                hidden_states=(1 - blend) * z + blend * noise,
                timestep=t * 1000,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - z)).square().mean()
        optimizer.step(loss, cosine(progress.fraction))
        ema.update()
        progress.step += 1
        progress.samples += batch
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if progress.step % 50 == 0:
            progress.curve.append((progress.step, running))
            log(f"flow step {progress.step} loss {running:.4f} {progress.cpu_seconds:.0f} s")
        if checkpoint is not None and checkpoint.due():
            ema.swap()
            checkpoint.save(pipe)
            ema.swap()
    ema.swap()
    for module in modules:
        module.eval().cpu()
    tie_cases(pipe.tokenizer, pipe.text_encoder.shared)


@torch.no_grad()
def sample(
    pipe: WanPipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int = 20,
    guidance: float = 3.0,
    size: int = SIZE,
    frames: int = FRAMES,
    batch: int = 16,
) -> Tensor:
    """Draw one clip per prompt, `[B, 3, T, Y, X]` in [0, 1], guided away from the empty prompt."""
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for start in range(0, len(prompts), batch):
        drawn = pipe(
            list(prompts[start : start + batch]),
            negative_prompt="",
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
        ).frames
        clips.append(drawn.float().transpose(1, 2))
    return torch.cat(clips)


def evaluate(
    pipe: WanPipeline, n: int, seed: int = HELD_OUT_SEED, *, steps: int = 20, guidance: float = 3.0
) -> dict[str, Any]:
    """Draw `n` held-out prompts; returns the share of right answers per question of the oracle."""
    clips = make_clips(n, seed)
    drawn = sample(pipe, [clip.caption for clip in clips], seed, steps=steps, guidance=guidance)
    report: dict[str, Any] = {"n": n, "steps": steps, "guidance": guidance}
    return report | {key: round(rate, 4) for key, rate in rates(judge_clips(drawn, clips)).items()}


def train(
    out: Path,
    *,
    minutes: float | None = None,
    steps: tuple[int, int, int, int] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    smoke: bool = False,
    resume: Path | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Train the pipeline, save it with its record in `out`, and return the record.

    Args:
        out: Folder for the weights, in the layout of `save_pretrained`.
        minutes: Time for all stages together; 75 if neither this nor `steps` is given.
        steps: Steps of the four stages instead of minutes: the autoencoder on pictures and on clips, the
            transformer, and the decoder alone.
        device: Device of the transformer stage; the others are small enough for any CPU.
        seed: Names the initial weights, the clips and the noise.
        smoke: Take three steps per stage on a few clips, to see that the recipe runs.
        resume: Folder of a saved pipeline. Its autoencoder is kept as it is, and the transformer
            and the text encoder are trained on from its weights.
        log: Receives progress messages.
    """
    plan = Plan.make(
        minutes, (3, 3, 3, 3) if smoke else steps, shares=(0.08, 0.32, 0.5, 0.1), default=75.0
    )
    record: dict[str, Any] = {
        "model": "text-to-video",
        "seed": seed,
        "size": SIZE,
        "frames": FRAMES,
    }
    record["text_length"] = TEXT_LENGTH
    if resume is None:
        torch.manual_seed(seed)
        pipe = build_pipeline(seed=seed)
        for index, (frames, batch, lr) in enumerate(
            ((1, 8, 2e-3), (FRAMES, 1 if smoke else 4, 1e-3))
        ):
            progress = plan.stage(index)
            quality = train_vae(
                pipe.vae,
                progress,
                seed=2 * seed + index,
                frames=frames,
                batch=batch,
                lr=lr,
                log=log,
            )
            record[f"autoencoder_{frames}"] = progress.record() | {"psnr": quality}
    else:
        pipe = WanPipeline.from_pretrained(resume)
    pipe.vae.eval()
    data = encode_clips(pipe, 16 if smoke else 12_000, seed + 1, log=log)
    progress = plan.stage(2)
    train_flow(
        pipe,
        data,
        progress,
        seed=seed,
        batch=4 if smoke else 32,
        device=device,
        checkpoint=Checkpoint(out),
        log=log,
    )
    record["transformer"] = progress.record()
    progress = plan.stage(3)
    quality = train_vae(
        pipe.vae,
        progress,
        seed=2 * seed + 2,
        frames=FRAMES,
        batch=1 if smoke else 4,
        lr=1e-3,
        decoder_only=True,
        log=log,
    )
    record["decoder"] = progress.record() | {"psnr": quality}
    save_half(pipe, out)
    if not smoke:
        record["metrics"] = evaluate(WanPipeline.from_pretrained(out), 200)
    write_record(out, record)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Train from the command line, with progress on the error stream."""
    arguments = trainer_arguments(__doc__, argv)
    train(
        arguments.out,
        minutes=arguments.minutes,
        device=arguments.device,
        seed=arguments.seed,
        smoke=arguments.smoke,
        resume=arguments.resume,
        log=log_to_stderr,
    )


if __name__ == "__main__":
    main()
