"""The kernel itself refuses: strace makes one system call of a run fail, below Python and its retries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

# Without torch, and with names of temporary files that can be told beforehand.
RUN = """
import os, secrets, sys
from pathlib import Path
import numpy as np
from mmattn.batch import writers
from mmattn.batch.items import Item
from mmattn.batch.ledger import Ledger, OutputError, Record, writing
from mmattn.batch.limits import sha256_of

secrets.token_hex, os.getpid = lambda n: "0" * 2 * n, lambda: 1
out = Path("out").absolute()
try:
    with Ledger(out) as ledger:
        for i in range(3):
            item = Item(f"item-{i}", "image", i, {}, (), "dense", "m")
            if ledger.done(item, verify="full"):
                continue
            with writing(item.file):
                pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
                file = writers.write_image(out / item.file, pixels, {"seed": i})
                facts = {"sha256": sha256_of(file), "size": file.stat().st_size}
            ledger.append([Record(item.id, "ok", item.key, file=item.file, **facts)])
except OutputError as error:
    sys.exit(f"OutputError: {error}")
"""
FILE = "images/59/item-1.png"
TEMPORARY = "images/59/.item-1.png.1.00000000.tmp"
# What fails: the calls, the path they are about, and which of them.
POINTS = {
    "make the folder": ("mkdir,mkdirat", "", 1),
    "open the lock": ("openat", ".lock", 1),
    "lock": ("flock", ".lock", 1),
    "empty the lock": ("ftruncate", ".lock", 1),
    "write into the lock": ("write", ".lock", 1),
    "open the manifest": ("openat", "manifest.jsonl", 1),
    "sync the manifest's name": ("fsync", "", 1),
    "make a shelf": ("mkdir,mkdirat", "images/59", 1),
    "create a file": ("openat", TEMPORARY, 1),
    "write a file": ("write", TEMPORARY, 1),
    "close a file": ("close", TEMPORARY, 2),
    "sync a file": ("fsync", TEMPORARY, 1),
    "rename a file": ("rename,renameat,renameat2", TEMPORARY, 1),
    "sync a file's name": ("fsync", "images/59", 1),
    "read a file back": ("openat", FILE, 1),
    "write a record": ("write", "manifest.jsonl", 2),
    "sync a record": ("fsync", "manifest.jsonl", 2),
    "close the manifest": ("close", "manifest.jsonl", 1),
}


def run(folder: Path, *before: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*before, sys.executable, "-c", RUN],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").rglob("*.png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / FILE).is_file() and len(pictures(folder)) == 3
    if run(folder, "strace", "-qq", "-o", "log").returncode:
        pytest.skip("this system does not let strace trace")
    return pictures(folder)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EINTR"])
@pytest.mark.parametrize("point", POINTS)
def test_one_system_call_fails(tmp_path, whole, point, error):
    calls, path, when = POINTS[point]
    inject = ("-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}")
    where = str(tmp_path / "out" / path).rstrip("/")
    done = run(tmp_path, "strace", "-f", "-qq", "-o", "log", *inject, "-P", where)
    assert (tmp_path / "log").read_text().count("INJECTED") == 1
    if done.returncode:
        assert done.stderr.startswith("OutputError: ") and "cannot be written" in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        # Python makes interrupted calls again; records were synced before the manifest is closed.
        assert error == "EINTR" or point == "close the manifest"
    assert pictures(tmp_path).items() <= whole.items(), "whole or not there"
    manifest = tmp_path / "out" / "manifest.jsonl"
    assert not manifest.exists() or manifest.read_bytes()[-1:] in (b"", b"\n")
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(tmp_path).returncode == 0
    assert pictures(tmp_path) == whole
    ids = [json.loads(line)["id"] for line in manifest.read_text().splitlines()]
    assert ids == ["item-0", "item-1", "item-2"]
