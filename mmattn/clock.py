"""Denoising step clock, read from the pipeline's scheduler and kept outside any compiled graph.

The scheduler instance gets a subclass of its own class (same name, `functools.wraps` signatures, so
`retrieve_timesteps` still sees `sigmas`). A deep-copied scheduler, as several pipelines make, carries
an inert clock and does not advance ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmattn.errors import ConfigError, ConflictError, DetachConflict
from mmattn.rebind import blank

_SLOT = "_mmattn_clock"


class StepClock:
    """Index of the current denoising step and the total number of steps.

    Attributes:
        index: 0-based step, or None before the first run.
        total: number of steps of the current run, or None.
    """

    def __init__(self) -> None:
        self.index: int | None = None
        self.total: int | None = None
        self.on_change: list[Callable[[bool], None]] = []

    @property
    def running(self) -> bool:
        """A run has begun and its last step is not done."""
        return self.index is not None and self.total is not None and self.index < self.total

    def start(self, total: int) -> None:
        """A new run of `total` steps begins."""
        self.index, self.total = 0, total
        self._tell(new_run=True)

    def begin_at(self, index: int) -> None:
        """The run starts in the middle of the schedule (image-to-image)."""
        if self.total is not None:
            self.index = index
            self._tell(new_run=False)

    def advance(self) -> None:
        """One scheduler step is done."""
        if self.index is not None:
            self.index += 1
            self._tell(new_run=False)

    def set(self, index: int, total: int) -> None:
        """Set the clock by hand (loops without a diffusers scheduler).

        Raises:
            ConfigError: unless ``0 <= index < total``.
        """
        if not 0 <= index < total:
            raise ConfigError(f"step index must satisfy 0 <= index < total, got {index} of {total}")
        new_run = index == 0 or self.index is None
        self.index, self.total = index, total
        self._tell(new_run=new_run)

    def _tell(self, *, new_run: bool) -> None:
        for listener in self.on_change:
            listener(new_run)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepClock:
        return StepClock()

    def __reduce__(self) -> tuple[type[StepClock], tuple[()]]:
        return StepClock, ()


@functools.cache
def _clocked(base: type) -> type:
    @functools.wraps(base.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
        if (clock := self.__dict__.get(_SLOT)) is not None:
            clock.start(len(self.timesteps))
        return result

    @functools.wraps(base.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)  # type: ignore[attr-defined]
        if (clock := self.__dict__.get(_SLOT)) is not None:
            clock.advance()
        return result

    def reduce_ex(self: Any, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != _SLOT}
        return blank, (base,), state

    def set_begin_index(self: Any, begin_index: int = 0) -> Any:
        result = base.set_begin_index(self, begin_index)  # type: ignore[attr-defined]
        if (clock := self.__dict__.get(_SLOT)) is not None:
            clock.begin_at(begin_index)
        return result

    def from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        return base.from_config(*args, **kwargs)  # type: ignore[attr-defined]

    members: dict[str, Any] = {
        "set_timesteps": set_timesteps,
        "step": step,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "from_config"):  # ``type(pipe.scheduler).from_config(...)`` makes a stock one
        members["from_config"] = classmethod(from_config)
    if hasattr(base, "set_begin_index"):
        members["set_begin_index"] = functools.wraps(base.set_begin_index)(set_begin_index)
    return type(base.__name__, (base,), members)


class SchedulerClock:
    """Installs a `StepClock` on one scheduler instance and takes it off again."""

    def __init__(self, scheduler: Any, clock: StepClock) -> None:
        self.scheduler, self.clock = scheduler, clock
        self.base: type = type(scheduler)
        self._installed = False

    def raise_if_taken(self) -> None:
        """Raise before anything is changed.

        Raises:
            ConflictError: when the scheduler drives the clock of another session.
        """
        if _SLOT in self.scheduler.__dict__:
            raise ConflictError(
                f"this {self.base.__name__} already drives the step clock of another mmattn session, "
                "so two pipelines share it; detach that session, or give this pipeline its own "
                "scheduler: pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)"
            )

    def install(self) -> None:
        """Swap the instance's class for the observing subclass."""
        self.raise_if_taken()
        self.scheduler.__dict__[_SLOT] = self.clock
        self.scheduler.__class__ = _clocked(self.base)
        self._installed = True

    def remove(self) -> None:
        """Restore the class.

        Raises:
            DetachConflict: when somebody replaced the scheduler's class in between.
        """
        if not self._installed:
            return
        if type(self.scheduler) is not _clocked(self.base):
            raise DetachConflict(
                f"the class of {self.base.__name__} was changed after mmattn observed it; "
                "undo that change first"
            )
        self.scheduler.__class__ = self.base
        del self.scheduler.__dict__[_SLOT]
        self._installed = False
