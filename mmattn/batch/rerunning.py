"""Make a file again from what it says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmattn.batch.cells import KINDS, check_cells, complete
from mmattn.batch.inspecting import inspect_file
from mmattn.batch.items import Item, expand
from mmattn.batch.metadata import cells_of, pictures_of
from mmattn.batch.models import Models
from mmattn.batch.worker import Options, Worker
from mmattn.errors import ConfigError
from mmattn.mini.manifest import NAMES

_TYPES = ("float32", "float16", "bfloat16")


def item_of(meta: dict[str, Any], path: Path) -> Item:
    """The item that `mmattn batch` made a file from. What the file says is checked like a row.

    Raises:
        ConfigError: when the metadata is not of a batch, is incomplete, or names a picture that is not
            there or has changed.
    """
    try:
        cells = check_cells(cells_of(meta), meta["kind"], path.parent)
        complete(cells, meta["kind"])
        (item,) = expand(cells, meta["kind"], meta["fingerprint"], row=0)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if pictures_of(item.params) != pictures_of(meta):
        raise ConfigError(f"{path}: a picture it was made from has changed since")
    return item


def rerun(
    path: Path, out: Path, model: str | None = None, *, device: str | None = None
) -> dict[str, Any]:
    """Make a file again and compare the two.

    Args:
        path: what `mmattn batch` wrote, with its metadata.
        out: folder for the new file.
        model: where the model is now; by default where the file says, if that is an embedded model or a
            folder. What a file says is never fetched from a hub.
        device: torch device; by default the kind of device that the file names.

    Returns:
        ``original`` and ``file``, whether they are ``identical`` byte for byte, and ``status`` and
        ``error`` as in a record.

    Raises:
        ConfigError: when the file does not say enough, or the model is not the one it was made with.
    """
    found = inspect_file(path)
    meta = found.get("mmattn") or {}
    item = item_of(meta, path)
    name, dtype = str(meta.get("model")), str(meta.get("dtype"))
    if model is None and name not in NAMES and not Path(name).is_dir():
        raise ConfigError(f"{path} was made with the model {name!r}; say where it is with --model")
    if dtype not in _TYPES:
        raise ConfigError(f"{path}: its metadata names the unknown type {dtype!r}")
    models = Models.named(
        [model or name], KINDS[item.kind], device=device or str(meta.get("device")), dtype=dtype
    )
    if item.kind not in models.sources:
        raise ConfigError(f"{model or name} does not make {item.kind}s, and {path} is one")
    source = models.sources[item.kind]
    if source.fingerprint() != item.model:
        raise ConfigError(
            f"{source.name} on {source.device} is not the model that {path} was made with (fingerprint "
            f"{item.model}); name the same weights with --model, and the same kind of device"
        )
    with Worker(models, Options(out)) as worker:
        record = worker.run([item])[0]
    return {
        "original": str(path),
        "file": None if record.file is None else str(out / record.file),
        "identical": record.sha256 == found["sha256"],
        "status": record.status,
        "error": record.error,
    }
