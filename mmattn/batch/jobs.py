"""A job file as a whole: checked before any model is loaded, then streamed as items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmattn.batch.cells import (
    CELLS,
    DEFAULTS,
    KINDS,
    check_cells,
    complete,
    kind_of,
    methods_of,
)
from mmattn.batch.items import Item, canonical, expand, hashed, portable
from mmattn.batch.limits import parse_json, safe_stem, sha256_of
from mmattn.batch.rows import Row, read_rows
from mmattn.errors import ConfigError, MmattnError

SHOWN = 20
_WHOLE = ("seed", "width", "height", "num_frames", "fps", "steps", "n", "max_new_tokens")
_TABLES = ("panels", "method")


class BadRows(ConfigError):  # noqa: N818  (reads as what it is)
    """Rows cannot be run. The message lists up to twenty of them, by line or by file.

    Args:
        name: what was read.
        problems: rows with what is wrong.
        count: how many there are.
        what: a row or a file.
    """

    def __init__(
        self, name: str, problems: list[tuple[Row, str]], count: int, what: str = "row"
    ) -> None:
        self.problems = [(row.line, text) for row, text in problems]
        lines = [
            text if text.startswith(row.where) else f"{row.where}: {text}" for row, text in problems
        ]
        if count > len(problems):
            lines.append(f"and {count - len(problems)} more")
        rows = f"1 {what}" if count == 1 else f"{count} {what}s"
        super().__init__(f"{name}: {rows} cannot be run\n" + "\n".join(lines))


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, counted from 0."""

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> Shard:
        """From ``i/n``.

        Raises:
            ConfigError: unless ``0 <= i < n``.
        """
        first, slash, second = text.partition("/")
        if slash and first.strip().isdigit() and second.strip().isdigit():
            shard = Shard(int(first), int(second))
            if shard.index < shard.count:
                return shard
        raise ConfigError(f"a shard is written i/n with i from 0 to n-1, such as 0/3; got {text!r}")


@dataclass
class Found:
    """What checking saw: rows, items by kind, the hash of the file, and files that were left out."""

    rows: int = 0
    skipped: int = 0
    items: dict[str, int] = field(default_factory=dict)
    sha256: str = ""


