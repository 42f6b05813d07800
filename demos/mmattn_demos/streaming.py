"""Work in a thread that tells how far it is, and that a visitor can stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image

R = TypeVar("R")


class StoppedError(Exception):
    """The visitor pressed Cancel or left."""


@dataclass(frozen=True)
class Update:
    """How far the work is.

    Args:
        text: one line.
        preview: what the picture looks like by now; None where nothing new is to be seen.
    """

    text: str
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Done(Generic[R]):
    """The last thing a stream yields."""

    value: R


Tell = Callable[[Update], None]


class Stops:
    """The stop signals of running jobs by visitor, so that Cancel reaches a job that computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, set[threading.Event]] = {}

    def add(self, visitor: str, event: threading.Event) -> None:
        """A job of `visitor` begins."""
        with self._lock:
            self._running.setdefault(visitor, set()).add(event)

    def discard(self, visitor: str, event: threading.Event) -> None:
        """It ended."""
        with self._lock:
            left = self._running.get(visitor, set())
            left.discard(event)
            if not left:
                self._running.pop(visitor, None)

    def stop(self, visitor: str) -> int:
        """Signal every running job of `visitor`; how many there were."""
        with self._lock:
            events = set(self._running.get(visitor, ()))
        for event in events:
            event.set()
        return len(events)


def stream(
    work: Callable[[Tell], R], *, lock: threading.Lock, stops: Stops, visitor: str
) -> Iterator[Update | Done[R]]:
    """Run `work` in a thread and yield what it tells, then `Done`.

    Between two denoising steps `tell` raises `StoppedError` when the visitor cancelled or nobody reads any
    more; what `work` opened is closed by its own ``with`` blocks, and the model stays locked until then.

    Args:
        work: gets `tell`; its errors are raised here.
        lock: held while it runs.
        stops: where Cancel finds it.
        visitor: whose job it is.

    Raises:
        StoppedError: after a stop.
    """
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def tell(update: Update) -> None:
        if stop.is_set():
            raise StoppedError
        told.put(update)

    def run() -> None:
        try:
            with lock:
                if stop.is_set():
                    raise StoppedError
                told.put(Done(work(tell)))
        except BaseException as error:
            told.put(error)

    stops.add(visitor, stop)
    thread = threading.Thread(target=run, name="mmattn-demo", daemon=True)
    thread.start()
    try:
        while True:
            item = told.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Done):
                return
    finally:
        stop.set()
        stops.discard(visitor, stop)
