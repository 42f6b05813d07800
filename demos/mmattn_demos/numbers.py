"""Numbers of runs side by side, as data and as an HTML table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mmattn.report import Stats

Measures = dict[str, Any]

_NAMES = {
    "seconds": "time, s",
    "peak_mb": "peak memory, MB",
    "density": "density",
    "tokens": "image tokens kept",
    "sites": "sites executed",
    "calls": "attention calls",
    "dense_calls": "of them dense",
    "psnr_db": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
}


def measures(
    label: str, seconds: float, memory_mb: float | None, stats: Stats | None, **more: Any
) -> Measures:
    """What one run cost and did; None where a number does not exist.

    Args:
        label: dense, or the method.
        seconds: wall time.
        memory_mb: peak above the level at the start.
        stats: of the session; None for the untouched model.
        more: further measures by name.
    """
    found: Measures = {
        "label": label,
        "seconds": round(seconds, 4),
        "peak_mb": None if memory_mb is None else round(memory_mb, 1),
        "density": None,
        "tokens": None,
        "sites": None,
        "calls": None,
        "dense_calls": None,
    }
    if stats is not None:
        found |= {
            "density": None if stats.density is None else round(stats.density, 4),
            "tokens": _kept(stats),
            "sites": f"{stats.executed} of {stats.planned}",
            "calls": stats.calls,
            "dense_calls": stats.dense_calls,
        }
    return found | more


def _kept(stats: Stats) -> str | None:
    """``32 of 64``: the fewest tokens that any layer kept."""
    pairs = [
        (site.tokens_kept, site.tokens_in)
        for site in stats.sites
        if site.tokens_kept is not None and site.tokens_in is not None
    ]
    if not pairs:
        return None
    kept, of = min(pairs)
    return f"{kept:.0f} of {of:.0f}"


def as_html(rows: Sequence[Measures]) -> str:
    """One line per measure that any run has, one column per run."""
    keys = [key for key in _NAMES if any(row.get(key) is not None for row in rows)]
    head = "".join(f'<th scope="col">{escape(str(row["label"]))}</th>' for row in rows)
    lines = []
    for key in keys:
        cells = "".join(f"<td>{_cell(key, row.get(key))}</td>" for row in rows)
        lines.append(f'<tr><th scope="row">{_NAMES[key]}</th>{cells}</tr>')
    return (
        f'<div class="numbers"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


_FORMS = {"seconds": "{:.3f}", "peak_mb": "{:.0f}", "density": "{:.3f}", "psnr_db": "{:.1f}"}


def _cell(key: str, value: Any) -> str:
    return "–" if value is None else escape(_FORMS.get(key, "{}").format(value))


def remarks(every: Sequence[Stats | None]) -> str:
    """Why calls ran dense, and what methods had to say, as Markdown; empty where there is nothing."""
    counts: dict[str, int] = {}
    for stats in every:
        for site in stats.sites if stats is not None else ():
            for texts, how in ((site.dense, "ran dense"), (site.remarks, "noted")):
                for text, count in texts.items():
                    key = f"{how}: {text}"
                    counts[key] = counts.get(key, 0) + count
    return "\n".join(f"- {count} calls {text}" for text, count in counts.items())
