"""Stats: plain numbers collected from the meters, and the table made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmattn.runs import Run


@dataclass(frozen=True)
class SiteStats:
    """Numbers of one site.

    Args:
        calls: attention calls that went through the seam.
        density: mean share of query-key pairs computed, 1.0 for dense; None if the method keeps none.
        tokens_in, tokens_kept: mean tokens before and after pruning or merging.
        dense: calls that ran the original attention, by reason.
        milliseconds: wall time inside the seam; on a GPU this is launch time, not kernel time.
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
    def dense_calls(self) -> int:
        """Calls that fell back to the original attention."""
        return sum(sum(s.dense.values()) for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


_NAMED = ("density", "of", "kept")


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
                )
            )
    reached = sum(1 for run in runs for site in run.sites if site.meter.reached)
    return Stats(len(rows), reached, sum(r.calls for r in rows), tuple(rows))


def table(stats: Stats, title: str) -> str:
    """A fixed-width table: one line per site, then the reasons for dense calls."""
    head = (
        f"{title}: {stats.executed} of {stats.planned} planned sites executed, {stats.calls} calls"
    )
    width = max((len(s.path) for s in stats.sites), default=4)
    lines = [head, f"  {'site':<{width}}  kind    calls  density     tokens        ms  dense"]
    for s in stats.sites:
        density = f"{s.density:.3f}" if s.density is not None else "-"
        tokens = "-"
        if s.tokens_kept is not None and s.tokens_in is not None:
            tokens = f"{s.tokens_kept:.0f}/{s.tokens_in:.0f}"
        dense = sum(s.dense.values())
        lines.append(
            f"  {s.path:<{width}}  {s.kind:<6} {s.calls:>6}  {density:>7}  {tokens:>9}"
            f"  {s.milliseconds:>8.1f}  {dense if dense else '-'}"
        )
    reasons: dict[str, int] = {}
    for s in stats.sites:
        for reason, count in s.dense.items():
            reasons[reason] = reasons.get(reason, 0) + count
    lines += [f"  dense {count} times: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)
