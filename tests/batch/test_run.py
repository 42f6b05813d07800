"""A batch run: killed, interrupted, resumed, sharded, out of disk; always the same files in the end."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest
import torch
from PIL import Image

from mmattn.batch.jobs import Shard
from mmattn.batch.ledger import Ledger, OutputError, read_last
from mmattn.batch.limits import sha256_of
from mmattn.batch.local import Limit, Rules, Stop, Summary
from mmattn.errors import ConfigError, ConflictError
from mmattn.measuring import measured

PRINTS = {"image": "fake-model", "video": "fake-model"}
ROWS = [{"id": f"item-{i}", "prompt": f"picture number {i}"} for i in range(24)]


def forked(work):
    """Run `work` in a child; returns its pid. The child never comes back."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    with suppress(BaseException):
        torch.set_num_threads(1)
        code = work()
    os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_folder(folder, expected):
    """Every id ok with the expected hash, every file whole, no litter."""
    last = read_last(folder)
    assert {name: entry.sha256 for name, entry in last.items()} == expected
    for entry in last.values():
        path = folder / entry.file
        assert sha256_of(path) == entry.sha256
        with Image.open(path) as image:
            image.load()
    files = {
        p.relative_to(folder).as_posix() for p in (folder / "images").rglob("*") if p.is_file()
    }
    assert files == {entry.file for entry in last.values()}, "nothing else is left"
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    ok = [record["id"] for record in map(json.loads, lines) if record["status"] == "ok"]
    # An item whose file was there but whose record was cut is made once more, never more often.
    assert sorted(set(ok)) == sorted(expected)


def kills(bench, count, monkeypatch):
    """Kills at random times and, in turn, in the middle of writing a random file."""
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.002), sync(descriptor))[1])
    bench.pipe.delay = 0.002
    path = bench.write(ROWS)
    start = time.perf_counter()
    bench.run(path, "whole")
    duration = time.perf_counter() - start
    expected = bench.hashes("whole")
    assert len(expected) == len(ROWS)
    dice = random.Random(5)
    cut, torn, made = 0, 0, []
    for trial in range(count):
        out = f"killed-{trial}"
        fatal = dice.randrange(len(ROWS)) if trial % 2 else None

        def work(out=out, fatal=fatal):
            if fatal is not None:
                os.fsync = deadly(fatal, os.fsync)
            return bench.run(path, out).exit_code

        pid = forked(work)
        if fatal is None:
            time.sleep(dice.uniform(0, duration))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cut += wait(pid) == -signal.SIGKILL
        torn += bool(list(bench.folder.glob(f"{out}/images/*/.*.tmp")))
        before = len(read_last(bench.folder / out)) if (bench.folder / out).exists() else 0
        assert fatal is None or before == fatal
        summary = bench.run(path, out)
        assert (summary.before, summary.ok, summary.failed) == (before, len(ROWS) - before, 0)
        made.append(before)
        check_folder(bench.folder / out, expected)
    return cut, torn, made


def deadly(number, sync):
    """An fsync that kills its process when it comes to the picture with that number."""
    seen = iter(range(number + 1))

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/images/" in name and name.endswith(".tmp") and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    return fsync


def test_killed_runs_resume_to_the_same_files(bench, monkeypatch):
    cut, torn, made = kills(bench, 8, monkeypatch)
    assert cut >= 5, "most kills must hit a running process, or this shows nothing"
    assert torn >= 4, "every other one in the middle of a write"
    assert any(0 < count < len(ROWS) for count in made)


@pytest.mark.slow
def test_fifty_killed_runs_resume_to_the_same_files(bench, monkeypatch):
    cut, torn, made = kills(bench, 50, monkeypatch)
    print(f"{cut} of 50 kills hit a running process, {torn} in a write; {made} items were there")
    assert cut >= 40 and torn >= 25 and len(set(made)) > 10


# -- resuming -------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_again(bench):
    path = bench.write(ROWS)
    bench.run(path)
    calls = len(bench.pipe.calls)
    summary = bench.run(path)
    assert (summary.before, summary.ok, summary.exit_code) == (24, 0, 0)
    assert len(bench.pipe.calls) == calls == 24


