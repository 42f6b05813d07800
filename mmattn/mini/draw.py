"""Draw batches of flat coloured shapes with smooth edges.

Every shape is a signed distance function: negative inside, positive outside, in units where the
shape's radius is 1. A pixel's coverage is the distance to the outline, in pixels, clamped to one
pixel of ramp: that is what makes the edges smooth at any size, and it costs one pass over the
picture per object. Everything is plain torch, so a whole batch of scenes is drawn at once, on any
device.

Shapes: pictures are `[B, 3, Y, X]` with values in [0, 1]; `x` grows to the right and `y` grows
    downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def _polygon_half_planes(u: Tensor, v: Tensor, normals: Sequence[tuple[float, float]]) -> Tensor:
    """Largest projection on `normals`: the distance to a convex polygon around the origin."""
    distance = u * normals[0][0] + v * normals[0][1]
    for nx, ny in normals[1:]:
        distance = torch.maximum(distance, u * nx + v * ny)
    return distance


def circle(u: Tensor, v: Tensor) -> Tensor:
    """A disc."""
    return torch.hypot(u, v) - 0.9


def square(u: Tensor, v: Tensor) -> Tensor:
    """A square with sides along the axes."""
    return torch.maximum(u.abs(), v.abs()) - 0.8


def triangle(u: Tensor, v: Tensor) -> Tensor:
    """An equilateral triangle that points up, around its centroid."""
    side = math.sqrt(0.75)
    return _polygon_half_planes(u, v, [(0.0, 1.0), (side, -0.5), (-side, -0.5)]) - 0.56


def cross(u: Tensor, v: Tensor) -> Tensor:
    """A plus sign."""
    u, v = u.abs(), v.abs()
    return torch.minimum(torch.maximum(u - 0.95, v - 0.31), torch.maximum(v - 0.95, u - 0.31))


def ring(u: Tensor, v: Tensor) -> Tensor:
    """A disc with a round hole."""
    return (torch.hypot(u, v) - 0.7).abs() - 0.22


def star(u: Tensor, v: Tensor) -> Tensor:
    """A five-pointed star with one point up."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    radius = torch.hypot(u, v)
    along, across = radius * torch.cos(angle), radius * torch.sin(angle)
    outer, inner = 1.08, 0.45
    dx, dy = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    length = math.hypot(dx, dy)
    return ((along - outer) * dy - across * dx) / length


def diamond(u: Tensor, v: Tensor) -> Tensor:
    """A rhombus, taller than wide."""
    width, height = 0.72, 1.08
    return (u.abs() / width + v.abs() / height - 1.0) * (width * height / math.hypot(width, height))


def heart(u: Tensor, v: Tensor) -> Tensor:
    """A heart: two discs above a point."""
    u = u.abs()
    lobe = torch.hypot(u - 0.42, v + 0.32) - 0.5
    slope = math.sqrt(0.5)
    wedge = torch.maximum((u + v) * slope - 0.573, -(v + 0.32))
    wedge = torch.maximum(wedge, u - 0.92)
    return torch.minimum(lobe, wedge)


def moon(u: Tensor, v: Tensor) -> Tensor:
    """A crescent, open to the right."""
    return torch.maximum(torch.hypot(u, v) - 0.95, 0.72 - torch.hypot(u - 0.5, v))


DISTANCES: Mapping[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
    "ring": ring,
    "star": star,
    "diamond": diamond,
    "heart": heart,
    "moon": moon,
}
"""Shape name to signed distance function."""

SHAPES: tuple[str, ...] = tuple(DISTANCES)
"""Shape names; the index in this tuple is the `shape_id` that `render` reads."""


def plural(shape: str) -> str:
    """Return the word for several of `shape`."""
    return shape + ("es" if shape.endswith("s") else "s")


COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.25, 0.95),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.50, 0.10, 0.65),
    "orange": (1.00, 0.50, 0.00),
    "cyan": (0.10, 0.85, 0.95),
    "pink": (1.00, 0.50, 0.75),
}
"""Colour name to red, green and blue in [0, 1]."""

BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.5, 0.5, 0.5),
    "black": (0.0, 0.0, 0.0),
}
"""Background name to red, green and blue in [0, 1]."""


def coverage(
    shape_ids: Tensor,
    cx: Tensor,
    cy: Tensor,
    radius: Tensor,
    size: int | tuple[int, int],
    *,
    rotation: Tensor | None = None,
) -> Tensor:
    """Return how much of every pixel each object covers, `[B, N, Y, X]` in [0, 1].

    Args:
        shape_ids: Indices into `SHAPES`, `[B, N]`, int64.
        cx: Centre column in pixels, `[B, N]`; pixel `i` spans `i .. i + 1`.
        cy: Centre row in pixels, `[B, N]`.
        radius: Size in pixels, `[B, N]`, above 0.
        size: Picture side in pixels, or `(height, width)`.
        rotation: Clockwise turn in radians, `[B, N]`. None draws upright.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape_ids_flat = shape_ids.reshape(-1)
    x = torch.arange(width, device=cx.device, dtype=cx.dtype) + 0.5
    y = torch.arange(height, device=cx.device, dtype=cx.dtype) + 0.5
    scale = radius.reshape(-1, 1, 1)
    u = ((x.view(1, 1, -1) - cx.reshape(-1, 1, 1)) / scale).expand(-1, height, width)
    v = ((y.view(1, -1, 1) - cy.reshape(-1, 1, 1)) / scale).expand(-1, height, width)
    if rotation is not None:
        cos, sin = rotation.reshape(-1, 1, 1).cos(), rotation.reshape(-1, 1, 1).sin()
        u, v = u * cos + v * sin, v * cos - u * sin
    distance = torch.empty(u.shape, device=cx.device, dtype=cx.dtype)
    for index, name in enumerate(SHAPES):
        chosen = (shape_ids_flat == index).nonzero().squeeze(1)
        if chosen.numel():
            distance[chosen] = DISTANCES[name](u[chosen], v[chosen])
    filled = (0.5 - distance * scale).clamp(0, 1)
    return filled.view(*shape_ids.shape, height, width)


def render(
    shape_ids: Tensor,
    rgb: Tensor,
    cx: Tensor,
    cy: Tensor,
    radius: Tensor,
    alpha: Tensor,
    background_rgb: Tensor,
    size: int | tuple[int, int],
    *,
    rotation: Tensor | None = None,
) -> Tensor:
    """Paint the objects of every scene in order, later ones over earlier ones.

    Args:
        shape_ids: Indices into `SHAPES`, `[B, N]`, int64.
        rgb: Object colours in [0, 1], `[B, N, 3]`.
        cx: Centre column in pixels, `[B, N]`.
        cy: Centre row in pixels, `[B, N]`.
        radius: Size in pixels, `[B, N]`, above 0.
        alpha: Opacity in [0, 1], `[B, N]`; 0 leaves a slot empty, so scenes with fewer objects can
            share a batch.
        background_rgb: Background colours in [0, 1], `[B, 3]`.
        size: Picture side in pixels, or `(height, width)`.
        rotation: Clockwise turn in radians, `[B, N]`. None draws upright.

    Returns:
        Pictures `[B, 3, Y, X]` in [0, 1].
    """
    filled = coverage(shape_ids, cx, cy, radius, size, rotation=rotation) * alpha[..., None, None]
    height, width = filled.shape[-2:]
    picture = background_rgb[:, :, None, None].expand(-1, -1, height, width)
    for index in range(shape_ids.shape[1]):
        weight = filled[:, index, None]
        picture = picture + weight * (rgb[:, index, :, None, None] - picture)
    return picture
