"""Example pictures for the demos: procedural scenes whose objects are known."""

from __future__ import annotations

import torch
from PIL import Image

from mmattn.batch.writers import to_image


def scene(seed: int) -> tuple[Image.Image, tuple[str, ...]]:
    """A scene of the world in which habit and picture come apart, and what is really in it."""
    from mmattn.mini import objects

    generator = torch.Generator().manual_seed(900_000 + seed)
    scenes = objects.sample_scenes(1, generator, partner_prob=0.2)
    return to_image(objects.render(scenes)[0][0]), scenes[0].names


def single(seed: int) -> Image.Image:
    """One object, as the embedded classifier knows them."""
    from mmattn.mini.train_vit import draw_batch

    return to_image(draw_batch(1, torch.Generator().manual_seed(900_000 + seed))[0][0])


def captioned(seed: int) -> tuple[Image.Image, str, str]:
    """A picture of the world of the embedded text-to-image model, its caption and its background."""
    from mmattn.mini.scenes import draw_scenes, make_scenes

    scenes = make_scenes(1, 900_000 + seed, mix=[("one", 1.0)])
    return to_image(draw_scenes(scenes, 64)[0]), scenes[0].caption, scenes[0].background
