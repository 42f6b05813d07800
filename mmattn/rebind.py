"""The same function, with some of its global names bound to something else.

This is how every attention seam is installed: a subclass of the stock class whose `__call__` or
`forward` is the stock code object, looking up one name (`dispatch_attention_fn`, `F`, ...) in our table
instead of the module's. No host code is copied. The host contract suite holds one canary per class.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

SLOT = "_mmattn_site"
"""Instance attribute that carries the site while attached."""


def names_used(fn: Callable[..., Any]) -> frozenset[str]:
    """Global and attribute names the innermost wrapped function of `fn` refers to."""
    inner = _innermost(fn)
    return (
        frozenset(inner.__code__.co_names) if isinstance(inner, types.FunctionType) else frozenset()
    )


def rebind(fn: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of `fn` whose global `names` are replaced; decorators kept by rebuilding their closures.

    The globals are a snapshot taken now. `__name__` is dropped from them because dynamo would otherwise
    resolve names through `sys.modules` and miss ours.
    """
    wrapped = getattr(fn, "__wrapped__", None)
    if not isinstance(fn, types.FunctionType):
        raise TypeError(f"cannot rebind {fn!r}: not a Python function")
    if wrapped is None:
        table = {**fn.__globals__, **names}
        table.pop("__name__", None)
        closure = fn.__closure__
    else:
        inner = rebind(wrapped, **names)
        table = fn.__globals__
        closure = tuple(
            types.CellType(inner) if cell.cell_contents is wrapped else cell
            for cell in fn.__closure__ or ()
        )
    copy = types.FunctionType(fn.__code__, table, fn.__name__, fn.__defaults__, closure)
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.__dict__.update(fn.__dict__)
    copy.__annotations__ = fn.__annotations__
    copy.__qualname__, copy.__doc__ = fn.__qualname__, fn.__doc__
    if wrapped is not None:
        copy.__dict__["__wrapped__"] = inner
    return copy


def spellings(fn: Callable[..., Any], **replaced: Any) -> dict[str, Any]:
    """What to rebind in `fn` so that it finds `replaced` in place of `torch.nn.functional`'s.

    The names in a code object do not tell ``torch.nn.functional.x`` from ``nn.functional.x``, ``F.x`` or
    a bare ``x``, so every spelling its module offers is covered at once.
    """
    functional = Proxy(F, **replaced)
    nn = Proxy(torch.nn, functional=functional)
    stands = {F: functional, torch.nn: nn, torch: Proxy(torch, nn=nn)}
    used, table = names_used(fn), _innermost(fn).__globals__
    names = {name: ours for name, ours in replaced.items() if name in table}
    for name in used:
        value = table.get(name)
        if isinstance(value, types.ModuleType) and value in stands:
            names[name] = stands[value]
    return names


def subclass(base: type, **members: Any) -> type:
    """A subclass of `base` under the same name, whose copies and pickles are plain `base` objects."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != SLOT}
        return blank, (base,), state

    table = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        **members,
    }
    return type(base.__name__, (base,), table)


def blank(cls: type) -> Any:
    """An instance of `cls` before any state; the first half of unpickling."""
    return object.__new__(cls)


class Proxy:
    """Stands for a module (`torch.nn.functional`, say) with some attributes replaced."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self.__dict__["_target"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _innermost(fn: Any) -> Any:
    while (inner := getattr(fn, "__wrapped__", None)) is not None:
        fn = inner
    return fn
