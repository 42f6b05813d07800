"""Latents in the middle of a run as pictures, for the pipelines whose packing is known."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmattn.batch.writers import to_image

UNPACKS = ["latents", "height", "width", "vae_scale_factor"]
"""Arguments of the function that unpacks latents in FLUX and Qwen-Image."""


@torch.no_grad()
def preview(pipe: Any, latents: Tensor, size: tuple[int, int] | None) -> Image.Image | None:
    """The first picture (or the middle frame) that `latents` decode to; None for an unknown packing.

    Args:
        pipe: a pipeline like FLUX or Qwen-Image (packed latents), Wan (video latents) or Stable Diffusion.
        latents: of its step callback.
        size: (height, width) of the picture, which FLUX-like latents do not tell.
    """
    vae, latents = getattr(pipe, "vae", None), latents[:1]
    if vae is None:
        return None
    if latents.ndim == 3:
        unpack = getattr(pipe, "_unpack_latents", None)
        # Other families have a function of this name too, with other arguments.
        if unpack is None or size is None or list(inspect.signature(unpack).parameters) != UNPACKS:
            return None
        latents = unpack(latents, *size, pipe.vae_scale_factor)
    if latents.ndim == 5:
        return _frame(vae, latents)
    if latents.ndim != 4 or latents.shape[1] != getattr(vae.config, "latent_channels", None):
        return None
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents / vae.config.scaling_factor + shift
    decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return to_image(decoded[0].float() / 2 + 0.5)


def _frame(vae: Any, latents: Tensor) -> Image.Image | None:
    config = vae.config
    means, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or spread is None or latents.shape[1] != len(means):
        return None
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(v, device=latents.device).view(shape) for v in (means, spread))
    middle = latents.shape[2] // 2
    # Up to the middle only: the frames of these VAEs depend on those before them.
    some = latents[:, :, : middle + 1].float() * std + mean
    decoded = vae.decode(some.to(vae.dtype), return_dict=False)[0]
    return to_image(decoded[0, :, -1].float() / 2 + 0.5)
