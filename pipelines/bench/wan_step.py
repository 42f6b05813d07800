"""One denoising step of a Wan transformer with random weights: dense and sparse, in one run.

    python pipelines/bench/wan_step.py --write                 # a small model, 8400 and 16 380 tokens, CPU
    python pipelines/bench/wan_step.py --device cuda --write # the 1.3B configuration at 480p and 720p

Weights are random, so queries and keys are unlike those of a trained model; time depends on how many
chunks are kept and not on which, and the settings keep a fixed number. Choosing is part of the time. No
number is printed unless every method agrees, on a small grid, with its op's loop reference.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

import mmattn
from mmattn.evals.flops import wan_forward_flops
from mmattn.measuring import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Config:
    """A transformer and the token grids it is timed on."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    grids: tuple[tuple[int, int, int], ...]
    text: int = 512


CONFIGS = {
    # Heads and layers of a small model; the FFN is wide enough that attention has the share of the time
    # in FLOPs that it has in the 1.3B model at 480p, three quarters.
    "scaled": Config(3, 6, 64, 2240, ((10, 28, 30), (21, 26, 30)), 64),
    "1.3B": Config(30, 12, 128, 8960, ((21, 30, 52), (21, 45, 80))),
}

METHODS: dict[str, Callable[[tuple[int, int, int]], mmattn.Method]] = {
    "VMoBA, a quarter of the chunks": lambda grid: vmoba(grid),
    "VMoBA, head pool, threshold 0.25": lambda grid: mmattn.VMoBA(
        threshold=0.25, kind="head", dense_steps=0
    ),
    "neighborhood, an eighth of the tokens": lambda grid: mmattn.NeighborhoodAttention(
        window=0.5, stride=(1, 4, 4)
    ),
    "random blocks, a quarter": lambda grid: mmattn.RandomBlocks(density=0.25),
    "ProxyAttn, coverage 0.5": lambda grid: mmattn.ProxyAttn(gamma=0.5, min_budget=128),
}


def vmoba(grid: tuple[int, int, int]) -> mmattn.VMoBA:
    """The paper's training-free preset where it has one for the grid, its shares elsewhere."""
    presets = {(21, 30, 52): mmattn.VMoBA.wan_480p, (21, 45, 80): mmattn.VMoBA.wan_720p}
    return presets.get(grid, mmattn.VMoBA)(dense_steps=0)


def build(config: Config, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            ffn_dim=config.ffn,
            num_layers=config.layers,
            text_dim=256,
            rope_max_seq_len=1024,
        )
    return model.to(dtype).eval()


def inputs(
    config: Config, grid: tuple[int, int, int], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Latents that make up `grid` tokens."""
    t, y, x = grid
    return {
        "hidden_states": torch.randn(1, 16, t, 2 * y, 2 * x, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, config.text, 256, device=device, dtype=dtype),
        "return_dict": False,
    }


_OPS = (
    ("mmattn.methods._chunk_attention", "routed_attention"),
    ("mmattn.methods.neighborhood", "neighborhood_attention"),
    ("mmattn.methods._blocks", "block_sparse_attention"),
)


@contextmanager
def reference() -> Iterator[None]:
    """Every op by its loops, and routing even where a mask would be faster."""
    kept = []
    for module, name in _OPS:
        home = importlib.import_module(module)
        kept.append((home, name, getattr(home, name)))
        setattr(home, name, functools.partial(getattr(home, name), backend="reference"))
    try:
        yield
    finally:
        for home, name, op in kept:
            setattr(home, name, op)


@torch.no_grad()
def check(device: str) -> dict[str, float]:
    """Largest difference between a method and its loop reference, over the output's size.

    Raises:
        SystemExit: when one is above 1e-4.
    """
    config = Config(3, 2, 32, 64, (), 7)
    model = build(config, device, torch.float32)
    x = inputs(config, (3, 10, 14), device, torch.float32)
    routing = importlib.import_module("mmattn.methods._chunk_attention")
    usual, routing._GATHER_FROM = routing._GATHER_FROM, 1
    errors = {}
    try:
        for name, make in METHODS.items():
            found = []
            for how in (reference(), nullcontext()):
                with how, mmattn.attach(model, make((3, 10, 14)).at("*.attn1")) as session:
                    session.step(5, 10)
                    found.append(model(**x)[0])
            expected, got = found
            errors[name] = float((got - expected).abs().max() / expected.abs().max())
            if not errors[name] < 1e-4:
                raise SystemExit(f"{name} is off by {errors[name]:.1e}; nothing was timed")
    finally:
        routing._GATHER_FROM = usual
    return errors


def _timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def time_grid(
    model: WanTransformer3DModel,
    config: Config,
    grid: tuple[int, int, int],
    repeats: int,
    device: str,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Median seconds of a step for dense and every method, taking turns."""
    x = inputs(config, grid, device, dtype)
    tokens = grid[0] * grid[1] * grid[2]
    rows = []
    shape = {"layers": config.layers, "dim": config.heads * config.head_dim, "ffn": config.ffn}
    whole = wan_forward_flops(grid, **shape, text=config.text)
    _timed(lambda: model(**x), device)
    for name, make in METHODS.items():
        own, other = [], []
        with mmattn.attach(model, make(grid).at("*.attn1")) as session:
            session.step(5, 10)
            _timed(lambda: model(**x), device)
            for _ in range(repeats):
                own.append(_timed(lambda: model(**x), device))
                with session.disabled():
                    other.append(_timed(lambda: model(**x), device))
            density = session.stats.density or 1.0
        flops = wan_forward_flops(grid, **shape, text=config.text, density=density)
        rows.append(
            {
                "method": name,
                "grid": list(grid),
                "tokens": tokens,
                "density": round(density, 4),
                "dense_s": round(statistics.median(other), 4),
                "sparse_s": round(statistics.median(own), 4),
                "speedup": round(statistics.median(other) / statistics.median(own), 3),
                "flops_ratio": round(whole / flops, 3),
            }
        )
        _print(rows[-1])
    return rows


def _print(row: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{row['tokens']:>6} tokens  {row['method']:<42} density {row['density']:.3f}  dense "
        f"{row['dense_s']:.3f} s  sparse {row['sparse_s']:.3f} s  {row['speedup']:.2f}x "
        f"(FLOPs {row['flops_ratio']:.2f}x)\n"
    )
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print, and write on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--config", choices=tuple(CONFIGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the numbers under results/")
    options = parser.parse_args(argv)
    name = options.config or ("1.3B" if options.device == "cuda" else "scaled")
    config = CONFIGS[name]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    errors = check(options.device)
    sys.stdout.write(f"check: largest relative difference {max(errors.values()):.1e}\n")
    model = build(config, options.device, dtype)
    rows = []
    for grid in config.grids:
        rows += time_grid(model, config, grid, options.repeats, options.device, dtype)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        record = {
            "config": name,
            "dtype": str(dtype),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "diffusers": version("diffusers"),
            "environment": environment(torch.device(options.device)),
            "check": errors,
            "rows": rows,
        }
        path = RESULTS / f"wan_step_{options.device}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
