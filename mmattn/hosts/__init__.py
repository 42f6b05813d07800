"""Picks the host adapter for a target. Adapters are imported only when their library already is."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmattn.errors import HostVersionError, NoSiteError
from mmattn.hosts.base import Host

_ORDER = (
    ("diffusers", "mmattn.hosts.diffusers", "DiffusersHost"),
    ("transformers", "mmattn.hosts.transformers", "TransformersHost"),
    ("open_clip", "mmattn.hosts.open_clip", "OpenClipHost"),
    ("timm", "mmattn.hosts.timm", "TimmHost"),
    ("torch", "mmattn.hosts.plain", "PlainHost"),
)

_OLDEST = {
    "diffusers": ("diffusers", (0, 40)),
    "transformers": ("transformers", (5, 0)),
    "open_clip": ("open_clip_torch", (2, 30)),
    "timm": ("timm", (1, 0, 20)),
}
"""Distribution and oldest version whose attention modules the adapter knows."""


def check_version(library: str) -> None:
    """Raise unless the installed `library` is recent enough.

    Raises:
        HostVersionError: names the version found and the one needed.
    """
    if library not in _OLDEST:
        return
    package, oldest = _OLDEST[library]
    try:
        found = version(package)
    except PackageNotFoundError:
        return  # a source checkout on the path; nothing to compare
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[: len(oldest)])
    if numbers < oldest:
        needed = ".".join(map(str, oldest))
        raise HostVersionError(
            f"{package} {found} is installed, and mmattn attaches to {package} >= {needed}. "
            f"Upgrade it: pip install -U '{package}>={needed}'"
        )


def host_for(target: Any) -> Host:
    """The adapter that claims `target`; the plain one takes any `nn.Module`.

    A library that was never imported cannot have made the target, so its adapter is not loaded.

    Raises:
        NoSiteError: when `target` is not a model or pipeline at all.
        HostVersionError: when the library that made it is too old.
    """
    for library, module, name in _ORDER:
        if library in sys.modules:
            host: Host = getattr(importlib.import_module(module), name)()
            if host.claims(target):
                check_version(library)
                return host
    raise NoSiteError(
        f"Cannot attach to a {type(target).__name__}. Targets are diffusers pipelines and models, "
        "transformers models, timm models, open_clip models, or any torch.nn.Module."
    )
