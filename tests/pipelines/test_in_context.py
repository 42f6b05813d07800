"""InContextPipeline on tiny random pipelines of five families, and on the embedded model."""

from __future__ import annotations

import diffusers as d
import pytest
import torch
from mmattn_pipelines.in_context import GRAY, InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image
from tiny_in_context import (
    CAPTION,
    FAMILIES,
    LAYOUT,
    TWO,
    draw,
    group,
    picture,
    same,
    settings,
    tiny,
)

import mmattn
import mmattn.mini


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_the_untouched_pipeline(family):
    pipe = tiny(family)
    extra = {"use_resolution_binning": False} if family == "pixart" else {}
    want = pipe(prompt=CAPTION.text, height=16, width=48, **settings(family), **extra).images[0]
    out = draw(family)
    assert torch.equal(out.canvas, want) and out.report is None
    assert [tuple(image.shape) for image in out.images] == [(3, 16, 24)] * 2
    assert torch.equal(torch.cat(out.images, 2), out.canvas)
    alone = group(family, visibility="isolated")
    want = pipe(prompt=TWO, height=16, width=24, **settings(family), **extra).images
    assert torch.equal(torch.stack(alone.images), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["canvas", "group"])
def test_given_pictures_stay_and_only_the_others_follow_the_seed(family, how):
    make = draw if how == "canvas" else group
    given = picture()
    pixels = torch.tensor(list(given.tobytes())).view(16, 24, 3).movedim(2, 0) / 255
    one, two = (make(family, references=[given], seed=seed) for seed in (0, 1))
    assert torch.equal(one.images[0], pixels)
    assert same(one, two) == [True, False]
    latents = [make(family, references=[given], seed=seed, output_type="latent") for seed in (0, 1)]
    assert same(*latents) == [True, False]
    vae = tiny(family).vae
    with torch.no_grad():
        mode = vae.encode(pixels[None] * 2 - 1).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    if family != "flux2":
        mode = (mode - shift) * vae.config.scaling_factor
        assert (latents[0].images[0] - mode).abs().max() < 1e-5
    unlike = make(family, references=[picture(5)], output_type="latent")
    assert same(latents[0], unlike) == [False, False]  # the drawn panel saw the given one


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fill_colour_leaks_through_the_canvas_and_not_through_panels(family):
    def latents(encode, fill):
        return draw(family, references=[picture()], encode=encode, fill=fill, output_type="latent")

    assert same(latents("per_panel", GRAY), latents("per_panel", "red")) == [True, True]
    assert same(latents("canvas", GRAY), latents("canvas", "red")) == [False, False]


def test_equals_the_inpainting_pipeline_of_diffusers():
    """Which encodes the canvas, takes a sample (here: the mode) and blends on its own."""
    pipe, given = tiny("flux"), picture()
    out = draw("flux", references=[given], encode="canvas", output_type="latent")
    inpaint = d.FluxInpaintPipeline(**pipe.components)
    inpaint.set_progress_bar_config(disable=True)
    inpaint._encode_vae_image = lambda image, generator: (
        (pipe.vae.encode(image).latent_dist.mode() - 0.1) * 0.5
    )
    mask = Image.new("L", (48, 16), 255)
    mask.paste(0, LAYOUT.boxes[0])
    want = inpaint(
        CAPTION.text,
        image=LAYOUT.join([given, Image.new("RGB", (24, 16), GRAY)]),
        mask_image=mask,
        height=16,
        width=48,
        strength=1.0,
        guidance_scale=3.5,
        **settings("flux", output_type="latent"),
    ).images
    assert (out.canvas - want).abs().max() < 1e-5
    assert (out.canvas - draw("flux", output_type="latent").canvas).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("caption", [CAPTION, TWO], ids=["shared", "split"])
def test_isolated_panels_know_nothing_of_each_other(family, caption):
    one, two = (
        draw(
            family,
            caption,
            references=[picture(seed)],
            visibility="isolated",
            decode="per_panel",
        )
        for seed in (0, 1)
    )
    assert same(one, two) == [False, True]
    assert one.report.density < 0.75
    other = draw(family, caption, references=[picture()], visibility="full", decode="per_panel")
    assert same(one, other) == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_per_panel(family):
    """Only panel 2 changes with its caption when panels are isolated; both do when they see each other."""
    words = [TWO, [TWO[0], "a green star"]]
    changed = {}
    for visibility in ("isolated", "group"):
        outs = [draw(family, w, visibility=visibility, output_type="latent") for w in words]
        changed[visibility] = same(*outs)
        assert outs[0].captions == TWO
    if family in ("pixart", "flux2"):
        assert changed["isolated"] == [True, False]
    else:  # the pooled vector of all captions is an input of every token
        assert changed["isolated"] == [False, False]
    assert changed["group"] == [False, False]
    made = draw(family, visibility="group")
    assert made.captions == ["a red circle, on the left", "a red circle, on the right"]


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_reach_every_panel(family):
    name, guided = (
        ("true_cfg_scale", {"true_cfg_scale": 3.0})
        if family == "flux"
        else ("guidance_scale", {"guidance_scale": 3.0})
    )
    outs = [
        draw(family, TWO, visibility="group", negative_prompt=words, **guided)
        for words in ("", "a green star")
        if family != "flux2"
    ]
    if family == "flux2":  # Klein takes no negative prompt; guidance itself must work
        outs = [draw(family, TWO, visibility="group", **{name: s}) for s in (1.0, 3.0)]
    assert same(*outs) == [False, False]


