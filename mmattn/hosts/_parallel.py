"""diffusers models that several processes run together: what a method sees there, and what is refused.

Under context parallelism (``model.enable_parallelism``) every process holds a stretch of the tokens, and
diffusers exchanges them inside ``dispatch_attention_fn``. A seam stands in front of that function, so on
its own a method would attend to the tokens of its process alone and never notice. Here the exchange that
Ulysses makes (arXiv 2309.14509: all tokens for a part of the heads) comes first, then the method, then
the way back.

A method that treats every head by itself says so with ``headwise = True`` and gets its process's part of
the heads, like the stock attention. Any other one (a choice made over all heads, numbers drawn for all of
them, maps of their mean) gets all heads in every process: the same result, without a saving in attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmattn.errors import UnsupportedCall
from mmattn.layout import Layout
from mmattn.methods.base import Method
from mmattn.runs import removable_hook
from mmattn.seams import Seam
from mmattn.sites import Site


class Watch:
    """Knows how a root is cut; a handle that looks again whenever the root is called.

    Traced code must not reach for the root by a path of its own, so it reads what was seen outside.

    Args:
        module: the root.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.config = config_of(module)
        self._hook: Any = None

    def install(self) -> None:
        """Hook the root's call."""
        hook = removable_hook(self._look, pre=True)
        self._hook = self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def check(self) -> str | None:
        """Nothing can replace a hook."""
        return None

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.config = config_of(module)


def dispatching(seam: Seam, original: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """Stand-in for ``dispatch_attention_fn`` that shows methods the whole sequence.

    Args:
        seam: runs the methods.
        original: the stock function.
        watch: of the root.
    """
    inner = seam.dispatch(original)

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
        site = seam.here
        parallel = watch.config
        if parallel is None and site is not None and rest.get("parallel_config") is not None:
            raise UnsupportedCall(
                f"{site.path}: context parallelism was enabled on a compiled model after mmattn attached to "
                "it; detach, then attach again"
            )
        # Encoders of text are not cut; those of their calls that are say so themselves.
        text = site is not None and site.kind == "text" and rest.get("parallel_config") is None
        if site is None or parallel is None or text:
            return inner(query, key, value, attn_mask, dropout_p, is_causal, scale, **rest)
        reason = refusal(parallel, site)
        if reason is None and parallel.context_parallel_config is None:
            return inner(query, key, value, attn_mask, dropout_p, is_causal, scale, **rest)
        if reason is None:
            sharded = rest.get("parallel_config") is not None
            try:
                exchange = _Exchange(parallel, site, query, key, attn_mask, sharded=sharded)
            except UnsupportedCall as error:
                reason = str(error)
        if reason is not None:
            if seam.run.unsupported != "dense":
                raise UnsupportedCall(_said(site, reason))
            _count_dense(seam, site, reason)
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, **rest)
        rest["parallel_config"] = None
        q, k, v = exchange.queries(query), exchange.keys(key), exchange.keys(value)
        mask = exchange.mask(attn_mask)
        return exchange.back(inner(q, k, v, mask, dropout_p, is_causal, scale, **rest))

    return dispatch_attention_fn


def check(model: torch.nn.Module, sites: Sequence[Site], unsupported: str) -> None:
    """Refuse at attach time what could never run.

    Raises:
        UnsupportedCall: for a form of parallelism that the methods at one of `sites` do not honour;
            methods of the tokens seam always, others unless `unsupported` is ``"dense"``.
    """
    parallel = config_of(model)
    if parallel is None:
        return
    for site in sites:
        reason = refusal(parallel, site)
        if reason is not None and (site.token_methods or unsupported != "dense"):
            raise UnsupportedCall(_said(site, reason))


def config_of(model: torch.nn.Module) -> Any:
    """The model's ``ParallelConfig``, or None where it runs in one process."""
    return getattr(getattr(model, "_orig_mod", model), "_parallel_config", None)


def refusal(parallel: Any, site: Site) -> str | None:
    """Why the methods at `site` cannot run under `parallel`, or None."""
    methods = [method for _, method in (*site.attention, *site.head_methods)]
    context = parallel.context_parallel_config
    if context is None:
        if all(_headwise(method) for method in methods):
            return None
        return (
            "the model runs under tensor parallelism, where a process sees a part of the heads, and the "
            "method looks at all of them; run the model in one process, or under context parallelism"
        )
    if any(not method.passive for _, method in site.token_methods):
        return (
            "the model runs under context parallelism, where a process holds a part of the tokens, and "
            "the method changes tokens of the whole sequence; run the model in one process"
        )
    if context.ring_degree > 1:
        return (
            f"the model runs under ring attention (ring_degree={context.ring_degree}), where no process "
            "ever holds all keys; use ContextParallelConfig(ulysses_degree=...) alone"
        )
    if context.ulysses_anything:
        return (
            "the model runs with ulysses_anything=True, whose stretches differ in length from process to "
            "process; choose a size whose tokens the processes share evenly, and leave it out"
        )
    return None


