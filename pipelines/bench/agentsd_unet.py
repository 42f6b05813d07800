"""AgentSD and token merging on one Stable Diffusion UNet with random weights, in one run.

    python pipelines/bench/agentsd_unet.py --write
    python pipelines/bench/agentsd_unet.py --tomesd /some/folder --write

The UNet has Stable Diffusion 1's four levels at another width; latents are 64 x 64 and smooth with some
noise, as half-way through denoising, because merging needs tokens that are alike; the batch is the two halves
of guidance. All merge the same share of the tokens at the highest resolution. Time is CPU time of one thread,
the best and the median of interleaved forwards; error is the relative distance from the untouched model's
output. Weights are random, so errors rank methods and say nothing about pictures.

`tomesd` (https://github.com/dbolya/tomesd) is the original of ToMe for diffusion; it is no dependency, and
runs where it can be imported, for instance after ``pip install --no-deps --target FOLDER tomesd==0.1.3``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DConditionModel
from torch import Tensor

import mmattn
from mmattn.measuring import environment

RESULTS = Path(__file__).parent / "results"


def build(width: int, layers: int = 2) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1's kind, `width` channels at the highest resolution, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=layers,
            attention_head_dim=8,
            cross_attention_dim=64,
            norm_num_groups=16,
        )
    return model.eval()


def inputs(side: int, seed: int = 0) -> dict[str, Tensor]:
    """Latents ``[2, 4, side, side]``, both halves the same but for the text."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 4, side // 8, side // 8, generator=draw)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    sample = smooth + 0.3 * torch.randn(1, 4, side, side, generator=draw)
    return {
        "sample": sample.repeat(2, 1, 1, 1),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 77, 64, generator=draw),
    }


@contextmanager
def tomesd_patch(tomesd: Any, model: UNet2DConditionModel, ratio: float) -> Iterator[None]:
    """The original package on `model`, taken off again afterwards."""
    tomesd.apply_patch(model, ratio=ratio)
    try:
        yield
    finally:
        tomesd.remove_patch(model)


def contestants(
    model: UNet2DConditionModel, ratio: float, tomesd: Any = None
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is timed, by name: makers of context managers."""

    def attached(method: mmattn.Method) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: mmattn.attach(model, method, sites="*attn1")

    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "dense": nullcontext,
        "ToMe": attached(mmattn.ToMe(ratio=ratio)),
        "AgentSD, a step with agents": attached(mmattn.AgentSD(ratio=ratio, agent_steps=1.0)),
        "AgentSD, a later step": attached(mmattn.AgentSD(ratio=ratio, agent_steps=0)),
    }
    if tomesd is not None:
        found["tomesd"] = lambda: tomesd_patch(tomesd, model, ratio)
    return found


@torch.no_grad()
def measure(
    width: int, side: int, ratio: float, repeats: int, tomesd: Any = None, layers: int = 2
) -> dict[str, Any]:
    """Check, then time and grade every contestant.

    Raises:
        RuntimeError: merging nothing changes the output, or something stays behind after detaching.
    """
    model, x = build(width, layers), inputs(side)

    def forward() -> Tensor:
        # tomesd reads the size of the latent from a positional argument.
        rest = {k: v for k, v in x.items() if k != "sample"}
        out: Tensor = model(x["sample"], **rest, return_dict=False)[0]
        return out

    dense = forward()
    for name, context in contestants(model, 0.0, tomesd).items():
        with context():
            out = forward()
        if not torch.allclose(out, dense, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{name} merged nothing and changed the output; no times are taken.")
    times: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        for name, context in contestants(model, ratio, tomesd).items():
            with context():
                began = time.process_time()
                out = forward()
                times.setdefault(name, []).append(time.process_time() - began)
            errors.setdefault(name, float((out - dense).norm() / dense.norm()))
    if not torch.equal(forward(), dense):
        raise RuntimeError("The model is not what it was before; no times are printed.")
    return {
        "width": width,
        "latent": side,
        "ratio": ratio,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": [
            {
                "method": name,
                "best_ms": round(1000 * min(values), 1),
                "median_ms": round(1000 * statistics.median(values), 1),
                "error": round(errors[name], 4),
            }
            for name, values in times.items()
        ],
    }


def table(found: dict[str, Any]) -> str:
    """The rows of `measure` for people."""
    lines = [
        f"width {found['width']}, latents {found['latent']} x {found['latent']}, ratio {found['ratio']}",
        "| method | best, CPU ms | median | error |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['best_ms']} | {r['median_ms']} | {r['error']} |"
        for r in found["rows"]
    ]
    return "\n".join(lines) + "\n"


def load_tomesd(folder: Path | None) -> Any:
    """The package from `folder` or from the environment, or None without it."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("tomesd")
    except ImportError:
        if folder is not None:
            raise
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write with `--write`; one thread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tomesd", type=Path, help="folder that tomesd was installed to")
    parser.add_argument("--write", action="store_true", help=f"write to {RESULTS.name}/")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tomesd = load_tomesd(options.tomesd)
    if tomesd is None:
        sys.stderr.write("tomesd cannot be imported and is left out.\n")
    records = []
    for width in options.widths:
        found = measure(width, options.side, options.ratio, options.repeats, tomesd)
        records.append(found)
        sys.stdout.write(table(found) + "\n")
        sys.stdout.flush()
    if options.write:
        record = {"environment": environment(torch.device("cpu")), "runs": records}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "agentsd_unet_cpu.json"
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
