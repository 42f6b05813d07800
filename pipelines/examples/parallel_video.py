"""Draw one video with several processes: each holds a stretch of the tokens, methods see all of them.

    torchrun --nproc-per-node 2 pipelines/examples/parallel_video.py --out out/parallel.mp4
    torchrun --nproc-per-node 4 pipelines/examples/parallel_video.py --out out/long.mp4 --device cuda \
        --model path/to/Wan2.1-T2V-1.3B-Diffusers --dtype bfloat16 --height 480 --width 832 --num-frames 81

Started with plain `python` it draws the same clip in one process. The number of heads and the number of
video tokens must be multiples of the number of processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import mmattn
from mmattn.batch.writers import write_video
from mmattn.calls import draw
from mmattn.loading import resolve
from mmattn.variants import parse


def enable(transformer: torch.nn.Module, degree: int, device: str) -> None:
    """Cut the tokens of `transformer` into `degree` stretches, one for each process."""
    config = ContextParallelConfig(ulysses_degree=degree)
    if device != "cpu":
        transformer.enable_parallelism(config=config)
        return
    # diffusers takes the rank modulo the number of accelerators, which without one is 0.
    with patch("torch.accelerator.device_count", return_value=1):
        transformer.enable_parallelism(config=config)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help=".mp4 file")
    parser.add_argument("--prompt", default="a red circle moving right on a white background")
    parser.add_argument("--model", default="t2v", help="t2v (embedded) or a folder of Wan")
    parser.add_argument("--sparse", default="vmoba:topk=2,dense_steps=0", help="identity: none")
    plain = {"steps": 20, "seed": 0, "fps": 8, "device": "cpu", "dtype": "float32"}
    for name, default in {**plain, "height": 0, "width": 0, "num_frames": 0}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser.parse_args(argv)


def film(args: argparse.Namespace, rank: int, degree: int) -> None:
    """Draw the clip with all processes; the first one writes it."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    loaded = resolve(args.model, "t2v", device=device, dtype=getattr(torch, args.dtype))
    if degree > 1:
        enable(loaded.target.transformer, degree, args.device)
    methods = list(parse(args.sparse).methods)
    sizes = {name: getattr(args, name) or None for name in ("height", "width", "num_frames")}
    # Every process draws the same noise from the same seed, on the CPU.
    with mmattn.attach(loaded.target, methods) as session:
        clips = draw(loaded, [args.prompt], [args.seed], steps=args.steps, **sizes)
        if rank == 0:
            sys.stdout.write(f"{session.report()}\n")
    if rank == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        path = write_video(args.out, list(clips[0].transpose(0, 1)), fps=args.fps)
        sys.stdout.write(f"{path}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as one of the processes that torchrun started, or alone."""
    args = arguments(argv)
    degree = int(os.environ.get("WORLD_SIZE", "1"))
    if degree == 1:
        film(args, rank=0, degree=1)
        return 0
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Small numbers are exchanged on the CPU whatever the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    try:
        film(args, dist.get_rank(), degree)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
