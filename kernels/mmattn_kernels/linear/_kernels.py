"""Triton kernels of linear attention: reduce tokens to a state, apply a state, slopes of features.

The backward of either op is made of the same three: the state's gradient is a reduction over queries,
the gradient of values an application of the state's gradient to keys.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from mmattn_kernels._triton import LOG2E as _LOG2E

LOG2E = tl.constexpr(_LOG2E)


@triton.jit
def _product(a, b, KIND: tl.constexpr):
    """Matrix product of fp32 features and another operand, summed in fp32.

    "bf16" rounds both to bfloat16. "fp16" stands for float16 inputs, whose features and states may leave
    its range: both are split in two bfloat16, which together hold more digits than float16. "fp32" is
    exact.
    """
    if KIND == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif KIND == "fp16":
        return tl.dot(a, b.to(tl.float32), input_precision="bf16x3")
    else:
        return tl.dot(a, b.to(tl.float32), input_precision="ieee")


@triton.jit
def _features(x, inside, MAP: tl.constexpr):
    """Features of a tile ``x [N, D]`` in fp32; 0 where not `inside`, so that padding weighs nothing."""
    if MAP == "relu":
        x = tl.maximum(x, 0.0)
    elif MAP == "squared_relu":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif MAP == "cubed_relu":
        x = tl.maximum(x, 0.0)
        x = x * x * x
    elif MAP == "elu1":
        x = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    elif MAP == "exp":
        x = tl.exp2(x * LOG2E)
    elif MAP == "sigmoid":
        x = 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    elif MAP == "softmax":
        x = tl.where(inside, x, -1e30)
        x = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        x = x / tl.sum(x, 1)[:, None]
    return tl.where(inside, x, 0.0)


@triton.jit
def _slope(x, y, grad, MAP: tl.constexpr):
    """The gradient of `x`, given that of its features `y`."""
    if MAP == "relu":
        grad = tl.where(y > 0.0, grad, 0.0)
    elif MAP == "squared_relu":
        grad = grad * (2.0 * tl.maximum(x, 0.0))
    elif MAP == "cubed_relu":
        x = tl.maximum(x, 0.0)
        grad = grad * (3.0 * x * x)
    elif MAP == "elu1":
        grad = grad * tl.minimum(y, 1.0)
    elif MAP == "exp":
        grad = grad * y
    elif MAP == "sigmoid":
        grad = grad * (y * (1.0 - y))
    elif MAP == "softmax":
        grad = y * (grad - tl.sum(grad * y, 1)[:, None])
    return grad


@triton.jit
def _rotate(
    x, cos, sin, rows, keep, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr
):
    """Turn pairs of neighbours of ``x [BN, BD]`` by the angles ``cos, sin [N, D / 2]`` of its rows."""
    half = tl.arange(0, BD // 2)
    at = rows[:, None] * (D // 2) + half[None, :]
    there = keep[:, None] & (half < D // 2)[None, :]
    c = tl.load(cos + at, mask=there, other=0.0)
    s = tl.load(sin + at, mask=there, other=0.0)
    if BACK:
        s = -s
    even, odd = tl.split(tl.reshape(x, (BN, BD // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BN, BD))


@triton.jit
def _kept(rows, stop, n, mask, b, MASKED: tl.constexpr):
    """Which rows are tokens that count."""
    keep = rows < stop
    if MASKED:
        keep = keep & (tl.load(mask + b.to(tl.int64) * n + rows, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _reciprocal(x):
    return tl.where(x == 0.0, 0.0, 1.0 / x)


@triton.jit
def reduce_kernel(
    x_box,
    y_box,
    cos,
    sin,
    mask,
    weights,
    products,
    sums,
    values,
    n,
    heads,
    per_split,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KIND: tl.constexpr,
):
    """One split's sums over tokens: turned features times values, features, values.

    With WEIGHTED, ``weights [3, B, H, N]`` multiply a token's value in the product, its features in
    their sum, and its value in the sum of values.
    """
    split, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = head // heads, head % heads
    first = split * per_split
    stop = tl.minimum(first + per_split, n)
    column = tl.arange(0, BD)
    acc = tl.zeros((BD, BV), tl.float32)
    # Summed over rows after the loop: a reduction across warps in each round would cost more.
    all_x = tl.zeros((BN, BD), tl.float32)
    all_y = tl.zeros((BN, BV), tl.float32)
    for start in range(first, stop, BN):
        rows = start + tl.arange(0, BN)
        keep = _kept(rows, stop, n, mask, b, MASKED)
        x = x_box.load([b, h, start, 0]).reshape(BN, BD).to(tl.float32)
        y = y_box.load([b, h, start, part * BV]).reshape(BN, BV)
        if MASKED:
            x = tl.where(keep[:, None], x, 0.0)
            y = tl.where(keep[:, None], y, 0.0)
        x = _features(x, keep[:, None] & (column < D)[None, :], MAP)
        if WEIGHTED:
            y = y.to(tl.float32)
            at = weights + head.to(tl.int64) * n + rows
            step = tl.num_programs(2).to(tl.int64) * n
            all_x += x * tl.load(at + step, mask=keep, other=0.0)[:, None]
            all_y += y * tl.load(at + 2 * step, mask=keep, other=0.0)[:, None]
            y = y * tl.load(at, mask=keep, other=0.0)[:, None]
        else:
            all_x += x
            all_y += y.to(tl.float32)
        if ROPE:
            x = _rotate(x, cos, sin, rows, keep, D, BN, BD, False)
        acc += _product(tl.trans(x), y, KIND)
    slot = head.to(tl.int64) * tl.num_programs(0) + split
    value = part * BV + tl.arange(0, BV)
    inside = (column < D)[:, None] & (value < DV)[None, :]
    tl.store(products + slot * D * DV + column[:, None] * DV + value[None, :], acc, mask=inside)
    tl.store(values + slot * DV + value, tl.sum(all_y, 0), mask=value < DV)
    if part == 0:
        tl.store(sums + slot * D + column, tl.sum(all_x, 0), mask=column < D)


@triton.jit
def apply_kernel(
    x_box,
    state_box,
    vectors,
    means,
    cos,
    sin,
    mask,
    out,
    n,
    heads,
    group,
    eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    MAP: tl.constexpr,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
):
    """Rows of features times a state, normalised by FORM.

    FORM "plain" leaves the product, "add" adds the row ``means [B, Hkv, Dv]`` to it, "divide" and "mala"
    are those of `linear_attention`. ``vectors [B, Hkv, D]`` gives the mass.
    """
    head, part = tl.program_id(1), tl.program_id(2)
    b, h = head // heads, head % heads
    source = b * (heads // group) + h // group
    column, value = tl.arange(0, BD), part * BV + tl.arange(0, BV)
    state = state_box.load([source, 0, part * BV]).reshape(BD, BV)
    if FORM == "divide" or FORM == "mala":
        vector = tl.load(vectors + source * D + column, mask=column < D, other=0.0)
    if FORM == "add" or FORM == "mala":
        mean = tl.load(means + source * DV + value, mask=value < DV, other=0.0)
    begin = tl.program_id(0) * (BM * TILES)
    for start in range(begin, tl.minimum(begin + BM * TILES, n), BM):
        rows = start + tl.arange(0, BM)
        keep = _kept(rows, n, n, mask, b, MASKED)
        x = x_box.load([b, h, start, 0]).reshape(BM, BD).to(tl.float32)
        if MASKED:
            x = tl.where(keep[:, None], x, 0.0)
        x = _features(x, keep[:, None] & (column < D)[None, :], MAP)
        if FORM == "divide" or FORM == "mala":
            mass = tl.sum(x * vector[None, :], 1)
        if ROPE:
            x = _rotate(x, cos, sin, rows, keep, D, BM, BD, False)
        y = _product(x, state, KIND)
        if FORM == "divide":
            y = y * _reciprocal(mass + eps)[:, None]
        elif FORM == "mala":
            y = y * (1.0 + _reciprocal(mass + eps))[:, None] - mass[:, None] * mean[None, :]
        elif FORM == "add":
            y = y + mean[None, :]
        if MASKED:
            y = tl.where(keep[:, None], y, 0.0)
        at = out + (head.to(tl.int64) * n + rows)[:, None] * DV + value[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (value < DV)[None, :])


@triton.jit
def slope_kernel(
    x_box,
    y_box,
    state_box,
    vectors,
    means,
    cos,
    sin,
    mask,
    dx,
    weights,
    n,
    heads,
    group,
    eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
):
    """The gradient of rows ``x``: queries by FORM with ``y`` their output's gradient, or FORM "keys".

    For keys, ``y`` are the values and the state is its own gradient, ``vectors`` that of the features'
    sum. For queries the ``weights [3, B, H, N]`` that `reduce_kernel` takes are written.
    """
    head = tl.program_id(1)
    b, h = head // heads, head % heads
    source = b * (heads // group) + h // group
    column = tl.arange(0, BD)
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    keep = _kept(rows, n, n, mask, b, MASKED)
    grad = tl.zeros((BM, BD), tl.float32)
    along = tl.zeros((BM,), tl.float32)
    for part in range(0, DV, BV):
        y = y_box.load([b, h, start, part]).reshape(BM, BV)
        if MASKED:
            y = tl.where(keep[:, None], y, 0.0)
        state = state_box.load([source, 0, part]).reshape(BD, BV)
        grad += _product(y.to(tl.float32), tl.trans(state), KIND)
        if FORM == "mala":
            value = part + tl.arange(0, BV)
            mean = tl.load(means + source * DV + value, mask=value < DV, other=0.0)
            along += tl.sum(y.to(tl.float32) * mean[None, :], 1)
    # So far the gradient of the turned features, but for a factor per row. It is turned back before the
    # features are read: both at once would not fit the registers.
    if ROPE:
        grad = _rotate(grad, cos, sin, rows, keep, D, BM, BD, True)
    x = x_box.load([b, h, start, 0]).reshape(BM, BD).to(tl.float32)
    if MASKED:
        x = tl.where(keep[:, None], x, 0.0)
    features = _features(x, keep[:, None] & (column < D)[None, :], MAP)
    vector = tl.load(vectors + source * D + column, mask=column < D, other=0.0)
    if FORM == "divide" or FORM == "mala":
        mass = tl.sum(features * vector[None, :], 1)
        inside = _reciprocal(mass + eps)
        # Turning both or neither leaves a product of rows; one factor at a time stays within fp32.
        d_mass = -((tl.sum(features * grad, 1) * inside) * inside)
        at = weights + head.to(tl.int64) * n + rows
        step = tl.num_programs(1).to(tl.int64) * n
        row = inside
        if FORM == "mala":
            row = 1.0 + inside
            d_mass -= along
            tl.store(at + 2 * step, -mass, mask=rows < n)
        else:
            tl.store(at + 2 * step, tl.zeros((BM,), tl.float32), mask=rows < n)
        tl.store(at, row, mask=rows < n)
        tl.store(at + step, d_mass, mask=rows < n)
        grad = grad * row[:, None] + d_mass[:, None] * vector[None, :]
    elif FORM == "keys":
        grad = grad + vector[None, :]
    grad = _slope(x, features, grad, MAP)
    if MASKED:
        grad = tl.where(keep[:, None], grad, 0.0)
    at = dx + (head.to(tl.int64) * n + rows)[:, None] * D + column[None, :]
    tl.store(at, grad.to(dx.dtype.element_ty), mask=(rows < n)[:, None] & (column < D)[None, :])
