"""What one visitor may ask for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from mmattn_demos import drawing, limits, sets

from mmattn.errors import ConfigError
from mmattn.loading import Loaded

REAL = Loaded("t2v", None, None, "big-model")


@pytest.mark.parametrize("value", [0, 51, 2.5, math.nan, math.inf, None, -3, 1e300])
def test_steps(value, models):
    with pytest.raises(ConfigError, match="steps"):
        drawing.asked(models, "t2i", "a red circle", "vmoba", 1, value, 3, 64, 64)


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, None, math.nan])
def test_seeds(seed, models):
    with pytest.raises(ConfigError, match="seed"):
        drawing.asked(models, "t2v", "a red circle", "", seed, 4, 3, 64, 64, 17)


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
    ask = drawing.asked(models, "t2i", "a red circle", "dense", 1, 4, 3, 9999, 9999)
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


class OneText:
    """A pipeline that reads one text per canvas; draws the seed as a colour."""

    def __call__(
        self,
        prompt=None,
        height=None,
        width=None,
        num_inference_steps=50,
        guidance_scale=7.5,
        generator=None,
        output_type="pil",
    ):
        self.seen.append((prompt, height, width, num_inference_steps, guidance_scale))
        return SimpleNamespace(images=torch.ones(len(prompt), 3, height, width) / 2)


def test_sets_of_pipelines_that_read_one_text():
    pipe = OneText()
    pipe.seen = []
    loaded = Loaded("t2i", pipe, None, "folder")
    models = SimpleNamespace(get=lambda kind: loaded)
    words = ("a fox\nan owl", "in ink", "canvas")
    with pytest.raises(ConfigError, match="choose full"):
        sets.asked(models, *words, "group", None, 1, 4, 3.0)
    ask = sets.asked(models, *words, "full", None, 1, 4, 3.0)
    alone = sets.one_by_one(loaded, ask)
    assert [image.size for image in alone.images] == [(512, 512)] * 2 and alone.report is None
    assert pipe.seen == [
        (["in ink, a fox"], 512, 512, 4, 3.0),
        (["in ink, an owl"], 512, 512, 4, 3.0),
    ]
