"""The live part of an attachment: one `Run` per root model, fed by two hooks on that model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmattn.clock import StepClock
from mmattn.errors import ConfigError, SeamNotReached
from mmattn.layout import Layout
from mmattn.methods.base import Method
from mmattn.rebind import SLOT
from mmattn.sites import Site

LayoutReader = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], Layout | None]

Probe = bool | tuple[int, ...]
"""Where methods measure what they leave out: nowhere, in every call, or in these denoising steps."""


@dataclass
class Root:
    """A model (or tower) whose forward is one unit of work for its sites.

    Args:
        name: prefix of its site paths inside the target, "" for the target itself.
        module: the model whose call begins and ends a forward.
        layout: reads the token layout from the arguments of that call.
        begin: module whose call starts a forward when users often bypass `module` (timm's
            `forward_features` never calls the model itself); defaults to `module`.
        sites: filled by the host.
        excluded: attention modules that are no sites, and why.
    """

    name: str
    module: torch.nn.Module
    layout: LayoutReader | None = None
    begin: torch.nn.Module | None = None
    sites: list[Site] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)


@dataclass
class Pictures:
    """How a vision-language model was last asked for image features.

    Args:
        ids: token ids that stand for image features in a prompt.
        module: the model that puts features among the token embeddings, or None.
        arguments: of its last `get_image_features`, by name; None before one was recorded.
        features: what that call returned, one tensor per image.
    """

    ids: tuple[int, ...] = ()
    module: torch.nn.Module | None = None
    arguments: dict[str, Any] | None = None
    features: list[torch.Tensor] = field(default_factory=list)


@dataclass
class ModelCall:
    """The running call of a root, for methods that act on what it returns.

    Args:
        module: the root.
        arguments: what the call was given, by name.
        cache: its key/value cache, given or made by the call; None without one.
        past: tokens in that cache when the call began.
        decoder: attention sites of the language model behind the logits, shallow to deep.
        pictures: where its image features come from; None where there are none.
    """

    module: torch.nn.Module
    arguments: dict[str, Any]
    cache: Any = None
    past: int = 0
    decoder: list[Site] = field(default_factory=list)
    pictures: Pictures | None = None


class Run:
    """State shared by the sites of one root: layout, branch, method phases, per-site memory."""

    def __init__(
        self,
        root: Root,
        methods: Sequence[Method],
        clock: StepClock,
        unsupported: str,
        seed: int,
        probe: Probe = False,
        dry: bool = False,
    ) -> None:
        self.root, self.methods, self.clock = root, tuple(methods), clock
        self.unsupported, self.seed, self.probe = unsupported, seed, probe
        self.dry = dry
        self.enabled = True
        self.installed = False
        self.layout: Layout | None = None
        self.branch = 0
        self.timed = False
        self.forwards = 0
        self.broken_off = False
        self.traced = False
        self.sites: list[Site] = []
        self.phases: list[int | bool | None] = [None] * len(self.methods)
        self.intact: Callable[[], str | None] = lambda: None
        self.call: ModelCall | None = None  # while methods of the logits seam look at it
        # Inside a second forward that a method runs, another branch of the memory is in use.
        self.stream = 0
        self.carried: list[Any] = []  # host objects whose attributes belong to one generation
        self._calls_in_step = 0
        self._shared: dict[tuple[int, int], dict[str, Any]] = {}
        self._generators: dict[tuple[int, str], torch.Generator] = {}
        self._hooks: list[Any] = []
        self.on_clock(new_run=False)

    def on_clock(self, new_run: bool) -> None:
        """The step clock moved. Runs outside every compiled graph."""
        self._calls_in_step = 0
        if new_run:
            self.clear()
        clock = self.clock
        self.timed = clock.running
        for slot, method in enumerate(self.methods):
            self.phases[slot] = method.phase(clock.index, clock.total)

    @property
    def peers(self) -> list[Run]:
        """This run, and the runs of the same session at modules below its root."""
        found: dict[int, Run] = {id(self): self}
        for module in self.root.module.modules():
            site = module.__dict__.get(SLOT)
            if site is not None and site.run is not None and site.run.clock is self.clock:
                found.setdefault(id(site.run), site.run)
        return list(found.values())

    @property
    def step(self) -> int | None:
        """Index of the denoising step that is running, or None outside a run."""
        return self.clock.index if self.timed else None

    @property
    def probing(self) -> bool:
        """Whether this call is one of those where methods measure what they leave out.

        Raises:
            ConfigError: when steps were named and no run is in progress.
        """
        if self.probe is False or torch.compiler.is_compiling():
            return False
        if self.probe is True:
            return True
        if not self.timed:
            raise ConfigError(
                f"probe={list(self.probe)} names denoising steps, but no step clock is running. Attach "
                "to a pipeline with a scheduler, call session.step(index, total) in your own loop, or "
                "pass probe=True to measure in every call."
            )
        return self.step in self.probe

    def clear(self) -> None:
        """Forget what methods remembered; a new run starts."""
        for site in self.sites:
            site.memory.clear()
        self._shared.clear()
        self._generators.clear()

    def state_of(self, site: Site) -> dict[str, Any]:
        """Memory of the running method at this site, branch and call."""
        # On the site and not here by its id: sites of one kind of block share a compiled graph.
        return site.memory.setdefault((self.branch, site.slot, site.call), {})

    def shared_of(self, site: Site) -> dict[str, Any]:
        """Memory that the running method keeps for all sites of the root together, per branch."""
        return self._shared.setdefault((self.branch, site.slot), {})

    def states_of(self, site: Site, slot: int) -> dict[tuple[int, int], dict[str, Any]]:
        """What the method in `slot` remembers at this site, by branch and call; to read after a run."""
        return {(b, c): d for (b, n, c), d in site.memory.items() if n == slot}

    def generator_of(self, site: Site, device: torch.device | None) -> torch.Generator:
        """A generator seeded from the session seed and the site, never the global one."""
        where = torch.device("cpu") if device is None else device
        key = (site.index, str(where))
        if key not in self._generators:
            generator = torch.Generator(device=where)
            generator.manual_seed(self.seed * 1_000_003 + site.index)
            self._generators[key] = generator
        return self._generators[key]

    def install(self) -> None:
        """Hook the start and the end of the root's forward."""
        self.enabled = self.installed = True
        begin = self.root.begin or self.root.module
        compiled = getattr(begin, "_compiled_call_impl", None)
        if compiled is not None and begin is self.root.module:
            self._hooks = [_AroundCompiled(begin, self._begin, self._end)]
            return
        self._hooks = [
            begin.register_forward_pre_hook(_Hook(self._begin, _pass_pre), with_kwargs=True),
            self.root.module.register_forward_hook(_Hook(self._end, _pass_post)),
        ]

    def remove(self) -> None:
        """Take both hooks off; order with other people's hooks does not matter.

        What somebody else kept of ours (diffusers' `unfuse_qkv_projections` puts processors back) runs
        the stock code from now on.
        """
        self.enabled = self.installed = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.enabled:
            return
        if self.root.layout is not None:
            layout = self.root.layout(module, args, kwargs)
            if layout is not None:
                self.layout = layout
        if torch.compiler.is_compiling():
            return
        replaced = self.intact()
        if replaced is not None:
            raise SeamNotReached(
                f"{replaced} was replaced after mmattn attached to it (fuse_qkv_projections and "
                "set_attn_processor do that). Detach, make the change, then attach again."
            )
        self.branch = self._calls_in_step if self.timed else self.stream
        self._calls_in_step += 1
        self.forwards += 1
        self.broken_off = self.root.begin is None  # until the end is reached

    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.enabled:
            return
        if torch.compiler.is_compiling():
            self.traced = True
            return
        self.broken_off = False
        if self.forwards == 1:
            self.check_reached()

    def check_reached(self) -> None:
        """Raise unless every site of this root was executed.

        Raises:
            SeamNotReached: lists the sites whose attention never came by.
        """
        missing = [site.path for site in self.sites if not site.meter.reached]
        if missing:
            raise SeamNotReached(
                f"{len(missing)} of {len(self.sites)} planned sites of {self.root.name or 'the model'} "
                f"were not executed in the first forward: {missing[:4]}. Their module computes "
                "attention another way; leave them out with sites=..."
            )


