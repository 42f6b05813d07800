"""One run, or shards of one number, at a time; what a dead runner leaves behind stops nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time

import pytest

from mmattn.batch.jobs import Shard
from mmattn.batch.locks import Locks
from mmattn.errors import ConflictError

ME = {"pid": os.getpid(), "host": socket.gethostname()}


@pytest.fixture
def taken():
    """Takes locks, and gives all of them free in the end."""
    held = []

    def take(out, shard=None):
        locks = Locks(out, shard)
        held.append(locks)
        locks.take()
        return locks

    yield take
    for locks in held:
        locks.release()


def message(call, *given):
    with pytest.raises(ConflictError) as caught:
        call(*given)
    return str(caught.value)


def test_a_lock_says_whose_it_is(tmp_path, taken):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "a" * 200}))
    assert taken(tmp_path).path == tmp_path / ".lock"
    assert json.loads((tmp_path / ".lock").read_text()) == ME
    assert message(taken, tmp_path) == (
        f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}. Wait for it, use "
        "another --out, or give every runner a --shard of its own."
    )


def test_shards_write_their_number(tmp_path, taken):
    locks = taken(tmp_path, Shard(1, 2))
    assert locks.path == tmp_path / ".lock.rank1"
    assert json.loads(locks.path.read_text()) == {**ME, "of": 2}
    assert (tmp_path / ".lock").read_text() == "", "it is not one shard's"
    taken(tmp_path, Shard(0, 2))
    assert f"process {os.getpid()}" in message(taken, tmp_path, Shard(1, 2))
    assert f"process {os.getpid()}" in message(taken, tmp_path)
    said = message(taken, tmp_path, Shard(2, 3))
    assert said == (
        f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} as one of 2 shards, "
        "which would overlap with shard 2/3; use the same number of shards everywhere"
    )
    locks.release()
    assert "as one of 2 shards" in message(taken, tmp_path, Shard(1, 3))


def test_what_dead_shards_left_stops_nobody(tmp_path, taken):
    for index in range(4):
        taken(tmp_path, Shard(index, 4)).release()
    first = taken(tmp_path, Shard(0, 2))
    second = taken(tmp_path, Shard(1, 2))
    first.release()
    second.release()
    taken(tmp_path)


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("", "another run"),
        ("{", "another run"),
        ("[1]", "another run"),
        ('{"host": "h"}', "another run"),
        ('{"pid": 7}', "process 7 on some host"),
    ],
)
def test_a_holder_that_says_little(tmp_path, taken, text, who):
    taken(tmp_path)
    (tmp_path / ".lock").write_text(text)
    assert f"in use by {who}." in message(taken, tmp_path)


def test_a_run_of_everything_is_told_which_shard_is_in_its_way(tmp_path, taken):
    taken(tmp_path, Shard(0, 2)).release()
    taken(tmp_path, Shard(1, 2))
    (tmp_path / ".lock.rank1").write_text('{"pid": 11, "host": "there"}')
    assert "process 11 on there" in message(taken, tmp_path)


def test_someone_who_only_looks_does_not_stop_a_shard(tmp_path, taken, monkeypatch):
    path = tmp_path / ".lock.rank1"
    path.write_text("")
    looking = [os.open(path, os.O_RDWR)]
    fcntl.flock(looking[0], fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looking.pop()))
    taken(tmp_path, Shard(1, 2))
    assert not looking


def test_the_wait_for_a_lock_is_short(tmp_path, taken, monkeypatch):
    taken(tmp_path)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    message(taken, tmp_path)
    assert len(waits) > 2 and 0.1 < sum(waits) < 0.5


def test_a_killed_runner_frees_the_folder(tmp_path, taken):
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        Locks(tmp_path, None).take()
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    assert f"process {pid}" in message(taken, tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for descriptor in (ready, tell):
        os.close(descriptor)
    taken(tmp_path)


def test_release_goes_on_after_an_error_and_twice(tmp_path, taken, monkeypatch):
    locks = taken(tmp_path, Shard(0, 2))
    real = os.close

    def close(descriptor):
        real(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        locks.release()
    locks.release()
    taken(tmp_path)


def test_a_disk_without_locks_is_an_error(tmp_path, taken, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks"):
        taken(tmp_path)
