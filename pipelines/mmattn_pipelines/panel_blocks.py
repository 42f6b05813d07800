"""Panels as blocks of Modular Diffusers: given panels in, kept during the loop, canvas cut at the end.

```python
from mmattn_pipelines.panel_blocks import flux_panel_blocks

pipe = flux_panel_blocks().init_pipeline()
pipe.update_components(**flux.components)
panels = pipe(prompt=caption.text, layout=layout, references=[photo], output="panels")
```
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import (
    ComponentSpec,
    InputParam,
    OutputParam,
)
from PIL import Image
from torch import Tensor

from mmattn.errors import ConfigError
from mmattn_pipelines import _panel_arrays as arrays
from mmattn_pipelines._panel_latents import Codec, KeepGiven, clean_canvas, codec_for
from mmattn_pipelines.panels import PanelLayout

_LAYOUT = InputParam(
    "layout", required=True, type_hint=PanelLayout, description="Where the panels are."
)
_REFERENCES = InputParam(
    "references",
    default=(),
    type_hint=list[Image.Image],
    description="Pictures for the first panels.",
)


class PanelEncodeStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Sets the size of the canvas, and encodes given pictures into its first panels.

    They are encoded one by one, as the mode of the encoder's distribution ("In-Context LoRA for Diffusion
    Transformers", arXiv 2410.23775, encodes the whole canvas, whose empty panels then leak into them).
    """

    model_name: ClassVar[str] = "flux"

    @property
    def description(self) -> str:
        """What the block does."""
        return "Sets the size of a canvas of panels and encodes the given pictures into the first ones."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The VAE."""
        return [ComponentSpec("vae", AutoencoderKL)]

    @property
    def inputs(self) -> list[InputParam]:
        """`layout` and `references`."""
        return [_LAYOUT, _REFERENCES]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The size of the canvas, packed clean latents, and where they are given."""
        return [
            OutputParam("height", type_hint=int, description="Height of the canvas."),
            OutputParam("width", type_hint=int, description="Width of the canvas."),
            OutputParam(
                "panel_clean", type_hint=Tensor, description="Packed latents of the panels."
            ),
            OutputParam("panel_keep", type_hint=Tensor, description="True where they are given."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Fill in the outputs.

        Raises:
            ConfigError: references that leave no panel to draw, or panels that are not whole tokens.
        """
        block = self.get_block_state(state)
        layout, codec = block.layout, _codec(components)
        layout.tokens(codec.token)
        given = [layout.fit(picture) for picture in block.references]
        if len(given) >= layout.count:
            raise ConfigError(
                f"{len(given)} references leave none of the {layout.count} panels to be drawn; use a "
                "layout with more panels"
            )
        block.height, block.width = layout.height, layout.width
        block.panel_clean = block.panel_keep = None
        if given:
            clean = clean_canvas(codec, layout, given, encode="per_panel", fill="gray")
            keep = torch.zeros_like(clean, dtype=torch.bool)
            for left, top, right, bottom in codec.boxes(layout)[: len(given)]:
                keep[:, :, top:bottom, left:right] = True
            block.panel_clean, block.panel_keep = codec.pack(clean), codec.pack(keep)
        self.set_block_state(state, block)
        return components, state


class PanelNoiseStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Remembers the noise that sampling begins with; stands between preparing latents and the loop."""

    model_name: ClassVar[str] = "flux"

    @property
    def description(self) -> str:
        """What the block does."""
        return "Remembers the initial noise, which given panels are re-noised with."

    @property
    def inputs(self) -> list[InputParam]:
        """The latents before the first step."""
        return [
            InputParam("latents", required=True, type_hint=Tensor, description="Initial noise.")
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The same, under a name that no later block overwrites."""
        return [OutputParam("panel_noise", type_hint=Tensor, description="Initial noise.")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Copy the reference; the loop makes new tensors and leaves this one alone."""
        block = self.get_block_state(state)
        block.panel_noise = block.latents
        self.set_block_state(state, block)
        return components, state


class PanelBlendStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Last block of a denoising loop: puts given panels back at the noise level of the next step."""

    model_name: ClassVar[str] = "flux"

    @property
    def description(self) -> str:
        """What the block does."""
        return "Within the denoising loop: puts given panels back, re-noised for the next step."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The scheduler."""
        return [ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        """What `PanelEncodeStep` and `PanelNoiseStep` left, and the latents."""
        return [
            InputParam("latents", required=True, type_hint=Tensor, description="Denoised latents."),
            InputParam(
                "panel_clean", type_hint=Tensor, description="Packed latents of the panels."
            ),
            InputParam("panel_keep", type_hint=Tensor, description="True where they are given."),
            InputParam("panel_noise", type_hint=Tensor, description="Initial noise."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The latents."""
        return [OutputParam("latents", type_hint=Tensor, description="Blended latents.")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        """After step `i`."""
        if block_state.panel_clean is not None:
            noise = block_state.panel_noise
            keeper = KeepGiven(block_state.panel_clean.to(noise), noise, block_state.panel_keep)
            block_state.latents = keeper.blend(components.scheduler, i, block_state.latents)
        return components, block_state


class PanelSplitStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Cuts the decoded canvas into its panels; given panels are the given pictures."""

    model_name: ClassVar[str] = "flux"

    @property
    def description(self) -> str:
        """What the block does."""
        return "Cuts the decoded canvas into panels and puts the given pictures back unchanged."

    @property
    def inputs(self) -> list[InputParam]:
        """The decoded canvas, and what it was made of."""
        return [
            InputParam("images", required=True, description="The decoded canvas."),
            InputParam("output_type", default="pil", description="pil, np or pt."),
            _LAYOUT,
            _REFERENCES,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The panels."""
        return [OutputParam("panels", type_hint=list, description="One picture per panel.")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Cut."""
        block = self.get_block_state(state)
        layout, kind = block.layout, block.output_type
        block.panels = arrays.panels_of(block.images[0], layout, kind)
        for number, picture in enumerate(block.references):
            block.panels[number] = arrays.as_kind(layout.fit(picture), kind)
        self.set_block_state(state, block)
        return components, state


def flux_panel_blocks() -> SequentialPipelineBlocks:
    """FLUX's own modular blocks with the panel blocks in their places.

    Run it with ``layout=`` and ``references=`` in addition to what FLUX takes; ``output="panels"``.
    """
    blocks = FluxAutoBlocks()
    denoise = blocks.sub_blocks["denoise"]
    denoise.sub_blocks.insert(
        "panel_noise", PanelNoiseStep(), list(denoise.sub_blocks).index("denoise")
    )
    loop = denoise.sub_blocks["denoise"].sub_blocks
    loop.insert("panel_blend", PanelBlendStep(), len(loop))
    blocks.sub_blocks.insert("panel_encode", PanelEncodeStep(), 0)
    blocks.sub_blocks.insert("panel_split", PanelSplitStep(), len(blocks.sub_blocks))
    return blocks


def _codec(components: Any) -> Codec:
    """The codec of FLUX for a modular pipeline, which has no packing of its own."""
    return codec_for(
        SimpleNamespace(
            vae=components.vae,
            image_processor=components.image_processor,
            vae_scale_factor=components.vae_scale_factor,
            transformer=components.transformer,
            _execution_device=components._execution_device,
            _pack_latents=FluxPipeline._pack_latents,
            _unpack_latents=FluxPipeline._unpack_latents,
        )
    )
