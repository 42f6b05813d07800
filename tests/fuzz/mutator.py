"""Damage for bytes: the same for the same dice, and often enough still half readable."""

from __future__ import annotations

import copy
import random
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

EDGES = (
    0,
    1,
    2,
    7,
    8,
    9,
    12,
    15,
    16,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**60,
)
EDGES += (2**63 - 1, 2**63, 2**64 - 1)
"""Numbers at which counters and lengths go wrong."""

WORDS = (
    *(b"null", b"true", b"NaN", b"-1", b"1e999", b"0.5", b'""', b"[]", b"{}", b'"\\ud800"'),
    *(b"9" * 400, b"9" * 5000, b"[" * 60, b"[" * 5000, b'{"a":' * 2000, b"(" * 50, b'"', b"'"),
    *(b"\\u0000", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"\t", b","),
    *(b"../" * 9, b"~nobody/", b"/dev/zero", b"http://x/", b"A" * 5000, b"=1+1", b"%s%n"),
    *(b"1979-05-27T07:32:00Z", b"0x_1", b"inf", b"1_0", b"[[", b"]]", b'"""', b"#", b": ", b"- "),
    *(b"name", b"prompt", b"method", b"image", b"panels", b"id", b"kind", b"\xc2\xa9cmt"),
)
"""Pieces that parsers of text stumble over."""


ODD = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), "", " ", "x", "\x00", "\ud800", "\u202e", "é" * 300, "x" * 5000),
    *("../../etc/passwd", "~nobody/x.png", "/dev/zero", "http://127.0.0.1/x", "a" * 300 + ".json"),
    *(
        "{",
        "[" * 5000,
        "tome:r=" + "[" * 5000,
        "=1+1",
        "NaN",
        "1e999",
        "-",
        "+",
        "tome+tome",
        "a.toml",
    ),
    *([], {}, [[]], [None], [0] * 300, {"": None}, {"name": []}, {"name": 3}, {"name": None}),
    *({"name": "tome"}, {"name": "tome", "r": []}, {"name": "\ud800"}, ["tome", {"name": {}}]),
)
"""Values where another one was expected."""


def mutate_table(table: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, taken away, moved or added."""
    table = copy.deepcopy(table)
    for _ in range(dice.choice((1, 1, 2, 3))):
        places = list(_places(table))
        if not places:
            return copy.deepcopy(dice.choice(ODD))
        home, key = dice.choice(places)
        change, odd = dice.randrange(8), copy.deepcopy(dice.choice(ODD))
        if change == 0:
            del home[key]
        elif change == 1:
            other, name = dice.choice(places)
            home[key] = copy.deepcopy(other[name])
        elif change == 2 and isinstance(home, dict):
            home[dice.choice(("", "x", "\ud800", "\x00", "name", "k" * 5000))] = odd
        else:
            home[key] = odd
    return table


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def mutate(seed: bytes, others: Sequence[bytes], dice: random.Random) -> bytes:
    """`seed` with one to eight changes.

    Args:
        seed: a sound file.
        others: sound files of the same format, for splices.
        dice: makes every choice.
    """
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        dice.choice(CHANGES)(data, others, dice)
    return bytes(data)


def _span(data: bytearray, dice: random.Random, most: int = 64) -> tuple[int, int]:
    start = dice.randrange(len(data) + 1)
    return start, min(len(data), start + dice.randint(1, most))


def _flip(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _set(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.randrange(256)


def _delete(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    start, stop = _span(data, dice)
    del data[start:stop]


def _duplicate(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    start, stop = _span(data, dice, 256)
    data[start:start] = data[start:stop] * dice.choice((1, 1, 2, 16, 100))


def _insert(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    start = dice.randrange(len(data) + 1)
    data[start:start] = dice.choice((dice.randbytes(dice.randint(1, 16)), dice.choice(WORDS)))


def _replace(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    """A number, a word or a quoted text of the file by another piece of text."""
    found = list(re.finditer(rb'"[^"\n]{0,80}"|-?\d+(?:\.\d+)?|[A-Za-z_]{3,}', data))
    if found:
        start, stop = dice.choice(found).span()
        data[start:stop] = dice.choice(WORDS)


def _truncate(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _splice(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    """The front of this file and the back of another, or a piece of the other inside of this one."""
    other = dice.choice(others)
    start, stop = sorted(dice.randrange(len(other) + 1) for _ in range(2))
    if dice.random() < 0.5:
        data[dice.randrange(len(data) + 1) :] = other[start:]
    else:
        place = dice.randrange(len(data) + 1)
        data[place:place] = other[start:stop]


def _number(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    size, order = dice.choice((1, 2, 4, 8)), dice.choice(("big", "little"))
    if len(data) >= size:
        place = dice.randrange(len(data) - size + 1)
        edge = (dice.choice(EDGES) + dice.choice((0, 0, 1, -1))) % 256**size
        data[place : place + size] = edge.to_bytes(size, order)


def _length(data: bytearray, others: Sequence[bytes], dice: random.Random) -> None:
    """One of the numbers that could be a length, since it is no larger than the file."""
    size, order = dice.choice((2, 4, 4, 8)), dice.choice(("big", "little"))
    places = range(max(0, min(len(data), 4096) - size + 1))
    found = [p for p in places if 0 < int.from_bytes(data[p : p + size], order) <= len(data)]
    if found:
        place = dice.choice(found)
        now = int.from_bytes(data[place : place + size], order)
        new = dice.choice((*EDGES, now + 1, now - 1, now * 2, len(data))) % 256**size
        data[place : place + size] = new.to_bytes(size, order)


CHANGES = (
    *(_flip, _set, _delete, _duplicate, _insert),
    *(_replace, _truncate, _splice, _number, _length),
)


def mended_png(data: bytes) -> bytes:
    """A damaged PNG with checksums that are right, so that a reader goes on to what lies behind them."""
    out, place = [data[:8]], 8
    while place + 12 <= len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        if place + 12 + size > len(data):
            break
        body = data[place + 4 : place + 8 + size]
        out.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + size
    return b"".join(out) + data[place:]


def mended_safetensors(data: bytes) -> bytes:
    """A damaged safetensors file with a header length that is right again where its end can be seen."""
    end = data.find(b"}}", 8)
    return data if end < 0 else struct.pack("<Q", end - 6) + data[8:]
