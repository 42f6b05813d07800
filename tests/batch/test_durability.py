"""Real disks that are full or read-only, real processes side by side, limits of the system, odd clocks."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmattn.batch.jobs import Shard
from mmattn.batch.ledger import Ledger, OutputError, read_last
from mmattn.batch.limits import sha256_of
from mmattn.batch.local import Stop
from mmattn.errors import ConflictError

LARGE = [
    {"id": f"item-{i}", "prompt": f"picture number {i}", "width": 96, "height": 96}
    for i in range(24)
]
ROWS = [{"id": f"item-{i}", "prompt": f"picture number {i}"} for i in range(8)]


def child(work) -> int:
    """Start `work` in a process of its own; what it raises is printed, its code is then 99."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        torch.set_num_threads(1)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def after(bench, count: int):
    """Stops a run once `count` items are made."""

    class Enough(Stop):
        def __call__(self):
            self.reason = "SIGTERM" if len(bench.pipe.calls) >= count else None
            return self.reason is not None

    bench.pipe.calls.clear()
    return Enough()


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_folder(folder: Path, hashes: dict[str, str]) -> None:
    """Nothing under its own name is torn, every ok record is true, and the hashes are the expected ones."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    manifest = (folder / "manifest.jsonl").read_bytes()
    assert not manifest or manifest.endswith(b"\n")
    for name, entry in read_last(folder).items():
        if entry.status == "ok":
            assert sha256_of(folder / entry.file) == entry.sha256 == hashes[name]


# -- disks of the system --------------------------------------------------------------------------------

MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
NO_MOUNTS = 77
libc = ctypes.CDLL(None, use_errno=True)


def mount(folder: Path, size: str, flags: int = 0) -> None:
    """A disk in memory at `folder`, or with `MS_REMOUNT` other settings for the one that is there."""
    options = f"size={size}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")


def with_mounts(work) -> None:
    """Run `work` where it may mount disks that nobody else sees; skip where the system forbids that."""

    def inside() -> int:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWNS):
            # Others than root, and root of some containers, have the right only among themselves.
            if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
                return NO_MOUNTS
            try:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            except OSError:
                return NO_MOUNTS
        if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
            return NO_MOUNTS
        return work()

    code = code_of(child(inside))
    if code == NO_MOUNTS:
        pytest.skip(
            "mounting a small disk takes root or user namespaces, and this system allows neither"
        )
    assert code == 0, "see the captured output"


def test_a_full_disk_stops_the_run_and_a_larger_one_completes_it(bench):
    path = bench.write(LARGE)
    bench.run(path, "whole")
    hashes = bench.hashes("whole")
    disk = bench.folder / "disk"
    disk.mkdir()

    def work():
        mount(disk, "5m")
        # Others fill most of it; what is left is enough for some of the pictures.
        (disk / "ballast").write_bytes(bytes(5 * 2**20 - 400_000))
        with pytest.raises(OutputError, match="No space left on device"):
            bench.run(path, "disk/out")
        made = len(bench.hashes("disk/out"))
        assert 5 < made < 15
        check_folder(disk / "out", hashes)
        with pytest.raises(OutputError, match="No space left on device"):
            bench.run(path, "disk/out")
        assert len(bench.hashes("disk/out")) == made, "what is there stays"
        mount(disk, "64m", MS_REMOUNT)
        summary = bench.run(path, "disk/out")
        assert (summary.before, summary.ok, summary.failed) == (made, len(LARGE) - made, 0)
        assert bench.hashes("disk/out") == hashes
        check_folder(disk / "out", hashes)
        assert not list(disk.rglob("*.tmp"))

    with_mounts(work)


def test_clips_on_a_full_disk(bench):
    rows = [
        {"id": f"clip-{i}", "prompt": f"clip {i}", "num_frames": 8, "width": 96, "height": 96}
        for i in range(3)
    ]
    path = bench.write(rows)
    bench.run(path, "whole")
    hashes = bench.hashes("whole")
    bytes_ = sum(p.stat().st_size for p in (bench.folder / "whole").rglob("*.mp4"))
    disk = bench.folder / "disk"
    disk.mkdir()

    def work():
        # The second clip does not fit: the encoder's own writes fail.
        mount(disk, str(bytes_ // 2 + 16384))
        with pytest.raises(OutputError, match="No space left on device"):
            bench.run(path, "disk/out")
        assert len(bench.hashes("disk/out")) == 1
        assert len(list(disk.rglob("*.mp4"))) == 1 and not list(disk.rglob("*.tmp"))
        mount(disk, "16m", MS_REMOUNT)
        assert bench.run(path, "disk/out").ok == 2
        assert bench.hashes("disk/out") == hashes

    with_mounts(work)


def test_a_read_only_disk(bench):
    path = bench.write(ROWS)
    bench.run(path, "whole")
    hashes = bench.hashes("whole")
    disk = bench.folder / "disk"
    disk.mkdir()

    def work():
        mount(disk, "8m", MS_RDONLY)
        with pytest.raises(OutputError, match="Read-only file system"):
            bench.run(path, "disk/out")
        mount(disk, "8m", MS_REMOUNT)
        assert bench.run(path, "disk/out", stop=after(bench, 3)).ok == 3
        mount(disk, "8m", MS_REMOUNT | MS_RDONLY)
        with pytest.raises(OutputError, match="Read-only file system"):
            bench.run(path, "disk/out")
        assert len(bench.hashes("disk/out")) == 3
        mount(disk, "8m", MS_REMOUNT)
        assert bench.run(path, "disk/out").ok == len(ROWS) - 3
        assert bench.hashes("disk/out") == hashes

    with_mounts(work)


def test_a_limit_on_the_size_of_files(bench):
    """The kernel takes the first half of a write and refuses the rest, also without a disk of its own."""
    path = bench.write(LARGE[:4])
    bench.run(path, "whole")
    largest = max(p.stat().st_size for p in (bench.folder / "whole").rglob("*.png"))

    def work():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
        with pytest.raises(OutputError, match="File too large"):
            bench.run(path)

    assert code_of(child(work)) == 0
    out = bench.folder / "out"
    assert not list(out.rglob("*.png")) and not list(out.rglob("*.tmp"))
    assert bench.run(path).ok == 4
    assert bench.hashes() == bench.hashes("whole")


# -- folders and runners --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_goes_away_under_the_run(bench, how):
    path = bench.write(ROWS)
    bench.run(path, "whole")
    out, other = bench.folder / "out", bench.folder / "other"

    def watch(summary):
        if summary.ok == 3:
            if how == "deleted":
                shutil.rmtree(out)
            else:
                out.rename(other)
            if how == "replaced":
                out.mkdir()
                (out / "manifest.jsonl").write_bytes(b"")

    with pytest.raises(OutputError, match=r"manifest\.jsonl was deleted or replaced"):
        bench.run(path, watch=watch)
    if how != "deleted":
        assert len(bench.hashes("other")) == 3
        check_folder(other, bench.hashes("whole"))
    # At most the item that was running has come back; no record claims it.
    assert not bench.hashes() and len(list(out.rglob("*.png"))) <= 1
    assert bench.run(path).ok == len(ROWS)
    assert bench.hashes() == bench.hashes("whole")


def test_of_two_runners_that_start_at_once_one_works(bench):
    path = bench.write(ROWS)
    heard, tell = os.pipe()

    def watch(summary):
        if summary.ok == 1:  # whoever is first waits until the others were refused
            assert select.select([heard], [], [], 60)[0] and os.read(heard, 1)
            assert select.select([heard], [], [], 60)[0] and os.read(heard, 1)

    def work():
        try:
            return bench.run(path, watch=watch).exit_code
        except ConflictError as error:
            assert re.search(r"in use by process \d+ on .*--shard", str(error))
            os.write(tell, b"x")
            return 2

    assert sorted(code_of(pid) for pid in [child(work) for _ in range(3)]) == [0, 2, 2]
    os.close(heard)
    os.close(tell)
    records = bench.records()
    assert len(records) == len(ROWS) == len({record["id"] for record in records})


def test_shards_that_start_at_once_share_the_work(bench):
    path = bench.write(ROWS)
    bench.run(path, "whole")
    # An earlier run used more shards: what is left of its locks must not frighten the new ones.
    for index in range(4):
        with Ledger(bench.folder / "out", Shard(index, 4)):
            pass
    runners = [child(lambda i=i: bench.run(path, shard=Shard(i, 3)).exit_code) for i in range(3)]
    assert [code_of(pid) for pid in runners] == [0, 0, 0]
    assert bench.hashes() == bench.hashes("whole")
    assert len(bench.records()) == len(ROWS)


# -- clocks and signals ---------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_changes_nothing(bench, monkeypatch):
    path = bench.write(ROWS)
    bench.run(path, "whole")
    now = [2_000_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(now[0] * 1e9))

    def watch(summary):
        now[0] -= 86_400.0

    bench.run(path, stop=after(bench, 3), watch=watch)
    assert len(bench.hashes()) == 3
    for entry in (bench.folder / "out").rglob("*"):
        os.utime(entry, (3e9, 3e9))  # what is there seems to be made in the future
    summary = bench.run(path, watch=watch)
    assert (summary.before, summary.ok) == (3, len(ROWS) - 3)
    changed = [{**ROWS[0], "steps": 3}, *ROWS[1:]]
    assert bench.run(bench.write(changed), watch=watch).ok == 1
    assert bench.run(path, watch=watch).before == len(ROWS), "the newest record counts"
    assert bench.run(bench.write(ROWS), watch=watch).ok == 1
    assert bench.hashes() == bench.hashes("whole")
    assert [r["run"] for r in bench.records()] == [1] * 3 + [2] * 5 + [3, 4]


def test_signals_that_come_all_the_time_interrupt_no_write(bench):
    """System calls really return early here, and Python makes them again."""
    path = bench.write(LARGE[:4])
    bench.run(path, "whole")
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *given: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
        bench.run(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 20
    assert bench.hashes() == bench.hashes("whole")


# -- memory of the real command -------------------------------------------------------------------------


def start(folder: Path, rows: list[dict], *more: str, space: int | None = None) -> subprocess.Popen:
    """``mmattn batch`` on the embedded models, with at most `space` bytes of addresses."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def limit():
        if space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (space, space))

    return subprocess.Popen(
        [sys.executable, "-m", "mmattn.cli", "batch", "jobs.jsonl", "--out", "out", *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=limit,
    )


@pytest.mark.slow
def test_a_hundred_rows_of_every_kind_in_four_and_a_half_gigabytes(tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "given.png")
    kinds = [
        {"prompt": "a red circle"},
        {"prompt": "a blue square", "init_image": "given.png", "strength": 0.6},
        {"prompt": "a red circle moving right", "num_frames": 5},
        {"prompt": "describe the picture .", "image": "given.png", "max_new_tokens": 8},
        {"prompt": "on a white background", "panels": ["a red circle", "a blue square"]},
    ]
    rows = [{"id": f"row-{i}", **kinds[i % 5]} for i in range(100)]
    run = start(tmp_path, rows, "--steps", "2", space=int(4.5 * 2**30))
    assert run.wait(600) == 0
    last = read_last(tmp_path / "out")
    assert len(last) == 100 and {entry.status for entry in last.values()} == {"ok"}


@pytest.mark.slow
def test_a_thousand_items_do_not_fill_the_memory(tmp_path):
    rows = [{"prompt": f"a red circle number {i}", "width": 32, "height": 32} for i in range(1000)]
    run = start(tmp_path, rows, "--steps", "1", "--quiet")
    manifest, read, lines = tmp_path / "out" / "manifest.jsonl", 0, 0
    levels: dict[int, float] = {}
    while run.poll() is None:
        time.sleep(0.02)
        if manifest.exists():
            with manifest.open("rb") as stream:
                stream.seek(read)
                new = stream.read()
            read, lines = read + len(new), lines + new.count(b"\n")
            with suppress(OSError, IndexError):
                pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
                levels[lines] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert run.wait() == 0 and lines == 1000
    # The first items fill caches; pages are written after the last.
    at = np.array([(count, level) for count, level in levels.items() if 300 <= count < 1000])
    assert len(at) > 100
    slope = np.polyfit(at[:, 0], at[:, 1], 1)[0] * 100
    print(
        f"{at[0, 1]:.1f} MB after {at[0, 0]:.0f} items, {at[-1, 1]:.1f} MB after {at[-1, 0]:.0f}: "
    )
    print(f"{slope:.3f} MB per 100 items")
    assert slope < 1
