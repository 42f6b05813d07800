"""Damaged outputs and sidecars: what they say about themselves is a table, text, or a sentence."""

from __future__ import annotations

import json
import random
import struct

import mutator
import pytest
import torch
import trials
from PIL import Image

from mmattn.batch.inspecting import CHUNK, inspect_file
from mmattn.batch.items import Item
from mmattn.batch.rerunning import item_of
from mmattn.batch.writers import write_image, write_video

META = {
    "schema": 1,
    "id": "größer",
    "kind": "image",
    "seed": 5,
    "fingerprint": "f" * 16,
    "methods": [{"name": "tome", "r": 8}],
    "prompt": "a <b> cat",
    "steps": 4,
    "guidance": 2.5,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """What `mmattn batch` writes: pictures, clips and captions, each with the same metadata."""
    folder = tmp_path_factory.mktemp("seeds")
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    write_image(folder / "a.png", noise, META)
    write_video(folder / "a.mp4", [noise] * 3, fps=8, meta=META)
    caption = json.dumps({"answer": "a cat", "mmattn": META}).encode()
    return {
        "png": [(folder / "a.png").read_bytes()],
        "mp4": [(folder / "a.mp4").read_bytes(), _atoms(json.dumps(META).encode())],
        "json": [caption, json.dumps(META).encode()],
    }


def _box(name, body):
    return struct.pack(">I4s", 8 + len(body), name) + body


def _atoms(comment):
    """An MP4 of boxes alone, so that most changes hit one of them."""
    value = _box(b"data", bytes([0, 0, 0, 1, 0, 0, 0, 0]) + comment)
    inner = _box(b"hdlr", bytes(8)) + _box(
        b"ilst", _box(b"\xa9too", b"x") + _box(b"\xa9cmt", value)
    )
    meta = _box(b"meta", bytes(4) + inner)
    return (
        _box(b"ftyp", b"isom" + bytes(4)) + _box(b"moov", _box(b"udta", meta)) + _box(b"free", b"")
    )


def cases(kind, seeds, count, folder):
    path = folder / f"x.{kind}"
    for number in range(count):
        dice = random.Random(f"{kind} {number}")
        seed = dice.choice(seeds[kind])
        if kind == "json" and dice.random() < 0.6:
            data = json.dumps(mutator.mutate_table(json.loads(seed), dice)).encode()
        else:
            data = mutator.mutate(seed, seeds[kind], dice)
        path.write_bytes(mutator.mended_png(data) if kind == "png" else data)
        yield f"{kind} {number}", path


def inspect(path):
    found = inspect_file(path)
    assert sum(map(len, found["text"].values())) <= 4 * CHUNK
    json.dumps(found)
    return found


def again(path):
    """As `mmattn rerun` begins."""
    item = item_of(inspect(path).get("mmattn") or {}, path)
    assert isinstance(item, Item) and ".." not in item.file and len(item.key) == 16


@pytest.mark.parametrize("kind", ["png", "mp4", "json"])
def test_damaged_outputs(kind, seeds, tmp_path):
    found = trials.run(cases(kind, seeds, trials.share(100), tmp_path), inspect)
    assert found.read and found.refused, found


@pytest.mark.parametrize("kind", ["png", "mp4", "json"])
def test_damaged_outputs_are_items_or_refused(kind, seeds, tmp_path):
    found = trials.run(cases(kind, seeds, trials.share(100), tmp_path), again)
    assert found.read and found.refused, found


def test_damaged_sidecars(seeds, tmp_path):
    picture = tmp_path / "x.webp"
    Image.new("RGB", (4, 4)).save(picture)

    def sidecars():
        for name, path in cases("json", seeds, trials.share(100), tmp_path):
            path.replace(tmp_path / "x.webp.json")
            yield name, picture

    found = trials.run(sidecars(), inspect)
    assert found.read and found.refused, found
