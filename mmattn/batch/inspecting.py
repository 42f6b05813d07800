"""Metadata out of files, parsed as data and nothing else."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmattn.batch.limits import parse_json, sha256_of
from mmattn.errors import ConfigError

CHUNK = 64 * 1024
"""Most bytes of one text, compressed or not."""
TEXTS = 16 * CHUNK
"""Most characters of all texts of a file together."""

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNKS, _BOXES = 10_000, 1_000


def inspect_file(path: Path) -> dict[str, Any]:
    """Everything that a file says about itself, JSON-ready.

    Args:
        path: a PNG, an MP4 or animated WebP with its sidecar, or the JSON of a caption.

    Raises:
        ConfigError: when there is no such file, or it is of none of these kinds, or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file at {path}")
    with path.open("rb") as stream:
        head = stream.read(12)
        stream.seek(0)
        texts: dict[str, str] = {}
        if head.startswith(_PNG):
            kind, texts = "png", _png_texts(stream, path)
        elif head[4:8] == b"ftyp":
            kind, texts = "mp4", _mp4_comment(stream, path)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            kind = "webp"
        elif head.lstrip()[:1] == b"{":
            kind = "json"
        else:
            raise ConfigError(f"{path} is no PNG, MP4, WebP or JSON file")
    found: dict[str, Any] = {
        "file": str(path),
        "format": kind,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "text": texts,
    }
    meta = texts.get("mmattn", texts.get("comment"))
    sidecar = path if kind == "json" else path.with_name(path.name + ".json")
    if meta is not None:
        found["mmattn"] = _table(meta, path)
    elif sidecar.is_file() and kind != "png":
        table = _table(_small(sidecar), sidecar)
        if kind == "json":
            found["answer"] = table.get("answer")
            table = table.get("mmattn", {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: its metadata is no table")
        found["mmattn"] = table
    return found


def _table(text: str, path: Path) -> dict[str, Any]:
    try:
        table = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path}: its metadata is damaged: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: its metadata is no table")
    return table


def _small(path: Path) -> str:
    if path.stat().st_size > CHUNK:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; {CHUNK} is the limit")
    return path.read_text("utf-8", errors="replace")


# -- PNG ------------------------------------------------------------------------------------------------


def _png_texts(stream: BinaryIO, path: Path) -> dict[str, str]:
    stream.seek(len(_PNG))
    texts: dict[str, str] = {}
    kept = 0
    for _ in range(_CHUNKS):
        head = stream.read(8)
        if len(head) < 8:
            raise ConfigError(f"{path} is truncated")
        size, name = struct.unpack(">I4s", head)
        if name == b"IEND":
            return texts
        if name not in (b"tEXt", b"zTXt", b"iTXt"):
            stream.seek(size + 4, 1)
            continue
        if size > CHUNK:
            raise ConfigError(f"{path}: a text of {size} bytes; {CHUNK} is the limit")
        data, check = stream.read(size), stream.read(4)
        if check != struct.pack(">I", zlib.crc32(name + data)):
            raise ConfigError(f"{path}: a text is damaged (checksum)")
        key, text = _png_text(name, data, path)
        kept += len(key) + len(text)
        if kept > TEXTS:
            raise ConfigError(f"{path}: more than {TEXTS} characters of text")
        texts.setdefault(key, text)
    raise ConfigError(f"{path} has more than {_CHUNKS} chunks")


def _png_text(name: bytes, data: bytes, path: Path) -> tuple[str, str]:
    key, _, rest = data.partition(b"\0")
    packed = False
    encoding = "latin-1"
    if name == b"zTXt":
        packed, rest = True, rest[1:]
    elif name == b"iTXt":
        packed, encoding = rest[:1] == b"\1", "utf-8"
        # Two bytes of flags, then language and translated key, each with its own end.
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if packed:
        unpacker = zlib.decompressobj()
        try:
            rest = unpacker.decompress(rest, CHUNK)
        except zlib.error as error:
            raise ConfigError(f"{path}: a text is damaged ({error})") from error
        if unpacker.unconsumed_tail:
            raise ConfigError(f"{path}: a packed text is longer than {CHUNK} bytes")
    return key.decode("latin-1"), rest.decode(encoding, errors="replace")


# -- MP4 ------------------------------------------------------------------------------------------------


def _mp4_comment(stream: BinaryIO, path: Path) -> dict[str, str]:
    end = path.stat().st_size
    budget = [_BOXES]
    for name, start, stop in _boxes(stream, 0, end, budget):
        if name == b"moov":
            found = _descend(
                stream, start, stop, [b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"], budget
            )
            if found is None:
                return {}
            start, stop = found[0] + 8, found[1]  # type and locale of the value
            if not 0 <= stop - start <= CHUNK:
                raise ConfigError(
                    f"{path}: a comment of {stop - start} bytes; 0 to {CHUNK} are the limits"
                )
            stream.seek(start)
            return {"comment": stream.read(stop - start).decode("utf-8", errors="replace")}
    return {}


def _descend(
    stream: BinaryIO, start: int, stop: int, names: list[bytes], budget: list[int]
) -> tuple[int, int] | None:
    for name, inner, end in _boxes(stream, start, stop, budget):
        if name == names[0]:
            inner += 4 * (name == b"meta")  # version and flags
            if len(names) == 1:
                return inner, end
            return _descend(stream, inner, end, names[1:], budget)
    return None


def _boxes(
    stream: BinaryIO, start: int, stop: int, budget: list[int]
) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= stop and budget[0] > 0:
        budget[0] -= 1
        stream.seek(start)
        size, name = struct.unpack(">I4s", stream.read(8))
        inner = start + 8
        if size == 1:
            size, inner = struct.unpack(">Q", stream.read(8).ljust(8, b"\0"))[0], start + 16
        elif size == 0:
            size = stop - start
        if size < inner - start or start + size > stop:
            return
        yield name, inner, start + size
        start += size
