"""Rows of a job file: JSONL, CSV, Parquet or plain prompts, streamed, with line numbers and limits."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmattn.batch.limits import parse_json
from mmattn.errors import ConfigError, MissingExtraError

LINE_BYTES = 2**20
COLUMNS = 200
ROWS, GROUP_BYTES, BATCH_BYTES = 10_000_000, 2**27, 2**25
"""Of Parquet, where a small file can hold any number: rows, unpacked bytes of a row group and of 256 rows."""
SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Row:
    """One row: the line it starts on, counted from 1, and its cells, or what is wrong with it.

    Args:
        typed: whether cells have types; in CSV everything is text.
    """

    line: int
    cells: dict[str, Any]
    problem: str | None = None
    typed: bool = True

    @property
    def where(self) -> str:
        """The row's place in what was read, for people."""
        return f"line {self.line}"


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a job file. Damaged rows come with their problem, and reading goes on.

    Raises:
        ConfigError: when there is no such file, its kind is unknown, or its head cannot be used.
        MissingExtraError: for Parquet without pyarrow.
    """
    if not path.is_file():
        raise ConfigError(f"there is no job file at {path}")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl(path)
    if suffix == ".csv":
        return _csv(path)
    if suffix == ".txt":
        return _txt(path)
    if suffix == ".parquet":
        return _parquet(path)
    raise ConfigError(f"a job file ends in one of {list(SUFFIXES)}, found {path.name}")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str, str | None]]:
    """Number, text without its end, and problem of every line; never more than one line in memory."""
    number = 0
    while raw := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(raw) > LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(LINE_BYTES)
            yield number, "", f"the line is longer than {LINE_BYTES:,} bytes"
            continue
        if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw = raw[3:]
        if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            yield number, "", "the file is UTF-16; save it as UTF-8"
            return
        if b"\x00" in raw:
            yield number, "", "the line holds a NUL byte"
            continue
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n"), None
        except UnicodeDecodeError as error:
            yield number, "", f"the line is not UTF-8 (byte {error.start})"


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, text, problem in _lines(stream):
            if problem is not None:
                yield Row(number, {}, problem)
            elif text.strip():
                yield _object(number, text)


def _object(number: int, text: str) -> Row:
    try:
        cells = parse_json(text)
    except ValueError as error:
        return Row(number, {}, f"not valid JSON: {error}")
    if not isinstance(cells, dict):
        return Row(number, {}, f"a row is a JSON object, found {type(cells).__name__}")
    return Row(number, cells)


def _txt(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, text, problem in _lines(stream):
            if problem is not None or text.strip():
                yield Row(number, {"prompt": text.strip()}, problem)


def _csv(path: Path) -> Iterator[Row]:
    at, size, broken = 0, 0, [""]

    def feed() -> Iterator[str]:
        nonlocal at, size
        for number, text, problem in _lines(stream):
            at = number
            size += len(text) + 1
            if size > LINE_BYTES:
                # Cells with line breaks can go on to the end of the file.
                raise csv.Error(f"the row is longer than {LINE_BYTES:,} characters")
            if problem is not None:
                broken[0] = problem
            yield text + "\n"

    csv.field_size_limit(LINE_BYTES)
    with path.open("rb") as stream:
        reader = csv.reader(feed(), strict=True)
        try:
            head = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise ConfigError(f"{path}: the head of the table is not valid CSV: {error}") from error
        if broken[0] or not any(head) or len(head) > COLUMNS:
            found = broken[0] or f"{len(head)} columns"
            raise ConfigError(f"{path}: the first line must name up to {COLUMNS} columns: {found}")
        if len(set(head)) < len(head) or "" in head:
            raise ConfigError(f"{path}: every column needs a name of its own, found {head}")
        while True:
            line, size, broken[0] = at + 1, 0, ""
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Row(line, {}, f"not valid CSV: {error}")
                return  # after a stray quote nothing tells where the next row begins
            if values is None:
                return
            if broken[0]:
                yield Row(line, {}, broken[0])
            elif len(values) > len(head):
                yield Row(line, {}, f"{len(values)} cells under {len(head)} columns")
            elif any(value.strip() for value in values):
                # A cell that is left empty is a key that is not given.
                pairs = zip(head, values, strict=False)
                yield Row(line, {k: v for k, v in pairs if v.strip()}, typed=False)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("a Parquet job file", "pyarrow", "batch") from error
    # Arrow raises errors of many families, Python's own among them, for what is damaged.
    try:
        table = parquet.ParquetFile(path)
        names, about = table.schema_arrow.names, table.metadata
        sizes = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
    except Exception as error:
        raise ConfigError(
            f"{path} is not a Parquet file: {' '.join(str(error).split())}"
        ) from error
    with table:
        if len(names) > COLUMNS or len(set(names)) < len(names):
            raise ConfigError(
                f"{path}: up to {COLUMNS} columns with names of their own, found {len(names)}"
            )
        if about.num_rows > ROWS or max(sizes, default=0) > GROUP_BYTES:
            raise ConfigError(
                f"{path} has {about.num_rows:,} rows and up to {max(sizes):,} bytes in a row group; "
                f"{ROWS:,} and {GROUP_BYTES:,} are the limits. Write it with a smaller row_group_size."
            )
        number = 0
        batches = table.iter_batches(batch_size=256)
        while True:
            try:
                part = next(batches, None)
                if part is not None and part.nbytes > BATCH_BYTES:
                    raise ValueError(f"{part.num_rows} rows hold {part.nbytes:,} bytes")
                rows = [] if part is None else part.to_pylist()
            except Exception as error:
                yield Row(number + 1, {}, f"the table is damaged: {' '.join(str(error).split())}")
                return
            if part is None:
                return
            for cells in rows:
                number += 1
                yield Row(number, {k: v for k, v in cells.items() if v is not None})
