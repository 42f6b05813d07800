"""Time and memory of one call, and the machine it ran on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "diffusers", "transformers", "timm", "open_clip_torch", "triton", "av")


@dataclass(frozen=True)
class Measured:
    """What a call returned and what it took.

    Args:
        value: its result.
        seconds: wall time; on a GPU the device is synchronised at both ends.
        memory_mb: peak memory above the level at the start, or None where it cannot be read.
    """

    value: Any
    seconds: float
    memory_mb: float | None


def measured(call: Callable[[], Any], device: torch.device) -> Measured:
    """Run `call` once and measure it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        value = call()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        return Measured(value, seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20)
    _settle()
    level = _reset_peak()
    start = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - start
    peak = _peak_kib()
    return Measured(value, seconds, None if level is None else max(0.0, (peak - level) / 1024))


def _settle() -> None:
    """Hand freed memory back to the system, or a later call would look smaller than an earlier one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> float | None:
    """Set the kernel's high-water mark back to now; the resident size in KiB, or None."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak_kib() -> float:
    mark = _status("VmHWM")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) if mark is None else mark


def _status(key: str) -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])
    return None


def package_versions() -> dict[str, str | None]:
    """Versions of the libraries that matter here; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, for the record of a run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "gpu": gpu,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": package_versions(),
    }
