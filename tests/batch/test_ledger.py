"""The manifest: torn lines, several files, size of a record, speed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time

import pytest

from mmattn.batch.items import Item
from mmattn.batch.jobs import Shard
from mmattn.batch.ledger import (
    RECORD_BYTES,
    Last,
    Ledger,
    OutputError,
    Record,
    manifests,
    read_last,
    read_records,
    writing,
)


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
    for length in (10, 65_536, 65_537, 200_000):
        for before in (b"", record("a").line()):
            path.write_bytes(before + b"x" * length)
            with Ledger(tmp_path):
                assert path.read_bytes() == before


def test_damaged_lines_do_not_hide_the_others(tmp_path):
    whole = json.loads(record("a").line())
    lines = [record("a").line(), b"\xff\x00{", b"[]", b"3", b"[" * 100_000, b"\x00" * 600, b""]
    for key, value in (("id", 3), ("status", None), ("key", 1), ("file", 3), ("run", "1")):
        lines.append(json.dumps({**whole, "id": "damaged", key: value}).encode())
    lines += [json.dumps({"id": "half", "status": "ok"}).encode(), record("b").line(), b"torn"]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(line.rstrip(b"\n") for line in lines))
    assert sorted(read_last(tmp_path)) == ["a", "b"]
    with Ledger(tmp_path) as ledger:
        ledger.append([record("c")])
    assert sorted(read_last(tmp_path)) == ["a", "b", "c"]


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


def test_records_that_are_not_enough(tmp_path):
    wanted = item("a")
    path = tmp_path / wanted.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    good = {"file": wanted.file, "size": 5}
    with Ledger(tmp_path) as ledger:
        for status, more in (("failed", good), ("ok", {"size": 5}), ("skipped", good)):
            ledger.append([Record("a", status, wanted.key, **more)])
            assert not ledger.done(wanted), (status, more)
        assert not ledger.changed(item("a")), "the same content"
        ledger.append([Record("a", "failed", "other")])
        assert not ledger.changed(wanted), "it was never made"
        ledger.append([Record("a", "ok", wanted.key, file=wanted.file, size=5, sha256="0")])
        assert ledger.done(wanted) and not ledger.done(wanted, verify="full")
        assert not ledger.changed(item("b"))


def test_runs_and_attempts_are_counted(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.append([record("a", "failed")])
        ledger.append([record("a", "failed"), record("b", "skipped")])
        assert ledger.attempts(item("a")) == 2
    with Ledger(tmp_path) as ledger:
        assert ledger.run == 2
        ledger.append([record("a", "skipped"), record("b", "ok")])
        assert ledger.last["a"].status == "failed", "skipped says nothing about it"
        ledger.append([record("a"), Record("a", "ok", "other")])
    found = [(r["id"], r["status"], r["run"], r["attempt"]) for r in read_records(tmp_path)]
    assert found == [
        ("a", "failed", 1, 1),
        ("a", "failed", 1, 2),
        ("b", "skipped", 1, 0),
        ("a", "skipped", 2, 2),
        ("b", "ok", 2, 1),
        ("a", "ok", 2, 3),
        ("a", "ok", 2, 1),
    ]


def test_what_is_in_memory_is_what_is_read_again(tmp_path):
    facts = {"file": "f", "sha256": "s", "size": 3}
    with Ledger(tmp_path) as ledger:
        assert ledger.last == {} and ledger.run == 1
        ledger.append([record("a", **facts), record("b", "failed"), record("c", "skipped")])
        ledger.append([record("a", "skipped")])
        assert ledger.last["a"] == Last("ok", item("a").key, "f", "s", 3, 1, 1)
        assert ledger.last == read_last(tmp_path)


def test_records_of_one_call_are_there_together_or_not_at_all(tmp_path, monkeypatch):
    with Ledger(tmp_path) as ledger:
        ledger.append([record("a")])
        before, real = ledger.path.read_bytes(), os.write
        for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()):
            calls = []

            def write(descriptor, data, error=error, calls=calls):
                calls.append(1)
                if len(calls) == 3:
                    real(descriptor, bytes(data[:9]))
                    raise error
                return real(descriptor, data)

            with monkeypatch.context() as patch:
                patch.setattr(os, "write", write)
                with pytest.raises((OutputError, KeyboardInterrupt)):
                    ledger.append([record(name) for name in "bcd"])
            assert ledger.path.read_bytes() == before
            assert sorted(ledger.last) == ["a"]
        ledger.append([])
        ledger.append([record("b")])
    assert sorted(read_last(tmp_path)) == ["a", "b"]


def test_nothing_is_recorded_for_nobody(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.path.unlink()
        ledger.append([])
        with pytest.raises(OutputError, match=r"manifest\.jsonl was deleted or replaced"):
            ledger.append([record("a")])
        assert ledger.last == {}


def test_errors_of_the_disk_become_one_sentence():
    for error, reason in (
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left on device"),
        (OSError("odd"), "odd"),
        (OSError(), "OSError"),
    ):
        with pytest.raises(OutputError) as caught, writing("out/a.png"):
            raise error
        assert str(caught.value) == f"out/a.png cannot be written: {reason}"
        assert caught.value.__cause__ is error
    inner = OutputError("said already")
    with pytest.raises(OutputError) as caught, writing("out"):
        raise inner
    assert caught.value is inner
    with pytest.raises(ValueError, match="mine"), writing("out"):
        raise ValueError("mine")


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


def test_texts_are_cut_no_more_than_needed():
    assert json.loads(record(answer="x" * 3500).line())["answer"] == "x" * 3500
    fits = record(answer="x")
    room = 4096 - len(fits.line())
    whole = record(answer="x" * (room + 1))
    assert len(whole.line()) == RECORD_BYTES == 4096, "to the last byte"
    assert json.loads(record(answer="x" * (room + 2)).line())["answer"] == "x" * 1999 + "…"
    three = record(answer="x" * 1500, notes=["y" * 1500, "z" * 500] * 2, file="f" * 300)
    read = json.loads(three.line())
    assert read["answer"] == "x" * 499 + "…" and read["notes"][1] == "z" * 500
    many = record(notes=["n" * 90] * 60)
    read = json.loads(many.line())
    assert read["notes"] == ["n" * 90] * 20, "500 // 25"
    assert json.loads(record(params={"seeds": list(range(900))}).line())["params"]["seeds"] == [
        *range(80)
    ]


def test_a_record_that_no_cutting_makes_short_enough_loses_its_params():
    dark = "\x01" * 400  # six bytes each in JSON
    keys = ("prompt", "negative_prompt", "init_image", "init_image_sha256", "image", "image_sha256")
    panels = [{"prompt": dark, "image": dark, "image_sha256": dark}] * 16
    worst = record(
        dark[:200],
        file="f" * 120,
        sha256="0" * 64,
        pixels="0" * 64,
        params={**dict.fromkeys(keys, dark), "panels": panels},
        answer=dark,
        method=dark,
        notes=[dark] * 9,
        error={"class": dark, "message": dark},
    )
    raw = worst.line()
    assert len(raw) <= RECORD_BYTES
    read = json.loads(raw)
    assert read["params"] == {} and (read["id"], read["file"]) == (dark[:200], "f" * 120)
    assert read["answer"] == dark[:19] + "…" and len(read["notes"]) == 4


def test_names_that_are_no_text_can_be_recorded(tmp_path):
    message = os.fsdecode(b"there is no picture at caf\xe9.png")
    with Ledger(tmp_path) as ledger:
        ledger.append([record(error={"class": "E", "message": message})])
    assert next(read_records(tmp_path))["error"]["message"] == message.replace("\udce9", "?")


def test_empty_facts_are_left_out():
    assert json.loads(Record("a", "ok", "k").line()) == {
        "id": "a",
        "status": "ok",
        "key": "k",
        "seed": 0,
        "kind": "",
        "row": 0,
        "attempt": 1,
        "run": 0,
        "method": "dense",
    }


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
    for age, there in ((3500, True), (3700, False)):
        os.utime(mine, (time.time() - age,) * 2)
        with Ledger(tmp_path, Shard(0, 2)):
            assert mine.exists() == there
    mine.write_text("x")
    with Ledger(tmp_path):
        assert not mine.exists()
    assert all(path.exists() for path in keep)


def test_a_clock_that_jumps_does_not_delete_what_another_shard_writes(tmp_path, monkeypatch):
    mine = tmp_path / ".a.png.123.deadbeef.tmp"
    mine.write_text("x")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with Ledger(tmp_path, Shard(0, 2)):
        assert mine.exists()


def test_litter_that_another_run_deletes_first_is_fine(tmp_path, monkeypatch):
    name = ".a.png.123.deadbeef.tmp"
    monkeypatch.setattr(os, "walk", lambda folder: [(str(tmp_path), [], [name, name])])
    (tmp_path / name).write_text("x")
    with Ledger(tmp_path):
        assert not (tmp_path / name).exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), Ledger(tmp_path):
        raise RuntimeError
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(OutputError), Ledger(tmp_path):
        pass
    (tmp_path / "manifest.jsonl").rmdir()


def test_a_ledger_opens_and_closes_its_files_once(tmp_path):
    descriptors = len(os.listdir("/proc/self/fd"))
    with Ledger(tmp_path / "new" / "out") as ledger:
        assert (tmp_path / "new" / "out" / "manifest.jsonl").read_bytes() == b""
        ledger.close()
        # The number of a closed file belongs to whoever opens the next one.
        with (tmp_path / "mine").open("w") as stream, (tmp_path / "mine too").open("w") as more:
            ledger.close()
            stream.write("text")
            more.write("text")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert Ledger(tmp_path).run == 1 and Ledger(tmp_path).last == {}, "before it is opened"


def test_a_close_that_fails_is_no_error(tmp_path, monkeypatch):
    real = os.close

    def close(descriptor):
        real(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Ledger(tmp_path) as ledger:
        ledger.append([record("a")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            ledger.close()
    with Ledger(tmp_path) as ledger:
        assert sorted(ledger.last) == ["a"]


def test_records_are_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    with Ledger(tmp_path) as ledger:
        monkeypatch.setattr(os, "fsync", fsync)
        ledger.append([record("a"), record("b")])
        assert synced == [ledger.path.stat().st_size]


def test_manifests_come_in_a_fixed_order(tmp_path):
    for name in ("manifest.rank2.jsonl", "manifest.rank10.jsonl", "manifest.jsonl", "x.jsonl"):
        (tmp_path / name).write_text("")
    names = [path.name for path in manifests(tmp_path)]
    assert names == ["manifest.jsonl", "manifest.rank10.jsonl", "manifest.rank2.jsonl"]
