"""Heatmaps: the colour table, sides, overlays and strips of frames."""

import numpy as np
import pytest
import torch
from PIL import Image

import mmattn
from mmattn.methods import _heatmap


def test_colours_brighten_evenly():
    ramp = _heatmap.colour(np.linspace(0, 1, 64)[None])[0] / 255
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    steps = np.diff(lightness)
    assert steps.min() > 0 and steps.max() < 2.5 * steps.mean()


def test_pictures_keep_sides_and_lay_over_images():
    values = torch.zeros(1, 3, 5)
    values[0, 0, 4] = 1.0
    alone = _heatmap.render(values)
    assert alone.size == (255, 153)
    pixels = np.asarray(alone).astype(int).sum(-1)
    assert pixels[:40, -40:].mean() > 2 * pixels[-40:, :40].mean()
    under = Image.new("RGB", (50, 20), (0, 0, 255))
    over = _heatmap.render(values, under)
    assert over.size == (50, 20)
    assert abs(int(np.asarray(over)[-1, 0, 2]) - (255 + 46) // 2) <= 2
    assert _heatmap.render(values * 0).size == alone.size
    with pytest.raises(mmattn.ConfigError, match="not finite"):
        _heatmap.render(values / 0)


def test_a_video_is_a_strip_over_the_nearest_frames(tmp_path):
    values = torch.rand(3, 4, 4)
    frames = [Image.new("RGB", (32, 16), (i * 50, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "frame.png")
    strip = _heatmap.render(values, [tmp_path / "frame.png", *frames[1:]], alpha=0.0)
    assert strip.size == (3 * 32 + 2 * 4, 16)
    assert [np.asarray(strip)[8, 36 * i + 8, 0] for i in range(3)] == [0, 100, 200]
    with pytest.raises(mmattn.ConfigError, match="empty list"):
        _heatmap.render(values, [])
