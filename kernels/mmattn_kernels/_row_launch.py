"""Launches the kernels of `_row_kernels`, and chooses their tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _row_kernels, _triton
from mmattn_kernels._backends import interpreting


def _tiles(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages; read off ahead-of-time compilation."""
    if interpreting():
        return 32, 32, 4, 1
    if dtype == torch.float32:
        return 64, 32, 4, 1
    if head_dim > 128:
        return 64, 64, 4, 2
    return (128, 64, 8, 3) if head_dim > 64 else (128, 128, 8, 3)


def _mask_arguments(mask: Tensor | None, like: Tensor) -> tuple[Tensor, list[int], int]:
    """Pointer, strides (0 where it broadcasts) and kind of a mask ``[B|1, H|1, Q|1, K]``."""
    if mask is None:
        return like, [0, 0, 0, 0], 0
    steps = [s if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True)]
    if mask.dtype == torch.bool:
        return mask.view(torch.int8), steps, 1
    return mask, steps, 2


def rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    groups: Tensor | None = None,
    num_groups: int = 0,
    coefficients: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Output (None without `v`), LSE, and masses (with `groups`, unless `coefficients` weigh them)."""
    b, h, q_len, dim = q.shape
    dtype, device = q.dtype, q.device
    kinds = {"dtype": torch.float32, "device": device}
    weighed = coefficients is not None
    out = None if v is None else torch.empty(q.shape, dtype=_triton.result_dtype(q), device=device)
    if lse is None:
        lse = torch.empty(q.shape[:3], **kinds)  # type: ignore[call-overload]
    masses = None
    if num_groups and not weighed:
        masses = torch.empty((*q.shape[:3], num_groups), **kinds)  # type: ignore[call-overload]
    if not k.numel():
        if not weighed:
            lse.fill_(float("-inf"))
        for empty in (out, masses):
            if empty is not None:
                empty.zero_()
    elif q.numel():
        size_q, size_k, warps, stages = _tiles(dim, dtype)
        if num_groups and stages > 2:
            stages = 2
        width = _triton.padded_dim(dim)
        q, k = _triton.aligned(q), _triton.aligned(k)
        value = k if v is None else _triton.aligned(v)
        pointer, steps, kind = _mask_arguments(mask, q)
        with _triton.on_device(q):
            _row_kernels.rows_kernel[(-(-q_len // size_q), h, b)](
                _triton.descriptor(q, 1, 1, size_q, width),
                _triton.descriptor(k, 1, 1, size_k, width),
                _triton.descriptor(value, 1, 1, size_k, width),
                q if out is None else out,
                lse,
                lse if masses is None else masses,
                lse if coefficients is None else coefficients.float().contiguous(),
                pointer,
                lse if groups is None else groups.to(torch.int32).contiguous(),
                scale * _triton.LOG2E,
                h,
                q_len,
                k.shape[2],
                *steps,
                GROUP=h // k.shape[1],
                D=dim,
                D0=width,
                BM=size_q,
                BN=size_k,
                GROUPS=num_groups,
                VALUES=v is not None,
                WEIGHED=weighed,
                MASK=kind,
                CAUSAL=is_causal,
                UP=_triton.upcast(q),
                PRECISE=dtype == torch.float32,
                num_warps=warps,
                num_stages=stages,
            )
    return None if out is None else out.to(dtype), lse, masses


def columns(
    q: Tensor, k: Tensor, offset: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Mass ``[B, H, K]`` for ``offset [B, H, Q]`` in log2 units."""
    b, h, q_len, dim = q.shape
    k_len = k.shape[2]
    mass = torch.empty((b, h, k_len), dtype=torch.float32, device=q.device)
    if not mass.numel() or not q_len:
        return mass.zero_()
    # Keys are the rows of this kernel's output; queries stream by.
    size_k, size_q, warps, stages = _tiles(dim, q.dtype)
    size_q, size_k = (size_q, size_k) if interpreting() else (size_k, min(size_q, 64))
    width = _triton.padded_dim(dim)
    dtype = q.dtype
    q, k = _triton.aligned(q), _triton.aligned(k)
    pointer, steps, kind = _mask_arguments(mask, q)
    constants: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    with _triton.on_device(q):
        _row_kernels.columns_kernel[(-(-k_len // size_k), h, b)](
            _triton.descriptor(q, 1, 1, size_q, width),
            _triton.descriptor(k, 1, 1, size_k, width),
            offset.contiguous(),
            mass,
            pointer,
            scale * _triton.LOG2E,
            h,
            q_len,
            k_len,
            *steps,
            GROUP=h // k.shape[1],
            D0=width,
            BM=size_q,
            BN=size_k,
            MASK=kind,
            CAUSAL=is_causal,
            UP=_triton.upcast(q),
            PRECISE=dtype == torch.float32,
            **constants,
        )
    return mass
