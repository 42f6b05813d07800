"""The manifest: torn lines, several files, size of a record, speed."""

from __future__ import annotations

import hashlib
import json
import os
import time

import pytest

from mmattn.batch.items import Item
from mmattn.batch.jobs import Shard
from mmattn.batch.ledger import RECORD_BYTES, Ledger, Record, read_last, read_records


def item(name="a", **params):
    return Item(name, "image", 1, params, (), "dense", "m")


def record(name="a", status="ok", **more):
    return Record(name, status, item(name).key, **more)


def test_a_torn_last_line_is_dropped_and_never_glued(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.append([record("a"), record("b")])
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):
        path.write_bytes(whole[:-cut])
        assert sorted(read_last(tmp_path)) == ["a"], "readers ignore it, whoever they are"
        with Ledger(tmp_path) as ledger:
            ledger.append([record("c")])
        assert sorted(read_last(tmp_path)) == ["a", "c"]
        assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_bytes(b"no line at all")
    with Ledger(tmp_path):
        assert path.read_bytes() == b""


def test_damaged_lines_do_not_hide_the_others(tmp_path):
    lines = [b'{"id": "a", "status": "ok"}', b"\xff\x00{", b"[]", b'{"id": 3}', b'{"id": "b"}', b""]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(lines))
    assert sorted(read_last(tmp_path)) == ["a", "b"]


def test_the_highest_run_counts_whatever_the_clock_says(tmp_path):
    with Ledger(tmp_path, Shard(1, 2)) as ledger:
        ledger.append([record("a", "failed")])
    with Ledger(tmp_path) as ledger:
        assert ledger.run == 2
        ledger.append([record("a", "ok", sha256="x")])
    with Ledger(tmp_path, Shard(0, 2)) as ledger:
        assert ledger.run == 3
        ledger.append([record("a", "skipped")])
    # manifest.rank1 is read last, and its older record must not win.
    assert read_last(tmp_path)["a"].sha256 == "x"
    with Ledger(tmp_path) as ledger:
        ledger.append([record("a", "failed")])
    assert read_last(tmp_path)["a"].status == "failed"


def test_done_needs_the_same_content_and_the_file(tmp_path):
    wanted = item("a", steps=2)
    path = tmp_path / wanted.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    good = {"file": wanted.file, "size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    with Ledger(tmp_path) as ledger:
        assert not ledger.done(wanted) and ledger.attempts(wanted) == 0
        ledger.append([Record("a", "failed", wanted.key)])
        ledger.append([Record("a", "skipped", wanted.key)])
        ledger.append([Record("a", "ok", wanted.key, **good)])
        assert ledger.done(wanted) and ledger.done(wanted, verify="full")
        assert ledger.attempts(wanted) == 2
        other = item("a", steps=3)
        assert not ledger.done(other) and ledger.changed(other) and ledger.attempts(other) == 0
        path.write_bytes(b"12346")
        assert ledger.done(wanted) and not ledger.done(wanted, verify="full")
        path.write_bytes(b"1234")
        assert not ledger.done(wanted)
        path.unlink()
        assert not ledger.done(wanted)
        assert [i.id for i in ledger.todo([wanted, item("b")])] == ["a", "b"]


def test_a_record_is_one_short_line(tmp_path):
    long = "größer " * 3000
    params = {"prompt": long, "negative_prompt": long, "panels": [{"prompt": long}] * 16}
    raw = record(
        "i" * 200,
        params=params,
        answer=long,
        error={"class": "E", "message": long},
        notes=[long] * 9,
    ).line()
    assert len(raw) <= RECORD_BYTES and raw.count(b"\n") == 1
    read = json.loads(raw)
    assert read["id"] == "i" * 200 and read["params"]["prompt"].startswith("größer")
    with Ledger(tmp_path) as ledger:
        ledger.append([record(params={"prompt": "two\nlines\u2028three"})])
    assert next(read_records(tmp_path))["params"]["prompt"] == "two\nlines\u2028three"


def test_a_hundred_thousand_records_resume_in_two_seconds(tmp_path):
    items = [item(f"item-{i}", prompt=f"a picture of number {i}", steps=20) for i in range(100_000)]
    with (tmp_path / "manifest.jsonl").open("wb") as stream:
        for one in items:
            done = Record(
                one.id,
                "ok",
                one.key,
                file=one.file,
                size=9,
                sha256="0" * 64,
                pixels="1" * 64,
                params=one.params,
                run=1,
                wall_s=1.5,
                peak_mb=900.0,
                counters={"step_checks": 20},
            )
            stream.write(done.line())
    for one in items:
        del one.__dict__["key"]  # computed anew below, as in a real run
    start = time.process_time()
    with Ledger(tmp_path) as ledger:
        scanned = time.process_time() - start
        assert len(ledger.last) == 100_000
        start = time.process_time()
        left = sum(1 for _ in ledger.todo(items))
        joined = time.process_time() - start
    assert left == 100_000, "the files are not there"
    print(f"scan {scanned:.2f} s, anti-join {joined:.2f} s of CPU time")
    assert scanned < 2
    assert joined < 2


def test_litter_of_killed_runs_is_removed_and_nothing_else(tmp_path):
    shelf = tmp_path / "images" / "ab"
    shelf.mkdir(parents=True)
    mine = shelf / ".a.png.123.deadbeef.tmp"
    keep = [shelf / "a.tmp", shelf / ".hidden", tmp_path / ".x.tmp"]
    for path in (mine, *keep):
        path.write_text("x")
    # Another shard may be in the middle of this one.
    with Ledger(tmp_path, Shard(0, 2)):
        assert mine.exists()
    old = time.time() - 7200
    os.utime(mine, (old, old))
    with Ledger(tmp_path, Shard(0, 2)):
        assert not mine.exists()
    mine.write_text("x")
    with Ledger(tmp_path):
        assert not mine.exists()
    assert all(path.exists() for path in keep)


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), Ledger(tmp_path):
        raise RuntimeError
    with Ledger(tmp_path) as ledger:
        ledger.close()
        ledger.close()
