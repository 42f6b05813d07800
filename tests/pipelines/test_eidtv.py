"""EIDT-V: the step callback against loops over places, and whole clips on small pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from mmattn_pipelines.eidtv import EIDTV, ClipSeg, _Blend, latent_grid, new_words
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

import mmattn
import mmattn.mini

FRAMES = ["a red circle on the left", "a red circle in the center", "a red circle on the right"]
CHANGES = [["red circle"], ["red circle"]]
FLUX = {
    "height": 64,
    "width": 64,
    "max_sequence_length": 16,
    "num_inference_steps": 4,
}


def constant(value):
    """A detector whose scaled maps cannot be all one; maps are put in by hand instead."""
    return lambda picture, texts: torch.full((len(texts), 8, 8), float(value))


class Fixed(EIDTV):
    """Change maps given by hand."""

    given = 1.0

    def change_map(self, picture, texts):
        if isinstance(self.given, float):
            return torch.full((64, 64), self.given)
        return self.given


@pytest.fixture(scope="module")
def flux():
    return mmattn.mini.load("t2i")


def plain(pipe, prompt, seed, **more):
    return pipe(
        [prompt],
        generator=[torch.Generator().manual_seed(seed)],
        **{**FLUX, **more},
    ).images


# -- one step -------------------------------------------------------------------------------------------

SCHEDULERS = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "ddim": diffusers.DDIMScheduler(),
    "euler": diffusers.EulerDiscreteScheduler(),
}


def noise_level(scheduler, name, i, anchor, noise):
    """The anchor at the level of step i + 1, from the definition of each family; clean at the end."""
    if i + 1 == len(scheduler.timesteps):
        return anchor
    if name == "flow":
        sigma = scheduler.sigmas[i + 1]
        return (1 - sigma) * anchor + sigma * noise
    if name == "euler":
        return anchor + scheduler.sigmas[i + 1] * noise
    kept = scheduler.alphas_cumprod[scheduler.timesteps[i + 1]]
    return kept.sqrt() * anchor + (1 - kept).sqrt() * noise


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_equals_a_loop_over_places(name, begun):
    scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    scheduler.set_timesteps(5)
    if begun and name != "ddim":
        scheduler.set_begin_index(0)
    draw = torch.Generator().manual_seed(3)
    anchor, maps = torch.randn(1, 2, 4, 6, generator=draw), torch.rand(3, 4, 6, generator=draw)
    blend = _Blend(scheduler, maps, anchor, torch.Generator().manual_seed(9))
    again = torch.Generator().manual_seed(9)
    latents = torch.randn(3, 2, 4, 6, generator=draw)
    shares = []
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(latents * 0.1, t, latents).prev_sample
        held = noise_level(scheduler, name, i, anchor, torch.randn(anchor.shape, generator=again))
        want, free = latents.clone(), 0
        for b in range(3):
            for y in range(4):
                for x in range(6):
                    if float(t) <= 1000 * float(maps[b, y, x]):
                        free += 1
                    else:
                        want[b, :, y, x] = held[0, :, y, x]
        latents = blend(latents, i, t, last=i == 4)
        torch.testing.assert_close(latents, want)
        shares.append(free / (3 * 24))
    assert [float(s.mean()) for s in blend.free] == pytest.approx(shares)
    assert shares == sorted(shares) and 0 < shares[1] < shares[-1]


def test_packed_latents_give_the_same_as_pictures():
    scheduler = SCHEDULERS["flow"]
    scheduler.set_timesteps(4)
    maps = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    one, two = torch.randn(1, 1, 4, 6), torch.randn(2, 1, 4, 6)

    def pack(x):
        return x.flatten(2).transpose(1, 2)

    results = []
    for anchor, latents in ((one, two), (pack(one), pack(two))):
        generator = torch.Generator().manual_seed(5)
        blend = _Blend(scheduler, maps, anchor, generator)
        results.append(blend(latents, 1, scheduler.timesteps[1], last=False))
    torch.testing.assert_close(pack(results[0]), results[1])


def test_maps_are_scaled_one_by_one_and_the_strongest_counts():
    scores = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    video = EIDTV(_pipe_like(), lambda *_: scores, falloff=3.0)
    want = torch.zeros(5, 7)
    for one in scores:
        scaled = (one - one.min()) / (one.max() - one.min())
        want = torch.maximum(want, scaled**3)
    picture = torch.zeros(3, 10, 14)
    torch.testing.assert_close(video.change_map(picture, ["a", "b"]), want)
    affine = EIDTV(_pipe_like(), lambda *_: scores * 7 - 3, falloff=3.0)
    torch.testing.assert_close(affine.change_map(picture, ["a", "b"]), want)
    flat = EIDTV(_pipe_like(), constant(4.0))
    assert (flat.change_map(picture, ["a"]) == 0).all()
    assert flat.change_map(picture, []).shape == (10, 14)


def _pipe_like():
    class Pipe:
        def __call__(self, prompt, callback_on_step_end=None):
            raise AssertionError

    return Pipe()


# -- clips ------------------------------------------------------------------------------------------------


def test_everything_free_is_the_plain_pipeline_bitwise(flux):
    out = Fixed(flux, constant(0))(FRAMES, changes=CHANGES, seed=4, **FLUX)
    assert out.frames.shape == (3, 3, 64, 64) and (out.free == 1).all()
    for i, prompt in enumerate(FRAMES):
        alone = plain(flux, prompt, 4 + i, output_type="pt")
        if i == 0:
            assert torch.equal(out.frames[:1], alone)
        else:
            torch.testing.assert_close(out.frames[i : i + 1], alone, atol=1e-4, rtol=1e-3)
    single = Fixed(flux, constant(0), batch_size=1)(FRAMES, changes=CHANGES, seed=4, **FLUX)
    assert torch.equal(single.frames[2:], plain(flux, FRAMES[2], 6, output_type="pt"))


def test_nothing_free_is_the_anchor(flux):
    video = Fixed(flux, constant(0))
    video.given = 0.0
    out = video(FRAMES, changes=CHANGES, **FLUX)
    assert torch.equal(out.latents, out.latents[:1].expand_as(out.latents))
    assert (out.free == 0).all()


def test_a_region_changes_and_the_rest_is_the_anchor(flux):
    video = Fixed(flux, constant(0), same_noise=True)
    video.given = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1)
    out = video(FRAMES[:2], changes=CHANGES[:1], **FLUX)
    grid = out.latents.view(2, 8, 8, -1)
    same = (grid[0] == grid[1]).all(-1)
    assert same[:, :4].all() and not same[:, 4:].any()
    assert out.free[0].tolist() == [0.5] * 4
    assert torch.equal(out.changes[0], torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1))


def test_a_larger_map_frees_more_in_every_step(flux):
    free = []
    for value in (0.3, 0.6, 0.9):
        video = Fixed(flux, constant(0))
        video.given = value
        free.append(video(FRAMES[:2], changes=CHANGES[:1], **FLUX).free[0])
    assert (free[0] <= free[1]).all() and (free[1] <= free[2]).all()
    assert free[0].sum() < free[1].sum() < free[2].sum()
    assert all((f.diff() >= 0).all() for f in free), "a place that is free stays free"


def test_the_anchor_is_the_frame_before_or_the_first(flux):
    seen = []

    def detector(picture, texts):
        seen.append((picture, tuple(texts)))
        return picture.mean(0)[None].expand(len(texts), -1, -1)

    prompts, changes = [*FRAMES, FRAMES[0]], [["a"], ["b"], ["c"]]
    video = EIDTV(flux, detector, batch_size=1)
    out = video(prompts, changes=changes, **FLUX)
    assert [texts for _, texts in seen] == [("a",), ("b",), ("c",)]
    for i, (picture, _) in enumerate(seen):
        assert torch.equal(picture, out.frames[i])
    seen.clear()
    out = EIDTV(flux, detector, batch_size=2, anchor="first")(prompts, changes=changes, **FLUX)
    assert all(torch.equal(picture, out.frames[0]) for picture, _ in seen) and len(seen) == 3
    seen.clear()
    out = EIDTV(flux, detector, batch_size=2)(prompts, changes=changes, **FLUX)
    assert [int(torch.equal(p, out.frames[0])) for p, _ in seen] == [1, 1, 0]
    assert torch.equal(seen[2][0], out.frames[2])
    again = EIDTV(flux, detector, batch_size=2)(prompts, changes=changes, **FLUX)
    assert torch.equal(again.frames, out.frames)
    state = torch.random.get_rng_state()
    EIDTV(flux, detector)(FRAMES[:2], changes=[["a"]], **FLUX)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_guidance_and_pictures_that_are_not_square(flux):
    video = EIDTV(flux, lambda picture, texts: picture[:1])
    more = {"height": 32, "width": 64, "true_cfg_scale": 2.0, "negative_prompt": ""}
    out = video(FRAMES, changes=CHANGES, **{**FLUX, **more})
    assert out.frames.shape == (3, 3, 32, 64) and out.changes.shape == (2, 4, 8)
    assert (out.free[:, 0] < out.free[:, -1]).all() and out.free[:, -1].max() < 1


def test_a_unet_pipeline(flux):
    from transformers import CLIPTextConfig, CLIPTextModel

    from mmattn.mini.text import clip_tokenizer

    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=256,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=clip_tokenizer(24),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 8, "width": 16, "num_inference_steps": 3}
    video = Fixed(pipe, constant(0))
    video.given = 0.0
    held = video(FRAMES, changes=CHANGES, **size)
    assert torch.equal(held.latents, held.latents[:1].expand_as(held.latents))
    video.given = torch.cat([torch.zeros(8, 8), torch.ones(8, 8)], 1)
    out = video(FRAMES, changes=CHANGES, **size)
    assert torch.equal(out.latents[1, ..., :8], out.latents[0, ..., :8])
    assert not torch.equal(out.latents[1, ..., 8:], out.latents[0, ..., 8:])


# -- texts and mistakes ----------------------------------------------------------------------------------


def test_new_words_are_the_default_changes(flux):
    assert new_words("a red circle, left", "A red circle right of a ring") == [
        "right",
        "of",
        "ring",
    ]
    asked = []

    def detector(picture, texts):
        asked.append(list(texts))
        return picture[:1].expand(len(texts), -1, -1)

    EIDTV(flux, detector)(FRAMES, **FLUX)
    assert asked == [["in", "center"], ["on", "right"]]
    asked.clear()
    EIDTV(flux, detector)(
        "left", frames=3, writer=lambda p, n: [f"{p} {i}" for i in range(n)], **FLUX
    )
    assert asked == [["1"], ["2"]]
    assert EIDTV(flux, detector)(FRAMES[:1], **FLUX).changes.shape[0] == 0


def test_clipseg_gives_a_map_per_text():
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config={
                **small,
                "vocab_size": 99,
                "max_position_embeddings": 12,
                "bos_token_id": 0,
                "eos_token_id": 98,
                "pad_token_id": 98,
            },
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=16,
            extract_layers=[0, 1],
            reduce_dim=8,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=8,
        )
    ).eval()
    seen = {}

    def processor(text, images, **more):
        seen.update(text=text, images=images, **more)
        ids = torch.tensor([[0, len(word), 98] for word in text])
        pixels = torch.stack(images)
        return SimpleNamespace(to=lambda device: {"input_ids": ids, "pixel_values": pixels})

    maps = ClipSeg(model, processor)(torch.rand(3, 32, 32), ["ball", "lawn tennis"])
    assert maps.shape == (2, 32, 32) and not torch.equal(maps[0], maps[1])
    assert seen["do_rescale"] is False and len(seen["images"]) == 2
    assert ClipSeg(model, processor)(torch.rand(3, 32, 32), ["ball"]).shape == (1, 32, 32)


def test_mistakes_are_told(flux):
    video = EIDTV(flux, constant(0))
    for bad in ({"falloff": 0.0}, {"batch_size": 0}, {"anchor": "last"}):
        with pytest.raises(mmattn.ConfigError):
            EIDTV(flux, constant(0), **bad)
    with pytest.raises(mmattn.ConfigError, match="has no callback_on_step_end"):
        EIDTV(SimpleNamespace(__call__=lambda prompt: None), constant(0))
    with pytest.raises(mmattn.ConfigError, match="3 frames have 2 changes"):
        video(FRAMES, changes=[["a"]], **FLUX)
    with pytest.raises(mmattn.ConfigError, match="writer="):
        video("one prompt", **FLUX)
    with pytest.raises(mmattn.ConfigError, match="asked for 3 prompts and returned 1"):
        video("one", frames=3, writer=lambda p, n: [p], **FLUX)
    with pytest.raises(mmattn.ConfigError, match="sets generator itself"):
        video(FRAMES, changes=CHANGES, generator=torch.Generator(), **FLUX)
    with pytest.raises(mmattn.ConfigError, match="prompts is empty"):
        video([], **FLUX)
    assert latent_grid(torch.zeros(1, 24, 4), 4 / 6) == (4, 6)
    for shape in ((1, 23, 4), (1, 2, 3, 4, 5)):
        with pytest.raises(mmattn.UnsupportedCall, match="packed ones"):
            latent_grid(torch.zeros(shape), 4 / 6)
