"""The list of the embedded weights: size and SHA-256 of every file, so damage is found by name.

No torch here: `mmattn doctor` and `mmattn mini verify` read it without loading a model.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmattn.errors import ModelLoadError

NAMES: tuple[str, ...] = ("t2i", "t2v", "vlm", "vit")
"""The embedded models: text-to-image, text-to-video, vision-language, classifier."""

FILE = "manifest.json"


def weights_root() -> Path:
    """Folder of the embedded weights; ``MMATTN_WEIGHTS`` names another one."""
    chosen = os.environ.get("MMATTN_WEIGHTS")
    return Path(chosen) if chosen else Path(__file__).parent / "weights"


@dataclass
class Check:
    """What is wrong with one model's files; sound when `present` and no problem is listed."""

    name: str
    present: bool
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Present and unchanged."""
        return self.present and not self.problems


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def write(root: Path | None = None) -> Path:
    """Record every file of every model under `root` in its ``manifest.json``."""
    root = weights_root() if root is None else root
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name in NAMES:
        folder = root / name
        if folder.is_dir():
            table[name] = {
                path.relative_to(folder).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": digest(path),
                }
                for path in _files(folder)
            }
    target = root / FILE
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def read(root: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """The manifest under `root`; an empty one where none was written.

    Raises:
        ModelLoadError: when the file is not valid JSON, or of another form.
    """
    target = (weights_root() if root is None else root) / FILE
    if not target.is_file():
        return {}
    try:
        table: dict[str, dict[str, dict[str, Any]]] = json.loads(target.read_text("utf-8"))
        for files in table.values():
            for name, entry in files.items():
                if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                    raise ValueError(f"size or SHA-256 of {name} is of the wrong type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(
            f"The weight manifest {target} is damaged ({error}); reinstall mmattn, or rebuild it "
            "with: mmattn mini verify --write"
        ) from error
    return table


def check(name: str, root: Path | None = None) -> Check:
    """Compare the files of one embedded model with the manifest. Never raises for damaged files."""
    root = weights_root() if root is None else root
    folder = root / name
    if not folder.is_dir() or not _files(folder):
        return Check(name, present=False, problems=[f"no files in {folder}"])
    listed = read(root).get(name)
    found = {p.relative_to(folder).as_posix(): p for p in _files(folder)}
    result = Check(name, True, len(found), sum(p.stat().st_size for p in found.values()))
    if listed is None:
        result.problems.append(f"{name} is not in {FILE}")
        return result
    for relative, entry in listed.items():
        path = found.get(relative)
        if path is None:
            result.problems.append(f"{relative} is missing")
        elif path.stat().st_size != entry["bytes"]:
            result.problems.append(
                f"{relative} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            )
        elif digest(path) != entry["sha256"]:
            result.problems.append(f"{relative} has another SHA-256 than recorded")
    return result


_verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}


def require(name: str, root: Path | None = None) -> Path:
    """The folder of an embedded model, after its files were verified once in this process.

    Raises:
        ModelLoadError: when the weights are missing or differ from the manifest.
    """
    root = weights_root() if root is None else root
    folder = root / name
    state = tuple(
        (str(p), p.stat().st_size, p.stat().st_mtime_ns)
        for p in (_files(folder) if folder.is_dir() else [])
    )
    if state and _verified.get(folder) == state:
        return folder
    result = check(name, root)
    if not result.present:
        raise ModelLoadError(
            f"The embedded model {name!r} has no weights: {result.problems[0]}. Reinstall mmattn, "
            f"or train it here with: mmattn mini train {name}"
        )
    if result.problems:
        raise ModelLoadError(
            f"The embedded model {name!r} in {folder} does not match its manifest: "
            f"{'; '.join(result.problems[:3])}. Reinstall mmattn; after training your own weights "
            "record them with: mmattn mini verify --write"
        )
    _verified[folder] = state
    return folder
