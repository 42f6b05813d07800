"""Read what others wrote: JSON and pictures, with limits, and with sentences instead of crashes."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from mmattn.errors import ConfigError

DEPTH = 32
"""Deepest nesting of JSON."""

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_PIXELS = 20_000_000
PICTURE_BYTES = 64 * 2**20
PICTURE_DAMAGE = (OSError, ValueError, SyntaxError, IndexError, EOFError)
"""What Pillow raises for damaged files."""

PARTS, SCANS = 20_000, 50
"""Most chunks of a PNG or segments of a JPEG, and most passes of a JPEG over its pixels."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Where a segment of a JPEG begins; the bytes left out are pixels, fill or stand alone."""

_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an orientation of EXIF, where the value is one."""

_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10)}


def parse_json(text: str) -> Any:
    """A JSON value of limited depth and without NaN, infinities, broken text or keys that come twice.

    Raises:
        ValueError: with one sentence that says what is wrong.
    """
    depth = deepest = 0
    # Brackets outside of strings; a string is skipped whole, escapes included.
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', text):
        mark = token.group()
        if mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    if deepest > DEPTH:
        raise ValueError(f"JSON is nested {deepest} deep; {DEPTH} is the limit")
    value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half of a surrogate pair, which is no text") from error
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} is there twice")
        table[key] = value
    return table


def text_problem(text: str) -> str | None:
    """Why `text` cannot be used as a prompt or a name, or None."""
    if "\x00" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no text"
    return None


def safe_stem(name: str) -> str:
    """`name` as the stem of a file, or a hash of it where it could be anything but a plain name."""
    plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}", name)
    if plain and name.split(".")[0].upper() not in _RESERVED and not name.endswith("."):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_picture(path: Path) -> tuple[int, int]:
    """Look at the head of a picture and return width and height; pixels are not decoded.

    Raises:
        ConfigError: when it is missing, no plain file, too large, or of another format.
    """
    try:
        stat = path.stat() if path.is_file() else None
    except OSError as error:  # a name that is too long, a folder that is closed to us
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if stat is None:
        raise ConfigError(f"there is no picture file at {path}")
    return _check_picture(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _check_picture(path: Path, changed: int, size: int) -> tuple[int, int]:
    with _opened(path) as image:
        return image.size


@lru_cache(maxsize=4096)
def _sha256(path: Path, changed: int, size: int) -> str:
    return sha256_of(path)


def picture_sha256(path: Path) -> str:
    """SHA-256 of a picture file; asked again for an unchanged file it is not read again."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


def _opened(path: Path) -> Image.Image:
    with path.open("rb") as stream:
        # One read, so that what was checked is what is decoded.
        data = stream.read(PICTURE_BYTES + 1)
    if len(data) > PICTURE_BYTES:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes; pictures may have {PICTURE_BYTES}"
        )
    if problem := slow_to_read(data):
        raise ConfigError(f"{path} {problem}; save it anew with another program")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own limit; ours is below that and checked next.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=PICTURE_FORMATS)
    except (*PICTURE_DAMAGE, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as one of {list(PICTURE_FORMATS)}: {reason}"
        ) from error
    if image.width * image.height > PICTURE_PIXELS:
        shape = f"{image.width}x{image.height}"
        image.close()
        raise ConfigError(
            f"{path} has {shape} pixels; pictures may have {PICTURE_PIXELS:,}. Make it smaller first."
        )
    return image


def slow_to_read(data: bytes) -> str | None:
    """Why a PNG or JPEG would take minutes however few its pixels are, or None.

    Pillow goes from chunk to chunk in Python, and a progressive JPEG can ask for any number of passes
    over its pixels with forty bytes each.
    """
    place, parts, scans = 8, 0, 0
    if data.startswith(b"\x89PNG"):
        while place < len(data) and parts <= PARTS:
            parts += 1
            place += 12 + int.from_bytes(data[place : place + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        place = 2
        while (found := _MARKER.search(data, place)) and max(parts / PARTS, scans / SCANS) <= 1:
            # In front of the pixels, fill is skipped byte by byte.
            parts += 1 + (0 if scans else found.start() - place)
            place = found.end()
            if found.group() == b"\xff\xd9":
                if scans:
                    break  # a second picture or a film may follow, which nobody reads
                continue
            scans += found.group() == b"\xff\xda"
            place += int.from_bytes(data[place : place + 2], "big")
    if parts > PARTS:
        return f"is in more than {PARTS:,} parts"
    return f"asks for more than {SCANS} passes over its pixels" if scans > SCANS else None


def flat(image: Image.Image) -> Image.Image:
    """RGB and nothing else: upright as EXIF says, transparent parts on white, 16 bits scaled to 8."""
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if image.mode.startswith("I"):
        # Pillow's own conversion clips instead of scaling.
        plain = image.point(lambda value: value / 257).convert("L").convert("RGB")
    elif "A" in image.getbands() or "transparency" in image.info:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        plain = Image.new("RGB", layer.size, "white")
        plain.paste(layer, mask=layer)
    else:
        plain = image.convert("RGB")
    if turn is not None:
        plain = plain.transpose(turn)
    plain.info = {}
    return plain


def open_picture(path: Path) -> Image.Image:
    """A picture as plain RGB: first frame, upright, transparent parts on white, no profile or EXIF.

    Raises:
        ConfigError: as for `check_picture`, and when the pixels are damaged.
    """
    check_picture(path)
    with _opened(path) as image:
        try:
            image.seek(0)
            image.load()
            return flat(image)
        except PICTURE_DAMAGE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{path} is damaged: {reason}") from error