def _headwise(method: Method) -> bool:
    return method.passive or method.headwise


def _said(site: Site, reason: str) -> str:
    first = next(m for _, m in (*site.attention, *site.head_methods, *site.token_methods))
    return f"{first.name} at {site.path}: {reason}."


def _count_dense(seam: Seam, site: Site, reason: str) -> None:
    """What the seam does for a call that runs the original attention."""
    site.meter.tick()
    seam.call += 1
    site.meter.fell_back(reason)
    if any(method.probes for _, method in site.attention):
        site.note("density", 1.0)


class _Exchange:
    """Brings one attention call together and apart again; tensors are ``[B, N, H, D]``.

    Args:
        parallel: how the model is cut.
        site: where the call is.
        query, key: of this process.
        mask: of this process.
        sharded: whether keys are cut like the queries; else every process holds all of them.

    Raises:
        UnsupportedCall: when the pieces cannot be put in order.
    """

    def __init__(
        self,
        parallel: Any,
        site: Site,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        sharded: bool,
    ) -> None:
        context = parallel.context_parallel_config
        self.group: Any = context._ulysses_mesh.get_group()
        self.degree: int = context.ulysses_degree
        self.rank: int = context._ulysses_local_rank
        self.sharded, self.local = sharded, key.shape[1]
        if not sharded and site.kind != "cross":
            raise UnsupportedCall(
                "this call of a model under context parallelism attends within the process on purpose"
            )
        methods = [method for _, method in (*site.attention, *site.head_methods)]
        even = query.shape[2] % self.degree == 0 and key.shape[2] % self.degree == 0
        self.split = even and all(_headwise(method) for method in methods)
        self.text = self._text(site, query.shape[1] * self.degree)
        if mask is not None:
            self._check(mask)
        self.exchange: Any = importlib.import_module(
            "diffusers.models.attention_dispatch"
        ).SeqAllToAllDim.apply

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens, and this process's part of the heads or all of them."""
        # Copies of the heads, one per process: gradients then sum over the processes as they must.
        whole = self.exchange(self.group, x if self.split else x.repeat(1, 1, self.degree, 1), 2, 1)
        return self._sorted(whole)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values, with the heads of `queries`."""
        if self.sharded:
            return self.queries(x)
        return x.chunk(self.degree, 2)[self.rank] if self.split else x

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask over all keys."""
        if mask is None or not self.sharded:
            return mask
        parts = [torch.empty_like(mask) for _ in range(self.degree)]
        torch.distributed.all_gather(parts, mask.contiguous(), group=self.group)
        return self._sorted(torch.cat(parts, -1).movedim(-1, 1)).movedim(1, -1)

    def back(self, out: torch.Tensor) -> torch.Tensor:
        """The tokens of this process, with all heads."""
        if self.text:
            rows, size = out.shape[0], out.shape[1]
            first, second = out.split([self.text, size - self.text], 1)
            pieces = [x.unflatten(1, (self.degree, -1)) for x in (first, second)]
            out = torch.cat(pieces, 2).reshape(rows, size, *out.shape[2:])
        if self.split:
            whole: torch.Tensor = self.exchange(self.group, out, 1, 2)
            return whole
        return out.chunk(self.degree, 1)[self.rank]

    def _sorted(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, ...]`` as the model has it: every process brought its text with its piece of the image."""
        if not self.text:
            return x
        pieces = x.unflatten(1, (self.degree, -1))
        first = self.text // self.degree
        halves = (pieces[:, :, :first], pieces[:, :, first:])
        return torch.cat([half.flatten(1, 2) for half in halves], 1)

    def _text(self, site: Site, tokens: int) -> int:
        """Tokens before the seam between text and image; 0 where a sequence has one kind only."""
        layout: Layout | None = site.run.layout if site.run is not None else None
        if layout is None:
            raise UnsupportedCall(
                f"how {site.family} orders its tokens is not known, so what the processes hold cannot be "
                "put together; run the model in one process"
            )
        if site.kind != "joint" or layout.text == "none":
            return 0
        t, y, x = layout.grid_for(tokens)
        image = t * y * x
        if image > tokens or image % self.degree or (tokens - image) % self.degree:
            raise UnsupportedCall(
                f"{tokens} tokens, {image} of them of the image, are not what {self.degree} processes with "
                "equal parts of text and image hold"
            )
        if image == tokens:
            return 0
        return tokens - image if layout.text == "before" else image

    def _check(self, mask: torch.Tensor) -> None:
        per_key = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
        if not per_key or mask.shape[-1] != self.local:
            raise UnsupportedCall(
                f"the call has an attention mask {list(mask.shape)}; under context parallelism it can be "
                f"one number per key, here [B, {self.local}] or [B, 1, 1, {self.local}]"
            )
