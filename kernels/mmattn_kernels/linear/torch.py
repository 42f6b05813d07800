"""Linear attention in plain torch: batched products in fp32 over pieces of the tokens.

Half precision is lifted to fp32 piece by piece. A CPU multiplies bfloat16 many times slower than fp32,
and features outgrow float16 quickly; in pieces, no copy of a long sequence is made for either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmattn_kernels._checks import state_dtype
from mmattn_kernels.linear.features import FORMS, factors, features, rotate, slope

_PIECE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""fp32 features of one piece: on a CPU what stays in the cache, on a GPU what keeps it busy."""


def pieces(x: Tensor, width: int) -> Iterator[slice]:
    """Cut the tokens of ``x [B, H, N, D]`` into pieces whose rows of `width` numbers fit `_PIECE_BYTES`."""
    size = _PIECE_BYTES.get(x.device.type, 1 << 28)
    step = max(64, size // (4 * max(1, x.shape[0] * x.shape[1] * width)))
    for start in range(0, x.shape[2], step):
        yield slice(start, min(start + step, x.shape[2]))


def batched(x: Tensor, heads: int) -> Tensor:
    """``[B, H, n, D]`` as a batch of matrices, one per key head: ``[B * heads, H / heads * n, D]``."""
    return x.reshape(x.shape[0] * heads, -1, x.shape[3])


def _cut(table: Tensor | None, piece: slice) -> Tensor | None:
    return None if table is None else table[piece]


def _drop(x: Tensor, key_mask: Tensor | None, piece: slice) -> Tensor:
    """`x` with zeros at keys that are not kept: padding may hold anything, NaN included."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, piece, None], 0.0)


def state_forward(
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the kept keys: turned features times values ``[B, Hkv, D, Dv]``, features, values."""
    work = state_dtype(k)
    (b, h, _, d), dv = k.shape, v.shape[3]
    products = torch.zeros(b * h, d, dv, dtype=work, device=k.device)
    sums = torch.zeros(b, h, d, dtype=work, device=k.device)
    values = torch.zeros(b, h, dv, dtype=work, device=k.device)
    for piece in pieces(k, max(d, dv)):
        x = features(feature_map, _drop(k[:, :, piece].to(work), key_mask, piece))
        x = _drop(x, key_mask, piece)
        y = _drop(v[:, :, piece].to(work), key_mask, piece)
        sums += x.sum(2)
        values += y.sum(2)
        x = rotate(x, _cut(cos, piece), _cut(sin, piece))
        products.baddbmm_(batched(x, h).transpose(1, 2), batched(y, h))
    return products.view(b, h, d, dv), sums, values


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
    """Gradients of keys and values; features are computed again, one piece at a time."""
    work = state_dtype(k)
    h, (d, dv) = k.shape[1], grad_products.shape[2:]
    matrix = batched(grad_products, h)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dvalue = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for piece in pieces(k, max(d, dv)):
        tables = _cut(cos, piece), _cut(sin, piece)
        raw = _drop(k[:, :, piece].to(work), key_mask, piece)
        x = features(feature_map, raw)
        y = _drop(v[:, :, piece].to(work), key_mask, piece)
        grad = torch.bmm(batched(y, h), matrix.transpose(1, 2)).view(x.shape)
        grad = rotate(grad, *tables, back=True) + grad_sums[:, :, None]
        dk[:, :, piece] = _drop(slope(feature_map, raw, x, grad), key_mask, piece)
        back = torch.bmm(batched(rotate(x, *tables), h), matrix).view(y.shape)
        dvalue[:, :, piece] = _drop(back + grad_values[:, :, None], key_mask, piece)
    return dk, dvalue


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
    work = state_dtype(q)
    (b, h, length, d), (heads, dv) = q.shape, (products.shape[1], products.shape[3])
    factor, inverse = factors(count, normalizer, scale)
    matrix = batched(products * factor[:, None, None, None], heads)
    vector = batched((sums * factor[:, None, None])[..., None], heads)
    mean = (values * inverse[:, None, None]).repeat_interleave(h // heads, 1)[:, :, None]
    form = FORMS[normalizer][0]
    out = torch.empty(b, h, length, dv, dtype=q.dtype, device=q.device)
    for piece in pieces(q, max(d, dv)):
        x = features(feature_map, q[:, :, piece].to(work))
        mass = torch.bmm(batched(x, heads), vector).view(b, h, -1, 1)
        x = rotate(x, _cut(cos, piece), _cut(sin, piece))
        y = torch.bmm(batched(x, heads), matrix).view(b, h, -1, dv)
        if form == "divide":
            y = y.mul_(reciprocal(mass + eps))
        elif form == "mala":
            y = y.mul_(1 + reciprocal(mass + eps)) - mass * mean
        out[:, :, piece] = y
    return out


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
    work = state_dtype(q)
    (b, h, _, d), (heads, dv) = q.shape, (products.shape[1], products.shape[3])
    group = h // heads
    factor, inverse = factors(count, normalizer, scale)
    matrix = batched(products * factor[:, None, None, None], heads)
    vector = batched((sums * factor[:, None, None])[..., None], heads)
    mean = (values * inverse[:, None, None]).repeat_interleave(group, 1)[..., None]
    form = FORMS[normalizer][0]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_products, d_sums = torch.zeros_like(matrix), torch.zeros_like(vector)
    d_values = torch.zeros(b * heads, dv, 1, dtype=work, device=q.device)
    for piece in pieces(q, max(d, dv)):
        tables = _cut(cos, piece), _cut(sin, piece)
        raw = q[:, :, piece].to(work)
        x = features(feature_map, raw)
        turned = rotate(x, *tables)
        g = grad[:, :, piece].to(work)
        # The gradient of the turned features but for a factor per row, which the normaliser decides.
        slopes = torch.bmm(batched(g, heads), matrix.transpose(1, 2)).view(x.shape)
        if form == "plain":
            d_products.baddbmm_(batched(turned, heads).transpose(1, 2), batched(g, heads))
            dx = rotate(slopes, *tables, back=True)
        else:
            mass = torch.bmm(batched(x, heads), vector).view(b, h, -1, 1)
            inside = reciprocal(mass + eps)
            # Multiplied one after the other: the square of 1e15 and more leaves fp32.
            d_mass = -(((turned * slopes).sum(-1, keepdim=True) * inside) * inside)
            row = inside
            if form == "mala":
                row = 1 + inside
                d_mass = d_mass - g @ mean
                d_values -= torch.bmm(batched(g, heads).transpose(1, 2), batched(mass, heads))
            d_products.baddbmm_(batched(turned, heads).transpose(1, 2), batched(g * row, heads))
            d_sums.baddbmm_(batched(x, heads).transpose(1, 2), batched(d_mass, heads))
            vectors = vector.view(b, heads, 1, d).repeat_interleave(group, 1)
            dx = rotate(slopes * row, *tables, back=True) + d_mass * vectors
        dq[:, :, piece] = slope(feature_map, raw, x, dx)
    return (
        dq,
        d_products.view(products.shape) * factor[:, None, None, None],
        d_sums.view(sums.shape) * factor[:, None, None],
        d_values.view(values.shape) * inverse[:, None, None],
    )


def reciprocal(mass: Tensor) -> Tensor:
    """One over `mass`, 0 where it is 0: a query without any weight gives 0."""
    return torch.where(mass == 0, 0.0, 1 / mass)
