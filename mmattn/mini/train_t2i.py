"""Train the embedded text-to-image model: a small Flux that draws `mmattn.mini.scenes`.

    python -m mmattn.mini.train_t2i --out weights/t2i

Stage 1 trains the autoencoder on drawn scenes. Stage 2 encodes scenes once, then trains the
transformer and both text encoders together from the flow-matching loss, so no pretrained text model
is needed. One thread of one CPU is enough: about ten minutes for the first stage and an hour for
the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mmattn.mini.oracle import judge_scenes, rates
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
from mmattn.mini.scenes import Kind, Scene, draw_scenes, make_scenes
from mmattn.mini.text import clip_tokenizer, t5_tokenizer, tie_cases

SIZE = 64
"""Picture side in pixels."""

TEXT_LENGTH = 16
"""Text tokens per prompt. Flux attends to padding, so sampling must use the length of training."""

HELD_OUT_SEED = 900_000
"""The first seed for judging; training never uses the seeds from here to 999_999."""


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: 4 x 4 pixels to one cell of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(
    vae: AutoencoderKL, progress: Progress, *, seed: int, batch: int = 8, log: Log = silent
) -> float:
    """Train the autoencoder on noise-free scenes and set its latent scale and shift; returns dB of PSNR."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    check = draw_scenes(make_scenes(64, HELD_OUT_SEED)) * 2 - 1
    while not progress.done:
        pictures = draw_scenes(make_scenes(batch, seed * 1_000_000 + progress.step)) * 2 - 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(progress.fraction)
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        error = drawn - pictures
        loss = error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.step += 1
        progress.samples += batch
        if progress.step % 50 == 0:
            progress.curve.append((progress.step, loss.item()))
        if progress.step % 250 == 0:
            log(f"vae step {progress.step} loss {loss.item():.4f} {_vae_psnr(vae, check):.2f} dB")
    with torch.no_grad():
        latents = vae.encode(draw_scenes(make_scenes(512, seed + 1)) * 2 - 1).latent_dist.mode()
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    return _vae_psnr(vae, check)


@torch.no_grad()
def _vae_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    return psnr(vae.decode(vae.encode(pictures).latent_dist.mode()).sample, pictures)


