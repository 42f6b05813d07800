"""Identity: the method that changes nothing, for checking a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmattn.methods.base import Method


@dataclass(frozen=True)
class Identity(Method):
    """Passes every seam through unchanged.

    Attach it to see which sites mmattn reaches on your model and that they are executed; the outputs
    stay bitwise equal to the untouched model's. No paper.
    """

    name: ClassVar[str] = "identity"
    seams: ClassVar[tuple[str, ...]] = ("attention", "heads", "tokens")
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross", "window", "channel", "text")
    paper: ClassVar[str] = "none"
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    @property
    def passive(self) -> bool:
        """Always True."""
        return True
