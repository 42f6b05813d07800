"""Which implementation of an op runs: every one says whether it can and, if not, why."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("mmattn_kernels")

REGISTRY: dict[str, Op] = {}
"""Every op by name; filled when `mmattn_kernels` is imported."""


class BackendUnavailable(RuntimeError):  # noqa: N818  (the name is public API)
    """A back end was asked for by name and cannot run this call; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What a back end needs to know to accept or refuse a call.

    `extra` holds what only one op has, such as whether a call carries patterns inside blocks.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Problem:
        """Read the problem off ``q [B, H, Q, D]``, ``k [B, Hkv, K, D]`` and ``v [B, Hkv, K, Dv]``."""
        return cls(
            q.device,
            q.dtype,
            q.shape[3],
            v.shape[3],
            q.shape[1],
            k.shape[1],
            q.shape[2],
            k.shape[2],
            extra,
        )


Predicate = Callable[[Problem], str | None]
"""Returns why a call cannot run, or None when it can."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: how it is asked for, as in ``backend="triton"``.
        can_run: the reason why a problem cannot run, None if it can.
        forward: the function that runs.
        backward: its own backward; None leaves the backward to the first back end that has one.
        automatic: whether ``backend="auto"`` may choose it.
    """

    name: str
    can_run: Predicate
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    automatic: bool = True


class Op:
    """An op and its back ends, the preferred one first."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        REGISTRY[name] = self

    def explain(self, problem: Problem) -> dict[str, str | None]:
        """For every back end, why it cannot run `problem`, or None when it can."""
        return {name: backend.can_run(problem) for name, backend in self.backends.items()}

    def choose(self, asked: str, problem: Problem) -> Backend:
        """The back end for a call.

        Raises:
            BackendUnavailable: `asked` by name cannot run `problem`, or (with ``MMATTN_STRICT=1``) a
                GPU call would fall back to plain torch.
            ValueError: no back end has the name `asked`.
        """
        if asked != "auto":
            if asked not in self.backends:
                raise ValueError(
                    f"{self.name} has no back end {asked!r}; it has {['auto', *self.backends]}."
                )
            backend = self.backends[asked]
            reason = backend.can_run(problem)
            if reason is not None:
                raise BackendUnavailable(f"{self.name} cannot run on {asked!r}: {reason}")
            return backend
        refused: dict[str, str] = {}
        for name, backend in self.backends.items():
            if not backend.automatic:
                continue
            reason = backend.can_run(problem)
            if reason is None and name == "triton" and problem.device.type == "cpu":
                reason = "on a CPU only Triton's interpreter runs it, which is for tests and slow"
            if reason is None:
                self._tell(name, problem.device.type, refused)
                return backend
            refused[name] = reason
        raise BackendUnavailable(f"no back end of {self.name} can run this call: {refused}")

    def choose_backward(self, asked: str, problem: Problem) -> Callable[..., Any]:
        """The backward for a call whose forward ran on `asked`."""
        first = self.choose(asked, problem)
        if first.backward is not None:
            return first.backward
        for backend in self.backends.values():
            if (
                backend.backward is not None
                and backend.automatic
                and backend.can_run(problem) is None
            ):
                return backend.backward
        raise BackendUnavailable(f"no back end of {self.name} has a backward for this call")

    def _tell(self, name: str, device: str, refused: dict[str, str]) -> None:
        key = (self.name, name, device)
        if key in _told:
            return
        reasons = "; ".join(f"{other}: {why}" for other, why in refused.items())
        if device == "cuda" and name == "torch":
            message = f"{self.name} runs as plain torch on the GPU ({reasons})."
            if os.environ.get("MMATTN_STRICT") == "1":
                raise BackendUnavailable(message)
            warnings.warn(message, stacklevel=4)
        _told.add(key)
        log.info("%s on %s: %s%s", self.name, device, name, f" ({reasons})" if reasons else "")


_told: set[tuple[str, str, str]] = set()


@cache
def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported to find out."""
    return find_spec(package) is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which works on a CPU and is very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def always(_: Problem) -> None:
    """The predicate of a back end that runs everything."""


def no_triton(problem: Problem) -> str | None:
    """Why Triton kernels cannot run `problem`, None if they can."""
    if not installed("triton"):
        return "triton is not installed"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{problem.dtype} is not one of float16, bfloat16, float32"
    if max(problem.head_dim, problem.value_dim) > 256:
        return f"the head dimension {max(problem.head_dim, problem.value_dim)} is above 256"
    if problem.device.type == "cpu" and interpreting():
        return None
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, not on a CUDA device"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}; 8.0 is the least"
    return None
