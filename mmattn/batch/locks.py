"""Who may write into an output folder: one run, or shards of one and the same number."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mmattn.batch.jobs import Shard
from mmattn.batch.writers import put
from mmattn.errors import ConflictError

_WAITS = (0.02, 0.05, 0.1)
"""Seconds between questions: someone who only looks whether a lock is held has it for a moment."""


class Locks:
    """The locks of one runner. The kernel gives them free when the process ends, however it ends.

    Args:
        out: the output folder.
        shard: the share of this runner, or None for all.
    """

    def __init__(self, out: Path, shard: Shard | None) -> None:
        self.out, self.shard = out, shard
        self._held: list[int] = []

    @property
    def path(self) -> Path:
        """The lock that is this runner's alone."""
        return self.out / (".lock" if self.shard is None else f".lock.rank{self.shard.index}")

    def take(self) -> None:
        """Take what this runner needs.

        Raises:
            ConflictError: when another runner has it.
            OSError: when a file cannot be written, or the disk has no locks.
        """
        if self.shard is None:
            self._take(self.path, fcntl.LOCK_EX, {})
            return
        # Shards share the folder with each other, but not with a run of everything.
        self._take(self.out / ".lock", fcntl.LOCK_SH, None)
        self._take(self.path, fcntl.LOCK_EX, {"of": self.shard.count})
        # Every runner writes its number before it looks, so one of two that differ sees the other.
        for path in self.out.glob(".lock.rank*"):
            holder = _holder(path)
            if holder.get("of", self.shard.count) != self.shard.count and _is_held(path):
                raise ConflictError(
                    f"{self.out} is in use by {_who(holder)} as one of {holder['of']} shards, which "
                    f"would overlap with shard {self.shard.index}/{self.shard.count}; use the same "
                    "number of shards everywhere"
                )

    def release(self) -> None:
        """Give them free. Calling it twice is fine."""
        while self._held:
            with contextlib.suppress(OSError):  # the lock is free whatever close says
                os.close(self._held.pop())

    def _take(self, path: Path, how: int, facts: dict[str, Any] | None) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._held.append(descriptor)
        if not _locked(descriptor, how):
            held = [rank for rank in self.out.glob(".lock.rank*") if _is_held(rank)]
            by = held[0] if held and self.shard is None else path
            raise ConflictError(
                f"{self.out} is in use by {_who(_holder(by))}. Wait for it, use another --out, or "
                "give every runner a --shard of its own."
            )
        if facts is not None:
            facts = {"pid": os.getpid(), "host": socket.gethostname(), **facts}
            os.ftruncate(descriptor, 0)
            put(descriptor, json.dumps(facts).encode())


def _locked(descriptor: int, how: int) -> bool:
    for wait in (*_WAITS, 0.0):
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
    return False


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another run"
    return f"process {holder['pid']} on {holder.get('host', 'some host')}"


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