class Jobs:
    """The rows of one file.

    Args:
        path: a ``.jsonl``, ``.csv``, ``.parquet`` or ``.txt`` file; paths in it start at its folder.
        defaults: cells of rows that do not have them, as far as their kind reads them.
        kinds: the kinds that the models at hand can serve, and which of their models is embedded.
        default_kind: kind of rows whose keys do not tell.
        allow_extra: take no offence at unknown keys.

    Attributes:
        name: what is read, for people.
        what: what one row of it is.
    """

    what = "row"

    def __init__(
        self,
        path: Path,
        defaults: Mapping[str, Any] | None = None,
        *,
        kinds: Mapping[str, bool] | None = None,
        default_kind: str = "image",
        allow_extra: bool = False,
    ) -> None:
        self.path, self.name = path, str(path)
        self.defaults = dict(defaults or {})
        self.kinds = dict.fromkeys(KINDS, True) if kinds is None else dict(kinds)
        self.default_kind, self.allow_extra = default_kind, allow_extra
        for key, value in self.defaults.items():
            try:
                CELLS[key][1](value)
            except ValueError as error:
                raise ConfigError(f"{key} {error}") from error
        self._repeated: set[bytes] = set()

    def check(self) -> Found:
        """Read every row once.

        Raises:
            BadRows: when some cannot be run.
            ConfigError: when the file cannot be read at all, or has no rows.
        """
        found = Found()
        problems: list[tuple[Row, str]] = []
        bad = 0
        names: set[int] = set()
        contents: set[int] = set()
        for row in self._read():
            found.rows += 1
            try:
                cells, kind = self._cells(row)
                methods_of(cells.get("method"))
                self._unique(cells, kind, names, contents)
            except MmattnError as error:
                bad += 1
                if len(problems) < SHOWN:
                    problems.append((row, " ".join(str(error).split())))
                continue
            found.items[kind] = found.items.get(kind, 0) + cells.get("n", 1)
        if bad:
            raise BadRows(self.name, problems, bad, self.what)
        if not found.rows:
            raise ConfigError(f"{self.name} has no {self.what}s")
        found.sha256 = self._sha256()
        return found

    def items(self, fingerprints: Mapping[str, str], shard: Shard | None = None) -> Iterator[Item]:
        """The items in the order of the file; of one shard, if given. Call `check` first.

        Args:
            fingerprints: of the model that serves each kind.
            shard: takes every n-th item among those of about equal cost.

        Raises:
            ConfigError: when the file is no longer as it was checked.
        """
        seen: dict[bytes, int] = {}
        places: dict[int, int] = {}
        for row in self._read():
            try:
                cells, kind = self._cells(row)
            except MmattnError as error:
                raise ConfigError(
                    f"{self.name} changed while it was read ({row.where}: {error}); start again"
                ) from error
            repeat = 0
            if "id" not in cells:
                name = self._content(cells, kind)
                if name in self._repeated:
                    repeat = seen.get(name, 0)
                    seen[name] = repeat + 1
            for item in expand(cells, kind, fingerprints[kind], row=row.line, repeat=repeat):
                if shard is not None:
                    place = places.get(item.cost, item.cost)
                    places[item.cost] = place + 1
                    if place % shard.count != shard.index:
                        continue
                yield item

    def _read(self) -> Iterator[Row]:
        return read_rows(self.path)

    def _sha256(self) -> str:
        return sha256_of(self.path)

    def _cells(self, row: Row) -> tuple[dict[str, Any], str]:
        if row.problem is not None:
            raise ConfigError(row.problem)
        cells = row.cells if row.typed else _typed(row.cells)
        cells = {key: value for key, value in cells.items() if value is not None}
        try:
            kind = kind_of(cells, self.default_kind)
        except ValueError as error:
            raise ConfigError(f"kind {error}") from error
        if kind not in self.kinds:
            raise ConfigError(
                f"no model here makes {kind}s; name one with --model, or leave --model out for the "
                "embedded ones"
            )
        presets = {k: v for k, v in self.defaults.items() if k in CELLS and kind in CELLS[k][0]}
        whole = self._whole(row, cells, kind, presets)
        complete(whole, kind)
        return whole, kind

    def _whole(
        self, row: Row, cells: Mapping[str, Any], kind: str, presets: Mapping[str, Any]
    ) -> dict[str, Any]:
        own = check_cells(cells, kind, self.path.parent, allow_extra=self.allow_extra)
        base = dict(DEFAULTS[kind])
        if kind == "caption" and not self.kinds[kind]:
            base["prompt"] = "Describe the picture."
        return {**base, **presets, **own}

    def _content(self, cells: Mapping[str, Any], kind: str) -> bytes:
        """A row without an id, as far as it tells it from others."""
        methods = methods_of(cells.get("method"))[0]
        # Without n: the first of two items is named like the first of three.
        text = canonical([kind, portable(hashed(cells)), methods, cells.get("seed")])
        return hashlib.sha256(text.encode()).digest()[:16]

    def _unique(
        self, cells: Mapping[str, Any], kind: str, names: set[int], contents: set[int]
    ) -> None:
        if "id" not in cells:
            name = self._content(cells, kind)
            small = int.from_bytes(name[:8], "big")
            if small in contents:
                self._repeated.add(name)
            contents.add(small)
            return
        count = cells.get("n", 1)
        for k in range(count):
            name_k = cells["id"] if count == 1 else f"{cells['id']}-{k}"
            stem = hashlib.sha256(safe_stem(name_k).encode()).digest()[:8]
            small = int.from_bytes(stem, "big")
            if small in names:
                raise ConfigError(f"the id {name_k!r} is taken by a {self.what} above")
            names.add(small)


def _typed(cells: Mapping[str, Any]) -> dict[str, Any]:
    """CSV cells with the types that their columns have."""
    typed: dict[str, Any] = {}
    for key, text in cells.items():
        value: Any = text
        if key in _WHOLE or key in ("guidance", "strength"):
            try:
                value = int(text)
            except ValueError:
                try:
                    value = float(text)
                except ValueError:
                    value = text
        elif key in _TABLES and text.lstrip()[:1] in ("[", "{"):
            try:
                value = parse_json(text)
            except ValueError as error:
                raise ConfigError(f"{key} is not valid JSON: {error}") from error
        typed[key] = value
    return typed
