"""Read what others wrote: JSON and pictures, with limits, and with sentences instead of crashes."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmattn.errors import ConfigError

DEPTH = 32
"""Deepest nesting of JSON."""

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
PICTURE_PIXELS = 20_000_000
PICTURE_BYTES = 64 * 2**20

_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10)}


def parse_json(text: str) -> Any:
    """A JSON value of limited depth and without NaN, infinities or keys that come twice.

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
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
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
    stat = path.stat() if path.is_file() else None
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
    size = path.stat().st_size
    if size > PICTURE_BYTES:
        raise ConfigError(f"{path} has {size} bytes; pictures may have {PICTURE_BYTES}")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own limit; ours is below that and checked next.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=PICTURE_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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


def open_picture(path: Path) -> Image.Image:
    """A picture as plain RGB: first frame, upright, transparent parts on white, no profile or EXIF.

    Raises:
        ConfigError: as for `check_picture`, and when the pixels are damaged.
    """
    check_picture(path)
    try:
        with _opened(path) as image:
            image.seek(0)
            upright = ImageOps.exif_transpose(image)
            if "A" in upright.getbands() or "transparency" in upright.info:
                paper = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                upright = Image.alpha_composite(paper, upright.convert("RGBA"))
            elif upright.mode.startswith("I"):
                # 16 bits: Pillow's own conversion clips instead of scaling.
                upright = upright.point(lambda value: value / 257).convert("L")
            plain = Image.new("RGB", upright.size)
            plain.paste(upright.convert("RGB"))
            return plain
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} is damaged: {reason}") from error
