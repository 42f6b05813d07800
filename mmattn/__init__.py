"""mmattn: attach published attention techniques to models you already have, and prove what they did.

Importing this package imports no torch, patches nothing, and loads no host library; names below are
resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "attach": "mmattn.attaching",
    "plan": "mmattn.planning",
    "Plan": "mmattn.planning",
    "Session": "mmattn.session",
    "Stats": "mmattn.report",
    "Site": "mmattn.sites",
    "Layout": "mmattn.layout",
    "Recipe": "mmattn.config",
    "load": "mmattn.config",
    "register": "mmattn.registry",
    "methods": "mmattn.methods",
    "Method": "mmattn.methods.base",
    "AttentionMethod": "mmattn.methods.base",
    "Identity": "mmattn.methods.identity",
    "AgentAttention": "mmattn.methods.agent_attention",
    "AttentionMaps": "mmattn.methods.attention_maps",
    "HiPrune": "mmattn.methods.hiprune",
    "RandomPrune": "mmattn.methods.random_prune",
    "ToMe": "mmattn.methods.tome",
    "VHR": "mmattn.methods.vhr",
    "VMoBA": "mmattn.methods.vmoba",
    "MmattnError": "mmattn.errors",
    "NoSiteError": "mmattn.errors",
    "SelectorError": "mmattn.errors",
    "ConflictError": "mmattn.errors",
    "UnsupportedCall": "mmattn.errors",
    "SeamNotReached": "mmattn.errors",
    "DetachConflict": "mmattn.errors",
    "ConfigError": "mmattn.errors",
    "HostVersionError": "mmattn.errors",
    "MissingExtraError": "mmattn.errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = import_module(_EXPORTS[name])
        # `mmattn.methods` is the package of methods, and calling it lists them.
        value = module if name == "methods" else getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mmattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
