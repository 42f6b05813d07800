"""Ray on this machine: started on the loopback interface only, and ended without a process left behind."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mmattn.errors import ConfigError, MissingExtraError, MmattnError

_STORE_BYTES = 128 * 2**20  # records are small
_GRACE_SECONDS = 3.0
_LOOK_SECONDS = 1.0
_CORE = ("gcs_server", "raylet")


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


class RayLostError(MmattnError):
    """The processes of Ray ended before the run did."""


class Cluster:
    """Ray on this machine, or the cluster that the caller is connected to; a context manager.

    An error of the run ends Ray in order. An interrupt, and the loss of Ray, do not wait for it: what Ray
    started here is killed, and this process should end soon.

    Args:
        actors: wanted, or None for one per GPU, or per CPU core without GPUs in use.
        device: where models run.

    Attributes:
        size: how many actors to start.
        killed: whether Ray was killed, and cannot be used in this process any more.
    """

    def __init__(self, actors: int | None, device: str) -> None:
        self.actors, self.on_gpu = actors, device == "cuda"
        self.size = 0
        self.killed = False
        self._ours = False
        self._before: set[int] = set()
        self._started: dict[int, Any] = {}
        self._core: list[Any] = []
        self._looked = 0.0

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            ConfigError: when it has not got that many GPUs or cores.
        """
        ray: Any = importlib.import_module("ray")
        wanted = self.actors or 1
        self._ours = not ray.is_initialized()
        if self._ours:
            self._before = {process.pid for process in _children()}
            try:
                _start(ray, max(wanted, os.cpu_count() or 1))
            except BaseException:
                self._kill()
                raise
        there = int(ray.cluster_resources().get("GPU" if self.on_gpu else "CPU", 0))
        if there < wanted:
            self._end()
            raise ConfigError(
                f"{wanted} actors were asked for, and Ray sees {there} "
                f"{'GPUs' if self.on_gpu else 'CPU cores'}; ask for fewer with --actors"
            )
        self.size = self.actors or there
        self._core = [process for process in self._look() if process.name() in _CORE]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, (KeyboardInterrupt, RayLostError)) or self.lost:
            self._kill()
        else:
            self._end()

    @property
    def lost(self) -> bool:
        """Whether processes that Ray cannot do without have ended; seen only where they were started here."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()  # whoever loses its parent is not found any more
        return not all(map(_runs, self._core))

    def any_runs(self, pids: Sequence[int]) -> bool:
        """Whether one of some processes is there still; of machines that cannot be seen all are."""
        if not self._ours:
            return bool(pids)
        return any(p.pid in pids and _runs(p) for p in self._look())

    def _look(self) -> list[Any]:
        """The processes that Ray started so far."""
        self._looked = time.monotonic()
        if self._ours:
            self._started |= {p.pid: p for p in _children() if p.pid not in self._before}
        return list(self._started.values())

    def _end(self) -> None:
        if not self._ours:
            return
        # Workers end a while after Ray itself did, some of its agents not at all.
        started = self._look()
        try:
            importlib.import_module("ray").shutdown()
            deadline = time.monotonic() + _GRACE_SECONDS
            while any(map(_runs, started)) and time.monotonic() < deadline:
                time.sleep(0.05)
        except BaseException:
            self.killed = True
            raise
        finally:
            _kill(started)

    def _kill(self) -> None:
        self.killed = self._ours
        _kill(self._look())


def _children() -> list[Any]:
    return list(importlib.import_module("psutil").Process().children(recursive=True))


def _runs(process: Any) -> bool:
    psutil: Any = importlib.import_module("psutil")
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(processes: Sequence[Any]) -> None:
    # Ray itself first, so that it starts nothing in place of what is killed; both were begun before workers.
    for process in processes:
        with contextlib.suppress(importlib.import_module("psutil").NoSuchProcess):
            process.kill()


def _start(ray: Any, cores: int) -> None:
    # Without it Ray puts this machine's own address in place of a loopback address. It is read at import,
    # here and in the processes that Ray starts.
    constants: Any = importlib.import_module("ray._private.ray_constants")
    services: Any = importlib.import_module("ray._private.services")
    before, popen = constants.ENABLE_RAY_CLUSTER, services.ConsolePopen
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {name: os.environ.get(name) for name in own}
    # Ray takes SIGTERM for itself; the run has its own way to end.
    heard = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A signal to all of a job's group would end Ray under the actors. Elsewhere Ray relies on groups.
        if sys.platform == "linux":
            services.ConsolePopen = functools.partial(popen, process_group=0)
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
        constants.ENABLE_RAY_CLUSTER, services.ConsolePopen = before, popen
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
