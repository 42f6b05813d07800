"""What is written beside the files at the end of a run: a contact sheet, a table, the failures."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmattn.batch.ledger import read_last, read_records, writing
from mmattn.batch.writers import write_text

SHOWN = 1000
"""Most items on the contact sheet."""

_COLUMNS = ("id", "status", "kind", "file", "sha256", "seed", "method", "prompt", "answer", "error")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
main { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
img, video { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: auto; display: block;
  background: #8882; }
figcaption { padding: .5rem .6rem; overflow-wrap: anywhere; }
small { color: var(--faint); display: block; }
.failed { border-color: #c0392b; }
.failed small { color: #c0392b; }
"""


def final_records(out: Path) -> Iterator[dict[str, Any]]:
    """The record that counts for every item, in the order in which they were written."""
    last = read_last(out)
    for record in read_records(out):
        entry = last.get(record["id"])
        if entry is None or record.get("status") == "skipped" != entry.status:
            continue
        if (record.get("run", 0), record.get("attempt", 1)) == (entry.run, entry.attempt):
            del last[record["id"]]
            yield record


def neutral(text: str) -> str:
    """`text` so that no spreadsheet takes it for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _row(record: dict[str, Any]) -> list[str]:
    cells = {
        **record,
        "prompt": prompt_of(record),
        "error": _table(record, "error").get("message", ""),
    }
    return [neutral(str(cells.get(name, ""))) for name in _COLUMNS]


def _table(record: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of a record, which may be damaged."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def prompt_of(record: dict[str, Any]) -> str:
    """What was asked for, in one text."""
    params = _table(record, "params")
    given = params.get("panels")
    panels = [
        str(panel.get("prompt", ""))
        for panel in (given if isinstance(given, list) else ())
        if isinstance(panel, dict)
    ]
    return " / ".join(part for part in [str(params.get("prompt", "")), *panels] if part)


def write_table(out: Path) -> Path:
    """``results.csv``: one line per item."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    table.writerows(_row(record) for record in final_records(out))
    return write_text(out / "results.csv", text.getvalue())


def write_failures(out: Path) -> int:
    """``failures.jsonl``: the records of the items that failed and were not made since; returns how many."""
    failed = [record for record in final_records(out) if record["status"] == "failed"]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in failed]
    write_text(out / "failures.jsonl", "".join(lines))
    return len(failed)


def write_sheet(out: Path) -> Path:
    """``index.html``: the first items with their pictures, clips and answers."""
    records = final_records(out)
    figures = [_figure(record) for record in islice(records, SHOWN)]
    rest = sum(1 for _ in records)
    more = f"<p>and {rest} more in results.csv</p>" if rest else ""
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src 'self' file:; "
        "media-src 'self' file:; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(out.name)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(out.name)}</h1>\n<main>\n"
        + "\n".join(figures)
        + f"\n</main>\n{more}</body></html>\n"
    )
    return write_text(out / "index.html", page)


def _figure(record: dict[str, Any]) -> str:
    prompt, kind = prompt_of(record), record.get("kind", "")
    file = quote(str(record.get("file") or ""))
    text = html.escape(prompt[:300])
    picture = ""
    if record["status"] == "ok":
        if kind == "caption":
            text = f"{text}<br><b>{html.escape(str(record.get('answer', ''))[:600])}</b>"
        elif file.endswith(".mp4"):
            picture = f"<video src='{file}' muted loop controls preload='metadata'></video>"
        else:
            alt = html.escape(prompt[:120], quote=True)
            picture = f"<a href='{file}'><img src='{file}' alt='{alt}' loading='lazy'></a>"
    facts = [str(record["id"]), f"seed {record.get('seed')}", str(record.get("method", ""))]
    if record["status"] != "ok":
        message = _table(record, "error").get("message", "")
        facts.append(f"{record['status']}: {message}"[:300])
    small = html.escape(" · ".join(facts))
    return (
        f"<figure class='{html.escape(str(record['status']))}'>{picture}"
        f"<figcaption>{text}<small>{small}</small></figcaption></figure>"
    )


def finish(out: Path) -> int:
    """Write all three; returns the number of failures that stand.

    Raises:
        OutputError: when they cannot be written.
    """
    with writing(str(out)):
        write_sheet(out)
        write_table(out)
        return write_failures(out)
