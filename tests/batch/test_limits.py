"""Pictures and JSON of strangers: a sentence or correct pixels, quickly, whatever the bytes are."""

from __future__ import annotations

import io
import json
import random
import struct
import time
import zlib

import pytest
import torch
from PIL import Image

from mmattn.batch.limits import DEPTH, check_picture, open_picture, parse_json
from mmattn.batch.rows import read_rows
from mmattn.errors import ConfigError, MmattnError
from mmattn.measuring import measured


def encoded(image, kind="PNG", **more):
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth=1, colour=0, data=b""):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", data or zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


RED = Image.new("RGB", (40, 30), (200, 30, 30))
FRAMES = [Image.new("P", (4, 4), i % 255) for i in range(200)]
BOMBS = {
    "30k x 30k": png(30_000, 30_000, data=zlib.compress(bytes(30_000 * 3751))),
    "1e9 wide": png(10**9, 1),
    "over the limit": png(5_000, 5_000),
    "truncated jpeg": encoded(RED, "JPEG")[:200],
    "truncated png": encoded(RED)[:60],
    "empty": b"",
    "html": b"<html><script>alert(1)</script></html>",
    "polyglot": b"GIF89a<html>",
    "gif of many frames": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "bmp": encoded(RED, "BMP"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    "no pixels": png(4, 4, data=b"not zlib"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_scraps_are_refused_quickly(tmp_path, name):
    path = tmp_path / "x.png"
    path.write_bytes(BOMBS[name])
    start = time.process_time()

    def work():
        with pytest.raises(ConfigError):
            open_picture(path)

    assert measured(work, torch.device("cpu")).memory_mb < 100
    assert time.process_time() - start < 1.5


def test_no_file_no_picture(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ConfigError, match="no picture file"):
            check_picture(path)


def test_every_form_of_a_picture_comes_out_as_upright_rgb(tmp_path):
    half = RED.convert("RGBA")
    half.putalpha(0)
    forms = {
        "cmyk.jpg": (encoded(RED.convert("CMYK"), "JPEG", quality=95), (200, 30, 30)),
        "alpha.png": (encoded(half), (255, 255, 255)),
        "gray.png": (encoded(RED.convert("L")), (81, 81, 81)),
        "deep.png": (encoded(Image.new("I;16", (40, 30), 257 * 81)), (81, 81, 81)),
        "palette.png": (encoded(RED.convert("P")), None),
        "lossless.webp": (encoded(RED, "WEBP", lossless=True), (200, 30, 30)),
        "moving.webp": (
            encoded(
                RED,
                "WEBP",
                save_all=True,
                append_images=[Image.new("RGB", (40, 30))],
                lossless=True,
            ),
            (200, 30, 30),
        ),
    }
    for name, (data, colour) in forms.items():
        path = tmp_path / name
        path.write_bytes(data)
        picture = open_picture(path)
        assert (picture.mode, picture.size, picture.info) == ("RGB", (40, 30), {}), name
        if colour is not None:
            pixel = picture.getpixel((20, 15))
            assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 4, (name, pixel)


def test_exif_rotation_is_applied(tmp_path):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / f"{turn}.jpg"
        path.write_bytes(encoded(RED, "JPEG", exif=exif))
        assert open_picture(path).size == ((30, 40) if turn >= 5 else (40, 30))


def test_exif_that_is_nonsense_does_not_cost_the_picture(tmp_path):
    """Turning a picture once wrote its EXIF anew, which failed where a value had the wrong type."""
    path = tmp_path / "x.webp"
    # Little endian; the orientation, and then a resolution that is text.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    path.write_bytes(encoded(RED, "WEBP", exif=exif))
    assert open_picture(path).size == (30, 40)


def test_exif_and_texts_do_not_come_along(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    for turn in (1, 6):
        exif[0x0112] = turn
        RED.save(tmp_path / "x.jpg", exif=exif, comment=b"c", icc_profile=b"p" * 200)
        picture = open_picture(tmp_path / "x.jpg")
        assert not picture.info and not picture.getexif()
        assert type(picture) is Image.Image


def test_a_name_that_is_too_long_or_closed_to_us(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / ("x/" * 3000)):
        with pytest.raises(ConfigError, match="cannot be read: File name too long"):
            check_picture(path)


def test_a_changed_file_is_looked_at_again(tmp_path):
    path = tmp_path / "x.png"
    RED.save(path)
    assert check_picture(path) == (40, 30)
    RED.resize((20, 20)).save(path)
    assert check_picture(path) == (20, 20)


def test_json_of_strangers():
    assert parse_json('{"a": "[[[[{\\"", "b": [1, {"c": null}]}') == {
        "a": '[[[[{"',
        "b": [1, {"c": None}],
    }
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    for text in (
        '{"a": ["\\ud83d"]}',
        '{"\\uDC00": 1}',
        "[" * 60_000,
        "[" * (DEPTH + 1) + "]" * (DEPTH + 1),
        '{"a": Infinity}',
        "",
        "1" * 5000,
    ):
        with pytest.raises(ValueError):
            parse_json(text)


def test_mutated_files_give_pixels_or_a_sentence(tmp_path):
    dice = random.Random(11)
    seeds = [encoded(RED), encoded(RED, "JPEG"), encoded(RED, "WEBP"), encoded(RED.convert("P"))]
    path = tmp_path / "x.png"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 2)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data[: dice.randint(1, len(data))] if dice.random() < 0.2 else data)
        try:
            open_picture(path)
            outcomes["read"] += 1
        except MmattnError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30


def test_mutated_job_files_give_rows_or_problems(tmp_path):
    dice = random.Random(12)
    rows = [{"id": "a", "prompt": 'x, "y"', "steps": 3}, {"prompt": "z", "panels": ["a", "b"]}]
    seeds = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode() * 3,
        ".csv": b'id,prompt,steps\na,"x, ""y""",3\r\nb,z,\n' * 2,
        ".txt": "a cat\nein Haus größer\n".encode() * 3,
    }
    problems = 0
    for _ in range(400):
        suffix, seed = dice.choice(list(seeds.items()))
        data = bytearray(seed)
        for _ in range(dice.randint(1, 6)):
            data[dice.randrange(len(data))] = dice.choice(b'\x00"\n\r,{}[]\xff\xfe\xef:a')
        path = tmp_path / f"jobs{suffix}"
        path.write_bytes(data)
        try:
            problems += sum(row.problem is not None for row in read_rows(path))
        except MmattnError:
            problems += 1
    assert problems > 200
