"""Checks that every attention op makes before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check ``q [B, H, Q, D]``, ``k [B, Hkv, K, D]``, ``v [B, Hkv, K, D]`` with Hkv a divisor of H.

    Raises:
        ValueError: shapes that do not belong together.
        TypeError: dtypes that differ or are not floating point.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; four axes [B, H, N, D] are needed."
            )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(
            f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; one floating dtype is needed."
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k, v are on {q.device}, {k.device}, {v.device}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: k {list(k.shape)} and v {list(v.shape)} are not the same tokens.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or v.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must share batch and "
            "head_dim."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly."
        )


def scale_of(q: Tensor, scale: float | None) -> float:
    """The softmax scale: `scale`, or ``head_dim ** -0.5``."""
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def state_dtype(x: Tensor) -> torch.dtype:
    """dtype of LSE and accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
