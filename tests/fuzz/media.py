"""Pictures that are bombs, torn, in disguise, or only unusual, and what has to come out of each."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIZE = (32, 24)
RED, GREEN = (200, 30, 30), (20, 160, 60)

Expected = dict[tuple[int, int], tuple[int, ...]]
"""Pixels by place."""


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    """A picture as bytes."""
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, depth: int, colour: int, packed: bytes, front: bytes = b""
) -> bytes:
    """A PNG with any numbers in its head, `packed` pixels, and other chunks in front of them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + front + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _packed(size: int) -> bytes:
    """Zeros, of which `size` megabytes are `size` kilobytes."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size)) + packer.flush()


def two_colours() -> Image.Image:
    """Red, with its upper left quarter green, so that turns and mirrors show."""
    image = Image.new("RGB", SIZE, RED)
    image.paste(GREEN, (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    return image


def _scans(count: int) -> bytes:
    """A small JPEG file of 20 megapixels that asks for many passes over them."""
    data = encoded(Image.new("L", (4400, 4400), 90), "JPEG", progressive=True, quality=50)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def _gif(frames: int) -> bytes:
    data = encoded(Image.new("P", (4, 4), 1), "GIF")
    start = data.index(b"\x2c")
    return data[:start] + data[start:-1] * frames + data[-1:]


def _apng(frames: int) -> bytes:
    """An animation whose frames after the first are green."""
    data = encoded(TWO, "PNG")
    size = struct.unpack(">I", data[data.index(b"IDAT") - 4 :][:4])[0]
    start = data.index(b"IDAT") - 4
    green = encoded(Image.new("RGB", SIZE, GREEN), "PNG")
    place = green.index(b"IDAT") - 4
    pixels = green[place + 8 : place + 8 + struct.unpack(">I", green[place:][:4])[0]]
    head, body, number = data[:start], data[start : start + size + 12], 1

    def control(sequence: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, *SIZE, 0, 0, 1, 10, 0, 0))

    out = [head, chunk(b"acTL", struct.pack(">II", frames, 0)), control(0), body]
    for _ in range(frames - 1):
        out += [control(number), chunk(b"fdAT", struct.pack(">I", number + 1) + pixels)]
        number += 2
    return b"".join(out) + chunk(b"IEND", b"")


def _texts(count: int, size: int) -> bytes:
    texts = b"".join(
        chunk(b"zTXt", b"key%d\0\0" % i + zlib.compress(bytes(size))) for i in range(count)
    )
    return png(8, 8, 1, 0, zlib.compress(bytes(16)), texts)


def _exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = turn, "where I live"
    return encoded(TWO, "JPEG", quality=98, subsampling=0, exif=exif)


def _turned(turn: int) -> Expected:
    """Where the green corner and the red one opposite are in a picture that EXIF turns."""
    across, down = SIZE[::-1] if turn >= 5 else SIZE
    left, top = turn in (1, 4, 5, 8), turn in (1, 2, 5, 6)
    x, y = (2 if left else across - 3), (2 if top else down - 3)
    return {(x, y): GREEN, (across - 1 - x, down - 1 - y): RED}


TWO = two_colours()
_JPEG, _NONE = encoded(TWO, "JPEG"), zlib.compress(bytes(16))

REFUSED: dict[str, Callable[[], bytes]] = {
    "30k x 30k": lambda: png(30_000, 30_000, 1, 0, _packed(108)),
    "1e9 wide": lambda: png(10**9, 1, 1, 0, _NONE),
    "1e9 high": lambda: png(1, 10**9, 1, 0, _NONE),
    "just over the limit": lambda: png(4473, 4473, 1, 0, _packed(3)),
    "no bytes": lambda: b"",
    "zeros": lambda: bytes(1000),
    "html": lambda: b"<html><script>alert(1)</script></html>",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "html that begins like a gif": lambda: b"GIF89a/*<html><script>alert(1)</script>",
    "html in front of a picture": lambda: b"<html>" + _JPEG,
    "zip": lambda: b"PK\x03\x04" + bytes(200),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "bmp": lambda: encoded(TWO, "BMP"),
    "tiff": lambda: encoded(TWO, "TIFF"),
    "gif of 10,000 frames": lambda: _gif(10_000),
    "cut jpeg": lambda: _JPEG[: len(_JPEG) // 2],
    "cut png": lambda: encoded(TWO, "PNG")[:-40],
    "cut webp": lambda: encoded(TWO, "WEBP")[:-40],
    "pixels that are not packed": lambda: png(8, 8, 8, 2, b"not zlib"),
    "text that unpacks to 60 MB": lambda: _texts(1, 60 * 2**20),
    "200 texts that unpack to 1 MB": lambda: _texts(200, 2**20 - 100),
    "profile that unpacks to 60 MB": lambda: png(
        8, 8, 1, 0, _NONE, chunk(b"iCCP", b"a\0\0" + _packed(60))
    ),
    "600,000 chunks": lambda: png(8, 8, 1, 0, _NONE, chunk(b"teSt", b"") * 600_000),
    "1,500,000 comments": lambda: _JPEG[:2] + b"\xff\xfe\0\2" * 1_500_000 + _JPEG[2:],
    "1,500,000 comments behind an end": lambda: (
        _JPEG[:2] + b"\xff\xd9" + b"\xff\xfe\0\2" * 1_500_000 + _JPEG[2:]
    ),
    "5 MB of fill": lambda: _JPEG[:2] + b"\xff" * 5_000_000 + _JPEG[2:],
    "2,000 passes": lambda: _scans(2000),
}
"""Files that nothing may come out of."""

_HALF = TWO.convert("RGBA")
_HALF.putalpha(Image.new("L", SIZE, 128))
_FEW = TWO.quantize(2)
_NOTES = PngInfo()
_NOTES.add_text("html", "<script>alert(1)</script>" * 100)
_MOVING = {
    "save_all": True,
    "append_images": [Image.new("RGB", SIZE, (0, 0, i)) for i in range(99)],
}
_HEAD = struct.pack(">IIBBBB", 1, 1, 8, 2, 0, 0)
_FINE = {"quality": 98, "subsampling": 0}
_WHITE = (255,) * 3

UPPER, LOWER = (2, 2), (SIZE[0] - 3, SIZE[1] - 3)
CORNERS: Expected = {UPPER: GREEN, LOWER: RED}
PALE: Expected = {UPPER: (137, 207, 157), LOWER: (227, 142, 142)}
GRAY: Expected = {UPPER: (106,) * 3, LOWER: (81,) * 3}
PALE_GRAY: Expected = {UPPER: (180,) * 3, LOWER: (168,) * 3}
CLEAR: Expected = {UPPER: _WHITE, LOWER: RED}

READ: dict[str, tuple[Callable[[], bytes], Expected]] = {
    "cmyk": (lambda: encoded(TWO.convert("CMYK"), "JPEG", **_FINE), CORNERS),
    "gray jpeg": (lambda: encoded(TWO.convert("L"), "JPEG", quality=98), GRAY),
    "progressive": (
        lambda: encoded(TWO, "JPEG", progressive=True, restart_marker_rows=1, **_FINE),
        CORNERS,
    ),
    "16 bits of gray": (
        lambda: encoded(Image.new("I;16", (4, 4), 257 * 81), "PNG"),
        {(1, 1): (81,) * 3},
    ),
    "16 bits of colour": (
        lambda: png(
            2, 1, 16, 2, zlib.compress(b"\0" + 2 * struct.pack(">3H", *(257 * c for c in RED)))
        ),
        {(0, 0): RED, (1, 0): RED},
    ),
    "palette": (lambda: encoded(_FEW, "PNG"), CORNERS),
    "palette with alpha": (lambda: encoded(_FEW, "PNG", transparency=_FEW.getpixel(UPPER)), CLEAR),
    "colour that is transparent": (lambda: encoded(TWO, "PNG", transparency=GREEN), CLEAR),
    "half transparent": (lambda: encoded(_HALF, "PNG"), PALE),
    "half transparent webp": (lambda: encoded(_HALF, "WEBP", lossless=True), PALE),
    "gray with alpha": (lambda: encoded(_HALF.convert("LA"), "PNG"), PALE_GRAY),
    "black and white": (lambda: encoded(Image.new("1", SIZE, 1), "PNG"), {UPPER: _WHITE}),
    "interlaced": (
        lambda: png(1, 1, 8, 2, zlib.compress(b"\0" + bytes(RED))).replace(
            chunk(b"IHDR", _HEAD + b"\0"), chunk(b"IHDR", _HEAD + b"\1")
        ),
        {(0, 0): RED},
    ),
    "apng of 3,000 frames": (lambda: _apng(3000), CORNERS),
    "webp of 100 frames": (lambda: encoded(TWO, "WEBP", lossless=True, **_MOVING), CORNERS),
    "mpo of 100 pictures": (lambda: encoded(TWO, "MPO", **_FINE, **_MOVING), CORNERS),
    "a film behind": (
        lambda: encoded(TWO, "JPEG", **_FINE) + random.Random(0).randbytes(2**23 - 4096),
        CORNERS,
    ),
    "40 passes": (lambda: _scans(34), {(20, 20): (90,) * 3}),
    "html behind": (lambda: encoded(TWO, "PNG") + b"<html><script>alert(1)</script>", CORNERS),
    "html inside": (lambda: encoded(TWO, "PNG", pnginfo=_NOTES), CORNERS),
    "100 MB of pixels, of which 64 count": (
        lambda: png(8, 8, 1, 0, _packed(100)),
        {(0, 0): (0, 0, 0)},
    ),
    "20 megapixels": (lambda: png(4472, 4472, 8, 6, _packed(77)), {(1023, 1023): _WHITE}),
    **{f"turned {i}": (partial(_exif, i), _turned(i)) for i in range(1, 9)},
}
"""Unusual files, and pixels that have to come out of them."""
