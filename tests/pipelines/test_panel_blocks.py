"""Panel blocks in a modular pipeline of the installed diffusers: the same canvas as `InContextPipeline`."""

from __future__ import annotations

from random import Random

import pytest
import torch
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panel_blocks import flux_panel_blocks
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

import mmattn
import mmattn.mini

LAYOUT = PanelLayout(1, 2, 32, 32)
PROMPT = "a red circle on a white background"
PICTURE = Image.frombytes("RGB", (32, 32), Random(0).randbytes(3 * 32 * 32)).resize((48, 32))
SETTINGS = {"num_inference_steps": 3, "max_sequence_length": 16, "output_type": "pt"}


@pytest.fixture(scope="module")
def flux():
    return mmattn.mini.load("t2i")


@pytest.fixture(scope="module")
def modular(flux):
    return _with_parts(flux_panel_blocks(), flux)


def _with_parts(blocks, flux):
    pipe = blocks.init_pipeline()
    pipe.update_components(**{k: v for k, v in flux.components.items() if k in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(modular, seed=0, **more):
    return modular(
        prompt=PROMPT, generator=torch.Generator().manual_seed(seed), **{**SETTINGS, **more}
    )


def test_given_panels(flux, modular):
    want = InContextPipeline(flux)(
        PROMPT,
        layout=LAYOUT,
        references=[PICTURE],
        generator=torch.Generator().manual_seed(0),
        **SETTINGS,
    )
    state = draw(modular, layout=LAYOUT, references=[PICTURE])
    panels = state.get("panels")
    assert len(panels) == 2
    assert all(torch.equal(a, b) for a, b in zip(panels, want.images, strict=True))
    assert torch.equal(
        panels[0],
        torch.tensor(list(LAYOUT.fit(PICTURE).tobytes())).view(32, 32, 3).movedim(2, 0) / 255,
    )
    other = draw(modular, seed=1, layout=LAYOUT, references=[PICTURE]).get("panels")
    assert torch.equal(panels[0], other[0]) and not torch.equal(panels[1], other[1])


def test_without_references_it_is_flux(flux, modular):
    stock = _with_parts(FluxAutoBlocks(), flux)
    want = draw(stock, height=32, width=64, output="images")
    panels = draw(modular, layout=LAYOUT, output="panels")
    assert torch.equal(torch.cat(panels, dim=2), want[0])


def test_other_forms(modular):
    panels = draw(modular, layout=LAYOUT, references=[PICTURE], output_type="pil", output="panels")
    assert panels[0].tobytes() == LAYOUT.fit(PICTURE).tobytes() and panels[1].size == (32, 32)


def test_errors(modular):
    with pytest.raises(mmattn.ConfigError, match="leave none of the 2 panels"):
        draw(modular, layout=LAYOUT, references=[PICTURE, PICTURE])
    with pytest.raises(mmattn.ConfigError, match="multiples of 8"):
        draw(modular, layout=PanelLayout(1, 2, 32, 36))
