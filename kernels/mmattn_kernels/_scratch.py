"""Memory that is used again: on a CPU, fresh pages cost as much time as filling them."""

from __future__ import annotations

from torch import Tensor


class Scratch:
    """One piece of memory for results of changing shape.

    Args:
        like: gives dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """Uninitialised memory of a shape; what was taken before is overwritten."""
        size = 1
        for n in shape:
            size *= n
        if self._room.numel() < size:
            self._room = self._room.new_empty(size)
        return self._room[:size].view(shape)
