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
import importlib.util
import itertools
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmattn.batch.items import Item, sentence
from mmattn.batch.ledger import OutputError, Record, writing
from mmattn.batch.local import Run, Summary, parts
from mmattn.batch.models import Models
from mmattn.batch.worker import Options, Worker
from mmattn.errors import ConfigError, MissingExtraError, ModelLoadError

ROUND = 4096
"""Most parts handed to one pool of actors. A longer job takes several pools and so little memory."""

TRIES = 3
"""How often a part is begun by a process that dies over it, before its items are tried one by one."""

_STORE_BYTES = 128 * 2**20  # records are small
_POLL_SECONDS = 0.2


def require(device: str = "cpu") -> None:
    """Check what the engine needs.

    Raises:
        MissingExtraError: without ray.
        ConfigError: for a device with a number; Ray gives every actor a GPU of its own.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError("The ray engine of mmattn batch", "ray[data]", "ray")
    if device.startswith("cuda:"):
        raise ConfigError(
            f"the ray engine gives every actor a GPU of its own, and the device is {device}; say --device "
            "cuda, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )


@contextlib.contextmanager
def cluster(actors: int | None, device: str) -> Iterator[int]:
    """Ray on this machine, or the cluster the caller is connected to; yields how many actors to start.

    Args:
        actors: wanted, or None for one per GPU, or per CPU core without GPUs in use.
        device: where models run.
    """
    ray: Any = importlib.import_module("ray")
    ours = not ray.is_initialized()
    on_gpu = device == "cuda"
    if ours:
        _start(ray, max(actors or 1, os.cpu_count() or 1))
    try:
        there = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
        if there < (actors or 1):
            raise ConfigError(
                f"{actors or 1} actors were asked for, and Ray sees {there} "
                f"{'GPUs' if on_gpu else 'CPU cores'}; ask for fewer with --actors"
            )
        yield actors or there
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, cores: int) -> None:
    # Without it Ray puts this machine's own address in place of a loopback address. It is read at import,
    # here and in the processes that Ray starts.
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {name: os.environ.get(name) for name in own}
    # Ray takes SIGTERM for itself; the run has its own way to end.
    heard = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        constants.ENABLE_RAY_CLUSTER = False
        os.environ.update(own)
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            num_cpus=cores,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for number, handler in heard.items():
            signal.signal(number, handler)
    address = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        ray.shutdown()
        raise ConfigError(
            f"Ray listens on {address} and not on the loopback interface alone, where its jobs would be "
            "open to the network; use another release of Ray, or connect to a cluster of your own first"
        )


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
    _size: int = field(default=0, init=False)
    _notes: Notes = field(init=False)
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
        finally:
            self._notes.clear()

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
        if not self._size:
            # Only now: a run with nothing left to make starts no processes.
            self._size = self._opened.enter_context(cluster(self.actors, self._device))
        waiting = dict(enumerate(chosen))
        watching = threading.Event()
        watcher = threading.Thread(target=self._pass_on_signals, args=(watching,), daemon=True)
        watcher.start()
        try:
            for row in self._results(chosen):
                answer = json.loads(row["answer"])
                if "stop" in answer:
                    self._notes.stop()
                    raise _STOPS[answer["stop"]](answer["message"])
                part = waiting.pop(int(row["part"]))
                records = [Record(**record) for record in answer["records"]]
                self._take(part, records, failed, summary)
                if self._should_stop(failed, summary):
                    self._notes.stop()  # what is left comes back as skipped
        finally:
            watching.set()
            watcher.join()
        text = "Ray came back without an answer; its logs are in the folder of its session (ray_temp_dir)"
        for part in waiting.values():
            self._take(part, [_failed(item, "NoAnswer", text) for item in part], failed, summary)

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

    def _pass_on_signals(self, done: threading.Event) -> None:
        while not done.wait(_POLL_SECONDS):
            if self.stop():
                self._notes.stop()
                return

    def _results(self, chosen: Sequence[list[Item]]) -> Iterator[dict[str, Any]]:
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
                size=min(self._size, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=1,
            num_gpus=1 if self._device == "cuda" else None,
        )
        rows_made: Iterator[dict[str, Any]] = made.iter_rows()
        return rows_made


_STOPS = {"OutputError": OutputError, "ModelLoadError": ModelLoadError}


def _failed(item: Item, kind: str, text: str) -> Record:
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

    def tries(self, name: str) -> int:
        """How often `name` was begun and not ended."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return 0

    def begin(self, name: str) -> None:
        """Count one more try."""
        with self._path(name).open("ab") as stream:
            stream.write(b".")

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
            self.notes.begin(name)
            records = self.worker.run(items)
            self.notes.end(name)
            return records
        if len(items) > 1:
            return [r for k, item in enumerate(items) for r in self._make([item], f"{name}-{k}")]
        text = f"the process that made it died {TRIES} times; too little memory is one cause"
        return [_failed(items[0], "ActorDied", text)]


def _item(table: dict[str, Any]) -> Item:
    return Item(**{**table, "methods": tuple(table["methods"])})
