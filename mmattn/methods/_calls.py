"""What several methods ask about a call: where the image tokens are, and which keys are masked."""

from __future__ import annotations

from math import isqrt

import torch

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods.base import Dense
from mmattn.sites import Site


def image_tokens(site: Site, queries: int, keys: int) -> tuple[Grid, slice, slice]:
    """Grid of the image tokens, and where they are among the queries and among the keys.

    The queries are the same tokens as the keys, or (PRX) only the image tokens of them.

    Raises:
        UnsupportedCall: when the grid is not known or does not fit; windows must be square.
    """
    if site.kind == "window":
        side = isqrt(keys)
        if side * side != keys or queries != keys:
            raise UnsupportedCall(f"A window of {queries} queries and {keys} keys is not square.")
        return (1, side, side), slice(0, keys), slice(0, keys)
    grid, image = site.layout.grid_for(keys), site.layout.image_slice(keys)
    if queries == keys:
        return grid, image, image
    if queries != image.stop - image.start:
        raise UnsupportedCall(f"Queries and keys are different tokens here ({queries} and {keys}).")
    return grid, slice(0, queries), image


def mask_rows(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The part of a mask ``[B or 1, H or 1, Q or 1, K]`` that belongs to the queries `rows`.

    Raises:
        UnsupportedCall: for a mask that does not have four axes.
    """
    if mask is not None and mask.ndim != 4:
        raise UnsupportedCall(f"The attention mask {list(mask.shape)} does not have four axes.")
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """`mask` as a mask of whole keys, ``[B or 1, H or 1, 1, K]``, if it treats every query alike.

    Raises:
        UnsupportedCall: for any other mask, and where a graph is traced and the rows cannot be compared.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    first = mask[:, :, :1]
    if torch.compiler.is_compiling() or not bool((mask == first).all()):
        raise UnsupportedCall(
            f"The attention mask {list(mask.shape)} differs from query to query; only masks of whole "
            "keys can be honoured."
        )
    return first


def masked_like(
    allowed: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A mask for SDPA: bool `allowed` ``[B, H, Q, K]`` together with the mask of the call."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return allowed & mask
    return torch.where(allowed, mask.to(dtype), float("-inf"))


def around(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    image: slice,
    mask: torch.Tensor | None,
    dense: Dense,
) -> torch.Tensor:
    """Put `out`, of the image queries, between text queries that attend densely: ``[B, H, Q, D]``."""
    parts = [out]
    if image.start:
        rows = slice(0, image.start)
        parts.insert(0, dense(q[:, :, rows], k, v, mask=mask_rows(mask, rows)))
    if image.stop < q.shape[2]:
        rows = slice(image.stop, q.shape[2])
        parts.append(dense(q[:, :, rows], k, v, mask=mask_rows(mask, rows)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def run_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, site: Site, dense: Dense, reason: str
) -> torch.Tensor:
    """The original attention, counted with its reason, as density 1 and recall 1."""
    site.meter.fell_back(reason)
    site.note("density", 1.0)
    if site.probing:
        site.note("recall", 1.0)
    return dense(q, k, v)


def no_clock(name: str, setting: str, off: str) -> ConfigError:
    """The error of a method that needs the denoising step and cannot know it."""
    return ConfigError(
        f"{name} depends on the denoising step here ({setting}), but no step clock is running. Attach to "
        "a pipeline with a scheduler, call session.step(index, total) in your own loop, or set "
        f"{off} so that every step is treated alike."
    )
