"""Sites: the places in a model where a method can act, and how users select them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import SelectorError, suggest
from mmattn.layout import Layout

if TYPE_CHECKING:
    from mmattn.methods.base import Method
    from mmattn.runs import Run

Selector = str | re.Pattern[str] | Callable[["Site"], bool] | Sequence[Any]
"""A glob on the site path, a compiled regex, a predicate on the site, or several of them."""


@dataclass(eq=False)
class Site:
    """One attention module of one model.

    Static facts, known at plan time:
        path: dotted module path, e.g. ``transformer_blocks.0.attn``.
        kind: ``self`` | ``cross`` (also pools and reduced keys) | ``joint`` | ``window`` | ``channel`` |
            ``text``.
        index, depth: position among the sites of its root, and how many there are.
        heads: number of query heads, or None when the module does not say.
        host, family: library and model class.

    Live facts, valid inside a call: `layout`, `phase`, `causal`, `branch`, `state`, and `call`, the
    position of this attention call within the module's forward (Wan image-to-video attends to the
    image first and the text second).
    """

    path: str
    kind: str
    module: torch.nn.Module
    index: int = 0
    depth: int = 1
    heads: int | None = None
    host: str = ""
    family: str = ""
    token_module: torch.nn.Module | None = None
    tags: frozenset[str] = frozenset()
    run: Run | None = None
    attention: tuple[tuple[int, Method], ...] = ()
    head_methods: tuple[tuple[int, Method], ...] = ()
    token_methods: tuple[tuple[int, Method], ...] = ()
    feature_methods: tuple[tuple[int, Method], ...] = ()
    phase: int | bool | None = None
    roles: dict[int, int | bool | None] = field(default_factory=dict)
    memory: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    causal: bool = False
    slot: int = 0
    call: int = 0
    meter: Meter = field(default_factory=lambda: Meter())

    @property
    def layout(self) -> Layout:
        """Token layout of the running call; an empty one where the host knows none, or for text."""
        layout = self.run.layout if self.run is not None and self.kind != "text" else None
        return layout if layout is not None else Layout()

    @property
    def branch(self) -> int:
        """Position of the running model call within the step: 0 conditional, 1 unconditional, ..."""
        return self.run.branch if self.run is not None else 0

    @property
    def state(self) -> dict[str, Any]:
        """What the running method keeps for this site, branch and call; cleared when a run starts."""
        assert self.run is not None
        return self.run.state_of(self)

    @property
    def role(self) -> int | bool | None:
        """What `Method.role` of the running method said about this site."""
        return self.roles.get(self.slot)

    @property
    def shared(self) -> dict[str, Any]:
        """What the running method keeps for all sites of this model together, per branch."""
        assert self.run is not None
        return self.run.shared_of(self)

    def generator(self, device: torch.device | None = None) -> torch.Generator:
        """The session's own generator for this site; the global RNG is never consumed."""
        assert self.run is not None
        return self.run.generator_of(self, device)

    @property
    def probing(self) -> bool:
        """True in the denoising steps where the session was asked to measure what is left out."""
        return self.run is not None and self.run.probing

    def note(self, name: str, value: float | torch.Tensor) -> None:
        """Add a number to the report (``density``, ``recall``, ``kept``, ``of``); averaged over calls."""
        self.meter.add(name, value, self.run.step if self.run is not None else None)

    def remark(self, text: str) -> None:
        """Add a sentence to the report, once, about what the method made of this call."""
        self.meter.remark(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Meter:
    """Counters of one site. Python numbers in eager mode, tensors where a graph is being traced."""

    def __init__(self) -> None:
        self.reached = False
        self.ticks = torch.zeros((), dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        """Back to zero; `reached` stays, it belongs to the attachment."""
        self.calls = 0
        self.ticks.zero_()
        self.nanoseconds = 0
        self.sums: dict[str, torch.Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.steps: dict[str, dict[int, list[Any]]] = {}
        self.dense: dict[str, int] = {}
        self.remarks: dict[str, int] = {}

    def place(self, device: torch.device) -> None:
        """Count compiled calls on the device of the module, so that CUDA graphs stay possible."""
        if device.type == "cuda":
            self.ticks = torch.zeros((), dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(self.ticks)

    def tick(self) -> None:
        """One call went through the seam."""
        self.reached = True
        if torch.compiler.is_compiling():
            self.ticks.add_(1)
        else:
            self.calls += 1

    def add(self, name: str, value: float | torch.Tensor, step: int | None = None) -> None:
        """Add to a running mean, and to that of the denoising step. Compiled graphs only count calls."""
        if torch.compiler.is_compiling():
            return
        if isinstance(value, torch.Tensor):
            value = value.detach().float().mean()
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1
        if step is not None:
            entry = self.steps.setdefault(name, {}).setdefault(step, [0.0, 0])
            entry[0] = entry[0] + value
            entry[1] += 1

    def fell_back(self, reason: str) -> None:
        """The original attention ran for a call the method could not, or chose not to, handle."""
        if not torch.compiler.is_compiling():
            self.dense[reason] = self.dense.get(reason, 0) + 1

    def remark(self, text: str) -> None:
        """Count a sentence for the report."""
        if not torch.compiler.is_compiling():
            self.remarks[text] = self.remarks.get(text, 0) + 1

    def mean(self, name: str) -> float | None:
        """Mean of what was added under `name`, or None."""
        if not self.counts.get(name):
            return None
        return float(self.sums[name]) / self.counts[name]

    def by_step(self, name: str) -> dict[int, float]:
        """Mean of what was added under `name` in each denoising step."""
        return {s: float(total) / n for s, (total, n) in sorted(self.steps.get(name, {}).items())}

    @property
    def total_calls(self) -> int:
        """Eager and compiled calls together."""
        return self.calls + int(self.ticks)


def select(sites: list[Site], selector: Selector | None) -> list[Site]:
    """The sites a user's selector picks, in model order.

    Raises:
        SelectorError: when any one selector matches nothing; names the nearest paths.
    """
    if selector is None:
        return list(sites)
    single = isinstance(selector, str | re.Pattern) or callable(selector)
    parts: Iterable[Any] = [selector] if single else selector  # type: ignore[assignment, list-item]
    chosen: set[int] = set()
    for part in parts:
        hits = [i for i, site in enumerate(sites) if _matches(part, site)]
        if not hits:
            shown = part.pattern if isinstance(part, re.Pattern) else part
            paths = [site.path for site in sites]
            hint = suggest(str(shown), paths) or f". The paths here look like {paths[:4]}."
            raise SelectorError(
                f"The selector {shown!r} matches none of the {len(sites)} sites{hint}"
            )
        chosen.update(hits)
    return [site for i, site in enumerate(sites) if i in chosen]


def _matches(part: Any, site: Site) -> bool:
    if isinstance(part, str):
        return fnmatchcase(site.path, part) or fnmatchcase(site.path, "*." + part)
    if isinstance(part, re.Pattern):
        return part.search(site.path) is not None
    if callable(part):
        return bool(part(site))
    raise SelectorError(
        f"A selector is a glob, a compiled regex or a function of a Site, not {type(part).__name__}."
    )
