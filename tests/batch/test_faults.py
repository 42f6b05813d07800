"""Every call that reaches the disk fails once, in every way: nothing is torn, and a rerun ends the same."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pytest
import typer.main
from PIL import Image

from mmattn import cli
from mmattn.batch.ledger import OutputError, read_last
from mmattn.batch.limits import sha256_of
from mmattn.batch.models import Models, Source
from mmattn.cli import common

ROWS = [{"id": f"item-{i}", "prompt": f"picture number {i}"} for i in range(3)]
LITTER = "out/images/ab/.x.png.1.deadbeef.tmp"

NOSPC, IO, INTR = errno.ENOSPC, errno.EIO, errno.EINTR
LATE = -errno.EIO
"""The call does its work and fails all the same, as when a server answers too late."""
SHORT = 0
"""A write takes only a part."""

Plan = Callable[[int, str], int | None]


class Disk:
    """Hears every call that reaches files in a folder, and lets those fail that `plan` says.

    Events read ``<call> <path>``, with paths that start at the folder. A write that fails has written half.
    """

    def __init__(self, patch, folder: Path, plan: Plan):
        self.folder, self.plan, self.events, self.hits = folder, plan, [], 0
        calls = [
            "open",
            "close",
            "write",
            "fsync",
            "replace",
            "mkdir",
            "unlink",
            "ftruncate",
            "stat",
        ]
        for owner, name in [*((os, call) for call in calls), (fcntl, "flock"), (io, "open")]:
            patch.setattr(owner, name, self._wrapped(owner, name, getattr(owner, name)))

    def _where(self, subject) -> str | None:
        if isinstance(subject, int):
            try:
                subject = os.readlink(f"/proc/self/fd/{subject}")
            except OSError:
                return None
        path = os.path.relpath(os.fsdecode(subject), self.folder)
        return path if path == "." or path.split("/")[0] == "out" else None

    def _wrapped(self, owner, name, real):
        def call(subject, *more, **named):
            where = self._where(more[0] if name == "replace" else subject)
            if where is None:
                return real(subject, *more, **named)
            verb = name
            if owner is io:
                verb = "read"
            elif name == "open" and more[0] & os.O_EXCL:
                verb = "create"
            event = f"{verb} {where}"
            number = self.plan(len(self.events), event)
            self.events.append(event)
            if number is None:
                return real(subject, *more, **named)
            self.hits += 1
            if name == "write":
                (data,) = more
                taken = real(subject, bytes(data if number < 0 else data[: len(data) // 2]))
                if number == SHORT:
                    return taken
            elif number < 0 or name == "close":
                done = real(subject, *more, **named)
                if name == "open":
                    # Nobody else can close what was never handed out.
                    done.close() if owner is io else os.close(done)
            raise OSError(abs(number), os.strerror(abs(number)))

        return call


def nth(pattern: str, number: int, *, skip: int = 0) -> Plan:
    """Fail the first event that matches after `skip` others did."""
    left = [skip]

    def plan(index, event):
        if re.fullmatch(pattern, event):
            left[0] -= 1
            return number if left[0] == -1 else None
        return None

    return plan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Power cuts cannot be played here, so nothing has to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def command(bench, monkeypatch, capsys):
    """``mmattn batch`` on the light pipeline: exit code and what it said on stderr."""
    monkeypatch.setattr(Models, "named", staticmethod(lambda *names, **more: bench.models()))
    monkeypatch.setattr(Source, "files", lambda self: {"weights": "0" * 64})
    monkeypatch.setattr(Source, "fingerprint", lambda self, files: "fake-model")
    monkeypatch.setattr(common, "quiet_libraries", lambda: None)
    monkeypatch.setattr(cli, "app", built())
    monkeypatch.chdir(bench.folder)

    def call(rows=ROWS):
        path = bench.write(rows)
        code = cli.main(["batch", str(path), "--out", "out", "--steps", "2", "--quiet"])
        return code, capsys.readouterr().err

    return call


@lru_cache
def built():
    """The command line, built once: that takes longer than a run here."""
    return typer.main.get_command(cli.app)


@lru_cache
def expected() -> dict[str, str]:
    """What an uninterrupted run makes; filled by the first test that asks."""
    return {}


def check_whole(folder: Path, *, torn: bool = False) -> None:
    """Whatever stands under its own name is complete, and every ok record tells the truth.

    With `torn` the end of the manifest is not looked at.
    """
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl" and not torn:
            text = path.read_text()
            assert not text or text.endswith("\n"), path.name
            assert all(json.loads(line) for line in text.splitlines())
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")
        elif path.suffix == ".csv":
            assert path.read_text().startswith("id,") and path.read_text().endswith("\n")
        else:
            assert path.suffix in (".mp4", ".jsonl"), path
    for entry in read_last(folder).values():
        if entry.status == "ok":
            assert sha256_of(folder / entry.file) == entry.sha256


def check_complete(bench, count: int) -> None:
    """Every item once ok, with the hashes of a run that was left alone; no litter."""
    out = bench.folder / "out"
    check_whole(out)
    if not expected():
        bench.run(bench.write(ROWS), "whole")
        expected().update(bench.hashes("whole"))
    assert bench.hashes() == {name: expected()[name] for name in bench.hashes()}
    ok = [record["id"] for record in bench.records() if record["status"] == "ok"]
    assert len(ok) == len(set(ok)) == count, "exactly once each"
    assert not list(out.rglob("*.tmp"))
    made = [path for path in (out / "images").rglob("*") if path.is_file()]
    assert len(made) == count


ITEM = r"out/images/../"
# What fails: the event, how many like it come before, and how many items are recorded by then.
POINTS = {
    "make the folder": ("mkdir out", 0, 0),
    "sync its name": (r"fsync \.", 0, 0),
    "open the lock": (r"open out/\.lock", 0, 0),
    "lock": (r"flock out/\.lock", 0, 0),
    "empty the lock": (r"ftruncate out/\.lock", 0, 0),
    "write into the lock": (r"write out/\.lock", 0, 0),
    "delete litter": (r"unlink out/images/ab/\.x.*", 0, 0),
    "read the manifest": ("read out/manifest.jsonl", 0, 0),
    "open the manifest": ("open out/manifest.jsonl", 0, 0),
    "sync the manifest's name": ("fsync out", 0, 0),
    "cut a torn line": ("ftruncate out/manifest.jsonl", 0, 0),
    "create run.json": (r"create out/\.run\.json.*", 0, 0),
    "write run.json": (r"write out/\.run\.json.*", 0, 0),
    "rename run.json": (r"replace out/run\.json", 0, 0),
    "create the first file": (rf"create {ITEM}\..*", 0, 0),
    "make a shelf": ("mkdir out/images/..", 1, 1),
    "sync a shelf's name": ("fsync out/images", 1, 1),
    "create a file": (rf"create {ITEM}\..*", 1, 1),
    "write a file": (rf"write {ITEM}\..*", 1, 1),
    "close a file": (rf"close {ITEM}\..*", 4, 1),
    "sync a file": (rf"fsync {ITEM}\..*", 1, 1),
    "rename a file": (rf"replace {ITEM}.*png", 1, 1),
    "sync a file's name": ("fsync out/images/..", 1, 1),
    "read a file back": (rf"read {ITEM}.*png", 1, 1),
    "look for the manifest": ("stat out/manifest.jsonl", 2, 1),
    "write a record": ("write out/manifest.jsonl", 1, 1),
    "sync a record": ("fsync out/manifest.jsonl", 1, 1),
    "write the contact sheet": (r"write out/\.index\.html.*", 0, 3),
    "rename the table": (r"replace out/results\.csv", 0, 3),
    "sync the list of failures": (r"fsync out/\.failures\.jsonl.*", 0, 3),
}
CASES = [(point, number) for point in POINTS for number in (NOSPC, IO, INTR, LATE)]
# A folder that is there is made, whatever mkdir said.
CASES = [(p, n) for p, n in CASES if n != LATE or p not in ("make the folder", "make a shelf")]
CASES += [(point, SHORT) for point in POINTS if point.startswith("write ")]
NAMES = {NOSPC: "ENOSPC", IO: "EIO", INTR: "EINTR", LATE: "late EIO", SHORT: "short"}


@pytest.mark.parametrize(
    ("point", "number"), CASES, ids=[f"{point}-{NAMES[number]}" for point, number in CASES]
)
def test_one_call_fails(bench, command, monkeypatch, point, number):
    pattern, skip, made = POINTS[point]
    out = bench.folder / "out"
    torn = point in ("delete litter", "read the manifest", "cut a torn line")
    if torn:
        # A run that was killed left these.
        (bench.folder / LITTER).parent.mkdir(parents=True)
        (bench.folder / LITTER).write_bytes(b"half")
        (out / "manifest.jsonl").write_bytes(b'{"id": "half')
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        disk = Disk(patch, bench.folder, nth(pattern, number, skip=skip))
        code, said = command()
    assert disk.hits == 1, "\n".join(disk.events)
    assert len(os.listdir("/proc/self/fd")) == descriptors, "everything is closed"
    if number == SHORT:
        assert (code, said) == (0, "")
        check_complete(bench, 3)
        return
    assert code == (3 if made else 4)
    assert f"cannot be written: {os.strerror(abs(number))}" in said and said.count("\n") == 1
    assert ("the same command goes on from here" in said) or not made
    check_whole(out, torn=torn)
    if not torn and number != LATE:
        assert not list(out.rglob("*.tmp")), "cleaned up at once, not by the next run"
    assert len(bench.hashes()) == made
    assert command() == (0, "")
    check_complete(bench, 3)


def test_a_close_that_fails_after_the_records_were_synced_changes_nothing(
    bench, command, monkeypatch
):
    for pattern in (r"close out/manifest\.jsonl", r"close out/\.lock"):
        with monkeypatch.context() as patch:
            disk = Disk(patch, bench.folder, nth(pattern, IO))
            assert command() == (0, "")
        assert disk.hits == 1
        assert command() == (0, ""), "and the folder is free again"
    check_complete(bench, 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": 5}', "\xff"])
def test_a_damaged_list_of_runs_is_begun_anew(bench, command, text):
    path = bench.folder / "out" / "run.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    assert command() == (0, "")
    assert [run["run"] for run in json.loads(path.read_text())["runs"]] == [1]


CLIP = [{"id": "clip", "prompt": "a clip", "num_frames": 2, "kind": "video"}]


def heard(bench, path) -> list[str]:
    """The calls of a run that goes well."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, bench.folder, lambda index, event: None)
        bench.run(path)
    return disk.events


