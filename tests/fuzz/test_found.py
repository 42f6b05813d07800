"""What damaged files once broke, each as small as it can be."""

from __future__ import annotations

import json
import struct
import zlib

import media
import pytest
from typer.testing import CliRunner

from mmattn.batch.inspecting import CHUNK, inspect_file
from mmattn.cli import app
from mmattn.cli.common import read_config
from mmattn.errors import ConfigError

KNOWN = {"batch": {"method", "steps"}}


def _box(name, body):
    return struct.pack(">I4s", 8 + len(body), name) + body


@pytest.mark.parametrize("size", range(9))
def test_a_comment_that_is_shorter_than_its_head(size, tmp_path):
    inner = _box(b"ilst", _box(b"\xa9cmt", _box(b"data", bytes(size))))
    atoms = _box(b"moov", _box(b"udta", _box(b"meta", bytes(4) + inner)))
    path = tmp_path / "x.mp4"
    path.write_bytes(_box(b"ftyp", b"isom" + bytes(4)) + atoms + b"{}" * 100)
    # What follows the comment is none of it.
    with pytest.raises(ConfigError, match="a comment of -" if size < 8 else "is damaged"):
        inspect_file(path)


def test_many_small_texts_are_one_large_one(tmp_path):
    path = tmp_path / "x.png"
    packed = zlib.compress(b"x" * (CHUNK - 1))
    texts = [media.chunk(b"zTXt", b"key%d\0\0" % i + packed) for i in range(9000)]
    path.write_bytes(media.png(1, 1, 8, 0, b"", b"".join(texts)))
    assert path.stat().st_size < 2**20
    with pytest.raises(ConfigError, match="more than 1048576 characters of text"):
        inspect_file(path)


@pytest.mark.parametrize("value", ["text", 3, None, [1]])
def test_the_metadata_of_a_caption_is_a_table(value, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"answer": "a", "mmattn": value}))
    with pytest.raises(ConfigError, match="is no table"):
        inspect_file(path)


@pytest.mark.parametrize("kind", ["toml", "json"])
@pytest.mark.parametrize("data", [b"\xff\xfe", b"a = " + b"[" * 9000, b"[" * 99_000])
def test_configuration_files_that_are_no_text_or_too_deep(kind, data, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"is not valid {kind}"):
        read_config(path, "batch", KNOWN)


def test_methods_have_no_dates(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[[method]]\nname = 'tome'\nr = 2020-01-01\n")
    with pytest.raises(ConfigError, match="unknown type: Object of type date"):
        read_config(path, "batch", KNOWN)


def test_names_of_files_that_are_no_text_are_printed(tmp_path):
    (tmp_path / "a\udcff.json").write_text("{}")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a\udcff.json")])
    assert result.exit_code == 0 and "a\\udcff.json" in result.output
