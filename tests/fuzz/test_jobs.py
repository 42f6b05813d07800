"""Damaged job files: rows with problems, items, or a sentence about the file."""

from __future__ import annotations

import io
import json
import random
from pathlib import PurePosixPath

import mutator
import pytest
import trials
from PIL import Image

from mmattn.batch.jobs import Jobs
from mmattn.batch.rows import read_rows

ROWS = [
    {"id": "a", "prompt": 'x, "y"\nz', "steps": 3, "guidance": 2.5, "seed": 7},
    {"prompt": "größer", "n": 2, "width": 64, "height": 64, "method": "tome:r=4"},
    {"prompt": "clip", "num_frames": 5, "fps": 8, "method": {"name": "tome", "r": 4}},
    {"panels": ["one", {"prompt": "two"}], "prompt": "[TAG] both", "kind": "imageset"},
    {"kind": "caption", "image": "ok.png", "prompt": "what ?", "max_new_tokens": 9},
    {"prompt": "on", "init_image": "ok.png", "strength": 0.5, "method": ["tome", "identity"]},
]
PANELS = [{"prompt": "one"}, {"prompt": "two"}]
PRINTS = dict.fromkeys(("image", "video", "imageset", "caption"), "model")


def _csv():
    head = ["id", "prompt", "steps", "seed", "method", "panels", "kind", "guidance"]
    lines = [",".join(head)]
    for row in ROWS[:4]:
        cells = [row.get(key, "") for key in head]
        texts = [c if isinstance(c, str) else json.dumps(c) for c in cells]
        lines.append(",".join('"' + text.replace('"', '""') + '"' for text in texts))
    return "\r\n".join(lines).encode()


def _parquet(**more):
    pa = pytest.importorskip("pyarrow", reason="parquet needs the extra [batch]")
    import pyarrow.parquet as pq

    keys = ("prompt", "kind", "steps", "seed", "guidance", "n")
    rows = [{key: row.get(key) for key in keys} for row in ROWS[:2] * 6]
    for row in rows[::3]:
        row |= {"prompt": "both", "kind": "imageset", "panels": PANELS}
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, **more)
    return stream.getvalue()


SEEDS = {
    "jsonl": [
        "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS[:3]).encode(
            "utf-8-sig"
        ),
    ],
    "csv": [_csv(), b"prompt\nred\nblue\n"],
    "txt": ["a cat\n\n  ein größeres Haus \r\n".encode(), b"\xef\xbb\xbfone\ntwo"],
}


def cases(kind, seeds, count, folder):
    Image.new("RGB", (8, 8)).save(folder / "ok.png")
    path = folder / f"jobs.{kind}"
    for number in range(count):
        dice = random.Random(f"{kind} {number}")
        if kind == "jsonl" and dice.random() < 0.6:
            row = mutator.mutate_table(dice.choice(ROWS), dice)
            data = b'{"prompt": "fine"}\n' + json.dumps(row).encode()
        else:
            data = mutator.mutate(dice.choice(seeds), seeds, dice)
        path.write_bytes(data)
        yield f"{kind} {number}", path


def check(path):
    """Everything that `mmattn batch --dry-run` does with a file."""
    # With models that are not embedded, so that no weights are asked for.
    kinds = dict.fromkeys(PRINTS, False)
    jobs = Jobs(path, {"steps": 2}, kinds=kinds, allow_extra=True)
    found = jobs.check()
    items = list(jobs.items(PRINTS))
    assert len(items) == sum(found.items.values())
    for item in items:
        place = PurePosixPath(item.file)
        assert not place.is_absolute() and ".." not in place.parts and len(place.name) < 100
        assert len(item.key) == 16 and item.group and item.cost >= 0
        json.dumps(item.params)
    assert len({item.file for item in items}) == len(items)


def rows(path):
    for row in read_rows(path):
        assert row.line > 0 and (row.problem or row.cells is not None)


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_text(kind, tmp_path):
    found = trials.run(cases(kind, SEEDS[kind], trials.share(150), tmp_path), check)
    assert found.read and found.refused, found


def test_damaged_parquet(tmp_path):
    seeds = [_parquet(), _parquet(compression="none", use_dictionary=False, row_group_size=4)]
    seeds += [_parquet(compression="zstd", data_page_version="2.0", write_page_checksum=True)]
    found = trials.run(cases("parquet", seeds, trials.share(150), tmp_path), check)
    assert found.read and found.refused, found
