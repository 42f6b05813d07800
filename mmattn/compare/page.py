"""The report as one HTML file: pictures inside, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from mmattn.compare.results import Figure, Outcome, Report, Section, shown
from mmattn.variants import DENSE

_MIME = {".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}


def inline_png(picture: Image.Image, alt: str) -> str:
    """An ``<img>`` with the pixels inside."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" {size}>'


def render(report: Report, out: Path) -> str:
    """The page; figures are read from `out`."""
    style = files("mmattn.compare").joinpath("report.css").read_text(encoding="utf-8")
    parts = [_head(report), *(_section(section, out) for section in report.sections), _foot(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>mmattn: methods side by side</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    machine = report.environment
    where = machine["gpu"] or f"{machine['cpus']} CPU cores"
    links = "".join(f'<a href="#{escape(s.model)}">{escape(s.title)}</a>' for s in report.sections)
    warning = ""
    if report.interrupted:
        warning = '<p class="notice">Interrupted: this page holds what was done by then.</p>\n'
    return (
        "<header>\n<h1>Methods side by side</h1>\n"
        f'<p class="sub">The same prompts and seeds through each model, untouched and with methods '
        f"attached. {escape(where)}, {report.seconds:.0f} s, {escape(report.started[:16])} UTC.</p>\n"
        f"{warning}<nav>{links}</nav>\n</header>\n"
    )


def _section(section: Section, out: Path) -> str:
    problems = "".join(f'<p class="notice">{escape(text)}</p>\n' for text in section.problems)
    table = _table(section) if section.outcomes else ""
    figures = "".join(_figure(figure, out) for figure in section.figures)
    return (
        f'<section id="{escape(section.model)}">\n<h2>{escape(section.title)} '
        f"<small>{escape(section.model)}, {section.samples} samples</small></h2>\n"
        f"<p>{escape(section.lead)}</p>\n{_findings(section)}{problems}{table}{figures}</section>\n"
    )


def _findings(section: Section) -> str:
    dense = next((o for o in section.outcomes if o.label == DENSE.label and o.status == "ok"), None)
    if dense is None:
        return ""
    lines = []
    for outcome in section.outcomes:
        if outcome is not dense and outcome.status == "ok":
            lines.append(f"<li>{finding(section, outcome, dense)}</li>")
    return f'<ul class="findings">{"".join(lines)}</ul>\n' if lines else ""


def finding(section: Section, outcome: Outcome, dense: Outcome) -> str:
    """What a method did, in one sentence of HTML."""
    work = _work(outcome)
    parts = []
    for key in section.columns:
        before, after = dense.quality.get(key.key), outcome.quality.get(key.key)
        if not key.headline or after is None:
            continue
        now = shown(after, key.style)
        parts.append(
            f"{key.label} {now}"
            if before is None
            else f"{key.label} {shown(before, key.style)} → {now}"
        )
    change = f"; {', '.join(parts)}" if parts else ""
    text = escape(f"{outcome.sites} sites, {work}{change}.")
    return f"<strong>{escape(outcome.label)}</strong>: {text}"


def _work(outcome: Outcome) -> str:
    if outcome.tokens_kept is not None and outcome.tokens_in:
        return f"{outcome.tokens_kept:.0f} of {outcome.tokens_in:.0f} tokens kept"
    if outcome.density is not None:
        dense = outcome.dense_calls
        some = f" ({dense} of {outcome.calls} calls dense)" if dense else ""
        return f"{100 * outcome.density:.0f} % of the query-key pairs computed{some}"
    return f"{outcome.calls} calls"


_Cell = Callable[[Outcome], str]


def _costs(section: Section) -> list[tuple[str, str, _Cell]]:
    """Heading, meaning and cell of the cost columns that hold anything in this section."""

    def tokens(o: Outcome) -> str:
        kept = o.tokens_kept is not None and o.tokens_in is not None
        return f"{o.tokens_kept:.0f}/{o.tokens_in:.0f}" if kept else ""

    every: list[tuple[str, str, _Cell]] = [
        ("time", "wall time of one pass over the samples", lambda o: f"{o.seconds or 0:.1f} s"),
        (
            "memory",
            "peak memory above the level before the pass",
            lambda o: "" if o.memory_mb is None else f"{o.memory_mb:.0f} MB",
        ),
        ("tokens", "tokens kept of tokens in", tokens),
        (
            "density",
            "share of query-key pairs computed",
            lambda o: "" if o.density is None else f"{o.density:.2f}",
        ),
    ]
    ran = [o for o in section.outcomes if o.status == "ok"]
    return [entry for entry in every if any(entry[2](o) for o in ran)]


def _table(section: Section) -> str:
    costs = _costs(section)
    heads = [("", ""), *((name, meaning) for name, meaning, _ in costs)]
    heads += [(c.label, c.meaning) for c in section.columns]
    top = "".join(
        f'<th scope="col" title="{escape(meaning)}">{escape(name)}</th>' for name, meaning in heads
    )
    rows = "".join(_row(section, outcome, costs) for outcome in section.outcomes)
    keys = "; ".join(
        f"<b>{escape(c.label)}</b> {escape(c.meaning)}{' (lower is better)' if c.better == 'low' else ''}"
        for c in section.columns
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{top}</tr></thead>\n'
        f'<tbody>{rows}</tbody>\n</table></div>\n<p class="keys">{keys}.</p>\n'
    )


def _row(section: Section, outcome: Outcome, costs: list[tuple[str, str, _Cell]]) -> str:
    name = f'<th scope="row">{escape(outcome.label)}</th>'
    if outcome.status != "ok":
        span = len(costs) + len(section.columns)
        text = f"{outcome.status}: {outcome.error or ''}"
        return f'<tr class="bad">{name}<td colspan="{span}">{escape(text)}</td></tr>\n'
    cells = [cell(outcome) or "–" for _, _, cell in costs]
    cells += [shown(outcome.quality.get(c.key), c.style) for c in section.columns]
    return f"<tr>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"


def _figure(figure: Figure, out: Path) -> str:
    # Texts are written by the jobs and may carry markup; nothing from a model or a user is in them.
    head = f"<h3>{escape(figure.title)}</h3>\n<p>{figure.text}</p>\n"
    if figure.kind == "html":
        return f'{head}<div class="cards">{figure.html}</div>\n'
    path = out / figure.path
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_MIME[path.suffix]};base64,{data}"
    link = f"<figcaption><code>{escape(figure.path)}</code></figcaption>"
    if path.suffix == ".mp4":
        media = f'<video src="{source}" controls loop muted autoplay playsinline></video>'
    else:
        media = f'<img src="{source}" alt="{escape(figure.title)}">'
    return f'{head}<figure class="wide"><div class="scroll" tabindex="0">{media}</div>{link}</figure>\n'


def _foot(report: Report) -> str:
    machine: dict[str, Any] = report.environment
    libraries = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    settings = report.settings
    return (
        "<footer>\n<p>Times are one pass each on this machine, after a short warm-up. Models this small "
        "spend little of their time in attention, so a sparse method often costs more here than it "
        "saves; density and tokens say what it would save on a long sequence. Use "
        "<code>mmattn bench</code> for repeated, interleaved timing.</p>\n"
        f"<p>Seed {settings['seed']}, {settings['steps']} steps, guidance {settings['guidance']:g}. "
        f"Python {escape(machine['python'])}, {escape(libraries)}; {escape(machine['platform'])}, "
        f"{machine['threads']} threads. All numbers: <code>report.json</code>.</p>\n</footer>\n"
    )
