"""`nn.MultiheadAttention`, its fused fast paths, and direct calls of `F.multi_head_attention_forward`.

torch may run these layers as one native kernel, or a whole `nn.TransformerEncoderLayer` as one. Where a
method acts, the stock forward is re-bound so that it sees the fast path as switched off; where nothing
acts, the stock code runs untouched and only the call is counted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.errors import UnsupportedCall
from mmattn.hosts.base import ClassSwap, Handle
from mmattn.rebind import Proxy, rebind, subclass
from mmattn.runs import Root
from mmattn.seams import Seam
from mmattn.sites import Site

FUNCTION = "multi_head_attention_forward"
_POSITION = list(inspect.signature(F.multi_head_attention_forward).parameters).index("need_weights")
_WEIGHTS = (
    "the call asks for attention weights (need_weights=True), which torch computes without SDPA"
)
_NESTED = "the call passes nested tensors, which only the native fast path takes"


def passive(site: Site) -> bool:
    """True when nothing at this site can change, or look into, the attention call."""
    return all(m.passive for _, m in (*site.attention, *site.head_methods))


def function(seam: Seam) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` with its SDPA call going through `seam`."""
    inner = seam.rebound(F.multi_head_attention_forward)
    assert inner is not None, "torch's own function calls SDPA"
    # Under a TorchFunctionMode (`with torch.device(...)`) the stock function would call itself by name.
    copy = rebind(inner, has_torch_function=_never)

    @functools.wraps(F.multi_head_attention_forward)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        site = seam.here
        weights = kwargs.get("need_weights", args[_POSITION] if len(args) > _POSITION else True)
        if not weights:
            return copy(*args, **kwargs)
        if site is not None and passive(site):
            site.meter.tick()
        elif site is not None:
            refuse(seam, site, _WEIGHTS)
        return F.multi_head_attention_forward(*args, **kwargs)

    return multi_head_attention_forward


def refuse(seam: Seam, site: Site, reason: str) -> None:
    """Raise, or count the call as dense where the session allows that.

    Raises:
        UnsupportedCall: unless the session was opened with ``unsupported="dense"``.
    """
    if seam.run.unsupported != "dense":
        raise UnsupportedCall(
            f'{site.path}: {reason}. Choose other sites, or attach with unsupported="dense" to run '
            "the original attention there and have it counted."
        )
    site.meter.tick()
    site.meter.fell_back(reason)


def swaps(site: Site, seam: Seam) -> Iterable[Handle]:
    """Class swaps for one `nn.MultiheadAttention`, and for the encoder layer around it."""
    layer, idle = site.token_module, passive(site)
    if isinstance(layer, torch.nn.TransformerEncoderLayer):
        tokens = bool(site.token_methods) and layer.self_attn.batch_first
        base = type(layer)
        key = f"layer{idle:d}{tokens:d}"
        cls = seam.cached((base, key), lambda: _layer(base, seam, idle, tokens))
        yield ClassSwap(layer, cls, site, f"{site.path} (its layer)")
        if idle:
            return
    own = type(site.module)
    name = "mha-idle" if idle else "mha"
    cls = seam.cached((own, name), lambda: _attention(own, seam, idle))
    yield ClassSwap(site.module, cls, site, site.path)


def encoders(root: Root, sites: Iterable[Site], seam: Seam) -> Iterable[Handle]:
    """Keep `nn.TransformerEncoder` from turning padded batches into nested tensors."""
    inside = {id(site.token_module): site for site in sites}
    for path, module in root.module.named_modules():
        if type(module) is not torch.nn.TransformerEncoder:
            continue
        for child in module.layers:
            if id(child) in inside:
                cls = seam.cached((type(module), "encoder"), lambda: _encoder(seam))
                yield ClassSwap(module, cls, inside[id(child)], path)
                break


def _attention(base: type, seam: Seam, idle: bool) -> type:
    stock: Any = base.forward  # type: ignore[attr-defined]
    functional = Proxy(F, **{FUNCTION: function(seam)})
    rebound = rebind(stock, F=functional, torch=_without_fast_path())

    @functools.wraps(stock)
    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not seam.run.enabled:
            return stock(self, query, key, value, *rest)
        site = self._mmattn_site
        if idle:
            site.meter.tick()
            return stock(self, query, key, value, *rest)
        if need_weights or query.is_nested:
            refuse(seam, site, _WEIGHTS if need_weights else _NESTED)
            return stock(self, query, key, value, *rest)
        seam.here, seam.call = site, 0
        return rebound(self, query, key, value, *rest)

    return subclass(base, forward=forward)


def _layer(base: type, seam: Seam, idle: bool, tokens: bool) -> type:
    stock: Any = base.forward  # type: ignore[attr-defined]
    inner = stock if idle else rebind(stock, torch=_without_fast_path())

    @functools.wraps(stock)
    def forward(self: Any, src: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not seam.run.enabled:
            return stock(self, src, *args, **kwargs)
        site = self._mmattn_site
        if idle:
            site.meter.tick()
        if not tokens:
            return inner(self, src, *args, **kwargs)
        out = inner(self, seam.enter(site, src), *args, **kwargs)
        return seam.leave(site, out)

    return subclass(base, forward=forward)


def _encoder(seam: Seam) -> type:
    base = torch.nn.TransformerEncoder
    stock = base.forward
    rebound = rebind(stock, torch=_without_fast_path())

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (rebound if seam.run.enabled else stock)(self, *args, **kwargs)

    return subclass(base, forward=forward)


def _without_fast_path() -> Proxy:
    mha = Proxy(torch.backends.mha, get_fastpath_enabled=_no)
    return Proxy(torch, backends=Proxy(torch.backends, mha=mha))


def _no() -> bool:
    return False


def _never(tensors: Any) -> bool:
    return False
