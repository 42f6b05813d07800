"""What a host adapter must provide: roots, sites, and handles that install a seam and take it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from mmattn.errors import DetachConflict
from mmattn.rebind import SLOT
from mmattn.runs import Root
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

    def handles(self, root: Root, sites: list[Site], seam: Seam, seams: set[str]) -> Iterable[Handle]:
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


def named_sites(
    module: torch.nn.Module, prefix: str = ""
) -> Iterable[tuple[str, torch.nn.Module]]:
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
