"""NATTEN as a back end, to compare with on a GPU. It wants ``[B, X, Y, Z, H, D]`` and no text queries."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from mmattn_kernels._backends import Problem, installed


def can_run(problem: Problem) -> str | None:
    """Why NATTEN cannot run, None if it can."""
    if not installed("natten"):
        return "natten is not installed"
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, not on a CUDA device"
    return refusal(problem)


def refusal(problem: Problem) -> str | None:
    """Why NATTEN would refuse the call itself, wherever it runs."""
    if min(problem.extra["window"]) < 2:
        return f"window {problem.extra['window']} has an axis below 2, the least that NATTEN takes"
    if problem.q_len != prod(problem.extra["grid"]):
        return "NATTEN has no queries outside the grid"
    if problem.head_dim % 8:
        return f"the head dimension {problem.head_dim} is not a multiple of 8"
    return None


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    extra_keys: int,
    scale: float,
) -> tuple[str, dict[str, Any]]:
    """The function of NATTEN that computes a call, and its arguments."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    extra = {}
    if extra_keys:
        extra = {
            "additional_keys": k[:, :extra_keys].contiguous(),
            "additional_values": v[:, :extra_keys].contiguous(),
        }
    q, k, v = (
        x.unflatten(1, tuple(grid)).contiguous()
        for x in (q.transpose(1, 2), k[:, extra_keys:], v[:, extra_keys:])
    )
    return f"na{len(grid)}d", {
        "query": q,
        "key": k,
        "value": v,
        "kernel_size": tuple(window),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(is_causal),
        "scale": scale,
        "return_lse": True,
        **extra,
    }


def forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, D]`` and LSE ``[B, H, Q]``."""
    import natten

    name, given = arguments(q, *rest)
    out, lse = getattr(natten, name)(**given)
    rank = len(given["kernel_size"])
    out = out.flatten(1, rank).transpose(1, 2)
    return out.contiguous(), lse.flatten(1, rank).transpose(1, 2).float().contiguous()