def sweep(bench, path, plan: Plan) -> None:
    """One run under `plan`, then one that must end with everything in place."""
    out = bench.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, bench.folder, plan)
        with suppress(OutputError):
            bench.run(path)
    assert disk.hits
    # Where even cutting the manifest was refused, the next run does it.
    check_whole(out, torn=disk.hits > 1)
    summary = bench.run(path)
    assert (summary.failed, summary.stopped, summary.planned) == (0, None, 1)
    check_whole(out)
    assert not list(out.rglob("*.tmp"))


def test_each_call_in_turn_fails(bench):
    """No list of points to forget one from: whatever is called, one after the other."""
    path = bench.write(CLIP)
    events, hashes = heard(bench, path), bench.hashes()
    assert len(hashes) == 1 and len(events) > 90
    for index in range(len(events)):
        number = (NOSPC, IO, INTR, LATE)[index % 4]
        sweep(bench, path, lambda at, event, i=index, n=number: n if at == i else None)
        assert bench.hashes() == hashes, events[index]


CHANGES = ("create", "write", "mkdir", "replace", "unlink", "ftruncate")


def test_from_each_change_on_the_disk_is_read_only(bench):
    """As when a file system is remounted after an error: cleaning up is refused too."""
    path = bench.write(CLIP)
    events, hashes = heard(bench, path), bench.hashes()
    changes = [i for i, event in enumerate(events) if event.split()[0] in CHANGES]
    assert len(changes) > 20
    for first in changes:

        def plan(at, event, first=first):
            return errno.EROFS if at >= first and event.split()[0] in CHANGES else None

        sweep(bench, path, plan)
        assert bench.hashes() == hashes, events[first]


