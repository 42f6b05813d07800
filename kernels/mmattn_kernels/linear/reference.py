"""Linear attention as its definition reads, one token at a time; the oracle of the tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mmattn_kernels._checks import state_dtype

MAPS: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x) ** 2,
    "cubed_relu": lambda x: torch.relu(x) ** 3,
    "elu1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: torch.softmax(x, -1),
}


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, token: int) -> Tensor:
    """One token's features ``x [D]``, every pair of neighbours turned by its angle."""
    if cos is None or sin is None:
        return x
    pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous())
    return torch.view_as_real(
        pairs * torch.complex(cos[token], sin[token]).to(pairs.dtype)
    ).flatten()


def state_forward(
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the kept keys: turned features times values, features, values."""
    work = state_dtype(k)
    k, v = k.to(work), v.to(work)
    (b, h, length, d), dv = k.shape, v.shape[3]
    products, sums, values = k.new_zeros(b, h, d, dv), k.new_zeros(b, h, d), k.new_zeros(b, h, dv)
    for i in range(b):
        for j in range(h):
            for token in range(length):
                if key_mask is not None and not bool(key_mask[i, token]):
                    continue
                feature, value = MAPS[feature_map](k[i, j, token]), v[i, j, token]
                products[i, j] += torch.outer(turned(feature, cos, sin, token), value)
                sums[i, j] += feature
                values[i, j] += value
    return products, sums, values


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
    """Output ``[B, H, Q, Dv]``; a query of a batch item without keys gives 0."""
    work = state_dtype(q)
    b, h, length, _ = q.shape
    group = h // products.shape[1]
    out = torch.zeros(b, h, length, products.shape[3], dtype=work, device=q.device)
    for i in range(b):
        n = float(count[i])
        if n == 0:
            continue
        for j in range(h):
            product, total, mean = (
                products[i, j // group],
                sums[i, j // group],
                values[i, j // group] / n,
            )
            for token in range(length):
                feature = MAPS[feature_map](q[i, j, token].to(work))
                row = scale * (turned(feature, cos, sin, token) @ product)
                mass = scale * (feature @ total)
                match normalizer:
                    case "sum":
                        out[i, j, token] = row / (mass + eps)
                    case "mean":
                        out[i, j, token] = (row / n) / (mass / n + eps)
                    case "count":
                        out[i, j, token] = row / n
                    case "none":
                        out[i, j, token] = row
                    case "mala":
                        out[i, j, token] = row / n * (1 + 1 / (mass / n + eps)) - mass / n * mean
                    case "mala_paper":
                        out[i, j, token] = row * (1 + 1 / (mass + eps)) - mass * mean
    return out.to(q.dtype)


def state_backward(
    grad_products: Tensor, grad_sums: Tensor, grad_values: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Gradients by automatic differentiation of `state_forward`."""
    with torch.enable_grad():
        leaves = [x.detach().to(state_dtype(x)).requires_grad_() for x in (k, v)]
        outputs = state_forward(leaves[0], leaves[1], *rest)
        dk, dv = _gradients(outputs, (grad_products, grad_sums, grad_values), leaves)
    return dk.to(k.dtype), dv.to(v.dtype)


def apply_backward(
    grad: Tensor, q: Tensor, products: Tensor, sums: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by automatic differentiation of `apply_forward`."""
    with torch.enable_grad():
        leaves = [
            x.detach().to(products.dtype).requires_grad_() for x in (q, products, sums, values)
        ]
        outputs = (apply_forward(leaves[0], leaves[1], leaves[2], leaves[3], *rest),)
        dq, *others = _gradients(outputs, (grad,), leaves)
    return dq.to(q.dtype), others[0], others[1], others[2]


def _gradients(
    outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], leaves: list[Tensor]
) -> list[Tensor]:
    if not any(x.requires_grad for x in outputs):
        return [torch.zeros_like(x) for x in leaves]
    kept = [(x, g.to(x.dtype)) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in kept], leaves, [g for _, g in kept], allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
