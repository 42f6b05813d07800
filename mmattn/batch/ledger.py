"""The manifest: one line per attempt, appended and synced, and what it says about what is done.

An artefact is written first and its record second, so a record never speaks of a file that is not there.
A kill can cut the last line; it is dropped when the next run opens the file. Runs are numbered, and the
record with the highest number counts, whatever the clocks of the machines say.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mmattn.batch.items import Item
from mmattn.batch.jobs import Shard
from mmattn.batch.limits import sha256_of
from mmattn.batch.locks import Locks
from mmattn.batch.writers import make_folder, put, sync
from mmattn.errors import MmattnError

RECORD_BYTES = 4096
"""Most bytes of a record: up to here an append is one piece on every file system."""

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-z_]+\.tmp")
_STALE_SECONDS = 3600


class OutputError(MmattnError, OSError):
    """The output folder cannot be written. The run stops; the same command goes on later."""


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn errors of the file system into `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise OutputError(f"{what} cannot be written: {reason}") from error


@dataclass
class Record:
    """One attempt at one item. Times are seconds, memory is MiB.

    Args:
        status: ``ok``, ``failed``, or ``skipped`` for an item that a stopping run did not try.
        file: path of the artefact in the output folder; None unless ok.
        sha256, size: of that file; size in bytes.
        pixels: SHA-256 of the pixels before encoding, or of the words of a caption.
        attempt: 1 for the first attempt at this item, over all runs.
        run: number of the run.
        notes: what was done so that it could be made, such as a smaller batch.
        error: class and message.
    """

    id: str
    status: str
    key: str
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    pixels: str | None = None
    seed: int = 0
    kind: str = ""
    row: int = 0
    attempt: int = 1
    run: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    method: str = "dense"
    wall_s: float | None = None
    peak_mb: float | None = None
    counters: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    answer: str | None = None

    def line(self) -> bytes:
        """The record as one line of at most `RECORD_BYTES`; long texts are cut, the file has them whole."""
        table = {k: v for k, v in vars(self).items() if v not in (None, [], {})}
        for most in (2000, 500, 100, 20):
            raw = _raw(table)
            if len(raw) <= RECORD_BYTES:
                return raw
            table = _cut(table, most)
        table["params"] = {}
        return _raw(table)


def _raw(table: dict[str, Any]) -> bytes:
    # A message can quote a file name that is no text.
    return json.dumps(table, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _cut(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= most else value[: most - 1] + "…"
    if isinstance(value, dict):
        return {k: v if k in ("id", "file") else _cut(v, most) for k, v in value.items()}
    if isinstance(value, list):
        return [_cut(v, most) for v in value[: max(4, most // 25)]]
    return value


class Last(NamedTuple):
    """What counts of the last record of an item."""

    status: str
    key: str
    file: str | None
    sha256: str | None
    size: int | None
    attempt: int
    run: int


def manifests(out: Path) -> list[Path]:
    """The manifest and those of shards, in a fixed order."""
    return sorted(out.glob("manifest.jsonl")) + sorted(out.glob("manifest.rank*.jsonl"))


_FORM: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "status": (str,),
    "key": (str,),
    "file": (str, type(None)),
    "run": (int,),
    "attempt": (int,),
}


def read_records(out: Path) -> Iterator[dict[str, Any]]:
    """Every whole record of every manifest in `out`; torn and damaged lines are left out."""
    for path in manifests(out):
        with path.open("rb") as stream:
            for raw in stream:
                if not raw.endswith(b"\n"):
                    continue
                try:
                    record = json.loads(raw)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and all(
                    isinstance(record.get(key), types) for key, types in _FORM.items()
                ):
                    yield record


def read_last(out: Path) -> dict[str, Last]:
    """The record that counts, by id."""
    last: dict[str, Last] = {}
    for record in read_records(out):
        before = last.get(record["id"])
        if before is not None and (before.run > record["run"] or record["status"] == "skipped"):
            continue
        last[record["id"]] = Last(
            record["status"],
            record["key"],
            record.get("file"),
            record.get("sha256"),
            record.get("size"),
            record["attempt"],
            record["run"],
        )
    return last


class Ledger:
    """The manifest of one output folder, open for appending; a context manager.

    Args:
        out: the folder; it is made if need be.
        shard: with one, records go to a manifest of its own and other shards may run at the same time.

    Raises:
        ConflictError: on entering, when another run uses the folder.
        OutputError: when the folder cannot be written.
    """

    def __init__(self, out: Path, shard: Shard | None = None) -> None:
        self.out, self.shard = out, shard
        name = "manifest.jsonl" if shard is None else f"manifest.rank{shard.index}.jsonl"
        self.path = out / name
        self.last: dict[str, Last] = {}
        self.run = 1
        self._locks = Locks(out, shard)
        self._descriptor = -1

    def __enter__(self) -> Self:
        with writing(str(self.out)):
            make_folder(self.out)
            try:
                self._locks.take()
                self._sweep()
                self.last = read_last(self.out)
                self.run = 1 + max((entry.run for entry in self.last.values()), default=0)
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o666)
                sync(self.out)
                self._drop_torn_line()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give the folder free. Calling it twice is fine."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # records were synced when they were added
                os.close(self._descriptor)
            self._descriptor = -1
        self._locks.release()

    # -- litter -----------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Delete temporary files of killed runs; beside other shards only those that are old."""
        # By the clock of the disk, which is the one that dates the files: ours may be off, or jump.
        old = self._locks.path.stat().st_mtime - _STALE_SECONDS
        for folder, _, names in os.walk(self.out):
            for name in names:
                if _TEMPORARY.fullmatch(name):
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        if self.shard is None or path.stat().st_mtime < old:
                            path.unlink()

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._descriptor).st_size
        end, tail = size, b""
        while end and b"\n" not in tail:
            start = max(0, end - 65536)
            tail = os.pread(self._descriptor, end - start, start) + tail
            end = start
        whole = end + tail.rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(self._descriptor, whole)

    # -- what is done -----------------------------------------------------------------------------

    def done(self, item: Item, *, verify: str = "fast") -> bool:
        """Whether an ok record with the same content stands, and its file too.

        Args:
            item: what would be made.
            verify: ``fast`` compares the size of the file, ``full`` its SHA-256.
        """
        entry = self.last.get(item.id)
        if entry is None or entry.status != "ok" or entry.key != item.key or entry.file is None:
            return False
        path = self.out / entry.file
        try:
            if path.stat().st_size != entry.size:
                return False
            return verify != "full" or sha256_of(path) == entry.sha256
        except (OSError, ValueError):  # the latter for a name with a NUL
            return False

    def changed(self, item: Item) -> bool:
        """Whether the item was made before with other content."""
        entry = self.last.get(item.id)
        return entry is not None and entry.status == "ok" and entry.key != item.key

    def attempts(self, item: Item | Record) -> int:
        """How often an item was tried with the same content, over all runs."""
        entry = self.last.get(item.id)
        return entry.attempt if entry is not None and entry.key == item.key else 0

    def todo(self, items: Iterable[Item], *, verify: str = "fast") -> Iterator[Item]:
        """The items that are not done."""
        return (item for item in items if not self.done(item, verify=verify))

    # -- adding -----------------------------------------------------------------------------------

    def append(self, records: Sequence[Record]) -> None:
        """Write the records, one piece each, and sync. Their `run` and `attempt` are filled in here.

        Raises:
            OutputError: when they cannot be written; the file then ends with a whole line still.
        """
        if not records:
            return
        with writing(str(self.path)):
            size = self._size()
            try:
                for record in records:
                    record.run = self.run
                    record.attempt = self.attempts(record) + (record.status != "skipped")
                    put(self._descriptor, record.line())
                os.fsync(self._descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise
        for record in records:
            if record.status != "skipped" or record.id not in self.last:
                self.last[record.id] = Last(
                    record.status,
                    record.key,
                    record.file,
                    record.sha256,
                    record.size,
                    record.attempt,
                    record.run,
                )

    def _size(self) -> int:
        found = os.fstat(self._descriptor)
        try:
            same = os.path.samestat(found, self.path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            # What goes into a deleted file is lost without an error.
            raise OutputError(
                f"{self.path} was deleted or replaced while the run used it, so nothing can be recorded"
            )
        return found.st_size
