"""How close two pictures or clips are: PSNR and SSIM as plain torch functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

IDENTICAL_DB = 100.0
"""PSNR reported for pictures that are exactly equal, so that means stay finite."""


def _same_shape(got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise ValueError(
            f"Compare pictures of one shape; found {tuple(got.shape)} and {tuple(want.shape)}."
        )


def psnr(got: Tensor, want: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every sample, `[B]`, capped at `IDENTICAL_DB`.

    Args:
        got, want: pictures `[B, 3, Y, X]` or clips `[B, 3, T, Y, X]` in [0, 1].

    Raises:
        ValueError: for different shapes.
    """
    _same_shape(got, want)
    error = (got.double() - want.double()).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-30))).clamp(max=IDENTICAL_DB).float()


def ssim(got: Tensor, want: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of every sample, `[B]`, 1 for equal pictures.

    Gaussian window of 11 pixels, K1 = 0.01, K2 = 0.03, valid positions only, mean over channels and
    frames, as in Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE TIP 2004.

    Args:
        got, want: pictures `[B, C, Y, X]` or clips `[B, C, T, Y, X]` in [0, 1].
        window: odd side of the window in pixels, no larger than the picture.
        sigma: standard deviation of the window in pixels.

    Raises:
        ValueError: for different shapes, or a window larger than the picture.
    """
    _same_shape(got, want)
    height, width = got.shape[-2:]
    if window > min(height, width):
        raise ValueError(f"A window of {window} pixels does not fit a {width} x {height} picture.")
    batch = got.shape[0]
    axis = torch.arange(window, dtype=torch.float64, device=got.device) - window // 2
    bell = torch.exp(-(axis**2) / (2 * sigma**2))
    bell = bell / bell.sum()
    kernel = (bell[:, None] * bell[None, :])[None, None]
    a = got.double().reshape(-1, 1, height, width)
    b = want.double().reshape(-1, 1, height, width)
    mean_a, mean_b = conv2d(a, kernel), conv2d(b, kernel)
    var_a = conv2d(a * a, kernel) - mean_a**2
    var_b = conv2d(b * b, kernel) - mean_b**2
    cov = conv2d(a * b, kernel) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return index.reshape(batch, -1).mean(1).float()


def flicker(clips: Tensor) -> Tensor:
    """Mean absolute change from frame to frame, `[B]`, of clips `[B, 3, T, Y, X]`."""
    return (clips[:, :, 1:] - clips[:, :, :-1]).abs().flatten(1).mean(1)


def decibels(value: float) -> str:
    """A PSNR for people: ``31.4 dB``, or ``identical``."""
    return "identical" if value >= IDENTICAL_DB or math.isinf(value) else f"{value:.1f} dB"