def build_pipeline(vae: AutoencoderKL | None = None, *, seed: int = 0) -> FluxPipeline:
    """Build the untrained pipeline around `vae` (a new one if None), in fp32 on the CPU."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        # As in DiT: every block starts as the identity, and the first prediction is zero.
        if isinstance(module, torch.nn.Linear) and (
            ("norm" in name and name.endswith("linear")) or name == "proj_out"
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    t5 = T5EncoderModel(
        T5Config(
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
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=24,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    look_at_neighbours(t5)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=build_vae() if vae is None else vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer(24),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(TEXT_LENGTH),
        transformer=transformer,
    )


def _tokens(pipe: FluxPipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of both encoders, padded as `FluxPipeline` pads them."""
    t5 = pipe.tokenizer_2(
        list(captions),
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    clip = pipe.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return t5, clip


@torch.no_grad()
def encode_scenes(pipe: FluxPipeline, n: int, seed: int, *, log: Log = silent) -> dict[str, Tensor]:
    """Encode `n` scenes once: packed latents `[B, 64, 32]` and token ids of both encoders."""
    vae = pipe.vae
    scenes = make_scenes(n, seed)
    latents = []
    for start in range(0, n, 64):
        pictures = draw_scenes(scenes[start : start + 64]) * 2 - 1
        z = vae.encode(pictures).latent_dist.mode()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(pipe._pack_latents(z, *z.shape).half())
        if start % 6400 == 0:
            log(f"encoded {start} of {n}")
    t5, clip = _tokens(pipe, [scene.caption for scene in scenes])
    return {"latents": torch.cat(latents), "t5": t5, "clip": clip, "near": _near(scenes)}


def _near(scenes: Sequence[Scene]) -> Tensor:
    """Which image tokens of a scene touch an object: 1 or 0, `[B, 64]`."""
    middle = (torch.arange(SIZE // 8) + 0.5) * 8
    near = torch.zeros(len(scenes), SIZE // 8, SIZE // 8)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            reach = thing.radius + 5.0
            inside = ((middle - thing.cy).abs() < reach)[:, None] & (
                (middle - thing.cx).abs() < reach
            )
            near[row][inside] = 1.0
    return near.flatten(1)


def _hidden(name: str) -> bool:
    """Whether a parameter is a matrix inside a block of the transformer (not of a text encoder)."""
    return "transformer_blocks." in name and "norm" not in name


def train_flow(
    pipe: FluxPipeline,
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
    """Train transformer and text encoders on encoded scenes; leaves the averaged weights in `pipe`."""
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    for module in modules:
        module.train().to(device)
    optimizer = MuonAdamW(modules, hidden=_hidden, muon_lr=muon_lr, adamw_lr=adamw_lr)
    ema = Ema(modules, 0.998)
    generator = torch.Generator().manual_seed(seed)
    no_t5, no_clip = _tokens(pipe, [""])
    side = SIZE // 8
    img_ids = pipe._prepare_latent_image_ids(1, side, side, device, torch.float32)
    txt_ids = torch.zeros(TEXT_LENGTH, 3, device=device)
    size = len(data["latents"])
    order = torch.randperm(size, generator=generator)
    running = None
    while not progress.done:
        at = progress.step * batch % (size - batch + 1)
        if progress.step and at < batch:
            order = torch.randperm(size, generator=generator)
        rows = order[at : at + batch]
        z = data["latents"][rows].float()
        empty = torch.rand(batch, 1, generator=generator) < 0.1
        t5_ids = torch.where(empty, no_t5, data["t5"][rows]).to(device)
        clip_ids = torch.where(empty, no_clip, data["clip"][rows]).to(device)
        noise = torch.randn(z.shape, generator=generator)
        moment = torch.sigmoid(torch.randn(batch, generator=generator) * 1.3 + 0.6)
        z, noise, t = z.to(device), noise.to(device), moment.to(device)
        with torch.autocast(
            torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None
        ):
            text = pipe.text_encoder_2(t5_ids, output_hidden_states=False)[0]
            pooled = pipe.text_encoder(clip_ids).pooler_output
            blend = t.view(-1, 1, 1)
            velocity = pipe.transformer(
                hidden_states=(1 - blend) * z + blend * noise,
                timestep=t,
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=txt_ids,
                img_ids=img_ids,
                return_dict=False,
            )[0]
        # Objects cover few tokens; early training weighs them more, late training is unweighted.
        weight = 1 + 2 * (1 - progress.fraction) * data["near"][rows].to(device)
        error = (velocity.float() - (noise - z)).square().mean(2)
        loss = (weight * error).mean() / weight.mean()
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
    tie_cases(pipe.tokenizer_2, pipe.text_encoder_2.shared)


@torch.no_grad()
def sample(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 32,
) -> Tensor:
    """Draw one picture per prompt, `[B, 3, Y, X]` in [0, 1], guided away from the empty prompt."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generator = torch.Generator().manual_seed(seed + start)
        drawn = pipe(
            part,
            negative_prompt=[""] * len(part),
            true_cfg_scale=guidance,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=generator,
            output_type="pt",
        ).images
        pictures.append(drawn.float())
    return torch.cat(pictures)


def evaluate(
    pipe: FluxPipeline, n: int, seed: int = HELD_OUT_SEED, *, steps: int = 20, guidance: float = 3.0
) -> dict[str, Any]:
    """Draw `n` held-out prompts of every scene kind and judge them with `mmattn.mini.oracle`.

    Returns:
        For every kind of scene, the share of right answers per question, and `n`.
    """
    report: dict[str, Any] = {"n": n, "steps": steps, "guidance": guidance}
    kinds: tuple[Kind, ...] = ("one", "relation", "count")
    for offset, kind in enumerate(kinds):
        scenes = make_scenes(n, seed + offset, mix=[(kind, 1.0)])
        pictures = sample(
            pipe, [scene.caption for scene in scenes], seed, steps=steps, guidance=guidance
        )
        report[kind] = {
            key: round(rate, 4) for key, rate in rates(judge_scenes(pictures, scenes)).items()
        }
    return report


def train(
    out: Path,
    *,
    minutes: float | None = None,
    steps: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    smoke: bool = False,
    resume: Path | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Train the pipeline, save it with its record in `out`, and return the record.

    Args:
        out: Folder for the weights, in the layout of `save_pretrained`.
        minutes: Time for both stages together; 50 if neither this nor `steps` is given.
        steps: Steps of the autoencoder and of the transformer, instead of minutes.
        device: Device of the second stage; the first is small enough for any CPU.
        seed: Names the initial weights, the scenes and the noise.
        smoke: Take three steps per stage on a few scenes, to see that the recipe runs.
        resume: Folder of a saved pipeline. Its autoencoder is kept as it is, and the transformer
            and the text encoders are trained on from its weights.
        log: Receives progress messages.
    """
    plan = Plan.make(minutes, (3, 3) if smoke else steps, shares=(0.18, 0.82), default=50.0)
    record: dict[str, Any] = {
        "model": "text-to-image",
        "seed": seed,
        "size": SIZE,
        "text_length": TEXT_LENGTH,
    }
    if resume is None:
        torch.manual_seed(seed)
        pipe = build_pipeline(seed=seed)
        progress = plan.stage(0)
        quality = train_vae(pipe.vae, progress, seed=seed, log=log)
        record["autoencoder"] = progress.record() | {"psnr": round(quality, 2)}
    else:
        pipe = FluxPipeline.from_pretrained(resume)
    pipe.vae.eval()
    data = encode_scenes(pipe, 64 if smoke else 40_000, seed + 1, log=log)
    progress = plan.stage(1)
    train_flow(
        pipe,
        data,
        progress,
        seed=seed,
        batch=8 if smoke else 32,
        device=device,
        checkpoint=Checkpoint(out),
        log=log,
    )
    record["transformer"] = progress.record()
    save_half(pipe, out)
    if not smoke:
        record["metrics"] = evaluate(FluxPipeline.from_pretrained(out), 200)
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