def test_reference_blocked_and_matrices():
    layout, given = PanelLayout(1, 3, 16, 24), [picture(0), picture(1)]
    words = ["a red circle", "a blue square", "a green star"]
    out = draw("flux", words, layout=layout, references=given, visibility="reference-blocked")
    matrix = draw(
        "flux", words, layout=layout, references=given, visibility=((1, 1, 0), (1, 1, 0), (1, 1, 1))
    )
    assert same(out, matrix) == [True] * 3 and out.report.density < 1
    full = draw("flux", words, layout=layout, references=given)
    assert same(out, full) == [True, True, False]


def test_fill():
    one, two = (draw("fill", references=[picture()], seed=s) for s in (0, 1))
    assert same(one, two) == [True, False]
    assert same(one, draw("fill", references=[picture(7)])) == [False, False]
    assert draw("fill").images[0].shape == (3, 16, 24)
    mask = Image.new("L", (48, 16), 255)
    mask.paste(0, LAYOUT.boxes[0])
    canvas = LAYOUT.join([picture(), Image.new("RGB", (24, 16), GRAY)])
    want = tiny("fill")(
        CAPTION.text, image=canvas, mask_image=mask, height=16, width=48, **settings("fill")
    ).images[0]
    assert torch.equal(one.images[1], want[:, :, 24:])
    isolated = draw("fill", references=[picture()], visibility="isolated")
    assert same(one, isolated) == [True, False] and isolated.report.density < 1
    split = draw("fill", TWO, references=[picture()], visibility="isolated")
    assert same(isolated, split) == [True, False] and split.report.density == 0.5
    with pytest.raises(mmattn.ConfigError, match="encodes the canvas by itself"):
        draw("fill", references=[picture()], encode="per_panel")
    with pytest.raises(mmattn.ConfigError, match="not in groups"):
        group("fill")


def test_given_latents_are_at_the_level_of_the_next_step():
    """By the formulas: x = (1 - s) clean + s noise for flows, sqrt(a) clean + sqrt(1 - a) noise for DDPM."""
    noise, seen = torch.randn(1, 4, 8, 24), []
    given = {"references": [picture()], "output_type": "latent", "latents": noise.clone()}
    clean = draw("pixart", **given, callback=lambda i, t, x: seen.append(x.clone())).images[0]
    scheduler = tiny("pixart").scheduler
    for step, latents in enumerate(seen[:-1]):
        a = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]].float()
        want = a.sqrt() * clean + (1 - a).sqrt() * noise[..., :12]
        assert torch.allclose(latents[..., :12], want, atol=1e-5)
    assert torch.equal(seen[-1][..., :12], clean)
    seen.clear()

    def watch(pipe, step, when, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    draw("sd3", **given, callback_on_step_end=watch)
    clean, sigmas = seen[-1][..., :12], tiny("sd3").scheduler.sigmas
    for step, latents in enumerate(seen[:-1]):
        want = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * noise[..., :12]
        assert torch.allclose(latents[..., :12], want, atol=1e-5)


def test_a_group_copies_what_its_caption_leaves_open():
    """The embedded model draws an object that its caption does not place where the given picture has it."""
    from mmattn.mini.oracle import look
    from mmattn.mini.scenes import draw_scenes, make_scenes

    pipe = mmattn.mini.load("t2i")
    scenes = [s for s in make_scenes(60, 41, mix=[("one", 1.0)]) if s.position is None][:3]
    apart = {"group": [], "isolated": []}
    for seed, scene in enumerate(scenes):
        drawn = (draw_scenes([scene])[0] * 255).round().byte().movedim(0, 2).contiguous()
        given = Image.frombytes("RGB", (64, 64), bytes(drawn.flatten().tolist()))
        for visibility, distances in apart.items():
            out = InContextPipeline(pipe).group(
                [scene.caption] * 2,
                size=(64, 64),
                references=[given],
                visibility=visibility,
                negative_prompt="",
                true_cfg_scale=3.0,
                **settings("t2i", seed, num_inference_steps=8),
            )
            found = look(out.images[1][None].float())[0].things
            place = scene.things[0]
            distances.append(
                32.0 if not found else abs(found[0].cx - place.cx) + abs(found[0].cy - place.cy)
            )
    assert sum(apart["group"]) < 0.5 * sum(apart["isolated"])
