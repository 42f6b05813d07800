"""Timing with a dense baseline in the same run, memory, and the check that comes before any number."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Work = Callable[[], Any]


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
    if device == "cuda":
        import triton

        found |= {
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
        }
        return found
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return found | {
        "device": model,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
    }


def interleaved(works: dict[str, Work], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of every work, after one warm-up, taking turns so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(_once(work, device))
    return {name: statistics.median(found) for name, found in times.items()}


def _once(work: Work, device: str) -> float:
    if device == "cuda":
        # A fresh buffer larger than the L2 cache keeps inputs from being found there.
        torch.empty(64 << 20, dtype=torch.int8, device="cuda").zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    start_s = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start_s)


def extra_megabytes(work: Work, device: str) -> float | None:
    """Memory above what was held before, at its highest while `work` runs; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before_kb = _status("VmRSS")
    work()
    return (_status("VmHWM") - before_kb) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return 0


def dense_baseline(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Work]:
    """torch's SDPA: on a CPU as it is, on a GPU each fused kernel by name, to take the fastest."""
    if not q.is_cuda:
        return {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def pinned(backend: Any) -> Work:
        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    works: dict[str, Work] = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):
        work = pinned(backend)
        try:
            work()
        except RuntimeError:
            continue
        works[name] = work
    return works


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, allowed: Callable[[int, int, Tensor], Tensor | None]
) -> tuple[list[tuple[int, int, Tensor]], list[Tensor]]:
    """A few rows of masked attention in fp64, to check a result that is too large to recompute.

    Args:
        allowed: for batch item, head and rows, bool ``[rows, K]`` (None: all).

    Returns:
        Where the rows are, as (batch item, head, rows), and their outputs.
    """
    draw = torch.Generator().manual_seed(0)
    places, wanted = [], []
    b, h, n, d = q.shape
    group = h // k.shape[1]
    for item, head in {(0, 0), (b - 1, h - 1)}:
        rows = torch.randint(n, (16,), generator=draw).to(q.device)
        keys, values = k[item, head // group].double(), v[item, head // group].double()
        scores = q[item, head, rows].double() @ keys.T * d**-0.5
        mask = allowed(item, head, rows)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        places.append((item, head, rows))
        wanted.append(torch.nan_to_num(scores.softmax(-1)) @ values)
    return places, wanted


def worst_error(out: Tensor, places: list[tuple[int, int, Tensor]], wanted: list[Tensor]) -> float:
    """Largest difference between a result ``[B, H, N, D]`` and known rows of it."""
    return max(
        float((out[item, head, rows].double() - want).abs().max())
        for (item, head, rows), want in zip(places, wanted, strict=True)
    )
