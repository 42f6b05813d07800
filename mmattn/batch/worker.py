"""Items in, files and records out: the part of a batch run that needs a model.

A `Worker` knows nothing of job files, manifests, shards or signals, so any engine can drive it: the local
loop of `mmattn.batch.run`, an actor, or a rank of a launcher.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmattn import __version__
from mmattn.batch.guards import NonFiniteError, free_memory, is_memory
from mmattn.batch.items import Item, sentence
from mmattn.batch.ledger import OutputError, Record, writing
from mmattn.batch.limits import sha256_of
from mmattn.batch.making import Made, Seat, make
from mmattn.batch.metadata import SCHEMA
from mmattn.batch.models import Models
from mmattn.batch.writers import write_image, write_json, write_video
from mmattn.errors import ModelLoadError

if TYPE_CHECKING:
    from mmattn.loading import Loaded
    from mmattn.session import Session


OFFLOADED = "models wait in main memory"


@dataclass(frozen=True)
class Options:
    """What a worker is told.

    Args:
        out: the output folder.
        batch: most items per call of a model. With 1, files do not depend on anything but the item; with
            more, rounding differs with the size of a batch.
        metadata: write prompt, seed and settings into the files.
    """

    out: Path
    batch: int = 1
    metadata: bool = True


@dataclass(frozen=True)
class _Try:
    """How a batch is being attempted."""

    notes: tuple[str, ...] = ()
    tiled: bool = False


class Worker:
    """Runs items on models and writes their files.

    Args:
        models: what serves each kind of item.
        options: folder and batch size.
        stopping: asked before every batch; once it says yes, the items left are recorded as skipped.
    """

    def __init__(
        self,
        models: Models,
        options: Options,
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.models, self.options = models, options
        self.stopping = stopping
        self._limits: dict[str, int] = {}  # items per call that fit into memory, by group
        self._attached: tuple[Any, str, Session] | None = None

    def run(self, items: Sequence[Item]) -> list[Record]:
        """Make the items, in batches that share a call, and return one record each, in their order.

        An error of one item never touches the others: a batch that fails is cut in halves until the item
        that cannot be made is alone.

        Raises:
            OutputError: when a file cannot be written.
            ModelLoadError: when a model cannot be loaded.
        """
        groups: dict[str, list[Item]] = {}
        for item in items:
            groups.setdefault(item.group, []).append(item)
        records: dict[str, Record] = {}
        for group, members in groups.items():
            start = 0
            while start < len(members):
                size = min(self.options.batch, self._limits.get(group, self.options.batch))
                part = members[start : start + size]
                start += size
                if self.stopping():
                    made = [self._record(item, "skipped") for item in part]
                else:
                    made = self._attempt(part, _Try())
                records.update({record.id: record for record in made})
        return [records[item.id] for item in items]

    def close(self) -> None:
        """Detach what is attached."""
        if self._attached is not None:
            session, self._attached = self._attached[2], None
            session.detach()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- one batch --------------------------------------------------------------------------------

    def _attempt(self, items: Sequence[Item], how: _Try) -> list[Record]:
        limit = self._limits.get(items[0].group)
        if limit is not None and limit < len(items):
            return self._halves(items, limit, how)
        error: Exception
        try:
            seats, seconds = self._make(items, how)
        except (OutputError, ModelLoadError):
            raise  # it would be the same for every item
        except Exception as caught:
            # The traceback keeps the tensors of the failed call alive.
            error = caught.with_traceback(None)
            error.__context__ = None
        else:
            return [
                self._keep(item, seat, seconds, how)
                for item, seat in zip(items, seats, strict=True)
            ]
        self.close()  # a session may be in the middle of a step; the next attempt attaches afresh
        return self._recover(items, how, error)

    def _recover(self, items: Sequence[Item], how: _Try, error: Exception) -> list[Record]:
        if is_memory(error):
            free_memory()
            if len(items) > 1:
                half = len(items) // 2
                self._limits[items[0].group] = half
                note = f"out of memory with {len(items)} items in a call"
                return self._halves(items, half, replace(how, notes=(*how.notes, note)))
            if not how.tiled and items[0].kind != "caption":
                note = "out of memory; decoded in tiles"
                return self._attempt(items, _Try((*how.notes, note), tiled=True))
            if self.models.sources[items[0].kind] not in self.models.offloaded:
                reason = self.models.offload(items[0].kind)
                note = OFFLOADED if reason is None else f"not offloaded: {reason}"
                how = replace(how, notes=(*how.notes, f"out of memory; {note}"))
                if reason is None:
                    return self._attempt(items, how)
        if len(items) > 1:
            return self._halves(items, len(items) // 2, how)
        return [self._failed(items[0], error, how)]

    def _halves(self, items: Sequence[Item], half: int, how: _Try) -> list[Record]:
        records = []
        for start in range(0, len(items), half):
            records += self._attempt(items[start : start + half], how)
        return records

    def _loaded(self, item: Item) -> Loaded:
        return self.models.get(item.kind, from_image="init_image" in item.params)

    def _make(self, items: Sequence[Item], how: _Try) -> tuple[list[Seat], float]:
        loaded = self._loaded(items[0])
        session = self._session(loaded.target, items[0])
        device = torch.device(self.models.sources[items[0].kind].device)
        call = partial(make, loaded, device=device, tiled=how.tiled)
        start = time.perf_counter()
        made: Made = call(items, session)
        if made.bad and session is not None:
            # The method may be what broke; the same item without it tells, and saves the item.
            for row, reason in made.bad.items():
                session.reset()
                with session.disabled():
                    again = call([items[row]], None)
                note = f"{reason}; made without methods"
                if not again.bad:
                    made.seats[row] = replace(again.seats[0], notes=(note,))
                else:
                    made.seats[row] = Seat(error=NonFiniteError(f"{reason}, without methods too"))
        else:
            for row, reason in made.bad.items():
                made.seats[row] = Seat(error=NonFiniteError(reason))
        return made.seats, (time.perf_counter() - start) / len(items)

    def _session(self, target: Any, item: Item) -> Session | None:
        """The session with the item's methods, kept open while they stay the same."""
        wanted = json.dumps(item.methods)
        if self._attached is not None:
            if self._attached[0] is target and self._attached[1] == wanted:
                self._attached[2].reset()
                return self._attached[2]
            self.close()
        if not item.methods:
            return None
        from mmattn.attaching import attach
        from mmattn.config import recipe_from

        methods = recipe_from({"method": list(item.methods)}, "method").methods
        # One seed for all: draws of a method must not depend on which items share a call.
        session = attach(target, list(methods), seed=0)
        self._attached = (target, wanted, session)
        return session

    # -- results ----------------------------------------------------------------------------------

    def _record(self, item: Item, status: str, how: _Try | None = None) -> Record:
        notes = [] if how is None else list(how.notes)
        tried_so = how is not None and self.models.sources[item.kind] in self.models.offloaded
        if tried_so and not any(OFFLOADED in note for note in notes):
            notes.append(OFFLOADED)
        return Record(
            item.id,
            status,
            item.key,
            seed=item.seed,
            kind=item.kind,
            row=item.row,
            params=item.params,
            method=item.label,
            notes=notes,
        )

    def _failed(self, item: Item, error: Exception, how: _Try) -> Record:
        record = self._record(item, "failed", how)
        record.error = {"class": type(error).__name__, "message": sentence(error)}
        return record

    def _keep(self, item: Item, seat: Seat, seconds: float, how: _Try) -> Record:
        if seat.error is not None:
            return self._failed(item, seat.error, how)
        record = self._record(item, "ok", how)
        record.notes += seat.notes
        record.wall_s, record.peak_mb = round(seconds, 4), _peak_mb(seat)
        record.counters = dict(seat.counters)
        path = self.options.out / item.file
        # A smaller batch leaves the pixels alone; these two do not.
        lasting = [*seat.notes, *(note for note in how.notes if "tiles" in note)]
        try:
            with writing(str(path)):
                written = self._write(path, item, seat, lasting)
                record.size, record.sha256 = written.stat().st_size, sha256_of(written)
        except OutputError:
            raise
        except Exception as error:  # of an encoder; the next item may suit it
            return self._failed(item, error, how)
        record.file = written.relative_to(self.options.out).as_posix()
        record.pixels = seat.content_sha256()
        record.answer = seat.answer
        return record

    def _write(self, path: Path, item: Item, seat: Seat, notes: Sequence[str]) -> Path:
        meta = describe(item, self.models, seat, notes) if self.options.metadata else None
        if item.kind == "caption":
            table = {"answer": seat.answer, **({} if meta is None else {"mmattn": meta})}
            return write_json(path, table)
        for number, panel in enumerate(seat.panels, 1):
            write_image(path.with_suffix(".panels") / f"{number}.png", panel)
        assert seat.drawn is not None
        if item.kind == "video":
            frames = [seat.drawn[:, t] for t in range(seat.drawn.shape[1])]
            return write_video(path, frames, fps=item.params["fps"], meta=meta)
        return write_image(path, seat.drawn, meta)


def describe(item: Item, models: Models, seat: Seat, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The metadata of a file: all that `mmattn rerun` needs, and nothing that differs between runs."""
    source = models.sources[item.kind]
    meta: dict[str, Any] = {
        "schema": SCHEMA,
        "mmattn": __version__,
        "id": item.id,
        "kind": item.kind,
        "seed": item.seed,
        **item.params,
        "model": source.name,
        "fingerprint": item.model,
        "device": source.device.partition(":")[0],
        "dtype": "float32" if source.embedded else source.dtype,
        "torch": torch.__version__,
        "methods": list(item.methods),
        "method": item.label,
    }
    if seat.drawn is not None:
        meta["size"] = f"{seat.drawn.shape[-1]}x{seat.drawn.shape[-2]}"
    if notes:
        meta["notes"] = list(notes)
    return meta


def _peak_mb(seat: Seat) -> float:
    """Peak memory: of the call on a GPU, of the process so far elsewhere."""
    if seat.peak_mb is not None:
        return seat.peak_mb
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
