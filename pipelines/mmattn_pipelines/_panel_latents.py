"""Latents of panels: pictures into the form a pipeline denoises, and given panels kept during its loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mmattn.errors import ConfigError
from mmattn_pipelines.panels import Box, PanelLayout

Color = str | tuple[int, int, int]
"""As Pillow takes colours."""


@dataclass(frozen=True)
class Codec:
    """How one kind of pipeline encodes, packs and decodes latents.

    "Spatial" latents are ``[B, C, Y, X]``, normalised as the denoiser sees them; "packed" is the form in
    which a pipeline hands them to its callback.

    Args:
        pipe: the pipeline.
        cell: pixels per side of a cell of the spatial latents.
        token: pixels per side of a token; panels are made of whole tokens.
        pack: spatial -> packed.
        unpack: packed and the canvas in cells ``(Y, X)`` -> spatial.
        normalise, restore: from the VAE's latents to spatial ones, and back.
        channels: of spatial latents.
        takes_spatial: whether the pipeline's argument ``latents`` is spatial though it packs.
    """

    pipe: Any
    cell: int
    token: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    normalise: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]
    channels: int
    takes_spatial: bool = False

    def encode(self, image: Image.Image) -> Tensor:
        """Spatial latents of a picture, the mode of the encoder's distribution and never a sample."""
        vae = self.pipe.vae
        pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
        pixels = pixels.permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            encoded = vae.encode(pixels.to(device=self.pipe._execution_device, dtype=vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        return self.normalise(encoded.latent if posterior is None else posterior.mode())

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Pictures of spatial latents, in the form that `output_type` names."""
        vae = self.pipe.vae
        with torch.no_grad():
            pixels = vae.decode(self.restore(latents).to(vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(pixels, output_type=output_type)

    def noise(
        self, rows: int, height: int, width: int, generator: Any, dtype: torch.dtype
    ) -> Tensor:
        """The noise that the pipeline itself would draw for pictures of this size in pixels, spatial."""
        shape = (rows, self.channels, height // self.cell, width // self.cell)
        drawn: Tensor = randn_tensor(
            shape, generator=generator, device=self.pipe._execution_device, dtype=dtype
        )
        return drawn

    def argument(self, noise: Tensor) -> Tensor:
        """Spatial noise as the pipeline's argument ``latents``."""
        return noise if self.takes_spatial else self.pack(noise)

    def boxes(self, layout: PanelLayout) -> list[Box]:
        """Box of every panel in cells."""
        layout.tokens(self.token)
        boxes = (tuple(edge // self.cell for edge in box) for box in layout.boxes)
        return [(left, top, right, bottom) for left, top, right, bottom in boxes]


def codec_for(pipe: Any) -> Codec:
    """The codec of a pipeline.

    Raises:
        ConfigError: its latents have a form that is not known here.
    """
    vae = getattr(pipe, "vae", None)
    processor = getattr(pipe, "image_processor", None)
    if vae is None or processor is None or not hasattr(pipe, "vae_scale_factor"):
        raise _unknown(pipe, "it has no image VAE")
    scale = pipe.vae_scale_factor
    if hasattr(pipe, "_patchify_latents"):  # Flux2: 2 x 2 cells are one, normalised by statistics
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)

        def normalise(z: Tensor) -> Tensor:
            patches: Tensor = (pipe._patchify_latents(z) - mean.to(z)) / deviation.to(z)
            return patches

        return Codec(
            pipe,
            cell=2 * scale,
            token=2 * scale,
            pack=pipe._pack_latents,
            # Klein returns the VAE's own latents when it is asked for latents.
            unpack=lambda x, y, _: (
                normalise(x) if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (y, -1))
            ),
            normalise=normalise,
            restore=lambda z: pipe._unpatchify_latents(z * deviation.to(z) + mean.to(z)),
            channels=4 * vae.config.latent_channels,
            takes_spatial=True,
        )
    factor = getattr(vae.config, "scaling_factor", None)
    if factor is None:
        raise _unknown(pipe, f"its {type(vae).__name__} has no scaling_factor")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    common: dict[str, Any] = {
        "cell": scale,
        "normalise": lambda z: (z - shift) * factor,
        "restore": lambda z: z / factor + shift,
        "channels": vae.config.latent_channels,
    }
    if hasattr(pipe, "_pack_latents"):  # Flux, Chroma: 2 x 2 cells are one token
        return Codec(
            pipe,
            token=2 * scale,
            pack=lambda z: pipe._pack_latents(z, *z.shape),
            unpack=lambda x, y, c: pipe._unpack_latents(x, y * scale, c * scale, scale),
            **common,
        )
    model = getattr(pipe, "transformer", None) or pipe.unet
    patch = getattr(model.config, "patch_size", None) or 1
    return Codec(pipe, token=patch * scale, pack=lambda z: z, unpack=lambda x, y, c: x, **common)


def codec_or_none(pipe: Any) -> Codec | None:
    """The codec of a pipeline, or None where its latents have a form that is not known here."""
    try:
        return codec_for(pipe)
    except ConfigError:
        return None


def _unknown(pipe: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{type(pipe).__name__} cannot be given pictures, or decoded panel by panel: {why}. Pipelines in "
        "the manner of Flux, Flux2, Chroma, SD3 and PixArt can"
    )


def filled(layout: PanelLayout, given: Sequence[Image.Image], fill: Color) -> Image.Image:
    """The canvas of `given`, with the other panels in one colour."""
    blank = Image.new("RGB", (layout.panel_width, layout.panel_height), fill)
    return layout.join([*given, *[blank] * (layout.count - len(given))])


def clean_canvas(
    codec: Codec, layout: PanelLayout, given: Sequence[Image.Image], *, encode: str, fill: Color
) -> Tensor:
    """Spatial latents of a canvas whose first panels are `given`; of the others, whatever `encode` makes.

    Args:
        encode: ``per_panel`` encodes every given picture alone and leaves zeros elsewhere; ``canvas``
            encodes the joined canvas, whose other panels have the colour `fill`. A VAE normalises and
            attends over all it sees, so that colour changes the latents of the given panels.
    """
    if encode == "canvas":
        return codec.encode(filled(layout, given, fill))
    panels = [codec.encode(picture) for picture in given]
    boxes = codec.boxes(layout)
    _, _, width, height = boxes[-1]
    canvas = panels[0].new_zeros(1, panels[0].shape[1], height, width)
    for panel, (left, top, right, bottom) in zip(panels, boxes, strict=False):
        canvas[:, :, top:bottom, left:right] = panel
    return canvas


class KeepGiven:
    """A step callback that puts the given panels back, re-noised to the level of the next step.

    Inpainting from noise: after step i the kept latents become ``scale_noise(clean, t[i + 1], noise)``,
    and after the last one the clean latents themselves.

    Args:
        clean, noise: packed latents, and the noise that sampling began with.
        keep: bool, broadcastable to them; True where latents are given.
        level: ``matched`` to the step, or ``clean`` at every step.
        then: the user's own callback, called afterwards with the blended latents.
        wants: what of the tensors the user's callback is to see.
    """

    def __init__(
        self,
        clean: Tensor,
        noise: Tensor,
        keep: Tensor,
        then: Callable[..., Any] | None = None,
        wants: Sequence[str] = ("latents",),
        level: str = "matched",
    ) -> None:
        self.clean, self.noise, self.keep, self.level = clean, noise, keep, level
        self.then, self.wants = then, wants
        self.blended = 0

    def blend(self, scheduler: Any, step: int, latents: Tensor) -> Tensor:
        """`latents` after denoising step `step`, with the given ones put back."""
        self.blended += 1
        there = self.clean
        if self.level == "matched":
            there = renoised(scheduler, self.clean, self.noise, step)
        return torch.where(self.keep, there.to(latents), latents)

    def __call__(self, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """As ``callback_on_step_end``."""
        tensors["latents"] = self.blend(pipe.scheduler, step, tensors["latents"])
        if self.then is None:
            return tensors
        seen = {name: tensors[name] for name in self.wants}
        return {"latents": tensors["latents"], **(self.then(pipe, step, t, seen) or {})}


def renoised(scheduler: Any, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """`clean` at the noise level that denoising step `step` ends at."""
    if step + 1 >= len(scheduler.timesteps):
        return clean
    t = scheduler.timesteps[step + 1 : step + 2]
    if hasattr(scheduler, "scale_noise"):
        there: Tensor = scheduler.scale_noise(clean, t, noise)
    else:
        there = scheduler.add_noise(clean, noise, t)
    return there


def keeper_for(
    codec: Codec,
    layout: PanelLayout,
    clean: Tensor,
    keep: Tensor,
    latents: Tensor | None,
    generator: Any,
    level: str = "matched",
) -> tuple[KeepGiven, Tensor]:
    """The callback that keeps the given latents, and the pipeline's argument ``latents``.

    Args:
        layout: of one picture; ``clean`` has as many rows as there are pictures.
        clean, keep: spatial latents, and a bool of their shape, True where they are given.
        latents: the noise to begin with, as the pipeline takes it; None: drawn as the pipeline would.
        level: ``matched`` keeps given latents as noisy as the step is, ``clean`` without noise from the
            first step on.
    """
    if latents is None:
        size = (layout.height, layout.width)
        latents = codec.argument(codec.noise(len(clean), *size, generator, text_dtype(codec.pipe)))
    noise = codec.pack(latents) if codec.takes_spatial else latents
    keeper = KeepGiven(codec.pack(clean.to(noise)), noise, codec.pack(keep), level=level)
    if level == "clean":
        given = (keep, clean) if codec.takes_spatial else (keeper.keep, keeper.clean)
        latents = torch.where(given[0], given[1].to(latents), latents)
    return keeper, latents


def text_dtype(pipe: Any) -> torch.dtype:
    """The precision in which a pipeline draws its noise: that of its text embeddings."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet")
    modules = (getattr(pipe, name, None) for name in names)
    dtype: torch.dtype = next(module.dtype for module in modules if module is not None)
    return dtype
