"""Jobs out of files that `mmattn batch` wrote: each is made again from what it says, with changes on top."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmattn.batch.cells import DEFAULTS, check_cells
from mmattn.batch.inspecting import inspect_file
from mmattn.batch.items import canonical, hashed
from mmattn.batch.jobs import Found, Jobs
from mmattn.batch.metadata import cells_of, parse_parameters, pictures_of
from mmattn.batch.rows import SUFFIXES, Row
from mmattn.errors import ConfigError
from mmattn.mini.manifest import NAMES

FILES = 100_000
"""Most files of one run; what they say is kept in memory."""

_WRITTEN = (".png", ".mp4", ".webp", ".json")
_PICTURES = (*_WRITTEN, ".jpg", ".jpeg")
_RUN = re.compile(r"run(\.rank\d+)?\.json")
_NOTHING = "it carries no metadata of mmattn batch"


@dataclass(frozen=True)
class FileRow(Row):
    """A file, and the cells of the row that asks for it.

    Args:
        path: of the file.
        model: name of the model that it was made with.
        fingerprint: of that model; None where the file does not say.
        pictures: hashes of the pictures that it was made from.
        silent: whether it says nothing at all.
        sha256: of the file.
    """

    path: Path = Path()
    model: str = ""
    fingerprint: str | None = None
    pictures: tuple[Any, ...] = ()
    silent: bool = False
    sha256: str = ""

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)


class FileJobs(Jobs):
    """Rows out of folders and files; identities and seeds are those of the files.

    Args:
        paths: folders, read with all that is below them in the order of names, and single files.
        defaults: cells that replace those of the files, ``seed`` excepted.
        named: whether the user named the models. Without it only files of embedded models are made again.
        changes: ``key=value`` or ``method.key=value``, applied to the methods of the files.
        allow_extra: leave out files without metadata, and take no offence at unknown keys.
        more: as for `Jobs`.
    """

    what = "file"

    def __init__(
        self,
        paths: Sequence[Path],
        defaults: Mapping[str, Any] | None = None,
        *,
        named: bool = False,
        changes: Sequence[str] = (),
        **more: Any,
    ) -> None:
        super().__init__(paths[0], defaults, **more)
        self.paths, self.name = list(paths), ", ".join(map(str, paths))
        self.named, self.changes = named, list(changes)
        self._rows: list[FileRow] = []

    def check(self) -> Found:
        """Read every file once; what they say is kept, so that they may go away afterwards.

        Raises:
            BadRows: when some cannot be made again.
            ConfigError: when there is none, or there are too many.
        """
        files = _files(self.paths)
        rows = [_row(number, path) for number, path in enumerate(files, 1)]
        self._rows = [row for row in rows if not (row.silent and self.allow_extra)]
        found = super().check()
        found.skipped = len(rows) - len(self._rows)
        return found

    def of_other_models(self, fingerprints: Mapping[str, str]) -> int:
        """How many files were made with other weights, in another type or on another kind of device."""
        return sum(row.fingerprint != fingerprints[row.cells["kind"]] for row in self._rows)

    def _read(self) -> Iterator[Row]:
        return iter(self._rows)

    def _sha256(self) -> str:
        names = [[str(row.path), row.sha256] for row in self._rows]
        return hashlib.sha256(canonical(names).encode()).hexdigest()

    def _whole(
        self, row: Row, cells: Mapping[str, Any], kind: str, presets: Mapping[str, Any]
    ) -> dict[str, Any]:
        assert isinstance(row, FileRow)
        if not self.named and row.model not in NAMES:
            by = f"with the model {row.model!r}" if row.model else "by another program"
            raise ConfigError(f"it was made {by}; say with --model what makes it now")
        changes = {k: v for k, v in presets.items() if k != "seed"}
        if self.changes and "method" not in changes:
            changes["method"] = _changed(cells.get("method"), self.changes)
        kept = {k: v for k, v in cells.items() if k not in changes}
        own = check_cells(kept, kind, row.path.parent, allow_extra=self.allow_extra)
        whole = {**DEFAULTS[kind], **own, **changes}
        if pictures_of(hashed(whole)) != list(row.pictures):
            raise ConfigError("a picture it was made from has changed since")
        return whole


def _changed(tables: Any, changes: Sequence[str]) -> list[dict[str, Any]]:
    from mmattn.registry import method_from
    from mmattn.variants import override, variant

    methods = [] if tables in (None, "dense") else [method_from(table) for table in tables]
    (column,) = override([variant(methods)], changes)
    return [method.to_dict() for method in column.methods]


def _row(number: int, path: Path) -> FileRow:
    if path.suffix.lower() not in _WRITTEN:
        return FileRow(number, {}, _NOTHING, path=path, silent=True)
    try:
        found = inspect_file(path)
        meta, texts = found.get("mmattn"), found["text"]
        if meta and "schema" not in meta:
            # Other verbs write what people want to know, and not all that it takes.
            return FileRow(number, {}, f"{_NOTHING}, but of another verb", path=path, silent=True)
        if meta:
            cells, model = cells_of(meta), str(meta.get("model"))
            print_, pictures = meta["fingerprint"], tuple(pictures_of(meta))
        elif "parameters" in texts:
            cells, model = parse_parameters(texts["parameters"])
            cells["id"] = path.stem
            print_, pictures = None, (None, None)
        else:
            return FileRow(number, {}, _NOTHING, path=path, silent=True)
    except ConfigError as error:
        text = str(error).removeprefix(f"{path}: ")
        return FileRow(number, {}, text, path=path)
    return FileRow(
        number, cells, None, bool(meta), path, model, print_, pictures, sha256=found["sha256"]
    )


def _files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else _below(path)
        if len(files) > FILES:
            raise ConfigError(f"there are more than {FILES:,} files; take a part of the folders")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """The files of a folder that could be results, without what lies beside results."""
    for at, folders, names in os.walk(folder, onerror=_raise):
        there = set(names)
        # Panels of a set; the canvas beside the folder tells how to make them.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not (name.endswith(".panels") and f"{name.removesuffix('.panels')}.png" in there)
        )
        for name in sorted(names):
            sidecar = name.endswith(".json") and name.removesuffix(".json") in there
            if name.startswith(".") or sidecar or _RUN.fullmatch(name):
                continue
            if Path(name).suffix.lower() in _PICTURES:
                yield Path(at, name)


def _raise(error: OSError) -> None:
    raise error


def jobs_from(
    paths: Sequence[Path],
    out: Path,
    defaults: Mapping[str, Any],
    *,
    named: bool,
    changes: Sequence[str] = (),
    **more: Any,
) -> Jobs:
    """The jobs that a user names: a job file, or folders and files that `mmattn batch` wrote.

    Args:
        paths: what to read.
        out: where results go; nothing that is read may lie there.
        defaults: cells that options give. They fill the gaps of a job file and replace what files say.
        named, changes, more: as for `FileJobs`.

    Raises:
        ConfigError: when there is nothing at a path, both kinds are named, or results would lie among what
            is read.
    """
    tables = [path for path in paths if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    if tables or (len(paths) == 1 and not paths[0].exists()):
        if len(paths) > 1:
            raise ConfigError(
                f"one job file makes a run, or any number of folders and files that mmattn batch wrote; "
                f"found {[str(path) for path in paths]}"
            )
        if changes:
            raise ConfigError("--set changes the settings of -m, and no -m is given")
        return Jobs(paths[0], defaults, **more)
    to = out.resolve()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"there is no file or folder at {path}")
        place = path.resolve()
        if place.is_relative_to(to) or (path.is_dir() and to.is_relative_to(place)):
            raise ConfigError(
                f"{path} is read and results go to {out}, and one lies in the other; name another --out"
            )
    return FileJobs(paths, defaults, named=named, changes=changes, **more)
