"""Session: a live attachment, its numbers, and the way back."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmattn.clock import SchedulerClock, StepClock
from mmattn.errors import ConfigError, DetachConflict
from mmattn.hosts.base import Handle
from mmattn.planning import Plan
from mmattn.report import Stats, collect, table
from mmattn.runs import Run
from mmattn.seams import Seam
from mmattn.sites import Site


class Session:
    """What `attach` returns. A context manager; leaving it detaches.

    Attributes:
        plan: the plan it was opened with.
        clock: the step clock; ``session.step(i, n)`` moves it by hand.
        lock: hold it around a forward when several threads share the model.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clock = StepClock()
        self.lock = threading.RLock()
        self.attached = False
        self.runs: list[Run] = []
        self._handles: list[Handle] = []
        self._clocks = [SchedulerClock(s, self.clock) for s in plan.host.schedulers(plan.target)]

    # -- installing and undoing ----------------------------------------------------------------

    def raise_if_clock_taken(self) -> None:
        """Raise before anything is changed.

        Raises:
            ConflictError: when a scheduler of the target already drives another session's clock.
        """
        for clock in self._clocks:
            clock.raise_if_taken()

    def _open(self) -> None:
        """Build every change first, then make them; undo all of them when one fails."""
        plan = self.plan
        rows = {id(row.site): row for row in plan.rows}
        seams = {seam for method in plan.methods for seam in method.seams}
        for root in plan.roots:
            run = Run(
                root,
                plan.methods,
                self.clock,
                plan.unsupported,
                plan.seed,
                plan.probe,
                plan.dry_run,
            )
            for site in root.sites:
                row = rows.get(id(site))
                if row is not None and row.methods:
                    _bind(site, run, row.slots)
                    run.sites.append(site)
            for site in run.sites:
                site.roles = {slot: m.role(site) for slot, m in enumerate(run.methods)}
            self.runs.append(run)
            if not run.sites and not seams & {"features", "logits"}:
                continue
            handles = list(plan.host.handles(root, run.sites, Seam(run), seams))
            run.intact = _checker(handles)
            self._handles += handles
        try:
            for handle in self._handles:
                handle.install()
            for run in self.runs:
                run.install()
                self.clock.on_change.append(run.on_clock)
            for clock in self._clocks:
                clock.install()
        except BaseException:
            self._undo()
            raise
        self.attached = True

    def _undo(self) -> None:
        errors: list[Exception] = []
        for step in [
            *(clock.remove for clock in self._clocks),
            *(run.remove for run in self.runs),
            *(handle.remove for handle in reversed(self._handles)),
        ]:
            try:
                step()
            except Exception as error:
                errors.append(error)
        self.clock.on_change.clear()
        if errors:
            raise errors[0]

    def detach(self) -> None:
        """Restore the target exactly. Calling it twice is fine.

        Raises:
            DetachConflict: when something else replaced what was installed; everything that could be
                restored has been.
        """
        if not self.attached:
            return
        self._undo()
        self.attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.detach()
        except DetachConflict as conflict:
            if error is None:
                raise
            error.add_note(str(conflict))  # what went wrong first is what the user must see
        if error is None:
            for run in self.runs:
                if (run.forwards or run.traced) and run.sites and not run.broken_off:
                    run.check_reached()

    # -- while attached ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model inside the block; attached again afterwards."""
        before = [run.enabled for run in self.runs]
        for run in self.runs:
            run.enabled = False
        try:
            yield
        finally:
            for run, was in zip(self.runs, before, strict=True):
                run.enabled = was and run.installed

    def step(self, index: int, total: int) -> None:
        """Tell the clock where a denoising loop without a diffusers scheduler is.

        Raises:
            ConfigError: unless ``0 <= index < total``.
        """
        self.clock.set(index, total)

    def reset(self) -> None:
        """Counters to zero, method state and generators forgotten. The attachment stays."""
        for run in self.runs:
            run.clear()
            run.forwards = 0
            for site in run.sites:
                site.meter.reset()

    # -- what happened ----------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Numbers so far: sites planned and executed, calls, and a row per site."""
        return collect(self.runs)

    def report(self) -> str:
        """`stats` as a table for people."""
        names = ", ".join(dict.fromkeys(m.name for m in self.plan.methods))
        return table(self.stats, f"{names} on {type(self.plan.target).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Methods, sites, versions and numbers; `mmattn.load` reads it back as a recipe."""
        sites = self.plan.sites
        if not _written(sites):
            sites = [row.site.path for row in self.plan.rows if row.methods]
        return {
            "mmattn": _version("mmattn"),
            "target": type(self.plan.target).__name__,
            "host": self.plan.host.name,
            "method": [
                method.to_dict()
                if where is None
                else {**method.to_dict(), "sites": self._paths(slot)}
                for slot, (method, where) in enumerate(
                    zip(self.plan.methods, self.plan.where, strict=True)
                )
            ],
            "sites": sites,
            "unsupported": self.plan.unsupported,
            "seed": self.plan.seed,
            "versions": {
                "python": platform.python_version(),
                **{p: _version(p) for p in ("torch", "diffusers", "transformers", "timm")},
            },
            "stats": self.stats.to_dict(),
        }

    def _paths(self, slot: int) -> Any:
        """The sites of one method as a recipe can hold them."""
        where = self.plan.where[slot]
        if _written(where):
            return where
        return [row.site.path for row in self.plan.rows if slot in row.slots]

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON.

        Raises:
            ConfigError: when the path does not end in ``.json``.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ConfigError(
                f"session.save writes JSON; give a path ending in .json, not {path.name}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(m.name for m in self.plan.methods))
        state = "attached" if self.attached else "detached"
        return f"<Session {names} on {type(self.plan.target).__name__}: {state}>"


def _bind(site: Site, run: Run, slots: list[int]) -> None:
    site.run = run
    first = next(site.module.parameters(), None)
    if first is not None:
        site.meter.place(first.device)
    listed = [(slot, run.methods[slot]) for slot in slots]
    # Observers see the call before and after everything else.
    listed.sort(key=lambda pair: not pair[1].observes)
    site.memory = {}
    site.attention = tuple(p for p in listed if "attention" in p[1].seams)
    site.head_methods = tuple(p for p in listed if "heads" in p[1].seams)
    site.token_methods = tuple(p for p in listed if "tokens" in p[1].seams)


def _written(sites: Any) -> bool:
    """Whether a selector can be written down; a regex or function cannot, the paths it chose can."""
    if sites is None or isinstance(sites, str):
        return True
    return isinstance(sites, list) and all(isinstance(s, str) for s in sites)


def _checker(handles: list[Handle]) -> Any:
    def intact() -> str | None:
        for handle in handles:
            replaced = handle.check()
            if replaced is not None:
                return replaced
        return None

    return intact


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
