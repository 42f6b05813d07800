"""Picks the host adapter for a target. Adapters are imported only when their library already is."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mmattn.errors import NoSiteError
from mmattn.hosts.base import Host

_ORDER = (
    ("diffusers", "mmattn.hosts.diffusers", "DiffusersHost"),
    ("transformers", "mmattn.hosts.transformers", "TransformersHost"),
    ("open_clip", "mmattn.hosts.open_clip", "OpenClipHost"),
    ("timm", "mmattn.hosts.timm", "TimmHost"),
    ("torch", "mmattn.hosts.plain", "PlainHost"),
)


def host_for(target: Any) -> Host:
    """The adapter that claims `target`; the plain one takes any `nn.Module`.

    A library that was never imported cannot have made the target, so its adapter is not loaded.

    Raises:
        NoSiteError: when `target` is not a model or pipeline at all.
    """
    for library, module, name in _ORDER:
        if library in sys.modules:
            host: Host = getattr(importlib.import_module(module), name)()
            if host.claims(target):
                return host
    raise NoSiteError(
        f"Cannot attach to a {type(target).__name__}. Targets are diffusers pipelines and models, "
        "transformers models, timm models, open_clip models, or any torch.nn.Module."
    )
