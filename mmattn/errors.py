"""Every error a user of mmattn can cause. Messages say what was asked, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MmattnError(Exception):
    """Base class; catch this to catch everything mmattn raises on purpose."""


class NoSiteError(MmattnError):
    """The target has no site that any of the methods can act on."""


class SelectorError(MmattnError):
    """A site selector matched nothing, even if other selectors did."""


class ConflictError(MmattnError):
    """Two methods, or two sessions, want the same place."""


class UnsupportedCall(MmattnError):  # noqa: N818  (the name is public API)
    """A method cannot honour this call (mask form, head dimension, grid).

    Raised at the first such call, unless the session was opened with ``unsupported="dense"``: then the
    original attention runs and the reason is counted in the report.
    """


class SeamNotReached(MmattnError):  # noqa: N818
    """A planned site was attached but the model's forward never went through it."""


class DetachConflict(MmattnError):  # noqa: N818
    """Something else replaced what we had installed, so it cannot be taken out safely."""


class ConfigError(MmattnError, ValueError):
    """A value, key or combination of settings is not valid."""


class ModelLoadError(MmattnError):
    """A model cannot be loaded: not found, offline, not safetensors, damaged, or its own code."""


class HostVersionError(MmattnError, ImportError):
    """A host library is missing or too old for the requested target."""


class MissingExtraError(MmattnError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'mmattn[{extra}]'"
        )


def suggest(word: str, known: Iterable[str], n: int = 3) -> str:
    """`", did you mean 'x'?"` for the nearest known words, or an empty string."""
    near = get_close_matches(word, list(known), n=n, cutoff=0.5)
    if not near:
        return ""
    return ", did you mean " + " or ".join(repr(w) for w in near) + "?"


class BudgetNotMet(MmattnError):  # noqa: N818
    """No setting that tuning tried stays within the budget; the message says how close the best came."""
