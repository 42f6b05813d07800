"""diffusers: pipelines and models. Seams go into the attention-processor slot.

Each site gets its own instance of a subclass of its stock processor; the subclass is shared per
processor class. `model.processor` is assigned directly, so Mochi, which has no `set_processor`, works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mmattn.errors import DetachConflict
from mmattn.hosts import _parallel
from mmattn.hosts.base import Handle, named_sites, number
from mmattn.hosts.diffusers_families import family_of, kind_of, tags_of
from mmattn.rebind import SLOT, blank, names_used, rebind
from mmattn.runs import Root
from mmattn.seams import Seam
from mmattn.sites import Site

_DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")


class DiffusersHost:
    """Adapter for `DiffusionPipeline` and `ModelMixin` objects."""

    name = "diffusers"

    def claims(self, target: Any) -> bool:
        """True for pipelines and models, compiled wrappers included."""
        from diffusers import DiffusionPipeline, ModelMixin

        return isinstance(_unwrap(target), DiffusionPipeline | ModelMixin)

    def roots(self, target: Any) -> list[Root]:
        """The denoisers of a pipeline, or the model itself."""
        from diffusers import DiffusionPipeline

        if not isinstance(target, DiffusionPipeline):
            return [self._root("", target)]
        components = {n: getattr(target, n, None) for n in _DENOISERS}
        return [
            self._root(name, module)
            for name, module in components.items()
            if isinstance(module, torch.nn.Module)
        ]

    def schedulers(self, target: Any) -> list[Any]:
        """The pipeline's scheduler."""
        scheduler = getattr(_unwrap(target), "scheduler", None)
        steps = hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")
        return [scheduler] if steps else []

    def _root(self, name: str, outer: torch.nn.Module) -> Root:
        # Hooks go on the compiled wrapper when there is one: outside the graph they see everything.
        model = _unwrap(outer)
        family = family_of(model)
        root = Root(name, outer, layout=family.layout if family else None)
        found = []
        for path, module in named_sites(model, name):
            processor = getattr(module, "processor", None)
            if processor is None:
                continue
            if not _seamable(type(processor)):
                root.excluded[path] = _why_not(type(processor))
                continue
            local = path[len(name) + 1 :] if name else path
            kind = kind_of(family, local, module)
            found.append(
                Site(
                    path=path,
                    kind=kind,
                    module=module,
                    heads=getattr(module, "heads", None),
                    host=self.name,
                    family=type(model).__name__,
                    tags=tags_of(family, local),
                )
            )
        root.sites = number(found)
        return root

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """One processor swap per site."""
        _parallel.check(root.module, sites, seam.run.unsupported)
        watch = _parallel.Watch(root.module)
        yield watch
        for site in sites:
            if site.attention or site.head_methods or site.token_methods:
                yield _ProcessorSwap(site, seam, watch)


class _ProcessorSwap:
    def __init__(self, site: Site, seam: Seam, watch: _parallel.Watch) -> None:
        self.site = site
        self.old: Any = site.module.processor
        cls = _stock(type(self.old))
        rebound = _rebound(cls.__call__, seam, watch)
        assert rebound is not None, "only seamable processors become sites"
        swapped = seam.attention_class(cls, "__call__", rebound, tokens=bool(site.token_methods))
        self.new: Any = blank(swapped)
        self.new.__dict__.update(self.old.__dict__)
        self.new.__dict__[SLOT] = site
        self._installed = False

    def install(self) -> None:
        """Put our processor into the slot."""
        self.site.module.processor = self.new
        self._installed = True

    def check(self) -> str | None:
        """None while our processor is in the slot."""
        return None if self.site.module.processor is self.new else self.site.path

    def remove(self) -> None:
        """Put the old processor back, carrying over what the user set on ours in between.

        Raises:
            DetachConflict: when the slot holds a processor that is neither ours nor the old one.
        """
        if not self._installed:
            return
        current = self.site.module.processor
        if current is not self.new:
            raise DetachConflict(
                f"{self.site.path}: the processor was replaced by a {type(current).__name__} after "
                "mmattn attached, and stays; the session is detached and everything else restored"
            )
        for key, value in self.new.__dict__.items():
            if key != SLOT and self.old.__dict__.get(key) is not value:
                self.old.__dict__[key] = value
        self.site.module.processor = self.old
        self._installed = False


def _rebound(
    call: Callable[..., Any], seam: Seam, watch: _parallel.Watch
) -> Callable[..., Any] | None:
    """The stock code with its attention call going through the seam, over all tokens of the model."""
    if "dispatch_attention_fn" not in names_used(call):
        return seam.rebound(call)
    original = inspect.unwrap(call).__globals__["dispatch_attention_fn"]
    return rebind(call, dispatch_attention_fn=_parallel.dispatching(seam, original, watch))


def _stock(cls: type) -> type:
    """The class under a seam that a detached session left behind (`unfuse_qkv_projections` does that)."""
    return cls.__mro__[1] if SLOT in cls.__dict__ else cls


def _seamable(cls: type) -> bool:
    used = names_used(cls.__call__) if callable(getattr(cls, "__call__", None)) else frozenset()  # noqa: B004
    return bool({"dispatch_attention_fn", "scaled_dot_product_attention"} & used)


def _why_not(cls: type) -> str:
    if "Linear" in cls.__name__:
        return f"{cls.__name__} is linear attention, without a softmax to act on"
    return (
        f"{cls.__name__} calls neither dispatch_attention_fn nor scaled_dot_product_attention; "
        "set another processor (AttnProcessor2_0) before attaching"
    )


def _unwrap(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)
