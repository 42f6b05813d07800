"""Sets of related pictures with an unchanged text-to-image pipeline: panels of a canvas, or a batch.

```python
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout

pipe = InContextPipeline(flux)  # any text-to-image pipeline of diffusers
layout = PanelLayout(1, 2, 512, 512)
caption = SetCaption.for_layout(layout, "COUPLE", "a fox in ink", ["it sits", "it runs"])
left, right = pipe(caption, layout=layout).images
(right,) = pipe(caption, layout=layout, references=[photo]).images[1:]
```
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxFillPipeline
from diffusers.utils import BaseOutput
from PIL import Image

import mmattn
from mmattn.errors import ConfigError
from mmattn.methods.panel_attention import PanelAttention
from mmattn_pipelines import _in_context_parts as parts, _panel_arrays as arrays
from mmattn_pipelines._in_context_parts import Visibility, one_of
from mmattn_pipelines._panel_latents import (
    Color,
    clean_canvas,
    codec_for,
    codec_or_none,
    keeper_for,
)
from mmattn_pipelines._panel_text import joined_prompts, reads_panels
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.panels import PanelLayout

GRAY = (127, 127, 127)


@dataclass
class InContextOutput(BaseOutput):  # type: ignore[misc]
    """What `InContextPipeline` returns.

    Args:
        images: one per panel in reading order, or per picture of a group, in the form that `output_type`
            names; for ``latent``, spatial latents ``[1, C, Y, X]``. Given panels are the given pictures.
        canvas: all panels in one; None for a group.
        layout: where the panels are; None for a group.
        captions: what the text encoder was given: one caption, or one per panel.
        report: densities and calls of the panel attention; None where nothing was attached.
    """

    images: list[Any]
    canvas: Any = None
    layout: PanelLayout | None = None
    captions: list[str] | None = None
    report: mmattn.Stats | None = None


class InContextPipeline:
    """Draws sets of related pictures with a text-to-image pipeline, which stays as it is.

    All pictures of a set are panels of one canvas under one caption ("In-Context LoRA for Diffusion
    Transformers", arXiv 2410.23775), or rows of one batch whose images attend to each other (`group`;
    "Group Diffusion Transformers are Unsupervised Multitask Learners", arXiv 2410.15027). Given pictures
    are kept by inpainting from noise: after every step their latents are put back at the noise level of
    the next one. The pipeline's own callback does that, so no inpainting class is needed.

    Compared in the tests with the untouched pipeline (text alone: bitwise), and with
    `FluxInpaintPipeline` at ``strength=1``, whose result it has when it encodes what that encodes.

    Deviations: given panels are encoded one by one, and as the mode of the encoder's distribution, so
    that neither a fill colour nor a seed changes them; the paper encodes the canvas. Neither paper has an
    attention mask on a canvas (`visibility`).

    Args:
        pipe: Flux, Flux2, SD3, PixArt and the like: whatever takes ``prompt``, ``height`` and ``width``.
            With a `FluxFillPipeline` the canvas and a mask are what it is conditioned on.

    Raises:
        ConfigError: the pipeline takes no prompt or no size.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._takes = inspect.signature(type(pipe).__call__).parameters
        missing = [name for name in ("prompt", "height", "width") if name not in self._takes]
        if missing:
            raise ConfigError(
                f"{type(pipe).__name__} does not take {' and '.join(missing)}; a text-to-image pipeline "
                "of diffusers does"
            )

    @property
    def reads_panels(self) -> bool:
        """Whether every panel of a canvas can have its own caption; every visibility but full needs it."""
        return reads_panels(self.pipe)

    def __call__(
        self,
        caption: SetCaption | str | Sequence[str],
        *,
        layout: PanelLayout | str = "auto",
        panel_size: tuple[int, int] | None = None,
        references: Sequence[Image.Image] = (),
        visibility: Visibility = "full",
        fill: Color = GRAY,
        encode: str = "auto",
        decode: str = "canvas",
        reference_level: str = "matched",
        lora_scale: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> InContextOutput | tuple[Any, ...]:
        """Draw the panels of one canvas.

        Args:
            caption: one caption for all panels, or a list with a caption for each. A list is encoded
                piece by piece, and piece k is seen by panel k alone.
            layout: a `PanelLayout`, the name of a preset, or ``auto``: the arrangement nearest to a
                square, of as many panels as the caption has.
            panel_size: height and width of a panel in pixels for ``auto``; None: those of the first
                reference, cut to whole tokens.
            references: pictures for the first panels, cropped to their size (`PanelLayout.fit`).
            visibility: which panels attend to each other, see `PanelAttention`; ``group`` with a
                `SetCaption` makes a caption of every panel, the shared part in front.
            fill: colour of the other panels where the canvas is encoded as a whole.
            encode: ``per_panel``; ``canvas``: the joined canvas, fill colour included; ``auto``: the
                first, except for FLUX.1-Fill, which encodes the canvas itself and blanks what it is to
                draw, so that no colour leaks.
            decode: ``canvas``, or ``per_panel``: pixels of a panel then owe nothing to its neighbors.
            reference_level: given panels are as noisy as the step is (``matched``, the paper's way), or
                ``clean`` at every step, which is what a LoRA trained with references expects.
            lora_scale: strength of the LoRA that the pipeline has loaded; None: as it is set.
            num_inference_steps, guidance_scale, generator: as the pipeline has them; None: its defaults.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as the pipeline has them; the
                callback sees latents in which the given panels are already put back.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            arguments: everything else that the pipeline takes, such as ``negative_prompt``.

        Raises:
            ConfigError: panels, captions, references and sizes that do not fit together; before
                anything is encoded or denoised.
        """
        one_of("encode", encode, ("auto", "per_panel", "canvas"))
        one_of("decode", decode, ("per_panel", "canvas"))
        one_of("reference_level", reference_level, ("matched", "clean"))
        one_of("output_type", output_type, arrays.KINDS)
        parts.check_arguments(self.pipe, self._takes, arguments)
        fills = isinstance(self.pipe, FluxFillPipeline)
        if fills and encode == "per_panel":
            raise ConfigError(
                "FluxFillPipeline encodes the canvas by itself, so encode='per_panel' cannot be had; "
                "leave `encode` out"
            )
        text, pieces, count = parts.captions_of(caption, visibility)
        placed = parts.layout_for(self.pipe, layout, panel_size, count, references)
        given = [placed.fit(picture) for picture in references]
        method = parts.method_for(placed, visibility, len(given), split=pieces is not None)
        whole = output_type != "latent" and decode == "canvas"
        codec = codec_for(self.pipe) if given or not whole else codec_or_none(self.pipe)
        if codec is not None:
            placed.tokens(codec.token)
        arguments |= parts.common_arguments(
            self.pipe,
            self._takes,
            arguments,
            lora_scale,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        if pieces is None:
            arguments["prompt"] = text
        else:
            arguments |= joined_prompts(self.pipe, pieces, arguments)
        arguments |= {"height": placed.height, "width": placed.width}
        keeper, noise = None, arguments.get("latents")
        if fills:
            arguments |= parts.fill_arguments(placed, given, fill)
        elif given:
            assert codec is not None
            clean = clean_canvas(codec, placed, given, encode=encode, fill=fill)
            keep = torch.zeros_like(clean, dtype=torch.bool)
            for left, top, right, bottom in codec.boxes(placed)[: len(given)]:
                keep[:, :, top:bottom, left:right] = True
            keeper, arguments["latents"] = keeper_for(
                codec, placed, clean, keep, noise, generator, reference_level
            )
        arguments |= parts.watching(
            self.pipe,
            self._takes,
            keeper,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            arguments.get("callback"),
        )
        result, report = self._run(method, arguments, output_type if whole else "latent")
        if whole:
            canvas = result[0]
            images = arrays.panels_of(canvas, placed, output_type)
        else:
            assert codec is not None
            cells = placed.height // codec.cell, placed.width // codec.cell
            latents = codec.unpack(result, *cells)
            images = [latents[:, :, t:b, x:r] for x, t, r, b in codec.boxes(placed)]
            canvas = result
            if output_type != "latent":
                images = list(codec.decode(torch.cat(images), output_type))
        if output_type != "latent":
            images[: len(given)] = [arrays.as_kind(picture, output_type) for picture in given]
            canvas = arrays.canvas_of(images, placed, output_type)
        said = [text] if pieces is None else pieces
        output = InContextOutput(images, canvas, placed, said, report)
        return output if return_dict else output.to_tuple()

    def group(
        self,
        captions: Sequence[str],
        *,
        size: tuple[int, int],
        references: Sequence[Image.Image] = (),
        visibility: Visibility = "group",
        lora_scale: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> InContextOutput | tuple[Any, ...]:
        """Draw a group: separate pictures with a caption each, whose image tokens attend to each other.

        Every picture keeps the positions and the text of a picture of its own, which is how GDT groups
        them. ``isolated`` is the untouched pipeline with a list of prompts.

        Args:
            captions: one per picture, at least two; references are described as well.
            size: height and width of every picture in pixels.
            references: pictures for the first members, cropped to `size`.
            visibility: which members see each other's images, see `PanelAttention`.
            generator: one, or one for every picture.
            lora_scale, num_inference_steps, guidance_scale, callback_on_step_end,
                callback_on_step_end_tensor_inputs, output_type, arguments: as for a call.

        Raises:
            ConfigError: fewer than two captions, or references that leave nothing to be drawn.
        """
        one_of("output_type", output_type, arrays.KINDS)
        parts.check_arguments(self.pipe, self._takes, arguments)
        if isinstance(self.pipe, FluxFillPipeline):
            raise ConfigError(
                "FLUX.1-Fill draws into a canvas and not in groups; call the pipeline"
            )
        n = len(captions)
        if isinstance(captions, str) or n < 2 or len(references) >= n:
            raise ConfigError(
                "a group needs a list of at least two captions, and fewer references than captions; got "
                f"{captions!r} and {len(references)} references"
            )
        one = PanelLayout(1, 1, *size)
        given = [one.fit(picture) for picture in references]
        method = PanelAttention(members=n, visibility=visibility, references=len(given))
        arguments["prompt"] = list(captions)
        if isinstance(arguments.get("negative_prompt"), str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * n
        arguments |= parts.common_arguments(
            self.pipe,
            self._takes,
            arguments,
            lora_scale,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        arguments |= {"height": size[0], "width": size[1]}
        keeper, noise = None, arguments.get("latents")
        if given:
            codec = codec_for(self.pipe)
            one.tokens(codec.token)
            clean = torch.cat([codec.encode(picture) for picture in given])
            clean = torch.cat([clean, clean.new_zeros(n - len(given), *clean.shape[1:])])
            keep = torch.zeros_like(clean, dtype=torch.bool)
            keep[: len(given)] = True
            keeper, arguments["latents"] = keeper_for(codec, one, clean, keep, noise, generator)
        arguments |= parts.watching(
            self.pipe,
            self._takes,
            keeper,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            arguments.get("callback"),
        )
        result, report = self._run(method, arguments, output_type)
        if output_type == "latent":
            codec = codec_for(self.pipe)
            spatial = codec.unpack(result, size[0] // codec.cell, size[1] // codec.cell)
            images: list[Any] = list(spatial.split(1))
        else:
            images = list(result)
            images[: len(given)] = [arrays.as_kind(picture, output_type) for picture in given]
        output = InContextOutput(images, None, None, list(captions), report)
        return output if return_dict else output.to_tuple()

    def _run(
        self, method: PanelAttention | None, arguments: dict[str, Any], output_type: str
    ) -> tuple[Any, mmattn.Stats | None]:
        holds = contextlib.nullcontext() if method is None else mmattn.attach(self.pipe, method)
        with holds as session:
            result = self.pipe(**arguments, output_type=output_type).images
            return result, None if session is None else session.stats


def lora_target_modules(transformer: torch.nn.Module) -> list[str]:
    """Layers that In-Context LoRAs adapt: every linear layer below ``*transformer_blocks``.

    Modulation layers of the norms are among them, which diffusers' own training scripts leave out; the
    embedders and the last layer are not. FLUX.1-dev has 494, with 85,917,696 LoRA parameters at rank 16.

    Returns:
        Names for ``peft.LoraConfig(target_modules=...)``.

    Raises:
        ConfigError: the model has no such blocks.
    """
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
    if not names:
        raise ConfigError(
            f"{type(transformer).__name__} has no linear layers below 'transformer_blocks'; name the "
            "layers yourself"
        )
    return names
