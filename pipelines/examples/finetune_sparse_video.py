"""Fine-tune the embedded video model with sparse attention in place, and say what that repairs.

    python pipelines/examples/finetune_sparse_video.py --steps 500 --lr 5e-4 --clips 1000 --judge 64

A sparse method that was not there in training costs quality; the same method left attached while the
transformer is trained on gets most of it back, because gradients flow through the attention to what the
routing keeps. Clips are drawn and encoded by the recipe the model was trained with. The JSON on stdout has
the flow-matching loss on held-out clips and, with ``--judge``, the share of drawn clips that show what the
prompt says: dense and sparse, before and after.

That command with its one seed, VMoBA at density 0.19 in every step, six CPU minutes of training:

|                            | dense before | sparse before | sparse after | dense after |
|----------------------------|--------------|---------------|--------------|-------------|
| loss on 128 held-out clips | 0.092        | 0.413         | 0.116        | 0.192       |
| 64 clips, all right        | 100 %        | 42 %          | 98 %         | 98 %        |

Of the loss that sparse attention added, 7 % is not won back in that time, and the weights are now
made for sparse attention: without it their loss has doubled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from tqdm import tqdm

import mmattn
import mmattn.mini
from mmattn.mini.recipe import Ema, Progress, cosine, save_half, write_record
from mmattn.mini.train_t2v import HELD_OUT_SEED, encode_clips, evaluate
from mmattn.variants import parse


def encode(pipe: WanPipeline, n: int, seed: int) -> dict[str, Tensor]:
    """Clips as latents ``[B, C, T, Y, X]`` in the units the shipped transformer knows, and their text."""
    config = pipe.vae.config
    known = (config.latents_mean, config.latents_std)
    data = encode_clips(pipe, n, seed)  # measures mean and deviation anew, on these clips
    fresh = (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    pipe.vae.register_to_config(latents_mean=known[0], latents_std=known[1])
    (mean, std), (new_mean, new_std) = (
        [torch.tensor(values).view(1, -1, 1, 1, 1) for values in pair] for pair in (known, fresh)
    )
    latents = (data["latents"].float() * new_std + new_mean - mean) / std
    with torch.no_grad():
        mask = (data["t5"] != 0).long()
        text = pipe.text_encoder(data["t5"], mask).last_hidden_state * mask[..., None]
    return {"latents": latents, "text": text}


def flow_loss(pipe: WanPipeline, data: dict[str, Tensor], rows: Tensor, seed: int) -> Tensor:
    """Flow-matching loss of some clips, with the noise and the moments that `seed` names."""
    generator = torch.Generator().manual_seed(seed)
    z = data["latents"][rows]
    noise = torch.randn(z.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(rows), generator=generator) * 1.3 + 0.6)
    blend = t.view(-1, 1, 1, 1, 1)
    velocity = pipe.transformer(
        hidden_states=(1 - blend) * z + blend * noise,
        timestep=t * 1000,
        encoder_hidden_states=data["text"][rows],
        return_dict=False,
    )[0]
    return (velocity - (noise - z)).square().mean()


def measure(
    pipe: WanPipeline, data: dict[str, Tensor], methods: Sequence[mmattn.Method] | None, judge: int
) -> dict[str, Any]:
    """Held-out loss, and what the oracle says of `judge` drawn clips, with `methods` attached."""
    pipe.transformer.eval()
    with mmattn.attach(pipe, list(methods)) if methods else nullcontext() as session:
        with torch.no_grad():
            rows = torch.arange(len(data["latents"])).split(32)
            losses = [flow_loss(pipe, data, part, 7 + i) * len(part) for i, part in enumerate(rows)]
        result: dict[str, Any] = {"loss": round(sum(losses).item() / len(data["latents"]), 5)}
        if session is not None:
            result["density"] = round(session.stats.density, 4)
        if judge:
            result["oracle"] = evaluate(pipe, judge, HELD_OUT_SEED + 50_000)
    return result


def finetune(
    pipe: WanPipeline,
    data: dict[str, Tensor],
    methods: Sequence[mmattn.Method],
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Train the transformer with `methods` attached; leaves the averaged weights in it."""
    pipe.transformer.train()
    parameters = list(pipe.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema, progress = Ema([pipe.transformer], 0.99), Progress(steps=steps)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=steps, unit="step", file=sys.stderr)
    with mmattn.attach(pipe, list(methods)):
        while not progress.done:
            rows = torch.randint(len(data["latents"]), (batch,), generator=generator)
            loss = flow_loss(pipe, data, rows, seed * 1_000_003 + progress.step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = lr * cosine(progress.fraction)
            optimizer.step()
            ema.update()
            progress.step += 1
            progress.samples += batch
            if progress.step % 10 == 0:
                progress.curve.append((progress.step, loss.item()))
            bar.update()
    bar.close()
    ema.swap()
    return progress.record()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, train, measure again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--method",
        default="vmoba:threshold=0.25,kind=head,dense_steps=0",
        help="name:key=value,key=value; it must not need the denoising step",
    )
    numbers = {"steps": 500, "lr": 5e-4, "seed": 0, "batch": 16, "clips": 2000, "judge": 0}
    for name, value in {**numbers, "held_out": 128}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--out", type=Path, help="folder for the weights and training.json")
    args = parser.parse_args(argv)
    methods = parse(args.method).methods
    pipe = mmattn.mini.load("t2v")
    held_out = encode(pipe, args.held_out, HELD_OUT_SEED + 60_000)
    data = encode(pipe, args.clips, args.seed + 2)
    record: dict[str, Any] = {"method": [method.to_dict() for method in methods]}
    record["before"] = {
        "dense": measure(pipe, held_out, None, args.judge),
        "sparse": measure(pipe, held_out, methods, args.judge),
    }
    record["training"] = finetune(
        pipe, data, methods, steps=args.steps, lr=args.lr, batch=args.batch, seed=args.seed
    )
    record["after"] = {
        "dense": measure(pipe, held_out, None, args.judge),
        "sparse": measure(pipe, held_out, methods, args.judge),
    }
    if args.out is not None:
        save_half(pipe, args.out)
        write_record(args.out, record)
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
