"""What goes wrong inside a model: memory that runs out, and numbers that are no numbers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from mmattn.batch.items import sentence
from mmattn.errors import MmattnError

_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


class NonFiniteError(MmattnError):
    """The latents or the pixels of an item hold NaN or infinity."""


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in main memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _MEMORY)


def free_memory() -> None:
    """Give back what the failed call held. Call it outside of the except block, which keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Guard:
    """A step callback that looks for rows of latents which are not finite.

    One reduction over the latents per step, and one small copy to the host. Rows of a batch do not depend
    on each other, so a bad row does not stop the good ones; when all are bad the call ends at once.

    Args:
        rows: items in the call.

    Attributes:
        checks: steps looked at.
        bad: row to the first step at which it was not finite.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.checks = 0
        self.bad: dict[int, int] = {}

    def __call__(
        self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Look at ``given["latents"]``; what the pipeline gets back is unchanged.

        Raises:
            NonFiniteError: when no row is finite any more.
        """
        latents = given["latents"]
        self.checks += 1
        finite = torch.isfinite(latents).reshape(self.rows, -1).all(dim=1).tolist()
        for row, good in enumerate(finite):
            if not good:
                self.bad.setdefault(row, step)
        if len(self.bad) == self.rows:
            raise NonFiniteError(self.reason(0))
        return given

    def look(self, drawn: torch.Tensor) -> None:
        """Look at decoded pictures ``[B, ...]`` too: a decoder can overflow on finite latents."""
        finite = torch.isfinite(drawn).reshape(self.rows, -1).all(dim=1).tolist()
        for row, good in enumerate(finite):
            if not good:
                self.bad.setdefault(row, -1)

    def reason(self, row: int) -> str:
        """Where a row went wrong."""
        step = self.bad[row]
        if step < 0:
            return "the decoded picture holds NaN or infinity"
        return f"the latents hold NaN or infinity after step {step}"


@contextlib.contextmanager
def tiled_decoding(pipe: Any) -> Iterator[bool]:
    """Decode in slices and tiles inside the block; yields whether that changed anything."""
    vae = getattr(pipe, "vae", None)
    changed = []
    for what in ("slicing", "tiling"):
        enable = getattr(vae, f"enable_{what}", None)
        if enable is not None and not getattr(vae, f"use_{what}", False):
            enable()
            changed.append(what)
    try:
        yield bool(changed)
    finally:
        for what in changed:
            getattr(vae, f"disable_{what}")()


def offload(pipe: Any, device: torch.device) -> str | None:
    """Keep the models of a pipeline in main memory, and on the device only the one that runs, from now on.

    What is drawn stays the same; the models take turns, so the largest of them has to fit and not their sum.

    Returns:
        Why that cannot be done, or None.
    """
    try:
        pipe.enable_model_cpu_offload(device=device)
    except Exception as error:
        return sentence(error)
    return None
