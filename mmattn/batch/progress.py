"""Progress for people: one bar on a terminal, one line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from mmattn.batch.local import Summary

EVERY = 10.0
"""Seconds between lines."""


class Progress:
    """A `Watch` that draws.

    Args:
        say: prints a line on stderr.
        terminal: whether stderr is one.
    """

    def __init__(self, say: Callable[[str], None], *, terminal: bool | None = None) -> None:
        self.say = say
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Any = None
        self._start = time.monotonic()
        self._spoken = self._start

    def __call__(self, summary: Summary) -> None:
        """Show where the run is."""
        if self.terminal:
            self._draw(summary)
            return
        now = time.monotonic()
        if now - self._spoken >= EVERY:
            self._spoken = now
            self.say(line(summary, now - self._start))

    def _draw(self, summary: Summary) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=summary.todo, file=sys.stderr, unit="item", dynamic_ncols=True)
        self._bar.set_postfix(failed=summary.failed, done_before=summary.before, refresh=False)
        self._bar.update(summary.ok + summary.failed - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def line(summary: Summary, seconds: float) -> str:
    """The state of a run in one line."""
    tried = summary.ok + summary.failed
    rate = tried / seconds if seconds > 0 else 0.0
    left = (summary.todo - tried) / rate if rate else 0.0
    minutes, rest = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f", {hours}:{minutes:02d}:{rest:02d} left" if rate else ""
    return (
        f"[{tried}/{summary.todo}] {summary.failed} failed, {summary.before} done before, "
        f"{rate:.2f} items/s{eta}"
    )
