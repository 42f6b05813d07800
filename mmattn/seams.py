"""The shared seam object: what runs instead of a host's attention call at every site of one root.

One object serves all sites of a root, and everything specific to a site is read through the site, so
`compile_repeated_blocks` compiles one graph per kind of block and not one per layer. Python counters
are kept out of traced code.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from mmattn.errors import UnsupportedCall
from mmattn.folding import Fold
from mmattn.methods._calls import run_dense
from mmattn.methods.base import Dense, Method
from mmattn.rebind import SLOT, Proxy, names_used, rebind, spellings, subclass
from mmattn.runs import Run
from mmattn.sites import Site

_SDPA = "scaled_dot_product_attention"
_INTERFACES = "ALL_ATTENTION_FUNCTIONS"
_BIASES = ("position_bias", "softcap", "s_aux", "cu_seq_lens_q")


class Opaque:
    """A mask, or a term of the softmax, that only the host's own attention function can read.

    Flash's 2-D padding masks and packed lengths, flex block masks, T5's position bias, soft caps and
    sinks. Methods get it in place of `mask`; handing it back to `dense` runs the call unchanged.
    """

    def __init__(self, mask: Any, what: str) -> None:
        self.mask, self.what = mask, what


class Seam:
    """Runs the methods of the site that is being executed. `here` is set by the installed class."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.here: Site | None = None
        self.call = 0
        self._classes: dict[tuple[type, str], type] = {}

    # -- attention and heads ------------------------------------------------------------------

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        causal: bool,
        dropout: float,
        dense: Dense,
    ) -> torch.Tensor:
        """One attention call, normalised: ``q [B, H, Q, D]``, ``k, v [B, Hk, K, D]``."""
        site = self.here
        if site is None or not self.run.enabled:
            return dense(q, k, v, mask=mask, scale=scale)
        start = 0 if torch.compiler.is_compiling() else time.perf_counter_ns()
        site.meter.tick()
        site.causal, site.call = causal, self.call
        self.call += 1
        if q.ndim != 4:
            out = self._folded(site, q, k, v, mask, scale, dropout, dense)
        else:
            out = self._heads(site, self._chain(site, 0, q, k, v, mask, scale, dropout, dense))
        if not torch.compiler.is_compiling():
            site.meter.nanoseconds += time.perf_counter_ns() - start
        return out

    def _chain(
        self,
        site: Site,
        depth: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dropout: float,
        dense: Dense,
    ) -> torch.Tensor:
        if depth == len(site.attention):
            return dense(q, k, v, mask=mask, scale=scale)
        slot, method = site.attention[depth]
        outer_mask, outer_scale = mask, scale

        def inner(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = outer_mask,
            scale: float | None = outer_scale,
        ) -> torch.Tensor:
            out = self._chain(site, depth + 1, q, k, v, mask, scale, dropout, dense)
            site.slot, site.phase = slot, self.run.phases[slot]
            return out

        site.slot, site.phase = slot, self.run.phases[slot]
        reason = _refusal(method, mask, site.causal, dropout)
        if "clock" in method.needs and not self.run.timed:
            reason = (
                "the method needs the denoising step, and no run is in progress; attach to the "
                "pipeline (after replacing its scheduler, if you do), or call session.step(i, n)"
            )
        if reason is not None:
            if self.run.unsupported != "dense":
                raise UnsupportedCall(
                    f"{method.name} at {site.path}: {reason}. Choose other sites, or attach with "
                    'unsupported="dense" to run the original attention there and have it counted.'
                )
            return _fall_back(method, q, k, v, site, inner, reason)
        if not method.grouped and k.shape[1] != q.shape[1]:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        try:
            out = method.attend(q, k, v, mask=mask, scale=scale, site=site, dense=inner)
        except UnsupportedCall as error:
            if self.run.unsupported != "dense":
                raise
            return _fall_back(method, q, k, v, site, inner, str(error))
        if not self.run.dry or method.observes:
            return out
        exact = inner(q, k, v)
        size = exact.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        site.note("error", (out - exact).float().square().sum() / size)
        return exact

    def _folded(
        self,
        site: Site,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dropout: float,
        dense: Dense,
    ) -> torch.Tensor:
        """Calls with extra or missing leading axes, brought to four (see folding.py)."""
        fold, whole = Fold(q, site), mask
        folded = fold.mask(mask)

        def unfolded(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            mask: torch.Tensor | None = folded,
            scale: float | None = scale,
        ) -> torch.Tensor:
            q, k, v = fold.back(q), fold.back(k), fold.back(v)
            if mask is folded:
                mask = whole
            elif mask is not None and mask.ndim > 2:
                mask = fold.back(mask)
            return fold(dense(q, k, v, mask=mask, scale=scale))

        q, k, v = fold(q), fold(k), fold(v)
        out = self._chain(site, 0, q, k, v, folded, scale, dropout, unfolded)
        return fold.back(self._heads(site, out))

    def _heads(self, site: Site, out: torch.Tensor) -> torch.Tensor:
        for slot, method in site.head_methods:
            site.slot, site.phase = slot, self.run.phases[slot]
            out = method.heads(out, site=site)
        return out

    # -- tokens -------------------------------------------------------------------------------

    def enter(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Hidden states on their way into a block."""
        site.call = 0
        for slot, method in site.token_methods:
            site.slot, site.phase = slot, self.run.phases[slot]
            x = method.enter(x, site=site)
        return x

    def leave(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Hidden states on their way out of a block, methods in reverse order."""
        site.call = 0
        for slot, method in reversed(site.token_methods):
            site.slot, site.phase = slot, self.run.phases[slot]
            x = method.leave(x, site=site)
        return x

    # -- what is put into the stock code's globals -----------------------------------------------

    def dispatch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Stand-in for diffusers' ``dispatch_attention_fn`` (``[B, N, H, D]``)."""

        def dispatch_attention_fn(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            **rest: Any,
        ) -> Any:
            def dense(
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                *,
                mask: torch.Tensor | None,
                scale: float | None,
            ) -> torch.Tensor:
                out: torch.Tensor = original(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    attn_mask=mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    **rest,
                )
                return out.transpose(1, 2)

            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = self.attention(q, k, v, attn_mask, scale, is_causal, dropout_p, dense)
            return out.transpose(1, 2)

        return dispatch_attention_fn

    def sdpa(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Stand-in for ``F.scaled_dot_product_attention`` (``[B, H, N, D]``)."""

        def scaled_dot_product_attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            **rest: Any,
        ) -> torch.Tensor:
            def dense(
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                *,
                mask: torch.Tensor | None,
                scale: float | None,
            ) -> torch.Tensor:
                return original(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    **rest,
                )

            return self.attention(query, key, value, attn_mask, scale, is_causal, dropout_p, dense)

        return scaled_dot_product_attention

    def interface(self, original: Callable[..., Any], *, explicit: bool) -> Callable[..., Any]:
        """Stand-in for one of transformers' attention functions (``[B, H, N, D]`` in, ``[B, N, H, D]`` out).

        Args:
            original: the function of the model's own `attn_implementation`.
            explicit: True where causality is always in the mask (eager), False where a missing mask
                means causal (sdpa and flash).
        """

        def attention_interface(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any = None,
            scaling: float | None = None,
            dropout: float = 0.0,
            **rest: Any,
        ) -> tuple[torch.Tensor, Any]:
            weights: list[Any] = [None]
            given = _readable(attention_mask, rest)

            def dense(
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                *,
                mask: Any,
                scale: float | None,
            ) -> torch.Tensor:
                if isinstance(mask, Opaque):
                    mask = mask.mask
                # The keys may have been repeated for the method; the host must not do it again.
                whole = k.shape[1] == q.shape[1] != key.shape[1]
                caller = Proxy(module, num_key_value_groups=1) if whole else module
                out, weights[0] = original(
                    caller, q, k, v, mask, scaling=scale, dropout=dropout, **rest
                )
                return out.transpose(1, 2)  # type: ignore[no-any-return]

            flag = rest.get("is_causal")
            flag = getattr(module, "is_causal", True) if flag is None else flag
            causal = bool(flag) and not explicit and attention_mask is None and query.shape[2] > 1
            out = self.attention(query, key, value, given, scaling, causal, dropout, dense)
            return out.transpose(1, 2), weights[0]

        return attention_interface

    def rebound(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """`function` with its attention call going through this seam, or None if it makes none."""
        used = names_used(function)
        table = getattr(_unwrap(function), "__globals__", {})
        if "dispatch_attention_fn" in used:
            original = table["dispatch_attention_fn"]
            return rebind(function, dispatch_attention_fn=self.dispatch(original))
        if _INTERFACES in used:
            return rebind(function, **{_INTERFACES: _Interfaces(self, table[_INTERFACES])})
        if _SDPA not in used:
            return None
        names = spellings(function, **{_SDPA: self.sdpa(_stock_sdpa)})
        return rebind(function, **names) if names else None

    # -- classes ----------------------------------------------------------------------------------

    def cached(self, key: tuple[type, str], make: Callable[[], type]) -> type:
        """The class made for `key`, made once: sites of one kind share it, so they share a graph."""
        if key not in self._classes:
            self._classes[key] = make()
        return self._classes[key]

    def attention_class(
        self, base: type, method: str, rebound: Callable[..., Any], *, tokens: bool = False
    ) -> type:
        """Subclass of `base` whose `method` (``__call__`` or ``forward``) runs `rebound` at its site.

        With `tokens`, the hidden states pass through the tokens seam before and after; for processors
        they are the second argument, for modules the first.
        """
        key = (base, method + ("+tokens" if tokens else ""))
        if key in self._classes:
            return self._classes[key]
        stock = getattr(base, method)
        seam = self

        if not tokens:

            @functools.wraps(stock)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                site = self._mmattn_site
                if site is None or not seam.run.enabled:
                    return stock(self, *args, **kwargs)
                seam.here, seam.call = site, 0
                return rebound(self, *args, **kwargs)

        else:
            position = 1 if method == "__call__" else 0

            @functools.wraps(stock)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                site = self._mmattn_site
                if site is None or not seam.run.enabled:
                    return stock(self, *args, **kwargs)
                seam.here, seam.call = site, 0
                if "hidden_states" in kwargs:
                    kwargs["hidden_states"] = seam.enter(site, kwargs["hidden_states"])
                else:
                    x = seam.enter(site, args[position])
                    args = (*args[:position], x, *args[position + 1 :])
                out = rebound(self, *args, **kwargs)
                seam.here = site
                if isinstance(out, tuple):
                    return (seam.leave(site, out[0]), *out[1:])
                return seam.leave(site, out)

        # Instances that users make of our class (``type(attn.processor)()``) belong to no site.
        self._classes[key] = subclass(base, **{method: call, SLOT: None})
        return self._classes[key]

    def block_class(self, base: type) -> type:
        """Subclass of a block module that passes hidden states through the tokens seam."""
        return self.attention_class(base, "forward", base.forward, tokens=True)  # type: ignore[attr-defined]


def _fall_back(
    method: Method,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    site: Site,
    dense: Dense,
    reason: str,
) -> torch.Tensor:
    """The original attention, counted with its reason; of a sparse method also as density 1."""
    if method.probes:
        return run_dense(q, k, v, site=site, dense=dense, reason=reason)
    site.meter.fell_back(reason)
    return dense(q, k, v)


class _Interfaces:
    """Stands for transformers' table of attention functions; hands out seamed ones."""

    def __init__(self, seam: Seam, table: Any) -> None:
        self.seam, self.table = seam, table

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Any:
        original = self.table.get_interface(implementation, default)
        return self.seam.interface(original, explicit=implementation in (None, "eager"))

    def __getitem__(self, implementation: str) -> Any:
        return self.seam.interface(self.table[implementation], explicit=implementation == "eager")


def _readable(mask: Any, rest: dict[str, Any]) -> Any:
    """`mask` when methods can read it (None or 4-D) and nothing else changes the softmax."""
    for name in _BIASES:
        if rest.get(name) is not None:
            return Opaque(mask, f"a {name}")
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4):
        return mask
    return Opaque(mask, f"a mask of its own kind ({type(mask).__name__})")


def _refusal(method: Method, mask: Any, causal: bool, dropout: float) -> str | None:
    if isinstance(mask, Opaque):
        if method.opaque or method.passive:
            return None
        return f"this attention implementation adds {mask.what}, which only itself can read"
    if mask is not None and not method.masks:
        return (
            f"the call has an attention mask {list(mask.shape)}, which this method does not honour"
        )
    if causal and not method.causal:
        return "the call is causal, which this method does not honour"
    if dropout > 0 and not method.observes and not method.passive:
        return f"the call drops attention weights (p={dropout}), which this method does not honour"
    return None


def _stock_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)  # looked up late: users may replace it


def _unwrap(fn: Any) -> Any:
    while (inner := getattr(fn, "__wrapped__", None)) is not None:
        fn = inner
    return fn
