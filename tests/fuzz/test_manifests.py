"""Damaged manifests: what is whole counts, the rest is left out, and a run can go on."""

from __future__ import annotations

import json
import random

import mutator
import trials

from mmattn.batch.items import Item
from mmattn.batch.ledger import Ledger, Record, read_records
from mmattn.batch.pages import finish

ITEM = Item("a", "image", 1, {"prompt": "x"}, (), "dense", "model")


def _records():
    ok = {
        "key": ITEM.key,
        "kind": "image",
        "size": 3,
        "sha256": "0" * 64,
        "params": {"prompt": "<x>"},
    }
    return [
        Record("a", "ok", file=ITEM.file, run=1, **ok),
        Record("b", "failed", ITEM.key, run=1, error={"class": "E", "message": "m"}, notes=["n"]),
        Record("v", "skipped", ITEM.key, run=2, attempt=2, counters={"calls": 3}),
        Record("c", "ok", file="captions/00/c.json", run=2, answer="a cat", wall_s=0.5, **ok),
    ]


def cases(count, folder):
    records = _records()
    lines = [record.line() for record in records]
    seeds = [b"".join(lines), b"".join(lines[::-1])]
    path = folder / "manifest.jsonl"
    for number in range(count):
        dice = random.Random(f"manifest {number}")
        if dice.random() < 0.7:
            table = mutator.mutate_table(json.loads(dice.choice(lines)), dice)
            data = lines[0] + json.dumps(table).encode() + b"\n" + lines[1]
        else:
            data = mutator.mutate(dice.choice(seeds), seeds, dice)
        path.write_bytes(data)
        yield f"manifest {number}", folder


def go_on(folder):
    """Open, ask, and add a record, as a run that resumes."""
    with Ledger(folder) as ledger:
        ledger.done(ITEM)
        ledger.changed(ITEM)
        ledger.append([Record("new", "ok", ITEM.key)])
    assert list(read_records(folder))[-1]["id"] == "new"


def test_damaged_manifests(tmp_path):
    found = trials.run(cases(trials.share(100), tmp_path), go_on)
    assert found.read == trials.share(100), found


def test_pages_of_damaged_manifests(tmp_path):
    found = trials.run(cases(trials.share(100), tmp_path), finish)
    assert found.read == trials.share(100), found