class _AroundCompiled:
    """Stands outside the call that ``module.compile()`` made, where Python runs as written.

    Forward hooks of such a module are traced, so they could neither read position ids nor count.
    """

    def __init__(
        self, module: torch.nn.Module, begin: Callable[..., None], end: Callable[..., None]
    ) -> None:
        self.module, self.begin, self.end = module, begin, end
        self.compiled: Callable[..., Any] = module.__dict__["_compiled_call_impl"]
        self.ours = self.__call__  # one bound method, to be recognised when it is taken off
        module.__dict__["_compiled_call_impl"] = self.ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.begin(self.module, args, kwargs)
        output = self.compiled(*args, **kwargs)
        self.end(self.module, args, output)
        return output

    def remove(self) -> None:
        """Put the compiled call back, unless the module was compiled again meanwhile."""
        if self.module.__dict__.get("_compiled_call_impl") is self.ours:
            self.module.__dict__["_compiled_call_impl"] = self.compiled


class _Hook:
    """A hook that turns into a no-op when the hooked model is copied or pickled."""

    def __init__(self, function: Callable[..., Any], inert: Callable[..., None]) -> None:
        self.function, self.inert = function, inert

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return self.inert

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _inert, (self.inert.__name__,)


def removable_hook(function: Callable[..., Any], *, pre: bool = False) -> Callable[..., Any]:
    """`function` as a hook that copies and pickles of the hooked model do not run.

    Args:
        pre: True for a forward pre-hook with kwargs, False for a forward hook without.
    """
    return _Hook(function, _pass_pre if pre else _pass_post)


def _pass_pre(module: Any, args: Any, kwargs: Any) -> None:
    return None


def _pass_post(module: Any, args: Any, output: Any) -> None:
    return None


def _inert(name: str) -> Any:
    return globals()[name]
