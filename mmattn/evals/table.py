"""Results of evaluations with intervals, and one table for many methods and seeds.

An interval is the middle 95 % of 1000 bootstrap resamples. Pictures are drawn, with all their questions,
and rates are computed anew from the summed counts, because F1 and CHAIR are ratios over the whole set and
not means. Differences are paired: both columns are resampled with the same pictures.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from mmattn.errors import ConfigError
from mmattn.evals._protocol import Rate, digest

RESAMPLES = 1000
COVERAGE = 0.95

Rates = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
Counts = Mapping[str, Sequence[float]]


class Interval(NamedTuple):
    """A number and where it lies in 95 % of the resamples."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def _totals(counts: Counts, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        name: weights @ torch.tensor(list(values), dtype=torch.float64)
        for name, values in counts.items()
    }


@functools.lru_cache(maxsize=4)
def _weights(pictures: int, resamples: int) -> torch.Tensor:
    """How often each resample draws each picture ``[1 + R, P]``; the first row is the set itself."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(pictures, (resamples, pictures), generator=generator)
    times = torch.zeros(resamples, pictures, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    return torch.cat([torch.ones(1, pictures, dtype=torch.float64), times])


def _interval(values: torch.Tensor) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(values[1:], torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(float(values[0]), float(low), float(high))


def intervals(counts: Counts, rates: Rates, *, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Every rate with its bootstrap interval.

    Args:
        counts: per counter, one number per picture.
        rates: turns summed counts ``[R]`` into rates ``[R]``.
        resamples: bootstrap resamples, at least 1. The draw is fixed: the same counts give the same
            interval.
    """
    weights = _weights(len(next(iter(counts.values()))), resamples)
    return {name: _interval(v) for name, v in rates(_totals(counts, weights)).items()}


