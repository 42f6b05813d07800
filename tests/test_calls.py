"""How prompts, guidance and refusals reach pipelines of different shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmattn.calls import draw, guiding
from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.loading import Loaded


class Pipe:
    """Notes its arguments; FLUX-like unless a subclass has another signature."""

    def __init__(self, distilled=False):
        self.transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=distilled))

    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        guidance_scale=3.5,
        num_inference_steps=50,
        generator=None,
        output_type="pil",
    ):
        self.seen = locals()
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, 8, 8))


class Editor(Pipe):
    """Has the picture in front of the prompt, and knows no negative prompt, as FLUX.2."""

    def __call__(
        self,
        image=None,
        prompt=None,
        guidance_scale=4.0,
        num_inference_steps=50,
        generator=None,
        output_type="pil",
    ):
        self.seen = locals()
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, 8, 8))


def made(pipe, **more):
    draw(Loaded("t2i", pipe), ["a", "b"], [1, 2], steps=2, **more)
    return pipe.seen


def test_the_prompt_goes_by_name():
    seen = made(Editor(), guidance=2.0)
    assert seen["image"] is None and seen["prompt"] == ["a", "b"]
    assert seen["guidance_scale"] == 2.0


@pytest.mark.parametrize(
    ("distilled", "negative", "expected"),
    [
        (False, "", {"true_cfg_scale": 5.0, "guidance_scale": 3.5, "negative_prompt": ["", ""]}),
        (True, "", {"true_cfg_scale": 1.0, "guidance_scale": 5.0, "negative_prompt": None}),
        (True, "x", {"true_cfg_scale": 5.0, "guidance_scale": 3.5, "negative_prompt": ["x", "x"]}),
    ],
)
def test_guidance_reaches_the_scale_that_acts(distilled, negative, expected):
    seen = made(Pipe(distilled), guidance=5.0, negative=negative)
    assert {name: seen[name] for name in expected} == expected


def test_defaults_are_those_of_the_pipeline():
    assert guiding(Loaded("t2i", Pipe()), None) == {}
    seen = made(Pipe(distilled=True))
    assert (seen["true_cfg_scale"], seen["guidance_scale"]) == (1.0, 3.5)


def test_a_negative_prompt_is_never_dropped():
    with pytest.raises(ConfigError, match="Editor takes no argument 'negative_prompt'"):
        made(Editor(), negative="rain")


def test_a_pipeline_without_prompts_is_refused():
    class Classes:
        def __call__(self, class_labels, num_inference_steps=50, generator=None, output_type="pil"):
            raise AssertionError("must not be called")

    with pytest.raises(ConfigError, match="Classes takes no prompt"):
        draw(Loaded("t2i", Classes()), ["a"], [1])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("height has to be divisible by 8"), ConfigError),
        (UnsupportedCall("no"), UnsupportedCall),
        (RuntimeError("a fault"), RuntimeError),
    ],
)
def test_what_the_pipeline_refuses_is_our_error_and_its_faults_are_not(error, expected):
    class Refusing(Pipe):
        def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="pil"):
            raise error

    with pytest.raises(expected) as caught:
        draw(Loaded("t2i", Refusing()), ["a"], [1])
    assert type(caught.value) is expected
    if expected is ConfigError:
        assert "Refusing refuses the call: height has to be" in str(caught.value)
