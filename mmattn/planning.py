"""plan(): which method would act at which site, and why not elsewhere. Touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmattn.errors import ConfigError, ConflictError, NoSiteError, suggest
from mmattn.hosts import host_for
from mmattn.hosts.base import Host
from mmattn.methods.base import Method, Placed
from mmattn.registry import method_from
from mmattn.runs import Probe, Root
from mmattn.sites import Selector, Site, select


@dataclass
class PlanRow:
    """One site of the target and what would happen there."""

    site: Site
    methods: list[str] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """The outcome of matching methods against a target's sites. ``print(plan)`` shows a table."""

    target: Any
    host: Host
    roots: list[Root]
    methods: tuple[Method, ...]
    rows: list[PlanRow]
    sites: Selector | None = None
    unsupported: str = "error"
    seed: int = 0
    probe: Probe = False
    where: tuple[Selector | None, ...] = ()
    dry_run: bool = False

    @property
    def planned(self) -> int:
        """Number of sites at which at least one method acts."""
        return sum(1 for row in self.rows if row.methods)

    def raise_if_empty(self) -> None:
        """Raise when some method has no site at all.

        Raises:
            NoSiteError: says what the target offers and why nothing fitted.
        """
        for slot, method in enumerate(self.methods):
            if _needs_no_site(method):
                continue
            if not any(slot in row.slots for row in self.rows):
                raise NoSiteError(self._why_empty(method))

    def _why_empty(self, method: Method) -> str:
        target = type(self.target).__name__
        if not self.rows:
            others = [site.path for root in self.roots for site in root.sites]
            return (
                f"{target} ({self.host.name}) has no attention site mmattn can reach"
                f"{'' if not others else f' under that selector; it has {others[:4]}'}. "
                "For your own modules pass sites= to name them." + "".join(self._exclusions())
            )
        reasons: dict[str, int] = {}
        for row in self.rows:
            for reason in row.skipped:
                if reason.startswith(method.name + ":"):
                    reasons[reason] = reasons.get(reason, 0) + 1
        listing = "; ".join(f"{n} sites: {r.split(': ', 1)[1]}" for r, n in reasons.items())
        names = [row.site.path for row in self.rows[:4]]
        return (
            f"{method.name} fits none of the {len(self.rows)} sites of {target} "
            f"({self.host.name}; {names}): {listing}." + "".join(self._exclusions())
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form of the table."""
        return {
            "target": type(self.target).__name__,
            "host": self.host.name,
            "planned": self.planned,
            "methods": [m.to_dict() for m in self.methods],
            "rows": [
                {
                    "site": row.site.path,
                    "kind": row.site.kind,
                    "index": row.site.index,
                    "heads": row.site.heads,
                    "methods": row.methods,
                    "skipped": row.skipped,
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(m.name for m in self.methods))
        head = f"{names} on {type(self.target).__name__} ({self.host.name}): "
        lines = [head + f"{self.planned} of {len(self.rows)} sites"]
        width = max((len(row.site.path) for row in self.rows), default=4)
        for row in self.rows:
            what = ", ".join(row.methods) or "-"
            why = f"   [{'; '.join(row.skipped)}]" if row.skipped else ""
            lines.append(f"  {row.site.path:<{width}}  {row.site.kind:<6} {what}{why}")
        return "\n".join([*lines, *self._exclusions()])

    def _exclusions(self) -> list[str]:
        """One line per reason for attention modules that are no sites."""
        reasons: dict[str, list[str]] = {}
        for root in self.roots:
            for path, reason in root.excluded.items():
                reasons.setdefault(reason, []).append(path)
        return [
            f"  {len(paths)} attention modules are no sites ({', '.join(paths[:2])}"
            f"{', ...' if len(paths) > 2 else ''}): {reason}"
            for reason, paths in reasons.items()
        ]


def _needs_no_site(method: Method) -> bool:
    return not {"attention", "heads", "tokens"} & set(method.seams)


def plan(
    target: Any,
    methods: Any,
    *,
    sites: Selector | None = None,
    unsupported: str = "error",
    seed: int = 0,
    probe: bool | int | Sequence[int] = False,
    dry_run: bool = False,
) -> Plan:
    """Match `methods` against the sites of `target` without changing anything.

    Args:
        target: diffusers pipeline or model, transformers, timm or open_clip model, or any nn.Module.
        methods: a `Method`, a registered name, a `Recipe` from `mmattn.load`, or a list of methods and
            names; ``method.at(sites)`` keeps one to some of the sites, and one method may come several
            times with different settings for different sites.
        sites: glob(s) on site paths, compiled regex(es) or predicate(s); None takes every site the
            methods accept.
        unsupported: ``"error"`` raises at the first call a method cannot honour; ``"dense"`` runs the
            original attention there and counts it.
        seed: seed of the generators that random methods own.
        probe: denoising steps (one index or several), or True for every call, in which sparse methods
            also measure the share of the dense attention mass that falls on what they kept: ``recall`` in
            the report. Costs a dense pass per site in those steps.
        dry_run: the methods run, and are measured (``error`` in the report: squared distance from the
            original attention's output over its squared size), but the model goes on with the original
            output. For methods of the ``attention`` seam.

    Raises:
        ConfigError: for an unknown method name, a bad `unsupported`, or a `probe` that no method answers.
        SelectorError: when a selector matches nothing.
        ConflictError: when two methods that replace attention want the same site.
    """
    from mmattn.config import Recipe

    if isinstance(methods, Recipe):
        recipe = methods
        methods, sites = recipe.methods, recipe.sites if sites is None else sites
        unsupported = recipe.unsupported if unsupported == "error" else unsupported
        seed = recipe.seed if seed == 0 else seed
    if unsupported not in ("error", "dense"):
        raise ConfigError(
            f"unsupported={unsupported!r}{suggest(str(unsupported), ('error', 'dense'))} "
            "Choose 'error' or 'dense'."
        )
    several = isinstance(methods, list | tuple) and not isinstance(methods, Placed)
    listed = methods if several else [methods]
    if not listed:
        raise ConfigError("no methods given; pass a Method, a registered name, or a list of them")
    pairs = [_placed(m) for m in listed]
    chosen, where = tuple(m for m, _ in pairs), tuple(w for _, w in pairs)
    host = host_for(target)
    if host.name == "torch" and sites is not None:
        roots = host.roots_for(target, sites)  # type: ignore[attr-defined]
        picked = [site for root in roots for site in root.sites]
    else:
        roots = host.roots(target)
        picked = [site for root in roots for site in root.sites]
        picked = select(picked, sites) if picked or sites is not None else picked
    for method in chosen if dry_run else ():
        if method.seams != ("attention",):
            raise ConfigError(
                f"dry_run is for methods of the attention seam alone; {method.name} uses "
                f"{'/'.join(method.seams)}"
            )
    places = [None if w is None else {id(site) for site in select(picked, w)} for w in where]
    rows = [_row(site, chosen, places, host.name) for site in picked]
    asked = _probe(probe, chosen)
    result = Plan(
        target, host, roots, chosen, rows, sites, unsupported, seed, asked, where, dry_run
    )
    _check_conflicts(result)
    return result


def _probe(probe: bool | int | Sequence[int], methods: tuple[Method, ...]) -> Probe:
    if probe is False:
        return False
    if not any(method.probes for method in methods):
        raise ConfigError(
            f"probe={probe!r}: none of {[m.name for m in methods]} measures what it leaves out; sparse "
            "attention methods do"
        )
    if probe is True:
        return True
    steps = (probe,) if isinstance(probe, int) else tuple(probe)
    if not steps or not all(type(s) is int and s >= 0 for s in steps):
        raise ConfigError(f"probe is True or indices of denoising steps from 0 on, got {probe!r}")
    return steps


def _placed(given: Any) -> tuple[Method, Selector | None]:
    if isinstance(given, dict) and "sites" in given:
        return method_from({k: v for k, v in given.items() if k != "sites"}), given["sites"]
    return given if isinstance(given, Placed) else (method_from(given), None)


def _row(
    site: Site, methods: tuple[Method, ...], places: list[set[int] | None], host: str
) -> PlanRow:
    row = PlanRow(site)
    for slot, (method, place) in enumerate(zip(methods, places, strict=True)):
        if _needs_no_site(method):
            continue
        if place is not None and id(site) not in place:
            continue
        reason = None
        if host not in method.hosts:
            reason = f"the method does not claim the host {host}"
        elif site.kind not in method.kinds:
            reason = f"kind {site.kind} is not among {'/'.join(method.kinds)}"
        elif "tokens" in method.seams and "no-tokens" in site.tags and not method.observes:
            reason = "no block with [B, N, C] hidden states encloses this site"
        else:
            reason = method.accepts(site)
        if reason is None:
            row.methods.append(method.name)
            row.slots.append(slot)
        else:
            row.skipped.append(f"{method.name}: {reason}")
    return row


def _check_conflicts(result: Plan) -> None:
    replacing = {m.name for m in result.methods if "attention" in m.seams and not m.observes}
    siteless = [m.name for m in result.methods if _needs_no_site(m)]
    for names in [siteless, *(row.methods for row in result.rows)]:
        for name in names:
            if names.count(name) > 1:
                raise ConflictError(
                    f"{name} is given twice; attach it once, with the settings you want, or keep each to "
                    'sites of its own: method.at("blocks.0.*")'
                )
    for row in result.rows:
        both = [name for name in row.methods if name in replacing]
        if len(both) > 1:
            raise ConflictError(
                f"{' and '.join(both)} both replace the attention at {row.site.path}. Give them "
                "different sites, or attach one of them."
            )
