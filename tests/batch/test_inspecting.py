"""What files say about themselves: read as data, with limits; and made again from it."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmattn.batch import metadata
from mmattn.batch.inspecting import CHUNK, inspect_file
from mmattn.batch.models import Models
from mmattn.batch.rerunning import item_of, rerun
from mmattn.errors import ConfigError, MmattnError


@pytest.fixture
def made(bench):
    rows = [{"id": "a", "prompt": "größer <b>"}, {"id": "v", "prompt": "x", "num_frames": 3}]
    bench.run(bench.write(rows))
    return {record["id"]: bench.folder / "out" / record["file"] for record in bench.records()}


def test_png_and_mp4_tell_all(made, bench):
    png, mp4 = inspect_file(made["a"]), inspect_file(made["v"])
    assert (png["format"], mp4["format"]) == ("png", "mp4")
    for found, name in ((png, "a"), (mp4, "v")):
        meta = found["mmattn"]
        item = next(i for i in bench.items(bench.folder / "jobs.jsonl") if i.id == name)
        assert item_of(meta, made[name]).key == item.key
        assert found["sha256"] == bench.hashes()[name]
    assert png["text"]["parameters"].startswith("größer <b>\nSteps: 2, Seed: ")
    # The comment inside the container is enough.
    made["v"].with_name("v.mp4.json").unlink()
    assert inspect_file(made["v"])["mmattn"] == mp4["mmattn"]


def test_a_sidecar_serves_where_the_file_has_nothing(tmp_path):
    path = tmp_path / "c.webp"
    Image.new("RGB", (4, 4)).save(path)
    assert "mmattn" not in inspect_file(path)
    (tmp_path / "c.webp.json").write_text('{"id": "c"}')
    assert inspect_file(path)["mmattn"] == {"id": "c"}


def text_png(path, key, text, *, packed=False):
    info = PngInfo()
    info.add_text(key, text, zip=packed)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_hostile_metadata_is_refused_with_a_sentence(tmp_path):
    deep = '{"a": ' + "[" * 500 + "]" * 500 + "}"
    cases = {
        "limit": text_png(tmp_path / "1.png", "mmattn", "x" * (CHUNK + 1)),
        "longer than": text_png(tmp_path / "2.png", "mmattn", "x" * 10**7, packed=True),
        "nested 501 deep": text_png(tmp_path / "3.png", "mmattn", deep),
        "is damaged": text_png(tmp_path / "4.png", "mmattn", "{"),
        "is no table": text_png(tmp_path / "5.png", "mmattn", "[1]"),
    }
    torn = tmp_path / "6.png"
    torn.write_bytes(cases["limit"].read_bytes()[:40])
    cases["truncated"] = torn
    wrong = tmp_path / "7.png"
    data = text_png(wrong, "mmattn", '{"id": 1}').read_bytes()
    wrong.write_bytes(data.replace(b'{"id": 1}', b'{"id": 2}'))
    cases["checksum"] = wrong
    html = tmp_path / "8.png"
    html.write_text("<html>")
    cases["no PNG"] = html
    cases["no file"] = tmp_path / "none.png"
    many = tmp_path / "9.png"
    empty = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    many.write_bytes(data[:33] + empty * 20_000)
    cases["chunks"] = many
    for part, path in cases.items():
        with pytest.raises(ConfigError, match=part):
            inspect_file(path)


def test_mutated_files_never_crash_the_reader(made, tmp_path):
    dice = random.Random(4)
    for name, path in made.items():
        whole = path.read_bytes()
        target = tmp_path / ("m" + path.suffix)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(dice.randint(1, 10)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            target.write_bytes(data[: dice.randint(12, len(data))])
            with contextlib.suppress(MmattnError):
                assert inspect_file(target)["format"] in ("png", "mp4", "json", "webp"), name


def test_a_file_is_made_again_byte_for_byte(bench, tmp_path, monkeypatch):
    rows = [
        {"id": "a", "prompt": "x", "negative_prompt": "y", "guidance": 2},
        {"id": "v", "prompt": "x", "num_frames": 3},
    ]
    bench.run(bench.write(rows))
    files = [bench.folder / "out" / record["file"] for record in bench.records()]
    monkeypatch.setattr(Models, "named", staticmethod(lambda *a, **k: bench.models()))
    monkeypatch.setattr("mmattn.batch.models.Source.fingerprint", lambda self: "fake-model")
    for path in files:
        found = rerun(path, tmp_path / "again", "fake")
        assert found["identical"] and found["status"] == "ok"
    # A changed seed shows.
    meta = inspect_file(files[0])["mmattn"]
    info = PngInfo()
    info.add_itxt("mmattn", json.dumps({**meta, "seed": meta["seed"] + 1}))
    other = tmp_path / "other.png"
    with Image.open(files[0]) as image:
        image.save(other, pnginfo=info)
    assert not rerun(other, tmp_path / "again", "fake")["identical"]


def test_a_file_cannot_make_us_do_more_than_a_row(made, tmp_path):
    meta = inspect_file(made["a"])["mmattn"]
    wrong = {
        "schema": {"schema": 99},
        "steps must be": {"steps": 10**9},
        "seed is missing": {"seed": "1"},
        "unknown kind": {"kind": "shell"},
        "unknown key": {"command": "x"},
        "unknown method": {"methods": [{"name": "os.system"}]},
        "local file": {"init_image": "http://127.0.0.1/x.png"},
    }
    for part, change in wrong.items():
        with pytest.raises(ConfigError, match=part):
            item_of({**meta, **change}, made["a"])


def test_models_are_never_fetched_because_a_file_says_so(made, tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        rerun(made["a"], tmp_path)
    with pytest.raises(ConfigError, match="is not the model"):
        rerun(made["a"], tmp_path, "t2i")
    assert metadata.SCHEMA == 1