def test_damaged_and_missing_files_are_made_again(bench):
    path = bench.write(ROWS)
    bench.run(path)
    first, second, third = (bench.folder / "out" / bench.items(path)[i].file for i in range(3))
    first.unlink()
    second.write_bytes(b"short")
    data = bytearray(third.read_bytes())
    data[-20] ^= 1
    third.write_bytes(data)
    hashes = bench.hashes()
    assert bench.run(path).ok == 2, "fast compares sizes, so a flipped bit stays"
    assert bench.run(path, rules=Rules(verify="full")).ok == 1
    assert bench.hashes() == hashes
    assert sha256_of(third) == hashes["item-2"]


def test_a_changed_row_is_made_again_and_only_that(bench):
    bench.run(bench.write(ROWS))
    rows = [{**ROWS[0], "steps": 3}, *ROWS[1:]]
    summary = bench.run(bench.write(rows))
    assert (summary.ok, summary.changed, summary.before) == (1, 1, 23)
    assert bench.run(bench.write(ROWS)).ok == 1, "the older record must not count for the new file"


def test_overwrite_makes_everything_again(bench):
    path = bench.write(ROWS[:5])
    bench.run(path)
    hashes = bench.hashes()
    assert bench.run(path, rules=Rules(overwrite=True)).ok == 5
    assert bench.hashes() == hashes
    assert {record["run"] for record in bench.records()} == {1, 2}
    assert [r["attempt"] for r in bench.records() if r["id"] == "item-0"] == [1, 2]


# -- what files depend on -------------------------------------------------------------------------------


def test_order_shards_and_batches_give_the_same_files(bench):
    path = bench.write(ROWS)
    bench.run(path, "plain")
    mixed = ROWS[:]
    random.Random(1).shuffle(mixed)
    bench.run(bench.write(mixed, "mixed.jsonl"), "mixed")
    for index in range(3):
        bench.run(path, "shards", shard=Shard(index, 3))
    bench.run(path, "batched", batch=5)
    plain = bench.hashes("plain")
    assert len(set(plain.values())) == 24
    assert bench.hashes("mixed") == bench.hashes("shards") == bench.hashes("batched") == plain
    ranks = sorted(p.name for p in (bench.folder / "shards").glob("manifest*"))
    assert ranks == [f"manifest.rank{i}.jsonl" for i in range(3)]
    counts = [len((bench.folder / "shards" / name).read_text().splitlines()) for name in ranks]
    assert sorted(counts) == [8, 8, 8]
    # Another number of shards, or none, reads all of them.
    assert bench.run(path, "shards").before == 24
    assert bench.run(path, "shards", shard=Shard(0, 2)).before == 12


def test_shards_get_as_many_costly_items_each(bench):
    sides = [64, 8] * 9
    rows = [{"id": str(i), "prompt": "p", "width": s, "height": s} for i, s in enumerate(sides)]
    path = bench.write(rows)
    shares = [bench.items(path, Shard(i, 3)) for i in range(3)]
    assert sorted(len(share) for share in shares) == [6, 6, 6]
    assert all(sum(item.params["width"] == 64 for item in share) == 3 for share in shares)
    assert len({item.id for share in shares for item in share}) == 18


# -- failures -------------------------------------------------------------------------------------------


def test_poisoned_rows_fail_alone_and_memory_stays_level(bench):
    poisoned = set(range(7, 1000, 33))
    assert len(poisoned) == 31
    poisoned.discard(7)
    rows = [
        {"id": str(i), "prompt": f"poison {i}" if i in poisoned else f"fine {i}"}
        for i in range(1000)
    ]
    path = bench.write(rows)
    levels = []

    def watch(summary):
        if (summary.ok + summary.failed) % 100 == 0:
            levels.append(resident())

    summary = bench.run(path, watch=watch, batch=4)
    assert (summary.ok, summary.failed, summary.exit_code) == (970, 30, 3)
    last = read_last(bench.folder / "out")
    assert {int(n) for n, e in last.items() if e.status == "failed"} == poisoned
    failed = [r for r in bench.records() if r["status"] == "failed"]
    assert all("poisoned prompt" in r["error"]["message"] for r in failed)
    lines = (bench.folder / "out" / "failures.jsonl").read_text().splitlines()
    assert {int(json.loads(line)["id"]) for line in lines} == poisoned
    slope = (levels[-1] - levels[3]) / (len(levels) - 4)
    assert slope < 1, f"{slope:.2f} MB per 100 items"


