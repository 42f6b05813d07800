"""What runs in a process of the Ray engine: a `Worker` fed with one part of the job at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmattn.batch.items import Item, sentence
from mmattn.batch.ledger import OutputError, Record, writing
from mmattn.batch.models import Models
from mmattn.batch.worker import Options, Worker
from mmattn.errors import ModelLoadError

TRIES = 3
"""How often a part is begun by a process that dies over it, before its items are tried one by one."""


def lost(item: Item, kind: str, text: str) -> Record:
    """The record of an item over which its process was lost."""
    record = Record(
        item.id,
        "failed",
        item.key,
        seed=item.seed,
        kind=item.kind,
        row=item.row,
        params=item.params,
        method=item.label,
    )
    record.error = {"class": kind, "message": text}
    return record


@dataclass(frozen=True)
class Notes:
    """Small files through which the processes of a run hear of each other.

    Args:
        folder: one that all of them see.
        run: tells this run from others, ``<digits>.<name>``.
    """

    folder: Path
    run: str

    def stop(self) -> None:
        """Ask every actor to come to an end."""
        self._path("stop").touch()

    def stopped(self) -> bool:
        """Whether they were asked."""
        return self._path("stop").exists()

    def running(self) -> list[int]:
        """The processes that began parts whose records have not arrived."""
        pids = []
        for path in self.folder.glob(f".ray-[0-9]*.{self.run}.tmp"):
            with contextlib.suppress(FileNotFoundError):
                pids += [int(word) for word in path.read_text().split()[-1:]]
        return pids

    def tries(self, name: str) -> int:
        """How often `name` was begun and not ended."""
        try:
            return len(self._path(name).read_text().split())
        except FileNotFoundError:
            return 0

    def begin(self, name: str) -> None:
        """Count one more try, by this process."""
        with self._path(name).open("a") as stream:
            stream.write(f"{os.getpid()} ")

    def end(self, name: str) -> None:
        """Forget the tries."""
        self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the notes."""
        for path in self.folder.glob(f".ray-*.{self.run}.tmp"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f".ray-{name}.{self.run}.tmp"


class Actor:
    """One process of the pool: a `Worker`, fed with one part at a time."""

    def __init__(
        self,
        models: Models,
        options: Options,
        notes: Notes,
        folder: Path,
        threads: int,
        deterministic: bool,
    ) -> None:
        import torch

        os.chdir(folder)  # paths of models and pictures may be relative
        torch.set_num_threads(threads)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.worker = Worker(models, options, stopping=notes.stopped)
        self.notes = notes

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make one part.

        Args:
            batch: ``part``, its number, and ``items``, a JSON list; one row.

        Returns:
            ``part`` and ``answer``, a JSON object: ``records``, or ``stop`` where no part can be made.
        """
        items = [_item(table) for table in json.loads(str(batch["items"][0]))]
        answer: dict[str, Any]
        try:
            with writing(str(self.worker.options.out)):
                records = self._make(items, str(batch["part"][0]))
            answer = {"records": [vars(record) for record in records]}
        except (OutputError, ModelLoadError) as error:
            answer = {"stop": type(error).__name__, "message": sentence(error)}
        return {"part": [int(batch["part"][0])], "answer": [json.dumps(answer)]}

    def _make(self, items: Sequence[Item], name: str) -> list[Record]:
        # Ray begins a part again, without end, when its process dies; what waits in line is innocent.
        if self.notes.tries(name) < TRIES:
            self.notes.begin(name)  # it ends when the records have arrived
            if self.notes.stopped():
                self.notes.end(name)  # the worker skips them, and nobody waits for that
            return self.worker.run(items)
        if len(items) > 1:
            records = []
            for k, item in enumerate(items):
                records += self._make([item], f"{name}-{k}")
                self.notes.end(f"{name}-{k}")
            return records
        text = f"the process that made it died {TRIES} times; too little memory is one cause"
        return [lost(items[0], "ActorDied", text)]


def _item(table: dict[str, Any]) -> Item:
    return Item(**{**table, "methods": tuple(table["methods"])})
