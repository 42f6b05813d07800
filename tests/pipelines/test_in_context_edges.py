"""InContextPipeline at its edges: forms of output, callbacks, layouts, LoRA, errors, the example."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import diffusers as d
import pytest
import torch
from mmattn_pipelines.in_context import InContextPipeline, lora_target_modules
from mmattn_pipelines.panels import PanelLayout
from PIL import Image
from tiny_in_context import CAPTION, LAYOUT, TWO, draw, group, picture, same, tiny

import mmattn


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_forms_of_output(kind):
    out = draw("flux", references=[picture()], output_type=kind)
    if kind == "pil":
        assert out.images[0].tobytes() == picture().tobytes()
        assert LAYOUT.join(out.images).tobytes() == out.canvas.tobytes()
    else:
        axes = {"np": (16, 24, 3), "pt": (3, 16, 24)}[kind]
        assert tuple(out.images[1].shape) == axes
        assert (out.images[0] * 255).round().sum() == sum(picture().tobytes())
    images, canvas, layout, captions = draw("flux", output_type=kind, return_dict=False)
    assert len(images) == 2 and layout == LAYOUT and captions == [CAPTION.text]
    assert canvas is not None


def test_callbacks_see_the_blended_latents():
    seen = []

    def watch(pipe, step, when, tensors):
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})
        return tensors

    more = {"references": [picture()], "output_type": "latent"}
    plain = draw("flux", **more)
    watched = draw(
        "flux",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "latents"],
        **more,
    )
    assert same(plain, watched) == [True, True] and len(seen) == 3
    assert set(seen[0]) == {"latents", "prompt_embeds"}
    assert torch.equal(seen[-1]["latents"], watched.canvas)
    only = []
    draw(
        "flux",
        callback_on_step_end=lambda p, i, t, tensors: only.append(set(tensors)) or {},
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **more,
    )
    assert only == [{"prompt_embeds"}] * 3
    steps = []
    draw("pixart", callback=lambda i, t, x: steps.append(i), **more)
    assert steps == [0, 1, 2]


def test_layouts():
    words = ["a", "b", "c", "d"]
    auto = draw("flux", words, layout="auto", panel_size=(16, 24), num_inference_steps=1)
    assert auto.layout == PanelLayout(2, 2, 16, 24)
    sized = draw("flux", TWO, layout="auto", references=[picture(0, 27, 17)], num_inference_steps=1)
    assert sized.layout == PanelLayout(2, 1, 16, 24)
    parsed = draw("flux", CAPTION.text, layout="auto", panel_size=(16, 24), num_inference_steps=1)
    assert parsed.layout == PanelLayout(2, 1, 16, 24)


def test_lora_scale():
    pipe = tiny("sd3")
    with pytest.raises(mmattn.ConfigError, match="has no LoRA loaded"):
        draw("sd3", lora_scale=0.5)
    with pytest.raises(mmattn.ConfigError, match="takes no LoRA scale"):
        draw("pixart", lora_scale=0.5)
    from peft import LoraConfig

    targets = lora_target_modules(pipe.transformer)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "set"
    )
    try:
        whole, half, off = (draw("sd3", lora_scale=s) for s in (1.0, 0.5, 0.0))
    finally:
        pipe.transformer.delete_adapters("set")
    assert same(whole, half) == same(half, off) == [False, False]
    assert same(off, draw("sd3")) == [True, True]


def test_lora_targets_of_flux():
    with torch.device("meta"):
        model = d.FluxTransformer2DModel(guidance_embeds=True)
    names = lora_target_modules(model)
    assert len(names) == len(set(names)) == 494
    layers = dict(model.named_modules())
    assert sum(16 * (layers[n].in_features + layers[n].out_features) for n in names) == 85_917_696
    assert {
        "transformer_blocks.18.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    } < {*names}
    assert not any(
        n.startswith(("x_embedder", "context_embedder", "proj_out", "norm_out")) for n in names
    )
    with pytest.raises(mmattn.ConfigError, match="name the layers yourself"):
        lora_target_modules(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layout": PanelLayout(1, 3, 16, 24)}, "describes 2 panels and the layout has 3"),
        ({"layout": PanelLayout(1, 2, 16, 22)}, "multiples of 4, such as 24 x 16"),
        ({"layout": "film-story"}, "no panel preset"),
        ({"layout": "auto"}, "needs panel_size"),
        ({"panel_size": (16, 24)}, "goes with layout='auto'"),
        ({"caption": "a cat", "layout": "auto"}, "a plain text has none"),
        ({"caption": "a cat", "visibility": "group"}, "a caption of its own"),
        ({"caption": []}, "one text for every panel"),
        ({"references": [picture()] * 2}, "leave none of the 2 panels"),
        ({"visibility": "reference-blocked"}, "references must be from 1 to 1"),
        ({"encode": "panels"}, "encode is one of"),
        ({"height": 16}, "follows from the caption"),
        ({"guidance": 3.0}, "no argument 'guidance', did you mean 'guidance_scale'"),
        ({"num_images_per_prompt": 2}, "one call draws one set"),
    ],
)
def test_errors_come_before_anything_runs(more, message, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the text encoder ran")

    monkeypatch.setattr(tiny("flux"), "encode_prompt", never)
    monkeypatch.setattr(tiny("flux").vae, "encode", never)
    with pytest.raises(mmattn.ConfigError, match=message):
        draw("flux", more.pop("caption", CAPTION), **more)


def test_errors_of_groups():
    with pytest.raises(mmattn.ConfigError, match="at least two captions"):
        InContextPipeline(tiny("flux")).group(["a cat"], size=(16, 24))
    with pytest.raises(mmattn.ConfigError, match="fewer references"):
        group("flux", references=[picture()] * 2)
    with pytest.raises(mmattn.ConfigError, match="takes no callback_on_step_end"):
        draw("pixart", callback_on_step_end=lambda *a: {})


def test_the_example(tmp_path, capsys):
    path = Path(__file__).parents[2] / "pipelines" / "examples" / "image_set.py"
    spec = importlib.util.spec_from_file_location("image_set", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = ["a red circle on a white background"] * 2
    picture(3, 64, 64).save(tmp_path / "given.png")
    more = ["--steps", "1", "--out", str(tmp_path), *words]
    assert script.main(["--reference", str(tmp_path / "given.png"), *more]) == 0
    assert "attention kept 82% of the pairs" in capsys.readouterr().out
    assert Image.open(tmp_path / "1.png").tobytes() == picture(3, 64, 64).tobytes()
    assert Image.open(tmp_path / "2.png").size == (64, 64)
    assert script.main(["--how", "canvas", "--tag", "PAIR", *more]) == 0
    assert Image.open(tmp_path / "canvas.png").size == (128, 64)


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_clean_references_are_clean_at_every_step(family):
    """What the model is shown of a given panel, from the first step on, is the picture's latents."""
    model, seen = tiny(family).transformer, []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    try:
        for level in ("clean", "matched"):
            draw(family, references=[picture()], reference_level=level, output_type="latent")
    finally:
        hook.remove()
    half = len(seen) // 2

    def still(states):  # share of what the model was shown that never changed
        moved = torch.stack([(x - states[0]).abs() for x in states]).amax(0)
        return (moved == 0).float().mean().item()

    assert still(seen[:half]) == 0.5 and still(seen[half:]) == 0.0
