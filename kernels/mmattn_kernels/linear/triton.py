"""Launchers of linear attention's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from mmattn_kernels._aot import AotCase
from mmattn_kernels._backends import interpreting
from mmattn_kernels._triton import (
    aligned,
    descriptor,
    multiprocessors,
    on_device,
    padded_dim,
)
from mmattn_kernels.linear._kernels import apply_kernel, reduce_kernel, slope_kernel
from mmattn_kernels.linear.features import FORMS, factors


@dataclass(frozen=True)
class Tiles:
    """Tokens, feature and value columns per program, and how many warps and stages work on them."""

    rows: int
    columns: int
    values: int
    warps: int
    stages: int


def _tiles(kernel: str, x: Tensor, dv: int) -> Tiles:
    """Tiles for features of `x`, chosen so that nothing spills; see kernels/bench/aot.py."""
    wide, values = padded_dim(x.shape[3]), padded_dim(dv)
    if interpreting():
        return Tiles(32, wide, min(values, 64), 4, 1)
    if x.dtype == torch.float32:
        # Products on plain cores: a tile of 16 to 64 keeps its operands in registers.
        return Tiles(16 if wide > 128 else 32, wide, min(values, 32), 8, 2)
    if x.dtype == torch.float16:
        # Every operand is kept twice, as two bfloat16.
        if wide > 128:
            rows, warps = (32 if kernel == "reduce" else 64), (16 if kernel == "slope" else 8)
            return Tiles(rows, wide, min(values, 32), warps, 1)
        return Tiles(64, wide, min(values, 32 if kernel == "apply" else 64), 8, 2)
    if wide > 128:
        if kernel == "reduce":
            return Tiles(32, wide, min(values, 64), 8, 2)
        return Tiles(64, wide, min(values, 64), 8, 2)
    rows = 128 if wide <= 32 else 64
    return Tiles(
        rows, wide, min(values, 128), 8 if wide > 64 else 4, 3 if kernel == "reduce" else 2
    )


def _kind(x: Tensor) -> str:
    if x.dtype == torch.float32 or interpreting():
        return "fp32"
    return "bf16" if x.dtype == torch.bfloat16 else "fp16"


def _tables(cos: Tensor | None, sin: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 tables; `other` stands in for what is never read."""
    if cos is None or sin is None:
        return other, other
    return cos.float().contiguous(), sin.float().contiguous()


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.uint8)


