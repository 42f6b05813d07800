"""Which methods exist: the built-in table, `register` for your own, and the entry-point group.

The table is data, so importing mmattn imports no method and no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from mmattn.errors import ConfigError, suggest

if TYPE_CHECKING:
    from mmattn.methods.base import Method

ENTRY_POINT_GROUP = "mmattn.methods"

BUILTIN: dict[str, str] = {
    "act": "mmattn.methods.act:ACT",
    "agent-attention": "mmattn.methods.agent_attention:AgentAttention",
    "agentsd": "mmattn.methods.agentsd:AgentSD",
    "astar": "mmattn.methods.astar:AStar",
    "attention-maps": "mmattn.methods.attention_maps:AttentionMaps",
    "dola": "mmattn.methods.dola:DoLa",
    "fastv": "mmattn.methods.fastv:FastV",
    "flashbias": "mmattn.methods.flashbias:FlashBias",
    "flexprefill": "mmattn.methods.flexprefill:FlexPrefill",
    "hiprune": "mmattn.methods.hiprune:HiPrune",
    "identity": "mmattn.methods.identity:Identity",
    "image-guidance": "mmattn.methods.imageguidance:ImageGuidance",
    "isolation-reposition": "mmattn.methods.isolation_reposition:IsolationReposition",
    "largepig": "mmattn.methods.largepig:LargePiG",
    "merge-prune": "mmattn.methods.merge_prune:MergePrune",
    "neighborhood": "mmattn.methods.neighborhood:NeighborhoodAttention",
    "opera": "mmattn.methods.opera:Opera",
    "pai": "mmattn.methods.pai:PAI",
    "paint": "mmattn.methods.paint:PAINT",
    "panel-attention": "mmattn.methods.panel_attention:PanelAttention",
    "proxyattn": "mmattn.methods.proxyattn:ProxyAttn",
    "pyramiddrop": "mmattn.methods.pyramiddrop:PyramidDrop",
    "random-blocks": "mmattn.methods.random_blocks:RandomBlocks",
    "random-prune": "mmattn.methods.random_prune:RandomPrune",
    "sliding-window": "mmattn.methods.sliding_window:SlidingWindow",
    "sparsed": "mmattn.methods.sparsed:SparseD",
    "tome": "mmattn.methods.tome:ToMe",
    "uniform-prune": "mmattn.methods.uniform_prune:UniformPrune",
    "var": "mmattn.methods.var:VAR",
    "vasparse": "mmattn.methods.vasparse:VASparse",
    "vcd": "mmattn.methods.vcd:VCD",
    "vhr": "mmattn.methods.vhr:VHR",
    "visionzip": "mmattn.methods.visionzip:VisionZip",
    "vmoba": "mmattn.methods.vmoba:VMoBA",
    "zerotuning": "mmattn.methods.zerotuning:ZeroTuning",
}

_registered: dict[str, type[Any]] = {}
_M = TypeVar("_M", bound=type[Any])


@dataclass(frozen=True)
class MethodInfo:
    """One row of `methods()`."""

    name: str
    cls: type[Method]
    seams: tuple[str, ...]
    kinds: tuple[str, ...]
    hosts: tuple[str, ...]
    paper: str
    training_free: bool
    summary: str


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a `Method` subclass available under `name`.

    Raises:
        ConfigError: when the name is taken by another class or the class is not a `Method`.
    """

    def add(cls: _M) -> _M:
        from mmattn.methods.base import Method

        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(
                f"register({name!r}) decorates a subclass of mmattn.Method, got {cls!r}"
            )
        taken = _registered.get(name)
        same = taken is not None and (taken.__module__, taken.__qualname__) == (
            cls.__module__,
            cls.__qualname__,
        )
        if name in BUILTIN or (taken is not None and not same):
            raise ConfigError(f"the method name {name!r} is already taken; choose another")
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Every known method name, plug-ins included, without importing them."""
    plugins = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return sorted({*BUILTIN, *_registered, *plugins})


def method_class(name: str) -> type[Method]:
    """The class registered under `name`.

    Raises:
        ConfigError: for an unknown name, with the nearest ones.
    """
    if name in _registered:
        return _registered[name]
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        cls: type[Method] = getattr(importlib.import_module(module), attribute)
        return cls
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            loaded: type[Method] = point.load()
            if not loaded.name:
                loaded.name = name
            return loaded
    raise ConfigError(f"unknown method {name!r}{suggest(name, names())} Known: {names()}")


def method_from(given: Any) -> Method:
    """A `Method` from an instance, a class with defaults, a name, or a settings mapping.

    Raises:
        ConfigError: for anything else, or an unknown name or key.
    """
    from mmattn.methods.base import Method

    if isinstance(given, Method):
        return given
    if isinstance(given, type) and issubclass(given, Method):
        return given()
    if isinstance(given, str):
        return method_class(given)()
    if isinstance(given, dict):
        if not isinstance(given.get("name"), str):
            raise ConfigError(
                f"a method table needs a 'name' key with a text, got the keys {sorted(given)} and the "
                f"name {given.get('name')!r}"
            )
        return method_class(given["name"]).from_dict(given)
    raise ConfigError(
        f"a method is a Method instance, a registered name or a settings mapping, not "
        f"{type(given).__name__}"
    )


def methods() -> list[MethodInfo]:
    """Every known method with its seams, hosts, paper and whether it needs training."""
    rows = []
    for name in names():
        cls = method_class(name)
        summary = (cls.__doc__ or "").strip().splitlines()
        rows.append(
            MethodInfo(
                name=name,
                cls=cls,
                seams=cls.seams,
                kinds=cls.kinds,
                hosts=cls.hosts,
                paper=cls.paper,
                training_free=cls.training_free,
                summary=summary[0] if summary else "",
            )
        )
    return rows


def markdown() -> str:
    """The documentation's table of methods, one generated line per method."""
    head = "| method | seams | site kinds | hosts | training-free | paper |\n|---|---|---|---|---|---|\n"
    lines = [
        f"| {_linked(row)} (`{row.name}`) | {', '.join(row.seams)} | {', '.join(row.kinds)} "
        f"| {', '.join(row.hosts)} | {'yes' if row.training_free else 'no'} | {row.paper} |"
        for row in methods()
    ]
    return head + "\n".join(lines) + "\n"


def _linked(row: MethodInfo) -> str:
    """The class, linked to its page where the project has one; plug-ins have theirs elsewhere."""
    name = f"`{row.cls.__name__}`"
    return f"[{name}](methods/{row.name}.md)" if row.name in BUILTIN else name
