"""Damaged pictures, as references of a job and as uploads: pixels or a sentence."""

from __future__ import annotations

import io
import random
from pathlib import Path

import mutator
import pytest
import trials
from mmattn_demos.uploads import read_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmattn.batch.limits import check_picture, open_picture

SIDE = (24, 17)


def encoded(image, kind, **more):
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def _seeds():
    dice = random.Random(1)
    noise = Image.frombytes("RGB", SIDE, dice.randbytes(3 * SIDE[0] * SIDE[1]))
    half = noise.convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(SIDE))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a note", 72.5
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    notes = PngInfo()
    notes.add_text("mmattn", '{"id": "a"}')
    notes.add_text("packed", "x" * 500, zip=True)
    notes.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    frames = [noise, noise.rotate(90), noise.rotate(180)]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 40}
    icc = dice.randbytes(300)
    pngs = [
        encoded(noise, "PNG", pnginfo=notes, exif=exif, icc_profile=icc),
        encoded(noise.convert("P"), "PNG", transparency=3),
        encoded(noise.convert("L"), "PNG", transparency=7),
        encoded(noise, "PNG", transparency=(1, 2, 3)),
        encoded(noise.convert("1"), "PNG"),
        encoded(half, "PNG"),
        encoded(half.convert("LA"), "PNG"),
        encoded(Image.new("I;16", SIDE, 40_000), "PNG"),
        encoded(noise, "PNG", **moving),
    ]
    jpegs = [
        encoded(noise, "JPEG", exif=exif, icc_profile=icc, comment=b"c"),
        encoded(noise, "JPEG", progressive=True, restart_marker_rows=1),
        encoded(noise.convert("L"), "JPEG"),
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise, "MPO", save_all=True, append_images=frames[1:]),
    ]
    webps = [
        encoded(noise, "WEBP", exif=exif, icc_profile=icc),
        encoded(half, "WEBP"),
        encoded(half, "WEBP", lossless=True),
        encoded(noise, "WEBP", **moving),
    ]
    return {"png": pngs, "jpeg": jpegs, "webp": webps}


SEEDS = _seeds()


def cases(kind, count, folder):
    """Damaged files of one kind, written one after the other to one place."""
    path = folder / f"x.{kind}"
    for number in range(count):
        dice = random.Random(f"{kind} {number}")
        data = mutator.mutate(dice.choice(SEEDS[kind]), SEEDS[kind], dice)
        if kind == "png" and dice.random() < 0.7:
            data = mutator.mended_png(data)
        path.write_bytes(data)
        yield f"{kind} {number}", path


def plain(picture):
    assert picture.mode == "RGB" and not picture.info and not picture.getexif()
    assert len(picture.tobytes()) == 3 * picture.width * picture.height


def reference(path: Path):
    size = check_picture(path)
    picture = open_picture(path)
    assert sorted(picture.size) == sorted(size)
    plain(picture)


def upload(path: Path):
    plain(read_picture(path))


@pytest.mark.parametrize("kind", SEEDS)
@pytest.mark.parametrize("work", [reference, upload])
def test_damaged_pictures(kind, work, tmp_path):
    found = trials.run(cases(kind, trials.share(100), tmp_path), work)
    assert found.read and found.refused, found
