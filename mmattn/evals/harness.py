"""Put a protocol's questions to a model, with and without methods, and keep every answer on disk.

A `Protocol` (POPE, CHAIR, MME, AMBER) knows its items, how one picture's answers are counted, and how
counts become rates. `run` asks the untouched model and one column per set of methods. Every answer is a
line in ``<out>/<protocol>/<column>/answers.jsonl`` as soon as its batch is done: a run that was killed goes
on where it stopped and asks nothing twice, and a hash of all settings keeps answers of different runs apart.

Counts are kept per picture, because questions about one picture are not independent: the intervals of
`mmattn.evals.table` resample pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import ConfigError, MmattnError, NoSiteError
from mmattn.evals._asking import Asker, fingerprint
from mmattn.evals._protocol import Item, Protocol, digest, put, put_lines

if TYPE_CHECKING:
    from mmattn.loading import Loaded
    from mmattn.session import Session
    from mmattn.variants import Variant

Progress = Callable[[str, int, int], None]
"""Called with the column, the items answered, and all items, after every batch."""


class Ledger:
    """The answers of one column, one JSON line each, behind a first line that holds the settings.

    Args:
        path: the file; what it holds already is read.
        settings: everything that answers depend on.

    Raises:
        ConfigError: when the file holds answers of other settings, or is damaged anywhere but in its last
            line, which a kill may have cut.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        plain = json.loads(json.dumps(settings, sort_keys=True, default=str))
        key = digest(plain)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                if number == 1 or "settings" in row:  # two runs that began at once both write it
                    self._check(row["settings"], row["key"], plain, key)
                elif "run" in row:
                    self.runs.append(row["run"])
                else:
                    self.answers[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, MmattnError):
                    raise
                raise ConfigError(
                    f"{path} line {number} is damaged ({error}); delete the file to ask again"
                ) from error
        if not whole:
            self._append([{"settings": plain, "key": key}])

    def _check(self, found: Any, found_key: str, wanted: Any, key: str) -> None:
        if found_key == key:
            return
        names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
        shown = "; ".join(
            f"{n} was {_cut(found.get(n))} and is now {_cut(wanted.get(n))}" for n in names
        )
        raise ConfigError(
            f"{self.path} holds answers of other settings: {shown}. Choose another folder with --out, or "
            "delete this file to ask again."
        )

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep answers, each with its ``id``."""
        self._append(rows)
        self.answers.update({row["id"]: dict(row) for row in rows})

    def finish(self, **run: Any) -> None:
        """Note what one stretch of asking took."""
        self._append([{"run": run}])
        self.runs.append(run)

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # One unbuffered write: a kill cuts one batch at most, and runs that share the file do not mix lines.
        with self.path.open("ab", buffering=0) as stream:
            stream.write(text.encode())


def _cut(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def slug(label: str) -> str:
    """`label` as a folder name."""
    name = re.sub(r"[^A-Za-z0-9.=_+-]+", "-", label).strip("-.") or "column"
    return name if len(name) <= 80 else f"{name[:70]}-{digest(label)[:8]}"


def run(
    protocol: Protocol,
    loaded: Loaded,
    columns: Sequence[Variant],
    out: Path,
    *,
    seed: int = 0,
    batch: int = 64,
    generation: Mapping[str, Any] | None = None,
    samples: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Ask the untouched model and every column, grade the answers, and write the results.

    Args:
        protocol: what is asked.
        loaded: a vision-language model.
        columns: sets of methods; the untouched model comes first by itself.
        out: answers go to ``<out>/<protocol>/<column>/``. What is there already is not asked again.
        seed: seed of methods and of sampling. Every batch has its own, so that a run that was cut draws
            what an uncut one draws.
        batch: items per call.
        generation: arguments of `generate`, such as ``num_beams``. The default is greedy.
        samples: write ``samples_<protocol>.jsonl`` as well, in the shape of lmms-eval.
        progress: called after every batch.

    Returns:
        One result per column, as in ``result.json``; the status of a column that failed is ``failed`` or
        ``does not fit``, and the others go on.

    Raises:
        ConfigError: when two columns are the same, or answers of other settings are in the way.
    """
    from mmattn.variants import DENSE

    every = [DENSE, *columns]
    labels = [column.label for column in every]
    twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if twice:
        raise ConfigError(f"the column {twice[0]!r} is there twice; give every set of methods once")
    if protocol.picture is None:
        raise ConfigError(f"{protocol.name}: asking a model needs the pictures, give their folder")
    asker = Asker(loaded, protocol.picture, generation)
    shared = {
        "protocol": protocol.name,
        "origin": protocol.origin,
        "items": digest([[i.id, i.picture, i.prompt, i.limit] for i in protocol.items]),
        "model": loaded.source,
        "weights": fingerprint(loaded.target),
        "dtype": str(loaded.target.dtype),
        "device": loaded.target.device.type,
        "generation": asker.generation,
        "seed": seed,
        "batch": batch,
    }
    folders = [out / protocol.name / slug(label) for label in labels]
    ledgers = [
        Ledger(
            folder / "answers.jsonl", {**shared, "methods": [m.to_dict() for m in column.methods]}
        )
        for column, folder in zip(every, folders, strict=True)
    ]
    results = []
    for column, folder, ledger in zip(every, folders, ledgers, strict=True):
        result: dict[str, Any] = {
            "label": column.label,
            "methods": [m.to_dict() for m in column.methods],
            "seed": seed,
        }
        try:
            _ask(protocol, asker, column, ledger, seed, batch, progress)
            result |= graded(protocol, ledger, folder, asker.generation, samples=samples)
        except Exception as error:
            status = "does not fit" if isinstance(error, NoSiteError) else "failed"
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, MmattnError) else f"{type(error).__name__}: "
            result |= {"protocol": protocol.name, "status": status, "error": f"{kind}{text}"[:600]}
        put(folder / "result.json", json.dumps(result, ensure_ascii=False) + "\n")
        results.append(result)
    return results


