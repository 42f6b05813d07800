"""What a host adapter must provide: roots, sites, and handles that install a seam and take it out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from mmattn.errors import DetachConflict, UnsupportedCall
from mmattn.rebind import SLOT
from mmattn.runs import ModelCall, Pictures, Root, Run, removable_hook
from mmattn.seams import Seam
from mmattn.sites import Site


class Handle(Protocol):
    """One reversible change to the host."""

    def install(self) -> None:
        """Make the change."""
        ...

    def check(self) -> str | None:
        """None while the change is in place, or the name of what replaced it."""
        ...

    def remove(self) -> None:
        """Undo it; raises DetachConflict when it is no longer ours to undo. Idempotent."""
        ...


class Host(Protocol):
    """Adapter for one library. Knows models, never methods."""

    name: str

    def claims(self, target: Any) -> bool:
        """Whether `target` is an object of this library."""
        ...

    def roots(self, target: Any) -> list[Root]:
        """Models and towers inside `target`, each with its sites filled in."""
        ...

    def schedulers(self, target: Any) -> list[Any]:
        """Schedulers whose steps drive the clock; empty where there is no denoising loop."""
        ...

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """The changes that route `sites` of `root` through `seam`, for the seams in use."""
        ...


class ClassSwap:
    """Gives one module instance a subclass of its own class, and gives the old class back."""

    def __init__(self, module: torch.nn.Module, cls: type, site: Site, path: str) -> None:
        self.module, self.cls, self.site, self.path = module, cls, site, path
        self.base: type = type(module)
        self._installed = False

    def install(self) -> None:
        """Swap the class and leave the site on the instance."""
        self.module.__dict__[SLOT] = self.site
        self.module.__class__ = self.cls
        self._installed = True

    def check(self) -> str | None:
        """None while our class is in place."""
        return None if type(self.module) is self.cls else self.path

    def remove(self) -> None:
        """Restore the class the module had.

        Raises:
            DetachConflict: when the class is neither ours nor the original.
        """
        if not self._installed:
            return
        if type(self.module) is not self.cls:
            raise DetachConflict(
                f"{self.path} changed its class to {type(self.module).__name__} after mmattn attached "
                "(parametrisations do that); undo that change first, then detach again"
            )
        self.module.__class__ = self.base
        del self.module.__dict__[SLOT]
        self._installed = False


class LogitsHook:
    """Passes what a root returns through the ``logits`` seam of every method that has it.

    The methods see the first planned site of the root, or, where they act at no site, one of kind
    ``logits`` made for them. While they run, ``run.call`` holds the arguments of the root's call.

    Args:
        decoder: attention sites of the language model behind the logits.
        pictures: where its image features come from.
    """

    def __init__(
        self,
        root: Root,
        sites: list[Site],
        run: Run,
        *,
        decoder: list[Site] | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        self.root, self.run = root, run
        self.decoder, self.pictures = decoder or [], pictures
        self.site = sites[0] if sites else Site(root.name or "logits", "logits", root.module)
        self.methods = [(i, m) for i, m in enumerate(run.methods) if "logits" in m.seams]
        self._hooks: list[Any] = []
        self._names = list(inspect.signature(type(root.module).forward).parameters)[1:]

    def install(self) -> None:
        """Hook the root's call and its output."""
        if self.site not in self.run.sites:
            self.site.run = self.run
            self.run.sites.append(self.site)
        module = self.root.module
        before = removable_hook(self._begin, pre=True)
        self._hooks = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(removable_hook(self._call)),
        ]

    def check(self) -> str | None:
        """Nothing can replace a hook."""
        return None

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.run.enabled or torch.compiler.is_compiling():
            return
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache: Any = given.get("cache", given.get("past_key_values"))
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self.run.call = ModelCall(module, given, cache, past, self.decoder, self.pictures)

    def _call(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not self.run.enabled:
            return None
        call = self.run.call
        if call is not None and call.cache is None:
            made = getattr(output, "cache", None)
            call.cache = getattr(output, "past_key_values", None) if made is None else made
        try:
            return self._changed(output)
        finally:
            self.run.call = None

    def _changed(self, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return self._through(output)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return (self._through(output[0]), *output[1:])
        if isinstance(getattr(output, "logits", None), torch.Tensor):
            output.logits = self._through(output.logits)
            return output
        raise UnsupportedCall(
            f"{self.root.name or 'the model'} returned a {type(output).__name__} without logits, and "
            f"{self.methods[0][1].name} changes logits; call the model so that it returns them"
        )

    def _through(self, logits: torch.Tensor) -> torch.Tensor:
        site = self.site
        if site.kind == "logits":
            site.meter.tick()
        for slot, method in self.methods:
            site.slot, site.phase = slot, self.run.phases[slot]
            logits = method.logits(logits, site=site)
        return logits


def named_sites(module: torch.nn.Module, prefix: str = "") -> Iterable[tuple[str, torch.nn.Module]]:
    """Modules below `module` with their dotted paths under `prefix`, each instance once."""
    for path, child in module.named_modules():
        yield (f"{prefix}.{path}" if prefix and path else prefix or path), child


def number(sites: list[Site]) -> list[Site]:
    """Fill in `index` and `depth`, counted per kind."""
    totals: dict[str, int] = {}
    for site in sites:
        site.index = totals.get(site.kind, 0)
        totals[site.kind] = site.index + 1
    for site in sites:
        site.depth = totals[site.kind]
    return sites
