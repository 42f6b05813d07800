"""What several methods ask about a call: where the image tokens are, and which keys are masked."""

from __future__ import annotations

from math import isqrt

import torch

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.layout import Grid
from mmattn.sites import Site


def image_tokens(site: Site, tokens: int) -> tuple[Grid, slice]:
    """Grid and position of the image tokens in a self-attention sequence of `tokens` entries.

    Raises:
        UnsupportedCall: when the grid is not known or does not fit; windows must be square.
    """
    if site.kind == "window":
        side = isqrt(tokens)
        if side * side != tokens:
            raise UnsupportedCall(f"A window of {tokens} tokens is not square.")
        return (1, side, side), slice(0, tokens)
    return site.layout.grid_for(tokens), site.layout.image_slice(tokens)


def same_length(q: torch.Tensor, k: torch.Tensor) -> None:
    """Refuse calls whose queries are not the same tokens as their keys.

    Raises:
        UnsupportedCall: when the two lengths differ.
    """
    if q.shape[2] != k.shape[2]:
        raise UnsupportedCall(
            f"Queries and keys are different tokens here ({q.shape[2]} and {k.shape[2]})."
        )


def key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """`mask`, if it hides keys and treats every query alike (``[B or 1, H or 1, 1, K]``).

    Raises:
        UnsupportedCall: for any other mask.
    """
    if mask is not None and (mask.ndim != 4 or mask.shape[2] != 1):
        raise UnsupportedCall(
            f"The attention mask {list(mask.shape)} differs from query to query; only masks of whole "
            "keys, [B, 1, 1, K], can be honoured."
        )
    return mask


def masked_like(
    allowed: torch.Tensor, keys: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A mask for SDPA: bool `allowed` ``[B, H, Q, K]`` together with a mask of whole keys."""
    if keys is None:
        return allowed
    if keys.dtype == torch.bool:
        return allowed & keys
    return torch.where(allowed, keys.to(dtype), float("-inf"))


def no_clock(name: str, setting: str, off: str) -> ConfigError:
    """The error of a method that needs the denoising step and cannot know it."""
    return ConfigError(
        f"{name} depends on the denoising step here ({setting}), but no step clock is running. Attach to "
        "a pipeline with a scheduler, call session.step(index, total) in your own loop, or set "
        f"{off} so that every step is treated alike."
    )
