"""Checks of linear attention's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels.linear.features import FEATURE_MAPS, NORMALIZERS
from mmattn_kernels.linear.state import LinearState


def check_names(op: str, feature_map: str, normalizer: str = "sum") -> None:
    """Check that both names are known."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"{op} has no feature map {feature_map!r}; it has {list(FEATURE_MAPS)}, or give a function."
        )
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{op} has no normalizer {normalizer!r}; it has {list(NORMALIZERS)}.")


def check_keys(op: str, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Check ``k [B, Hkv, K, D]``, ``v [B, Hkv, K, Dv]`` and ``key_mask [B, K]``."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; four axes [B, H, N, D] are needed."
            )
    if k.dtype != v.dtype or not k.is_floating_point():
        raise TypeError(
            f"{op}: k and v have dtypes {k.dtype} and {v.dtype}; one floating dtype is needed."
        )
    if k.device != v.device:
        raise ValueError(f"{op}: k and v are on {k.device} and {v.device}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: k {list(k.shape)} and v {list(v.shape)} are not the same tokens.")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_mask must be bool (False: padding), got {key_mask.dtype}.")
    want = (k.shape[0], k.shape[2])
    if tuple(key_mask.shape) != want or key_mask.device != k.device:
        raise ValueError(
            f"{op}: key_mask must be {list(want)} on {k.device}, got {list(key_mask.shape)} on "
            f"{key_mask.device}."
        )


def check_queries(op: str, q: Tensor, state: LinearState) -> None:
    """Check that ``q [B, H, Q, D]`` can read `state`."""
    if q.ndim != 4:
        raise ValueError(f"{op}: q has shape {list(q.shape)}; four axes [B, H, Q, D] are needed.")
    if not q.is_floating_point() or state.products.dtype != state_dtype(q):
        raise TypeError(
            f"{op}: q is {q.dtype} and needs a state in {state_dtype(q)}, got {state.products.dtype}."
        )
    if q.device != state.products.device:
        raise ValueError(f"{op}: q is on {q.device}, the keys on {state.products.device}.")
    b, heads, d, _ = state.products.shape
    if q.shape[0] != b or q.shape[3] != d:
        raise ValueError(
            f"{op}: q {list(q.shape)} must share batch and head_dim with the keys, {b} and {d}."
        )
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"{op}: {q.shape[1]} query heads cannot share {heads} key heads evenly.")


def tables_of(
    op: str, rope: tuple[Tensor, Tensor] | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The tables ``cos, sin [N, D / 2]`` that turn ``x [B, H, N, D]``, or None twice."""
    if rope is None:
        return None, None
    if len(rope) != 2:
        raise ValueError(f"{op}: rope has {len(rope)} tables; (cos, sin) is needed.")
    if x.shape[3] % 2:
        raise ValueError(f"{op}: rope turns pairs of features; head_dim {x.shape[3]} is odd.")
    want = (x.shape[2], x.shape[3] // 2)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if tuple(table.shape) != want or not table.is_floating_point() or table.device != x.device:
            raise ValueError(
                f"{op}: {name} must be a floating tensor {list(want)} on {x.device} (one angle per pair "
                f"of features), got {table.dtype} {list(table.shape)} on {table.device}."
            )
    return rope