def asks(protocol: Protocol) -> dict[str, str]:
    """Item id to the id of the first item with the same picture and prompt; such items share an answer."""
    first: dict[tuple[str, str, int], str] = {}
    return {i.id: first.setdefault((i.picture, i.prompt, i.limit), i.id) for i in protocol.items}


def batches(protocol: Protocol, size: int) -> list[list[Item]]:
    """Distinct requests in batches that depend on nothing else: one limit per batch, pictures together."""
    source = asks(protocol)
    place: dict[str, int] = {}
    for item in protocol.items:
        place.setdefault(item.picture, len(place))
    todo = [item for item in protocol.items if source[item.id] == item.id]
    made = []
    for limit in sorted({item.limit for item in todo}):
        group = [item for item in todo if item.limit == limit]
        group.sort(key=lambda item: place[item.picture])
        made += [group[start : start + size] for start in range(0, len(group), size)]
    return made


def _ask(
    protocol: Protocol,
    asker: Asker,
    column: Variant,
    ledger: Ledger,
    seed: int,
    size: int,
    progress: Progress | None,
) -> None:
    from mmattn.attaching import attach
    from mmattn.measuring import measured

    every = batches(protocol, size)
    total = sum(map(len, every))
    open_ = [(n, [i for i in group if i.id not in ledger.answers]) for n, group in enumerate(every)]
    open_ = [(n, group) for n, group in open_ if group]
    if not open_:
        return
    methods = list(column.methods)
    session = attach(asker.model, methods, seed=seed) if methods else None

    def work() -> None:
        for number, group in open_:
            rows = _one_batch(asker, session, group, seed * 100_003 + number)
            ledger.add([{"id": i.id, **row} for i, row in zip(group, rows, strict=True)])
            if progress is not None:
                progress(column.label, len(ledger.answers), total)

    with session if session is not None else contextlib.nullcontext():
        result = measured(work, asker.model.device)
    ledger.finish(
        seconds=round(result.seconds, 3),  # with the preparation of pictures and the writing
        answered=sum(len(group) for _, group in open_),
        memory_mb=None if result.memory_mb is None else round(result.memory_mb, 1),
    )


