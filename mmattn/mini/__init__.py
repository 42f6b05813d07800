"""Small models trained inside this repository, and the drawn scenes they were trained on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmattn.mini.loading import Vlm as Vlm, load as load

__all__ = ["Vlm", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("mmattn.mini.loading"), name)
    raise AttributeError(f"module 'mmattn.mini' has no attribute {name!r}")
