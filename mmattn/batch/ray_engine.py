"""The Ray engine: the same run with its items made by several processes, which Ray starts and restarts.

Ray Data hands parts of the job to a pool of actors. An actor loads a model once, writes files itself, whole
or not at all, and sends back records; the process that was started keeps the manifest and nothing else. An
actor that dies is started again and its part made again, under the same names with the same bytes, so what
counts is there exactly once. Ray listens on the loopback interface only, because its job interface has no
authentication, and its dashboard and its usage statistics are off.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmattn.batch.items import Item, sentence
from mmattn.batch.ledger import OutputError, Record
from mmattn.batch.local import Run, Summary, parts
from mmattn.batch.ray_actor import Actor, Notes, lost
from mmattn.batch.ray_cluster import Cluster, RayLostError, require
from mmattn.errors import ModelLoadError

ROUND = 4096
"""Most parts handed to one pool of actors. A longer job takes several pools and so little memory."""

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 3.0
_LOST = "the processes of Ray have ended"


@dataclass
class RayRun(Run):
    """A `Run` whose items are made by Ray actors. Its worker makes nothing and names models and options.

    Args:
        actors: processes, each with a model of its own; None for one per GPU, or per CPU core.
        threads: of torch in every actor.
        deterministic: ask torch for kernels that repeat.
    """

    actors: int | None = None
    threads: int = 1
    deterministic: bool = False
    _notes: Notes = field(init=False)
    _cluster: Cluster | None = field(default=None, init=False)
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __call__(self) -> Summary:
        """Make what is not there yet.

        Raises:
            OutputError: when the folder cannot be written any more.
            ModelLoadError: when a model cannot be loaded.
            ConfigError: when Ray has not got that many GPUs or cores.
        """
        require(self._device)
        # In the folder, which all actors see, and named like the temporary files that the next run deletes.
        self._notes = Notes(self.ledger.out.absolute(), f"{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with contextlib.ExitStack() as self._opened:
                return super().__call__()
        except RayLostError as error:
            # A signal to all processes of a job ends Ray too, and there is nobody to finish anything.
            self.summary.stopped = self.stop.reason or sentence(error)
            return self.summary
        finally:
            self._notes.clear()

    @property
    def killed(self) -> bool:
        """Whether Ray had to be killed; Python would wait for it at its end."""
        return self._cluster is not None and self._cluster.killed

    @property
    def _device(self) -> str:
        return next(iter(self.worker.models.sources.values())).device

    def _round(self, items: Iterator[Item], failed: dict[str, Item], summary: Summary) -> None:
        batch = self.worker.options.batch
        while window := list(itertools.islice(items, ROUND * batch)):
            chosen = list(parts(window, batch))
            for start in range(0, len(chosen), ROUND):
                if self._should_stop(failed, summary):
                    return
                self._pool(chosen[start : start + ROUND], failed, summary)
        self._should_stop(failed, summary)

    def _pool(
        self, chosen: Sequence[list[Item]], failed: dict[str, Item], summary: Summary
    ) -> None:
        if self._cluster is None:
            # Only now: a run with nothing left to make starts no processes.
            self._cluster = Cluster(self.actors, self._device)
            self._opened.enter_context(self._cluster)
        waiting = dict(enumerate(chosen))
        with Feed(self._results(chosen), self._cluster, self.stop) as feed:
            for row in feed:
                if row is not None:
                    number, records = self._read(row)
                    self._take(waiting.pop(number), records, failed, summary)
                    self._notes.end(str(number))
                if self._should_stop(failed, summary):
                    self._notes.stop()
                    if not self._cluster.any_runs(self._notes.running()):
                        return
                if self._cluster.lost:
                    raise RayLostError(_LOST)
        text = "Ray came back without an answer; its logs are in the folder of its session (ray_temp_dir)"
        for number, part in waiting.items():
            self._take(part, [lost(item, "NoAnswer", text) for item in part], failed, summary)
            self._notes.end(str(number))

    def _read(self, row: dict[str, Any]) -> tuple[int, list[Record]]:
        answer = json.loads(row["answer"])
        if "stop" in answer:
            self._notes.stop()
            raise _STOPS[answer["stop"]](answer["message"])
        return int(row["part"]), [Record(**record) for record in answer["records"]]

    def _take(
        self,
        part: list[Item],
        records: list[Record],
        failed: dict[str, Item],
        summary: Summary,
    ) -> None:
        self.ledger.append(records)
        self._count(part, records, failed, summary)
        self.watch(summary)

    def _results(self, chosen: Sequence[list[Item]]) -> Iterator[dict[str, Any]]:
        assert self._cluster is not None
        data: Any = importlib.import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.max_errored_blocks = -1  # what is missing is seen by who waits for it
        context.enable_progress_bars = False
        rows = [
            {"part": number, "items": json.dumps([asdict(item) for item in part])}
            for number, part in enumerate(chosen)
        ]
        options = replace(self.worker.options, out=self.worker.options.out.absolute())
        made = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor,
            fn_constructor_kwargs={
                "models": self.worker.models,
                "options": options,
                "notes": self._notes,
                "folder": Path.cwd(),
                "threads": self.threads,
                "deterministic": self.deterministic,
            },
            batch_size=1,
            compute=data.ActorPoolStrategy(
                size=min(self._cluster.size, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=1,
            num_gpus=1 if self._device == "cuda" else None,
        )
        rows_made: Iterator[dict[str, Any]] = made.iter_rows()
        return rows_made


_STOPS = {"OutputError": OutputError, "ModelLoadError": ModelLoadError}


class Feed:
    """Rows that another thread takes out of Ray, so that this one never waits where no signal is heard.

    A context manager, and an iterator that gives None where nothing has come for a while.

    Args:
        rows: what actors answer.
        cluster: where they run.
        stop: tells when a signal came. Then there is little patience with Ray.
    """

    def __init__(
        self, rows: Iterator[dict[str, Any]], cluster: Cluster, stop: Callable[[], bool]
    ) -> None:
        self._cluster, self._stop = cluster, stop
        self._arrived: queue.SimpleQueue[dict[str, Any] | BaseException | None] = (
            queue.SimpleQueue()
        )
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(rows,), daemon=True)

    def _run(self, rows: Iterator[dict[str, Any]]) -> None:
        end = None
        try:
            for row in rows:
                self._arrived.put(row)
                if self._enough.is_set():
                    break
        except BaseException as error:
            end = error
        self._arrived.put(end)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        while True:
            try:
                row = self._arrived.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if row is None:
                return
            if isinstance(row, BaseException):
                raise row
            yield row

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._enough.set()
        if isinstance(error, (KeyboardInterrupt, RayLostError)):
            return
        # Ray must not be ended under a thread that is inside it.
        start = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)
            late = self._stop() and time.monotonic() - start > _PATIENCE_SECONDS
            if error is None and (late or self._cluster.lost):
                raise RayLostError(_LOST)
