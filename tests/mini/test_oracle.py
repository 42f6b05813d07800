"""The oracle answers everything right on drawn scenes, also blurred or noisy, and wrong on swapped
captions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mmattn.mini.oracle import judge_clips, judge_scenes, look, rates
from mmattn.mini.scenes import draw_clips, draw_scenes, make_clips, make_scenes

KINDS = ["one", "relation", "count"]


def blur(pictures: Tensor, sigma: float = 0.8) -> Tensor:
    axis = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-(axis**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel) / kernel.sum() ** 2
    padded = functional.pad(pictures, (3, 3, 3, 3), mode="replicate")
    return functional.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [48, 64, 96])
def test_right_on_drawn_scenes(kind: str, size: int) -> None:
    scenes = make_scenes(60, 910_000, mix=[(kind, 1.0)])
    assert min(rates(judge_scenes(draw_scenes(scenes, size), scenes)).values()) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_right_on_blurred_and_noisy_scenes(kind: str) -> None:
    scenes = make_scenes(60, 910_001, mix=[(kind, 1.0)])
    pictures = draw_scenes(scenes)
    noise = 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    for spoiled in (blur(pictures), pictures + noise):
        assert min(rates(judge_scenes(spoiled, scenes)).values()) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_on_swapped_captions(kind: str) -> None:
    scenes = make_scenes(100, 910_002, mix=[(kind, 1.0)])
    verdicts = rates(judge_scenes(draw_scenes(scenes), scenes[1:] + scenes[:1]))
    assert verdicts["all"] <= 0.03
    assert verdicts["colour"] <= 0.35 and verdicts["shape"] <= 0.35


def test_wrong_on_empty_and_noise_pictures() -> None:
    scenes = make_scenes(20, 910_003)
    empty = torch.full((20, 3, 64, 64), 0.5)
    noise = torch.rand(empty.shape, generator=torch.Generator().manual_seed(0))
    for pictures in (empty, noise):
        assert rates(judge_scenes(pictures, scenes))["all"] == 0.0
    assert all(not sight.things for sight in look(empty))


def test_measures_place_and_size() -> None:
    scenes = make_scenes(40, 910_004, mix=[("one", 1.0)])
    for sight, scene in zip(look(draw_scenes(scenes)), scenes, strict=True):
        (found,), (thing,) = sight.things, scene.things
        assert abs(found.cx - thing.cx) < 0.7 and abs(found.cy - thing.cy) < 0.7
        assert abs(found.radius - thing.radius) < 0.7


def test_right_on_drawn_clips_and_wrong_backwards() -> None:
    clips = make_clips(24, 910_005)
    frames = draw_clips(clips)
    assert min(rates(judge_clips(frames, clips)).values()) >= 0.98
    soft = blur(frames.transpose(1, 2).flatten(0, 1)).view(24, 17, 3, 48, 48).transpose(1, 2)
    assert min(rates(judge_clips(soft, clips)).values()) >= 0.98
    assert rates(judge_clips(frames.flip(2), clips))["motion"] == 0.0
    still = frames[:, :, :1].expand_as(frames)
    assert rates(judge_clips(still, clips))["motion"] == 0.0