def differences(
    counts: Counts, base: Counts, rates: Rates, *, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Every rate minus that of `base`, over the same pictures in the same order.

    Raises:
        ConfigError: for different numbers of pictures.
    """
    sizes = {len(values) for side in (counts, base) for values in side.values()}
    if len(sizes) != 1:
        raise ConfigError(
            f"a paired difference needs the same pictures on both sides, found {sorted(sizes)}"
        )
    weights = _weights(sizes.pop(), resamples)
    ours, theirs = rates(_totals(counts, weights)), rates(_totals(base, weights))
    return {name: _interval(ours[name] - theirs[name]) for name in ours if name in theirs}


class Line(NamedTuple):
    """One column of an evaluation, all seeds together."""

    label: str
    rates: dict[str, Interval]
    differences: dict[str, Interval]
    cost: dict[str, float]
    items: int
    sets: int
    error: str | None = None


def read(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results in ``result.json`` files.

    Raises:
        ConfigError: for a file that is no result.
    """
    results = []
    for path in map(Path, paths):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["label"], data["protocol"], data["status"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not the result of an evaluation: {error}") from error
        results.append(data)
    return results


def lines(results: Sequence[Mapping[str, Any]], *, base: str = "dense") -> list[Line]:
    """Results of one protocol as lines, in order of first appearance; results of one label are pooled.

    Args:
        results: see `read`; one per column and set of pictures (seed).
        base: label that the others are compared with, on the pictures that both have.

    Raises:
        ConfigError: for results of several protocols, or two of one label on one set of pictures.
    """
    names = sorted({result["protocol"] for result in results})
    if len(names) != 1:
        raise ConfigError(f"a table is about one protocol, found {names}")
    rates: Rates = importlib.import_module(f"mmattn.evals.{names[0]}").rates
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    pools = {label: _pool(label, group) for label, group in groups.items()}
    made = []
    for label, group in groups.items():
        failed = next((r["error"] for r in group if r["status"] != "ok"), None)
        pool = pools[label]
        if not pool:
            made.append(Line(label, {}, {}, {}, 0, 0, failed))
            continue
        gaps: dict[str, Interval] = {}
        common = [key for key in pool if key in pools.get(base, {})]
        if label != base and common:
            gaps = differences(_columns(pool, common), _columns(pools[base], common), rates)
        good = [r for r in group if r["status"] == "ok"]
        costs = [r.get("cost", {}) for r in good]
        cost = {k: fmean(c[k] for c in costs if k in c) for k in {k for c in costs for k in c}}
        made.append(
            Line(
                label,
                intervals(_columns(pool, list(pool)), rates),
                gaps,
                cost,
                sum(r["items"] for r in good),
                len(good),
                failed,
            )
        )
    return made


def _pool(
    label: str, group: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], dict[str, float]]:
    """Counts by set and picture."""
    pool: dict[tuple[str, str], dict[str, float]] = {}
    for result in group:
        if result["status"] != "ok":
            continue
        where = digest(result["origin"])
        if any(key[0] == where for key in pool):
            raise ConfigError(f"{label}: two results are about the same pictures; give one of them")
        for i, picture in enumerate(result["pictures"]):
            pool[where, picture] = {name: v[i] for name, v in result["tallies"].items()}
    return pool


def _columns(
    pool: Mapping[tuple[str, str], Mapping[str, float]], keys: Sequence[tuple[str, str]]
) -> dict[str, list[float]]:
    names = dict.fromkeys(name for key in keys for name in pool[key])
    return {name: [pool[key].get(name, 0) for key in keys] for name in names}


_COSTS = (
    ("tokens_kept", "image tokens", "{:.0f}"),
    ("tokens", "answer tokens", "{:.1f}"),
    ("prefill_ms", "prefill ms", "{:.1f}"),
    ("decode_ms", "decode ms", "{:.1f}"),
    ("memory_mb", "memory MiB", "{:.0f}"),
)


def rates_of(protocol: str) -> tuple[Rate, ...]:
    """The rates that a protocol shows."""
    shown: tuple[Rate, ...] = importlib.import_module(f"mmattn.evals.{protocol}").RATES
    return shown


def cells(protocol: str, made: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: every rate with its interval, the paired difference, and what it cost."""
    shown = [r for r in rates_of(protocol) if any(r.key in line.rates for line in made)]
    costs = [c for c in _COSTS if any(c[0] in line.cost for line in made)]
    head = ["", *(r.label for r in shown), *(c[1] for c in costs)] if shown else ["", "error"]
    rows = []
    for line in made:
        row = [line.label]
        if not line.rates:
            row += [line.error or "failed", *[""] * (len(head) - 2)]
            rows.append(row)
            continue
        for rate in shown:
            row.append(_cell(rate, line.rates.get(rate.key), line.differences.get(rate.key)))
        row += [form.format(line.cost[key]) if key in line.cost else "" for key, _, form in costs]
        rows.append(row)
    return head, rows


def _cell(rate: Rate, value: Interval | None, gap: Interval | None) -> str:
    if value is None:
        return ""
    factor = 100 if rate.style == "percent" else 1
    text = f"{factor * value.value:.1f} [{factor * value.low:.1f}, {factor * value.high:.1f}]"
    if gap is not None:
        mark = "*" if gap.certain else ""
        text += f" ({factor * gap.value:+.1f}{mark})"
    return text


NOTE = (
    "Shares in percent. Brackets: 95 % bootstrap interval over pictures. Parentheses: paired difference to "
    "dense, with * where its own interval excludes zero. Times are per answer, in milliseconds."
)
"""What the cells say."""


def markdown(results: Sequence[Mapping[str, Any]], *, base: str = "dense") -> str:
    """One markdown table of many results (methods and seeds) of one protocol, with intervals.

    Args:
        results: see `read`.
        base: label that the others are compared with.

    Raises:
        ConfigError: for results of several protocols, or two of one label on one set of pictures.
    """
    made = lines(results, base=base)
    head, rows = cells(results[0]["protocol"], made)
    table = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table)
    good = [line for line in made if line.rates]
    notes = [NOTE]
    if good:
        most = max(good, key=lambda line: line.sets)
        notes.append(f"{most.items} items over {most.sets} set(s) of pictures.")
    fewer = [line.label for line in good if line.sets < max(g.sets for g in good)]
    if fewer:
        notes.append(f"On fewer sets: {', '.join(fewer)}.")
    return f"{text}\n\n{' '.join(notes)}\n"
