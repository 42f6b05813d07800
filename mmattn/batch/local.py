"""The local engine: one process, one job file or one shard of it, resumable and interruptible."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from mmattn.batch.items import Item
from mmattn.batch.jobs import Jobs, Shard
from mmattn.batch.ledger import Ledger, Record
from mmattn.errors import ConfigError

if TYPE_CHECKING:
    from mmattn.batch.worker import Worker

WINDOW = 256
"""Items read ahead, so that those that can share a call come together."""


@dataclass(frozen=True)
class Limit:
    """How many items may fail: a number, or a share of those to be made."""

    value: float
    share: bool = False

    @staticmethod
    def parse(text: str) -> Limit:
        """From ``10`` or ``2.5%``.

        Raises:
            ConfigError: for anything else.
        """
        try:
            if text.endswith("%"):
                value = float(text[:-1])
                if 0 <= value <= 100:
                    return Limit(value / 100, share=True)
            elif int(text) >= 0:
                return Limit(int(text))
        except ValueError:
            pass
        raise ConfigError(f"--max-failures takes a number or a percentage up to 100%, got {text!r}")

    def passed(self, failed: int, planned: int) -> bool:
        """Whether `failed` of `planned` are too many."""
        return failed > (self.value * planned if self.share else self.value)


@dataclass(frozen=True)
class Rules:
    """How a run goes about it.

    Args:
        verify: ``fast`` or ``full``; how finished files are checked before they are left alone.
        overwrite: make everything, whatever is there.
        retry_failed: further rounds over the items that failed.
        fail_fast: stop at the first item that fails.
        max_failures: stop when more fail.
    """

    verify: str = "fast"
    overwrite: bool = False
    retry_failed: int = 0
    fail_fast: bool = False
    max_failures: Limit | None = None


@dataclass
class Summary:
    """What a run did.

    Args:
        planned: items of this run's share of the file.
        before: of those, done by earlier runs.
        changed: of those, made earlier with other content and now made again.
        ok, failed: by what their last attempt gave; `failed` ends up with the items that stayed failed.
        stopped: why it ended early, or None: ``SIGINT``, ``SIGTERM``, or a sentence.
    """

    planned: int = 0
    before: int = 0
    changed: int = 0
    ok: int = 0
    failed: int = 0
    seconds: float = 0.0
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "exit_code": self.exit_code}

    @property
    def todo(self) -> int:
        """Items this run set out to make."""
        return self.planned - self.before

    @property
    def exit_code(self) -> int:
        """0 all there, 3 some failed, 4 nothing tried, 130 and 143 after signals."""
        if self.stopped == "SIGINT":
            return 130
        if self.stopped == "SIGTERM":
            return 143
        if self.failed or (self.stopped is not None and self.ok):
            return 3
        return 0 if self.stopped is None else 4


class Stop:
    """Ctrl-C and SIGTERM, once: end after the running batch. Ctrl-C twice: end now. A context manager.

    Attributes:
        reason: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.reason is not None

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.reason == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watch(Protocol):
    """Shows progress."""

    def __call__(self, summary: Summary) -> None:
        """Called once when the plan is made and after every batch."""


@dataclass
class Run:
    """One run over a job file.

    Args:
        jobs: checked.
        fingerprints: of the model for each kind of row.
        ledger: open.
        worker: makes the items; its batch size is used.
        rules: see `Rules`.
        shard: the share of the file, or None for all of it.
        stop: tells when a signal came.
        watch: shows progress.
        summary: filled in while it runs, so that it holds after an error too.
    """

    jobs: Jobs
    fingerprints: Mapping[str, str]
    ledger: Ledger
    worker: Worker
    rules: Rules = field(default_factory=Rules)
    shard: Shard | None = None
    stop: Stop = field(default_factory=Stop)
    watch: Watch = lambda summary: None
    summary: Summary = field(default_factory=Summary)

    @property
    def killed(self) -> bool:
        """Whether other processes had to be killed, so that this one had better end at once."""
        return False

    def __call__(self) -> Summary:
        """Make what is not there yet.

        Raises:
            OutputError: when the folder cannot be written any more; what was recorded stays valid.
        """
        start = time.perf_counter()
        summary = self.summary
        mask = self.plan(summary)
        self.watch(summary)
        failed: dict[str, Item] = {}
        try:
            self._round(self._open_items(mask), failed, summary)
            for _ in range(self.rules.retry_failed):
                if not failed or summary.stopped is not None:
                    break
                again = list(failed.values())
                self._round(iter(again), failed, summary)
        finally:
            summary.failed = len(failed)
            summary.seconds = time.perf_counter() - start
        return summary

    def plan(self, summary: Summary) -> bytearray:
        """One byte per item, 1 where it is to be made; fills in the counts of `summary`."""
        mask = bytearray()
        for item in self.jobs.items(self.fingerprints, self.shard):
            done = not self.rules.overwrite and self.ledger.done(item, verify=self.rules.verify)
            summary.before += done
            summary.changed += self.ledger.changed(item)
            mask.append(not done)
        summary.planned = len(mask)
        return mask

    def _open_items(self, mask: bytearray) -> Iterator[Item]:
        return itertools.compress(self.jobs.items(self.fingerprints, self.shard), mask)

    def _round(self, items: Iterator[Item], failed: dict[str, Item], summary: Summary) -> None:
        size = max(WINDOW, 8 * self.worker.options.batch)
        while window := list(itertools.islice(items, size)):
            for part in parts(window, self.worker.options.batch):
                if self._should_stop(failed, summary):
                    return
                records = self.worker.run(part)
                self.ledger.append(records)
                self._count(part, records, failed, summary)
                self.watch(summary)
        self._should_stop(failed, summary)

    def _count(
        self, part: list[Item], records: list[Record], failed: dict[str, Item], summary: Summary
    ) -> None:
        for item, record in zip(part, records, strict=True):
            if record.status == "ok":
                summary.ok += 1
                failed.pop(item.id, None)
            elif record.status == "failed":
                failed[item.id] = item
        summary.failed = len(failed)

    def _should_stop(self, failed: dict[str, Item], summary: Summary) -> bool:
        if self.stop():
            summary.stopped = self.stop.reason
        elif failed and self.rules.fail_fast:
            summary.stopped = "an item failed, and --fail-fast was given"
        elif self.rules.max_failures is not None and self.rules.max_failures.passed(
            len(failed), summary.todo
        ):
            summary.stopped = f"{len(failed)} items failed, more than --max-failures allows"
        return summary.stopped is not None


def parts(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Items that can share a call, at most `size` at a time, in the order in which groups appear."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    for members in groups.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]