def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_failed_items_are_tried_again_where_that_is_asked(bench):
    path = bench.write([{"id": "a", "prompt": "fine"}, {"id": "b", "prompt": "poison"}])
    assert bench.run(path, rules=Rules(retry_failed=2)).failed == 1
    assert [r["attempt"] for r in bench.records() if r["id"] == "b"] == [1, 2, 3]
    # And by every later run.
    assert bench.run(path).failed == 1
    assert [r["attempt"] for r in bench.records() if r["id"] == "b"] == [1, 2, 3, 4]


def test_fail_fast_and_max_failures_stop_early(bench):
    rows = [{"id": str(i), "prompt": "poison" if i % 2 else "fine"} for i in range(40)]
    path = bench.write(rows)
    fast = bench.run(path, "fast", rules=Rules(fail_fast=True))
    assert (fast.ok, fast.failed, fast.exit_code) == (1, 1, 3)
    most = bench.run(path, "most", rules=Rules(max_failures=Limit.parse("3")))
    assert (most.ok, most.failed) == (4, 4) and "4 items failed" in most.stopped
    share = bench.run(path, "share", rules=Rules(max_failures=Limit.parse("10%")))
    assert share.failed == 5
    for wrong in ("many", "-1", "101%", ""):
        with pytest.raises(ConfigError, match="max-failures"):
            Limit.parse(wrong)


def test_exit_codes():
    assert Summary().exit_code == 0
    assert Summary(ok=3).exit_code == 0
    assert Summary(ok=3, failed=1).exit_code == 3
    assert Summary(failed=1).exit_code == 3
    assert Summary(ok=1, stopped="no space left").exit_code == 3
    assert Summary(stopped="no space left").exit_code == 4
    assert Summary(ok=1, stopped="SIGINT").exit_code == 130
    assert Summary(failed=1, stopped="SIGTERM").exit_code == 143


# -- signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_after_the_running_batch(bench, number, code):
    bench.pipe.delay = 0.05
    path = bench.write(ROWS)

    def child():
        with Stop() as stop:
            return bench.run(path, stop=stop, batch=2).exit_code

    pid = forked(child)
    manifest = bench.folder / "out" / "manifest.jsonl"
    deadline = time.monotonic() + 10
    while not (manifest.exists() and manifest.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, number)
    asked = time.monotonic()
    assert wait(pid) == code
    assert time.monotonic() - asked < 0.1 + 2
    done = len(bench.hashes())
    assert 2 <= done < len(ROWS) and done % 2 == 0
    assert (bench.folder / "out" / "index.html").exists()
    summary = bench.run(path)
    assert (summary.before, summary.ok) == (done, len(ROWS) - done)


def test_the_second_ctrl_c_ends_now(bench):
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


# -- disks ----------------------------------------------------------------------------------------------

POINTS = ("mkdir", "open", "write", "fsync", "replace", "folder", "record", "record-fsync")


