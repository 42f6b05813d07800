"""Run something on many damaged files, within limits of time and memory."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmattn.errors import MmattnError

SECONDS = 5
"""Processor time of one case."""
MEGABYTES = 300
"""Memory above the level at the start, over all cases."""

SCALE = float(os.environ.get("FUZZ", "1"))
"""How many times as many cases as usual: about 3,700 with ``FUZZ=1``, 37,000 with ``FUZZ=10``."""


class TooSlow(BaseException):
    """A case does not end; not an `Exception`, so that nothing under test catches it."""


@dataclass
class Outcome:
    """How many cases were read and how many refused; processor time of the slowest; most memory in use."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def _deadline():
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    # Later than what is measured below: on a busy machine this clock can run ahead.
    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(
    cases: Iterable[tuple[str, Any]],
    work: Callable[[Any], Any],
    allowed: tuple[type[BaseException], ...] = (MmattnError,),
) -> Outcome:
    """Call `work` on every case.

    Args:
        cases: name and argument of each.
        work: fails with an `AssertionError` for what must not be.
        allowed: errors that mean a case was refused; every other one fails.
    """
    outcome = Outcome()
    faults: dict[str, list[str]] = {}
    """By kind and place, since one mistake shows in many cases."""
    level = reset_peak()
    for name, case in cases:
        problem = ""
        start = time.process_time()
        try:
            with warnings.catch_warnings(), _deadline():
                warnings.simplefilter("ignore")
                work(case)
            outcome.read += 1
        except allowed as error:
            outcome.refused += 1
            if not str(error).strip():
                problem = f"{type(error).__name__} without a sentence"
        except (Exception, TooSlow) as error:
            problem = f"{type(error).__name__} at {_place(error)}"
            name = f"{name}: {error!s:.150}"
        took = time.process_time() - start
        outcome.slowest = max(outcome.slowest, took)
        outcome.peak_mb = (kib("VmHWM") - level) / 1024
        if outcome.peak_mb > MEGABYTES:
            problem, level = f"{outcome.peak_mb:.0f} MB of memory", reset_peak()
        if took > SECONDS:
            problem = f"more than {SECONDS} seconds"
        if problem:
            faults.setdefault(problem, []).append(name)
    found = [f"{problem}\n    {len(n)} cases, first {n[0]}" for problem, n in faults.items()]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(found)
    return outcome


def _place(error: BaseException) -> str:
    """Where an error came up, as far as it is in code of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mmattn" in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def kib(key: str) -> float:
    """A line of /proc/self/status; 0 on a system that has none."""
    status = Path("/proc/self/status")
    return float(status.read_text().partition(key + ":")[2].split()[0]) if status.exists() else 0.0


def reset_peak() -> float:
    """Set the high-water mark of memory, ``VmHWM``, back to now; its new value in KiB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return kib("VmHWM")


def share(count: int) -> int:
    """`count` cases, or a multiple where the environment asks for it."""
    return max(10, int(count * SCALE))
