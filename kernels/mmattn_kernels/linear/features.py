"""Feature maps and normalisers by name, with the derivative of every map, in plain torch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

FeatureMap = Literal[
    "identity", "relu", "squared_relu", "cubed_relu", "elu1", "exp", "sigmoid", "softmax"
]
Normalizer = Literal["sum", "mean", "count", "none", "mala", "mala_paper"]

FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)

FORMS: dict[str, tuple[Literal["divide", "plain", "mala"], bool]] = {
    "sum": ("divide", False),
    "mean": ("divide", True),
    "count": ("plain", True),
    "none": ("plain", False),
    "mala": ("mala", True),
    "mala_paper": ("mala", False),
}
"""For every normaliser, what is done with the weights' sum and whether the state is a mean over keys."""


def features(name: str, x: Tensor) -> Tensor:
    """The feature map `name` of ``x [..., D]``; softmax runs over D, all others by element."""
    match name:
        case "identity":
            return x
        case "relu":
            return x.relu()
        case "squared_relu":
            return x.relu().square()
        case "cubed_relu":
            return x.relu().pow(3)
        case "elu1":
            return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
        case "exp":
            return x.exp()
        case "sigmoid":
            return x.sigmoid()
        case "softmax":
            return x.softmax(-1)
    raise ValueError(f"no feature map has the name {name!r}; there are {list(FEATURE_MAPS)}.")


def slope(name: str, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `x`, given that of ``y = features(name, x)``."""
    match name:
        case "identity":
            return grad
        case "relu":
            return grad * (x > 0)
        case "squared_relu":
            return grad * (2 * x.relu())
        case "cubed_relu":
            return grad * (3 * x.relu().square())
        case "elu1":
            return grad * y.clamp(max=1)
        case "exp":
            return grad * y
        case "sigmoid":
            return grad * (y * (1 - y))
        case "softmax":
            return y * (grad - (grad * y).sum(-1, keepdim=True))
    raise ValueError(f"no feature map has the name {name!r}; there are {list(FEATURE_MAPS)}.")


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, *, back: bool = False) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of ``x [..., N, D]`` by angles ``cos, sin [N, D / 2]``.

    `back` turns the other way, which is what gradients need.
    """
    if cos is None or sin is None:
        return x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if back:
        sin = -sin
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def factors(count: Tensor, normalizer: str, scale: float) -> tuple[Tensor, Tensor]:
    """What the state is multiplied by, and one over the number of keys; both ``[B]``.

    Without any key both are 0, so that outputs and gradients are.
    """
    inverse = torch.where(count > 0, 1 / count.clamp(min=1), 0.0)
    whole = torch.full_like(inverse, scale)
    return (whole * inverse if FORMS[normalizer][1] else whole), inverse