def _one_batch(
    asker: Asker, session: Session | None, group: Sequence[Item], seed: int
) -> list[dict[str, Any]]:
    if session is not None:
        for part in session.runs:
            part.seed = seed
        session.reset()
    device = asker.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows = asker(group)
    if session is not None:
        stats = session.stats
        pruned = [s for s in stats.sites if s.tokens_kept is not None and s.tokens_in is not None]
        facts: dict[str, float | None] = {"density": stats.density}
        if pruned:
            facts["tokens_in"] = max(s.tokens_in for s in pruned if s.tokens_in is not None)
            facts["tokens_kept"] = min(s.tokens_kept for s in pruned if s.tokens_kept is not None)
        for row in rows:
            row.update({k: round(v, 4) for k, v in facts.items() if v is not None})
    return rows


def graded(
    protocol: Protocol,
    ledger: Ledger,
    folder: Path,
    generation: Mapping[str, Any],
    *,
    samples: bool = True,
) -> dict[str, Any]:
    """Counts, costs, and the files beside the answers."""
    source = asks(protocol)
    rows = [ledger.answers[source[item.id]] for item in protocol.items]
    responses = [row["response"] for row in rows]
    protocol.write(folder, responses)
    if samples:
        put_lines(
            folder / f"samples_{protocol.name}.jsonl", sample_rows(protocol, rows, generation)
        )
    own = list(ledger.answers.values())
    cost: dict[str, float] = {
        "prefill_ms": median(row["prefill_ms"] for row in own),
        "decode_ms": median(row["decode_ms"] for row in own),
    }
    for key in ("tokens", "tokens_in", "tokens_kept", "density"):
        values = [row[key] for row in own if key in row]
        if values:
            cost[key] = fmean(values)
    memory = [part["memory_mb"] for part in ledger.runs if part["memory_mb"] is not None]
    if memory:
        cost["memory_mb"] = max(memory)
    cost["seconds"] = sum(row["prefill_ms"] + row["decode_ms"] for row in own) / 1e3
    return {**score(protocol, responses), "answers": len(own), "cost": cost}


def score(protocol: Protocol, responses: Sequence[str]) -> dict[str, Any]:
    """Counts per picture, and the rates over all of them.

    Raises:
        ConfigError: when there is not one response per item.
    """
    if len(responses) != len(protocol.items):
        raise ConfigError(
            f"{protocol.name}: found {len(responses)} answers to {len(protocol.items)} items"
        )
    keys, tallies = protocol.tallies(responses)
    totals = {k: torch.tensor([sum(v)], dtype=torch.float64) for k, v in tallies.items()}
    rates = importlib.import_module(f"mmattn.evals.{protocol.name}").rates(totals)
    return {
        "protocol": protocol.name,
        "status": "ok",
        "origin": protocol.origin,
        "items": len(protocol.items),
        "rates": {name: float(value) for name, value in rates.items()},
        "pictures": keys,
        "tallies": tallies,
    }


def sample_rows(
    protocol: Protocol, rows: Sequence[Mapping[str, Any]], generation: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One line per item in the shape of ``lmms-eval --log_samples``; ``resps`` is always there."""
    lines = []
    for n, (item, row) in enumerate(zip(protocol.items, rows, strict=True)):
        doc = dict(item.doc)
        text = json.dumps(doc, indent=2, ensure_ascii=False)
        arguments = {**generation, "max_new_tokens": item.limit}
        lines.append(
            {
                "doc_id": n,
                "doc": doc,
                "target": item.target,
                "arguments": [item.prompt, arguments, n, protocol.name, "test"],
                "resps": [[row["response"]]],
                "filtered_resps": [protocol.filtered(item, row["response"])],
                "token_counts": [{"output_tokens": row["tokens"]}],
                "doc_hash": hashlib.sha256(text.encode()).hexdigest(),
                "input_media": [item.picture],
                **protocol.payload(item, row["response"]),
            }
        )
    return lines