class Faults:
    """Makes the n-th pass of one place in the write protocol fail."""

    def __init__(self, monkeypatch, point, number, after):
        self.point, self.number, self.left, self.hits = point, number, after, 0
        self.real = {
            name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "mkdir")
        }
        for name in self.real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def _due(self, point):
        if point != self.point:
            return False
        self.left -= 1
        if self.left >= 0:
            return False
        self.hits += 1
        return True

    def _fail(self, point):
        if self._due(point):
            raise OSError(self.number, os.strerror(self.number))

    def mkdir(self, path, *more, **named):
        if "images" in os.fspath(path).split("/")[-2:-1]:
            self._fail("mkdir")
        return self.real["mkdir"](path, *more, **named)

    def open(self, path, flags, *more, **named):
        if str(path).endswith(".tmp") and flags & os.O_CREAT:
            self._fail("open")
        return self.real["open"](path, flags, *more, **named)

    def _what(self, descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def write(self, descriptor, data):
        name = self._what(descriptor)
        point = "record" if "manifest" in name else "write" if ".png." in name else ""
        if point == self.point and self._due(point):
            # Half of it arrives first, as on a disk that fills up.
            self.real["write"](descriptor, bytes(data[: len(data) // 2]))
            raise OSError(self.number, os.strerror(self.number))
        return self.real["write"](descriptor, data)

    def fsync(self, descriptor):
        name = self._what(descriptor)
        if "manifest" in name:
            self._fail("record-fsync")
        elif ".png." in name:
            self._fail("fsync")
        elif "images" in name:
            self._fail("folder")
        return self.real["fsync"](descriptor)

    def replace(self, source, target):
        if str(target).endswith(".png"):
            self._fail("replace")
        return self.real["replace"](source, target)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EROFS])
@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_fails_leaves_nothing_broken(bench, monkeypatch, point, number):
    path = bench.write(ROWS[:6])
    bench.run(path, "whole")
    with monkeypatch.context() as patch:
        # Every item makes a folder, which is synced above and in it.
        faults = Faults(patch, point, number, after=4 if point == "folder" else 2)
        with pytest.raises(OutputError, match=os.strerror(number)):
            bench.run(path)
    assert faults.hits == 1
    for file in (bench.folder / "out").rglob("*.png"):
        with Image.open(file) as image:
            image.load()
    manifest = (bench.folder / "out" / "manifest.jsonl").read_bytes()
    assert not manifest or manifest.endswith(b"\n")
    done = bench.hashes()
    assert len(done) in (2, 3)
    summary = bench.run(path)
    assert (summary.before, summary.failed) == (len(done), 0)
    check_folder(bench.folder / "out", bench.hashes("whole"))


def test_short_writes_are_continued(bench, monkeypatch):
    path = bench.write(ROWS[:3])
    bench.run(path, "whole")
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:37])))
        bench.run(path)
    check_folder(bench.folder / "out", bench.hashes("whole"))


def test_a_folder_that_cannot_be_written_is_one_error(bench, monkeypatch):
    path = bench.write(ROWS[:1])
    real = os.open

    def refuse(name, flags, *more, **named):
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        bench.run(path)


def test_a_folder_deleted_under_the_run_is_one_error(bench):
    path = bench.write(ROWS[:6])

    def watch(summary):
        if summary.ok == 2:
            import shutil

            shutil.rmtree(bench.folder / "out")

    # Files come back with their folders, but the manifest is gone: nothing may be claimed.
    with suppress(OutputError):
        bench.run(path, watch=watch)
    assert bench.run(path).before == 0
    assert len(bench.hashes()) == 6


def test_two_runners_need_shards(bench):
    path = bench.write(ROWS[:4])
    out = bench.folder / "out"
    with Ledger(out):
        with pytest.raises(ConflictError, match=rf"process {os.getpid()} on .* --shard"):
            bench.run(path)
        with pytest.raises(ConflictError, match="in use"):
            bench.run(path, shard=Shard(0, 2))
    with Ledger(out, Shard(0, 2)):
        assert bench.run(path, shard=Shard(1, 2)).ok == 2
        with pytest.raises(ConflictError, match=rf"process {os.getpid()}"):
            bench.run(path)
        with pytest.raises(ConflictError, match=rf"process {os.getpid()}"):
            bench.run(path, shard=Shard(0, 2))
        with pytest.raises(ConflictError, match="one of 2 shards"):
            bench.run(path, shard=Shard(1, 3))
    assert bench.run(path).ok == 2


def test_a_job_file_of_many_rows_is_streamed(bench):
    path = bench.folder / "many.jsonl"
    with path.open("w") as stream:
        for i in range(100_000):
            stream.write(json.dumps({"prompt": f"picture {i} " + "x" * 200}) + "\n")
    size = path.stat().st_size / 2**20

    def work():
        jobs = bench.jobs(path)
        return sum(1 for _ in jobs.items(PRINTS))

    result = measured(work, torch.device("cpu"))
    assert result.value == 100_000
    assert size > 20 and result.memory_mb < size, f"{result.memory_mb:.0f} of {size:.0f} MB"
