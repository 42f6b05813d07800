"""What one visitor may ask for."""

from __future__ import annotations

import math

import pytest
from mmattn_demos import image, limits, sets, video

from mmattn.errors import ConfigError
from mmattn.loading import Loaded

REAL = Loaded("t2v", None, None, "big-model")


@pytest.mark.parametrize("value", [0, 51, 2.5, math.nan, math.inf, None, -3, 1e300])
def test_steps(value, models):
    with pytest.raises(ConfigError, match="steps"):
        image.asked(models, "a red circle", "vmoba", 1, value, 3, 64, 64)


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, None, math.nan])
def test_seeds(seed, models):
    with pytest.raises(ConfigError, match="seed"):
        video.asked(models, "a red circle", "", seed, 4, 3, 64, 64, 17)


def test_prompts():
    assert limits.prompt("  a red circle\n") == "a red circle"
    for text in ("", "   ", None, "x" * (limits.PROMPT_LENGTH + 1), "a\x00b", "a\x1bb"):
        with pytest.raises(ConfigError, match="prompt"):
            limits.prompt(text)


def test_work_of_real_models_is_bounded():
    asked = limits.size(REAL, 50, 832, 480, 81)
    assert asked == {"width": 832, "height": 480, "num_frames": 81}
    with pytest.raises(ConfigError, match="times the work"):
        limits.size(REAL, 50, 1280, 720, 121)
    for wide, high, frames in ((833, 480, 81), (32, 480, 81), (832, 480, 500), (None, 480, 81)):
        with pytest.raises(ConfigError):
            limits.size(REAL, 10, wide, high, frames)


def test_embedded_models_have_their_own_size(models):
    ask = image.asked(models, "a red circle", "dense", 1, 4, 3, 9999, 9999)
    assert ask.size == {} and ask.column.methods == ()


@pytest.mark.parametrize(
    ("clauses", "way", "seen", "files"),
    [
        ("one", "batch", "group", []),
        ("a\nb\nc\nd\ne", "batch", "group", []),
        ("a\nb", "elsewhere", "group", []),
        ("a\nb", "batch", "everyone", []),
        ("a\nb", "batch", "reference-blocked", []),
        ("a\nb", "batch", "group", ["x.png"] * 5),
    ],
)
def test_sets(clauses, way, seen, files, models):
    with pytest.raises(ConfigError):
        sets.asked(models, clauses, "", way, seen, files, 1, 4, 3.0)
