"""What a run is about to do, for people who ask first, and for the record."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmattn import __version__
from mmattn.batch.jobs import Found, Jobs, Shard
from mmattn.batch.ledger import Ledger, read_last, writing
from mmattn.batch.local import Rules
from mmattn.batch.models import Models
from mmattn.batch.writers import write_json

RUNS = 50
"""Most runs that ``run.json`` remembers."""


def dry(
    jobs: Jobs,
    fingerprints: Mapping[str, str],
    out: Path,
    rules: Rules,
    shard: Shard | None = None,
) -> list[dict[str, Any]]:
    """Every item, and whether it would be made; nothing is written or locked."""
    ledger = Ledger(out, shard)
    ledger.last = read_last(out)
    planned = []
    for item in jobs.items(fingerprints, shard):
        done = not rules.overwrite and ledger.done(item, verify=rules.verify)
        planned.append(
            {
                "status": "done" if done else "again" if ledger.changed(item) else "to make",
                "id": item.id,
                "kind": item.kind,
                "seed": item.seed,
                "method": item.label,
                "file": item.file,
                "row": item.row,
            }
        )
    return planned


def describe_run(
    out: Path,
    shard: Shard | None,
    number: int,
    argv: Sequence[str],
    models: Models,
    files: Mapping[str, Mapping[str, str]],
    jobs: Jobs,
    found: Found,
) -> Path:
    """Add this run to ``run.json``, or ``run.rank<i>.json``: command, versions, models, machine."""
    import torch

    from mmattn.measuring import environment

    used = {kind: models.sources[kind] for kind in found.items}
    device = next(iter(used.values())).device
    entry = {
        "run": number,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": [os.path.basename(argv[0]), *argv[1:]] if argv else [],
        "mmattn": __version__,
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "jobs": {"file": jobs.name, "sha256": found.sha256, "rows": found.rows},
        "items": found.items,
        "defaults": jobs.defaults,
        "shard": None if shard is None else f"{shard.index}/{shard.count}",
        "models": {
            kind: {"name": source.name, "dtype": source.dtype, "files": dict(files[source.name])}
            for kind, source in used.items()
        },
        "host": socket.gethostname(),
        **environment(torch.device(device)),
    }
    path = out / ("run.json" if shard is None else f"run.rank{shard.index}.json")
    try:
        runs = list(json.loads(path.read_text("utf-8"))["runs"])
    except (OSError, ValueError, KeyError, TypeError):
        runs = []
    with writing(str(path)):
        return write_json(path, {"runs": [*runs, entry][-RUNS:]})


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is, or None; read from its files, git is not needed."""
    try:
        head = (folder / ".git" / "HEAD").read_text("utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        loose = folder / ".git" / name
        if loose.is_file():
            return loose.read_text("utf-8").strip()
        packed = (folder / ".git" / "packed-refs").read_text("utf-8")
        return next(line.split()[0] for line in packed.splitlines() if line.endswith(" " + name))
    except (OSError, StopIteration, UnicodeDecodeError):
        return None