def test_the_order_in_which_things_reach_the_disk(bench):
    """Data before its name, the name before the record: a power cut between two of them loses nothing."""
    looking = ("stat", "open", "close", "unlink")
    events = heard(bench, bench.write(ROWS[:1]))
    acts = [
        re.sub(r"\.\d+\.[0-9a-f]{8}\.tmp", "", event)
        for event in events
        if not event.startswith(looking)
    ]
    file = bench.items(bench.folder / "jobs.jsonl")[0].file
    shelf = f"out/{Path(file).parent}"
    hidden = f"{shelf}/.{Path(file).name}"
    start = ["mkdir out", "fsync .", "flock out/.lock", "ftruncate out/.lock", "write out/.lock"]
    folders = ["mkdir out/images", "fsync out", f"mkdir {shelf}", "fsync out/images"]
    data = [f"create {hidden}", f"write {hidden}", f"fsync {hidden}"]
    name = [f"replace out/{file}", f"fsync {shelf}", f"read out/{file}"]
    record = ["write out/manifest.jsonl", "fsync out/manifest.jsonl"]
    assert acts[:18] == [*start, "fsync out", *folders, *data, *name, *record]
    pages = [event.split("/")[-1] for event in acts[18:] if event.startswith("replace")]
    assert pages == ["index.html", "results.csv", "failures.jsonl"]
