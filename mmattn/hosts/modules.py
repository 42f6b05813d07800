"""Attention modules that call SDPA in their own `forward`: finding them and swapping their class.

Shared by the timm, open_clip and plain adapters. `nn.MultiheadAttention` has its own file, mha.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from mmattn.hosts import mha
from mmattn.hosts.base import ClassSwap, Handle, named_sites
from mmattn.rebind import names_used, rebind, spellings, subclass
from mmattn.seams import Seam
from mmattn.sites import Site

_SWITCHES = ("fused_attn", "use_fsdpa")
_BY_HAND = {"softmax", "bmm", "baddbmm", "einsum"}
NO_TOKENS = "no-tokens"
"""Tag of sites whose enclosing block does not carry ``[B, N, C]`` hidden states."""


def seamable(module: torch.nn.Module) -> bool:
    """Whether the attention call of this very module (not of a child) can be intercepted."""
    if getattr(module, "logit_scale", None) is not None and hasattr(module, "use_fsdpa"):
        return False  # open_clip's scaled-cosine branch multiplies matrices by itself
    forward = getattr(type(module), "forward", None)
    if isinstance(module, torch.nn.MultiheadAttention):
        return forward is torch.nn.MultiheadAttention.forward
    used = names_used(forward) if callable(forward) else frozenset()
    here = used & {"scaled_dot_product_attention", mha.FUNCTION}
    return bool(here) and bool(spellings(forward, **dict.fromkeys(here)))  # type: ignore[arg-type]


def candidates(
    model: torch.nn.Module, prefix: str = ""
) -> Iterable[tuple[str, str, torch.nn.Module]]:
    """``(full path, path below model, module)`` of every seam-able module, in model order."""
    for path, module in named_sites(model, prefix):
        if seamable(module):
            yield path, path[len(prefix) + 1 :] if prefix else path, module


def by_hand(model: torch.nn.Module, prefix: str = "") -> dict[str, str]:
    """Modules that look like attention but make no call mmattn can intercept, by path, with the reason."""
    found: dict[str, str] = {}
    for path, module in named_sites(model, prefix):
        name = type(module).__name__
        looks = "Att" in name or "attn" in path.rpartition(".")[2].lower()
        if looks and not seamable(module) and names_used(type(module).forward) & _BY_HAND:
            found[path] = f"{name} computes the softmax itself and never calls SDPA"
    return found


def swaps(site: Site, seam: Seam) -> Iterable[Handle]:
    """The class swaps that route one site through `seam`."""
    module, base = site.module, type(site.module)
    blocks = bool(site.token_methods) and NO_TOKENS not in site.tags
    if isinstance(module, torch.nn.MultiheadAttention):
        yield from mha.swaps(site, seam)
        if isinstance(site.token_module, torch.nn.TransformerEncoderLayer):
            return
    else:
        own = blocks and site.token_module is module
        yield ClassSwap(module, _class(base, site, seam, tokens=own), site, site.path)
        if own:
            return
    if blocks and site.token_module is not None:
        cls = seam.block_class(type(site.token_module))
        yield ClassSwap(site.token_module, cls, site, f"{site.path} (its block)")


def _class(base: type, site: Site, seam: Seam, *, tokens: bool) -> type:
    switch = next((s for s in _SWITCHES if site.module.__dict__.get(s) is False), None)
    if switch is not None and mha.passive(site):
        return seam.cached((base, "tick"), lambda: _ticking(base, seam))
    rebound = rebound_forward(base, seam)
    assert rebound is not None, "only seamable modules become sites"
    swapped = seam.attention_class(base, "forward", rebound, tokens=tokens)
    if switch is None:
        return swapped
    # The stock code has a branch with SDPA but does not take it by default.
    return seam.cached((swapped, switch), lambda: _switched(base, swapped, switch, seam))


def rebound_forward(base: type, seam: Seam) -> Any:
    """The stock forward of `base` with its attention call going through `seam`, or None."""
    forward: Any = base.forward  # type: ignore[attr-defined]
    if mha.FUNCTION in names_used(forward):
        names = spellings(forward, **{mha.FUNCTION: mha.function(seam)})
        return rebind(forward, **names) if names else None
    return seam.rebound(forward)


def _ticking(base: type, seam: Seam) -> type:
    stock: Any = base.forward  # type: ignore[attr-defined]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if seam.run.enabled:
            self._mmattn_site.meter.tick()
        return stock(self, *args, **kwargs)

    return subclass(base, forward=forward)


def _switched(base: type, swapped: type, switch: str, seam: Seam) -> type:
    """`swapped` with `switch` reading True while the session is enabled; the instance keeps its own."""

    def read(self: Any) -> bool:
        return True if seam.run.enabled else bool(self.__dict__[switch])

    def write(self: Any, value: bool) -> None:
        self.__dict__[switch] = value

    members = {k: v for k, v in vars(swapped).items() if k in ("forward", "__reduce_ex__")}
    return subclass(base, **{"forward": members["forward"], switch: property(read, write)})
