"""Stats: plain numbers collected from the meters, and the table made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmattn.runs import Run


@dataclass(frozen=True)
class SiteStats:
    """Numbers of one site.

    Args:
        calls: attention calls that went through the seam.
        density: mean share of query-key pairs computed, 1.0 for dense; None if the method keeps none.
        recall: mean share of the dense attention mass on what was kept, in the probed steps; None if
            nothing was probed.
        tokens_in, tokens_kept: mean tokens before and after pruning or merging.
        dense: calls that ran the original attention, by reason.
        milliseconds: wall time inside the seam; on a GPU this is launch time, not kernel time.
        steps: mean density in each denoising step; empty without a step clock.
        remarks: sentences of the methods about these calls, and how often each was true.
    """

    path: str
    kind: str
    methods: tuple[str, ...]
    calls: int
    density: float | None
    tokens_in: float | None
    tokens_kept: float | None
    dense: dict[str, int]
    milliseconds: float
    notes: dict[str, float]
    recall: float | None = None
    steps: dict[int, float] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """Numbers of a session.

    Args:
        planned: sites a method was planned for.
        executed: sites whose seam was reached at least once.
        calls: attention calls over all sites.
    """

    planned: int
    executed: int
    calls: int
    sites: tuple[SiteStats, ...]

    @property
    def density(self) -> float | None:
        """Mean density over the calls that recorded one."""
        rows = [s for s in self.sites if s.density is not None]
        total = sum(s.calls for s in rows)
        if not total:
            return None
        return sum(s.density * s.calls for s in rows if s.density is not None) / total

    @property
    def recall(self) -> float | None:
        """Mean share of the dense attention mass recalled, over the probed sites."""
        rows = [s.recall for s in self.sites if s.recall is not None]
        return sum(rows) / len(rows) if rows else None

    @property
    def dense_calls(self) -> int:
        """Calls that fell back to the original attention."""
        return sum(sum(s.dense.values()) for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


_NAMED = ("density", "recall", "of", "kept")


def collect(runs: Sequence[Run]) -> Stats:
    """Read every meter of `runs`."""
    rows = []
    for run in runs:
        for site in run.sites:
            meter = site.meter
            names = dict.fromkeys(
                m.name
                for _, m in (
                    *site.attention,
                    *site.head_methods,
                    *site.token_methods,
                    *site.feature_methods,
                )
            )
            notes = {n: meter.mean(n) for n in meter.counts if n not in _NAMED}
            rows.append(
                SiteStats(
                    path=site.path,
                    kind=site.kind,
                    methods=tuple(names),
                    calls=meter.total_calls,
                    density=meter.mean("density"),
                    tokens_in=meter.mean("of"),
                    tokens_kept=meter.mean("kept"),
                    dense=dict(meter.dense),
                    milliseconds=meter.nanoseconds / 1e6,
                    notes={n: v for n, v in notes.items() if v is not None},
                    recall=meter.mean("recall"),
                    steps=meter.by_step("density"),
                    remarks=dict(meter.remarks),
                )
            )
    reached = sum(1 for run in runs for site in run.sites if site.meter.reached)
    return Stats(len(rows), reached, sum(r.calls for r in rows), tuple(rows))


def table(stats: Stats, title: str) -> str:
    """A fixed-width table: one line per site, density by step, then reasons of dense calls and remarks."""
    head = (
        f"{title}: {stats.executed} of {stats.planned} planned sites executed, {stats.calls} calls"
    )
    width = max((len(s.path) for s in stats.sites), default=4)
    probed = stats.recall is not None
    lines = [
        head,
        f"  {'site':<{width}}  kind    calls  density{'  recall' if probed else ''}"
        "     tokens        ms  dense",
    ]
    for s in stats.sites:
        tokens = "-"
        if s.tokens_kept is not None and s.tokens_in is not None:
            tokens = f"{s.tokens_kept:.0f}/{s.tokens_in:.0f}"
        dense = sum(s.dense.values())
        recalled = f"  {_share(s.recall):>6}" if probed else ""
        lines.append(
            f"  {s.path:<{width}}  {s.kind:<6} {s.calls:>6}  {_share(s.density):>7}{recalled}  {tokens:>9}"
            f"  {s.milliseconds:>8.1f}  {dense if dense else '-'}"
        )
    lines += _by_step(stats, width)
    for name, prefix in (("dense", "dense {} times: "), ("remarks", "{} calls: ")):
        counts: dict[str, int] = {}
        for s in stats.sites:
            for text, count in getattr(s, name).items():
                counts[text] = counts.get(text, 0) + count
        lines += [f"  {prefix.format(count)}{text}" for text, count in counts.items()]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_STEP_COLUMNS = 8


def _by_step(stats: Stats, width: int) -> list[str]:
    """Density per site and denoising step; steps that are alike at every site share a column."""
    rows = [s for s in stats.sites if s.steps]
    steps = sorted({step for s in rows for step in s.steps})
    if len(steps) < 2:
        return []
    groups: list[list[int]] = []
    for step in steps:
        alike = groups and all(
            _share(s.steps.get(step)) == _share(s.steps.get(groups[-1][-1])) for s in rows
        )
        if alike:
            groups[-1].append(step)
        else:
            groups.append([step])
    if len(groups) > _STEP_COLUMNS:  # the choice depends on the data: means over equal stretches
        size = -(-len(steps) // _STEP_COLUMNS)
        groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    names = [f"{g[0]}-{g[-1]}" if len(g) > 1 else f"{g[0]}" for g in groups]
    lines = [f"  {'density by step':<{width}}  " + " ".join(f"{name:>7}" for name in names)]
    for s in rows:
        cells = []
        for group in groups:
            values = [s.steps[step] for step in group if step in s.steps]
            cells.append(_share(sum(values) / len(values) if values else None))
        lines.append(f"  {s.path:<{width}}  " + " ".join(f"{cell:>7}" for cell in cells))
    return lines