def _reduce(
    x: Tensor,
    y: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens in two stages: splits of the tokens in the kernel, then over splits.

    Without atomics, so that the same inputs give the same bits.
    """
    (b, h, n, d), dv = x.shape, y.shape[3]
    tiles = _tiles("reduce", x, dv)
    parts = triton.cdiv(dv, tiles.values)
    # Two programs for every multiprocessor, but at least four tiles of tokens for each of them.
    wanted = triton.cdiv(2 * multiprocessors(x), max(1, b * h * parts))
    splits = max(1, min(wanted, triton.cdiv(n, 4 * tiles.rows)))
    per_split = triton.cdiv(triton.cdiv(n, splits), tiles.rows) * tiles.rows
    splits = triton.cdiv(n, per_split)
    products = torch.empty(b, h, splits, d, dv, dtype=torch.float32, device=x.device)
    sums = torch.empty(b, h, splits, d, dtype=torch.float32, device=x.device)
    values = torch.empty(b, h, splits, dv, dtype=torch.float32, device=x.device)
    boxed_x, boxed_y = aligned(x), aligned(y)
    with on_device(x):
        reduce_kernel[(splits, parts, b * h)](
            descriptor(boxed_x, 1, 1, tiles.rows, tiles.columns),
            descriptor(boxed_y, 1, 1, tiles.rows, tiles.values),
            *_tables(cos, sin, sums),
            _bytes(mask, sums),
            sums if weights is None else weights,
            products,
            sums,
            values,
            n,
            h,
            per_split,
            D=d,
            DV=dv,
            BN=tiles.rows,
            BD=tiles.columns,
            BV=tiles.values,
            MAP=feature_map,
            ROPE=cos is not None,
            MASKED=mask is not None,
            WEIGHTED=weights is not None,
            KIND=_kind(x),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return products.sum(2), sums.sum(2), values.sum(2)


def _operand(state: Tensor, x: Tensor) -> Tensor:
    """A state ``[B, Hkv, D, Dv]`` as ``[B * Hkv, D, Dv]``, in the dtype that its product takes."""
    state = state.flatten(0, 1)
    return aligned(state.to(torch.bfloat16) if _kind(x) == "bf16" else state)


def _apply(
    x: Tensor,
    state: Tensor,
    vectors: Tensor,
    means: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    feature_map: str,
    form: str,
    eps: float,
) -> Tensor:
    """Rows ``x [B, H, N, D]`` times ``state [B, Hkv, D, Dv]``, normalised by `form`."""
    (b, h, n, d), dv = x.shape, state.shape[3]
    out = torch.empty(b, h, n, dv, dtype=x.dtype, device=x.device)
    tiles = _tiles("apply", x, dv)
    many = 1 if interpreting() else 4
    grid = (triton.cdiv(n, tiles.rows * many), b * h, triton.cdiv(dv, tiles.values))
    boxed, operand = aligned(x), _operand(state, x)
    with on_device(x):
        apply_kernel[grid](
            descriptor(boxed, 1, 1, tiles.rows, tiles.columns),
            descriptor(operand, 1, tiles.columns, tiles.values),
            vectors.contiguous(),
            means.contiguous(),
            *_tables(cos, sin, vectors),
            _bytes(mask, vectors),
            out,
            n,
            h,
            h // state.shape[1],
            eps,
            D=d,
            DV=dv,
            BM=tiles.rows,
            BD=tiles.columns,
            BV=tiles.values,
            TILES=many,
            MAP=feature_map,
            ROPE=cos is not None,
            MASKED=mask is not None,
            FORM=form,
            KIND=_kind(x),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out


def _slopes(
    x: Tensor,
    y: Tensor,
    state: Tensor,
    vectors: Tensor,
    means: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    feature_map: str,
    form: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``x [B, H, N, D]`` and, for queries, the weights ``[3, B, H, N]`` for `_reduce`."""
    (b, h, n, d), dv = x.shape, y.shape[3]
    dx = torch.empty(b, h, n, d, dtype=x.dtype, device=x.device)
    weights = torch.empty(3, b, h, n, dtype=torch.float32, device=x.device)
    tiles = _tiles("slope", x, dv)
    boxed_x, boxed_y, operand = aligned(x), aligned(y), _operand(state, x)
    with on_device(x):
        slope_kernel[(triton.cdiv(n, tiles.rows), b * h)](
            descriptor(boxed_x, 1, 1, tiles.rows, tiles.columns),
            descriptor(boxed_y, 1, 1, tiles.rows, tiles.values),
            descriptor(operand, 1, tiles.columns, tiles.values),
            vectors.contiguous(),
            means.contiguous(),
            *_tables(cos, sin, vectors),
            _bytes(mask, vectors),
            dx,
            weights,
            n,
            h,
            h // state.shape[1],
            eps,
            D=d,
            DV=dv,
            BM=tiles.rows,
            BD=tiles.columns,
            BV=tiles.values,
            MAP=feature_map,
            ROPE=cos is not None,
            MASKED=mask is not None,
            FORM=form,
            KIND=_kind(x),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return dx, weights


def state_forward(
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the kept keys: turned features times values, features, values."""
    if k.numel() == 0 or v.numel() == 0:
        (b, h, _, d), dv = k.shape, v.shape[3]
        return (
            k.new_zeros((b, h, d, dv), dtype=torch.float32),
            k.new_zeros((b, h, d), dtype=torch.float32),
            k.new_zeros((b, h, dv), dtype=torch.float32),
        )
    return _reduce(k, v, cos, sin, key_mask, None, feature_map)


def state_backward(
    grad_products: Tensor,
    grad_sums: Tensor,
    grad_values: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    if k.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(k), torch.zeros_like(v)
    state = (grad_products, grad_sums, grad_values, cos, sin, key_mask, feature_map)
    dk, _ = _slopes(k, v, *state, "keys", 0.0)
    return dk, _apply(k, *state, "add", 0.0)


def apply_forward(
    q: Tensor,
    products: Tensor,
    sums: Tensor,
    values: Tensor,
    count: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> Tensor:
    """Output ``[B, H, Q, Dv]``."""
    if q.numel() == 0 or products.numel() == 0:
        return q.new_zeros((*q.shape[:3], products.shape[3]))
    state = _scaled(products, sums, values, count, normalizer, scale)
    return _apply(q, *state, cos, sin, None, feature_map, FORMS[normalizer][0], eps)


def apply_backward(
    grad: Tensor,
    q: Tensor,
    products: Tensor,
    sums: Tensor,
    values: Tensor,
    count: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries and state."""
    zeros = torch.zeros_like(products), torch.zeros_like(sums), torch.zeros_like(values)
    if q.numel() == 0 or grad.numel() == 0:
        return (torch.zeros_like(q), *zeros)
    form = FORMS[normalizer][0]
    state = _scaled(products, sums, values, count, normalizer, scale)
    dq, weights = _slopes(q, grad, *state, cos, sin, None, feature_map, form, eps)
    given = None if form == "plain" else weights
    found = _reduce(q, grad, cos, sin, None, given, feature_map)
    heads, (factor, inverse) = products.shape[1], factors(count, normalizer, scale)
    d_products, d_sums, d_values = (x.unflatten(1, (heads, -1)).sum(2) for x in found)
    if form == "plain":
        return dq, d_products * factor[:, None, None, None], zeros[1], zeros[2]
    return (
        dq,
        d_products * factor[:, None, None, None],
        d_sums * factor[:, None, None],
        d_values * inverse[:, None, None],
    )


def _scaled(
    products: Tensor, sums: Tensor, values: Tensor, count: Tensor, normalizer: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    factor, inverse = factors(count, normalizer, scale)
    return (
        products * factor[:, None, None, None],
        sums * factor[:, None, None],
        values * inverse[:, None, None],
    )


def aot_cases() -> list[AotCase]:
    """Launches that `kernels/bench/aot.py` compiles ahead of time: SANA, SANA-Video, MALA and wide."""

    def run(
        dtype: torch.dtype, d: int, dv: int, feature_map: str, normalizer: str, rope: bool
    ) -> Any:
        def made(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=like, device="meta")

        single = torch.float32
        q, k, v = made(2, 20, 32760, d), made(2, 20, 32760, d), made(2, 20, 32760, dv)
        table = made(32760, d // 2, like=single) if rope else None
        state = state_forward(k, v, table, table, None, feature_map)
        rest: tuple[Any, ...] = (
            made(2, like=single),
            table,
            table,
            feature_map,
            normalizer,
            1.0,
            1e-15,
        )
        out = apply_forward(q, *state, *rest)
        grads = apply_backward(out, q, *state, *rest)
        return state_backward(*grads[1:], k, v, table, table, None, feature_map)

    half, short, single = torch.bfloat16, torch.float16, torch.float32
    return [
        AotCase(
            "bf16 d32 relu", partial(run, half, 32, 32, "relu", "sum", False), tensor_cores="mma"
        ),
        AotCase("bf16 d64 elu1 rope mala", partial(run, half, 64, 64, "elu1", "mala", True)),
        AotCase(
            "bf16 d112 relu rope", partial(run, half, 112, 112, "relu", "sum", True), quick=True
        ),
        AotCase("bf16 d128 elu1", partial(run, half, 128, 128, "elu1", "sum", False)),
        AotCase("bf16 d256 dv128 identity", partial(run, half, 256, 128, "identity", "sum", True)),
        AotCase("bf16 d256 dv256 softmax", partial(run, half, 256, 256, "softmax", "count", False)),
        AotCase("fp16 d128 relu rope", partial(run, short, 128, 128, "relu", "sum", True)),
        AotCase("fp32 d64 elu1", partial(run, single, 64, 64, "elu1", "sum", False)),
        AotCase("fp32 d128 relu rope", partial(run, single, 128, 128, "relu", "sum", True)),
        AotCase("fp32 d256 relu rope", partial(run, single, 256, 256, "relu", "mala", True)),
    ]
