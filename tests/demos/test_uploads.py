"""Pictures from visitors: bombs, damage and disguises are refused fast, good ones come out plain."""

from __future__ import annotations

import time
from io import BytesIO

import pytest
from bombs import png_header
from mmattn_demos.uploads import read_picture
from PIL import Image, PngImagePlugin

from mmattn.errors import ConfigError


def encoded(format, size=(40, 24), mode="RGB", **more):
    out = BytesIO()
    Image.new(mode, size, 90 if mode in ("L", "P", "I;16") else None).save(out, format, **more)
    return out.getvalue()


def frames(format):
    out = BytesIO()
    images = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(40)]
    images[0].save(out, format, save_all=True, append_images=images[1:])
    return out.getvalue()


BAD = {
    "30000 x 30000": png_header(30_000, 30_000),
    "a thousand million wide": png_header(1_000_000_000, 1),
    "21 megapixels": png_header(7000, 3000),
    "empty": b"",
    "text": b"<script>alert(1)</script>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "cut jpeg": encoded("JPEG")[:300],
    "cut png": encoded("PNG", (300, 300))[:120],
    "jpeg magic alone": b"\xff\xd8\xff\xe0" + bytes(64),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(name, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(BAD[name])
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        read_picture(path)
    assert time.perf_counter() - start < 1
    assert str(tmp_path) not in str(caught.value)


def test_too_many_bytes(tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(encoded("PNG") + bytes(8 * 2**20))
    with pytest.raises(ConfigError, match="8 MB"):
        read_picture(path)


GOOD = {
    "rgb": encoded("PNG"),
    "grey": encoded("PNG", mode="L"),
    "16 bit": encoded("PNG", mode="I;16"),
    "palette": encoded("PNG", mode="P"),
    "alpha": encoded("PNG", mode="RGBA"),
    "jpeg": encoded("JPEG"),
    "cmyk jpeg": encoded("JPEG", mode="CMYK"),
    "webp": encoded("WEBP"),
    "animated webp": frames("WEBP"),
    "animated png": frames("PNG"),
    "large": encoded("PNG", (2400, 1200)),
    "html at the end": encoded("PNG") + b"<html><script>alert(1)</script>",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures_come_out_plain(name, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(GOOD[name])
    picture = read_picture(path)
    assert picture.mode == "RGB" and max(picture.size) <= 1024 and not picture.info
    assert getattr(picture, "n_frames", 1) == 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_upright_and_lose_their_notes(turn, tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("red", (0, 0, 10, 5))
    exif = Image.Exif()
    exif[274], exif[270] = turn, "where I live"
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "secret")
    picture.save(tmp_path / "turned.png", exif=exif, pnginfo=notes)
    upright = read_picture(tmp_path / "turned.png")
    assert upright.size == ((20, 40) if turn >= 5 else (40, 20))
    assert not upright.info and not upright.getexif()
    corner = {1: (1, 1), 2: (38, 1), 3: (38, 18), 4: (1, 18)}
    corner |= {5: (1, 1), 6: (18, 1), 7: (18, 38), 8: (1, 38)}
    assert upright.getpixel(corner[turn]) == (255, 0, 0)


def test_transparent_parts_are_paper():
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file.name)
        assert read_picture(file.name).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path):
    Image.new("I;16", (4, 4), 32768).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").getpixel((0, 0))[0] in (127, 128)
