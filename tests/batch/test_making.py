"""How a row reaches pipelines that start from a picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmattn.batch.items import Item
from mmattn.batch.making import make
from mmattn.loading import Loaded


class Sized:
    """Draws at a size it is told."""

    def __call__(
        self,
        prompt=None,
        image=None,
        width=None,
        height=None,
        num_inference_steps=50,
        generator=None,
        output_type="pil",
    ):
        return self.drawn(prompt, image, (height, width))

    def drawn(self, prompt, image, size):
        self.seen = [picture.size for picture in image]
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, *size))


class Unsized(Sized):
    """Draws at the size of the picture, as Stable Diffusion does."""

    def __call__(
        self, prompt=None, image=None, num_inference_steps=50, generator=None, output_type="pil"
    ):
        return self.drawn(prompt, image, image[0].size[::-1])


@pytest.mark.parametrize(
    ("pipe", "asked", "given", "drawn"),
    [
        (Sized(), {"width": 48, "height": 32}, (40, 24), (48, 32)),
        (Unsized(), {"width": 48, "height": 32}, (48, 32), (48, 32)),
        (Unsized(), {"width": 48}, (48, 24), (48, 24)),
        (Unsized(), {}, (40, 24), (40, 24)),
    ],
)
def test_sizes_of_pictures_from_pictures(pipe, asked, given, drawn, tmp_path):
    Image.new("RGB", (40, 24)).save(tmp_path / "p.png")
    params = {"prompt": "a", "init_image": str(tmp_path / "p.png"), "steps": 1, **asked}
    item = Item("i", "image", 1, params, (), "dense", "model")
    made = make(Loaded("t2i", pipe), [item], None, torch.device("cpu"))
    assert pipe.seen == [given] and made.seats[0].drawn.shape[-2:] == drawn[::-1]
