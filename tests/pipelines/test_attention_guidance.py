"""AttentionGuidance: against a hand-written loop with explicit softmaxes, and no trace afterwards."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from mmattn_pipelines.attention_guidance import AttentionGuidance
from transformers import CLIPTextConfig, CLIPTextModel

import mmattn
from mmattn import AStar
from mmattn.mini import train_t2i
from mmattn.mini.text import clip_tokenizer

PROMPT = "a red circle left of a blue square"
WORDS = ("red circle", "square")
FIXED = {"num_inference_steps": 3, "output_type": "latent"}
STRONG = {"alpha": 0.2, "unit": "latents", "stop": 1.0}


def awake(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def parts():
    return train_t2i.build_pipeline(seed=0).components


def _flux(parts):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    )
    made = {**parts, "transformer": awake(transformer)}
    made["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(**{k: v for k, v in made.items() if k != "image_encoder"})


def _pixart(parts):
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=16,
        num_layers=2,
        norm_num_groups=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=96,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=parts["tokenizer_2"],
        text_encoder=parts["text_encoder_2"],
        vae=parts["vae"],
        transformer=awake(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sd(parts):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(
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
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=text.eval(),
        tokenizer=clip_tokenizer(24),
        unet=awake(unet),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILD = {"flux": _flux, "pixart": _pixart, "sd": _sd}
SIZE = {
    "flux": {"height": 32, "width": 48, "max_sequence_length": 16, "true_cfg_scale": 2.0},
    "pixart": {
        "height": 32,
        "width": 48,
        "max_sequence_length": 16,
        "clean_caption": False,
        "use_resolution_binning": False,
    },
    "sd": {"height": 16, "width": 24},
}


@pytest.fixture(scope="module")
def pipes(parts):
    made = {name: build(parts) for name, build in BUILD.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def draw(call, name, prompt=PROMPT, seed=0, **more):
    count = 1 if isinstance(prompt, str) else len(prompt)
    arguments = {**FIXED, **SIZE[name]}
    if name == "flux":
        arguments["negative_prompt"] = "" if isinstance(prompt, str) else [""] * count
    generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    if isinstance(prompt, str):
        generator = generator[0]
    return call(prompt, generator=generator, **{**arguments, **more}).images


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def trace_of(pipe):
    module = denoiser(pipe)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    processors = {name: id(p) for name, p in module.attn_processors.items()}
    return hooks, processors, type(pipe.scheduler), "step" in vars(pipe.scheduler)


@pytest.mark.parametrize("name", BUILD)
def test_settings_that_move_nothing_are_the_plain_pipeline_bitwise(pipes, name):
    stock = draw(pipes[name], name)
    for knobs in ({"alpha": 0.0}, {"stop": 0.0}, {"segregation": 0.0, "retention": 0.0}):
        guided = AttentionGuidance(pipes[name], AStar(words=WORDS, **knobs))
        assert torch.equal(draw(guided, name), stock) and guided.trace == []
    tiny = AttentionGuidance(pipes[name], AStar(words=WORDS, alpha=1e-30, unit="gradient"))
    assert torch.equal(draw(tiny, name), stock), "the plumbing itself changes no bit"
    assert len(tiny.trace) == 3


@pytest.mark.parametrize("name", BUILD)
def test_latents_move_by_alpha_and_the_pipeline_is_left_as_it_was(pipes, name):
    pipe = pipes[name]
    before, stock = trace_of(pipe), draw(pipe, name)
    calls = []
    hook = denoiser(pipe).register_forward_hook(lambda *_: calls.append(1))
    guided = AttentionGuidance(pipe, AStar(words=WORDS, **STRONG))
    out = draw(guided, name)
    hook.remove()
    assert (out - stock).abs().mean() > 0.01 * stock.abs().mean()
    assert trace_of(pipe) == before and torch.equal(draw(pipe, name), stock)
    assert [s.step for s in guided.trace] == [0, 1, 2]
    want = [0.2, 0.2 * 0.75**0.5, 0.2 * 0.5**0.5]
    assert [s.moved[0] for s in guided.trace] == pytest.approx(want, rel=1e-4)
    assert guided.trace[0].retention == (0.0,) and 0.5 <= guided.trace[1].retention[0] / 2 <= 1
    assert all(0 < s.segregation[0] <= 0.5 for s in guided.trace)
    assert len(calls) == 3 * (2 if name == "flux" else 1), "the pipeline's own calls and no more"
    half = AttentionGuidance(pipe, AStar(words=WORDS, **{**STRONG, "stop": 0.34}))
    draw(half, name)
    assert [s.step for s in half.trace] == [0]


@pytest.mark.parametrize("name", BUILD)
def test_the_loss_falls_where_the_latents_went_and_not_in_random_directions(pipes, name):
    pipe = pipes[name]
    start = torch.randn(draw(pipe, name).shape, generator=torch.Generator().manual_seed(1))
    losses = {}
    for random in (False, True):
        method = AStar(words=WORDS, alpha=0.02, unit="latents", random=random, depth=(0.0, 1.0))
        guided = AttentionGuidance(pipe, method)
        moves = []
        stock = pipe.scheduler.step

        @functools.wraps(stock)
        def step(*args, stock=stock, moves=moves, **kwargs):
            moves.append(args[2])
            return stock(*args, **kwargs)

        pipe.scheduler.step = step
        draw(guided, name, latents=start)
        assert pipe.scheduler.step is step, "somebody else's wrapper stays"
        del pipe.scheduler.step
        before = guided.trace[0].segregation[0]
        scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)
        draw(guided, name, latents=moves[0] / scale)
        losses[random] = guided.trace[0].segregation[0] - before
        assert (moves[0] / scale - start).norm() / start.norm() == pytest.approx(0.02, rel=1e-3)
    assert losses[False] < 0
    assert losses[False] < losses[True]
    assert abs(losses[True]) < 0.5 * abs(losses[False])


class Explicit:
    """A cross- or self-attention processor that keeps its softmax: the reference of the maps."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = encoder_hidden_states if encoder_hidden_states is not None else hidden_states
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        if encoder_hidden_states is not None:
            self.kept.append(weights)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def by_hand(pipe, alpha, tau, guidance, steps, resolution):
    """A-STAR on a UNet: an own loop, explicit softmaxes, losses in loops over pairs."""
    kept = []
    stock = dict(pipe.unet.attn_processors)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    prompt, empty = (
        pipe.text_encoder(
            pipe.tokenizer(t, padding="max_length", max_length=24, return_tensors="pt").input_ids
        ).last_hidden_state
        for t in (PROMPT, "")
    )
    z = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    z = z * scheduler.init_noise_sigma
    regions = None
    for i, t in enumerate(scheduler.timesteps):
        z = z.detach().requires_grad_()
        kept.clear()
        pipe.unet.set_attn_processor({name: Explicit(kept) for name in stock})
        pipe.unet(scheduler.scale_model_input(z, t), t, encoder_hidden_states=prompt.detach())
        fitting = [w for w in kept if w.shape[2] == resolution[0] * resolution[1]]
        mean = torch.stack([w[0].mean(0) for w in fitting]).mean(0)
        maps = [
            mean[:, [2, 3]].mean(1),
            mean[:, 8],
        ]  # "red circle", "square" behind the start token
        loss = torch.minimum(*maps).sum() / (maps[0] + maps[1]).sum()
        if regions is not None:
            for a, b in zip(maps, regions, strict=True):
                loss = loss + 1 - torch.minimum(a, b).sum() / (a + b).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        regions = [
            ((m - m.min()) / (m.max() - m.min()) > tau).float() for m in (m.detach() for m in maps)
        ]
        with torch.no_grad():
            z = z - alpha * (1 - 0.5 * i / (steps - 1)) ** 0.5 * gradient
            x = scheduler.scale_model_input(torch.cat([z, z]), t)
            noise = pipe.unet(x, t, encoder_hidden_states=torch.cat([empty, prompt])).sample
            a, b = noise.chunk(2)
            z = scheduler.step(a + guidance * (b - a), t, z).prev_sample
    pipe.unet.set_attn_processor(stock)
    return z.detach()


@pytest.mark.parametrize(
    ("scheduler", "alpha"), [(DDIMScheduler, 300.0), (EulerDiscreteScheduler, 1e5)]
)
def test_unets_equal_a_loop_by_hand(parts, scheduler, alpha):
    pipe = _sd(parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler()
    method = AStar(words=WORDS, alpha=alpha, unit="gradient", tau=0.4, resolution=12, stop=1.0)
    guided = AttentionGuidance(pipe, method)
    got = draw(guided, "sd", guidance_scale=3.0)
    want = by_hand(pipe, alpha, 0.4, 3.0, 3, (8, 12))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    plain = draw(pipe, "sd", guidance_scale=3.0)
    assert (plain - want).abs().max() > 20 * (got - want).abs().max(), (
        "the move is what was compared"
    )


@pytest.mark.parametrize("name", BUILD)
def test_rows_are_independent_and_copies_belong_to_their_prompt(pipes, name):
    pipe = pipes[name]
    guided = AttentionGuidance(pipe, AStar(**STRONG))
    prompts = [PROMPT, "a star above a green ring"]
    words = [("red circle", "square"), ("star", "ring")]
    both = draw(guided, name, prompts, words=words)
    for i in range(2):
        alone = draw(guided, name, [prompts[i]], seed=i, words=[words[i]])
        torch.testing.assert_close(both[i], alone[0], rtol=1e-3, atol=2e-3)
    count = guided.trace[0]
    assert len(count.moved) == 1
    many = draw(guided, name, PROMPT, words=[words[0]], num_images_per_prompt=2)
    assert many.shape[0] == 2 and len(guided.trace[0].moved) == 2


def test_a_layout_replaces_the_regions_and_single_words_are_only_kept(pipes):
    pipe = pipes["sd"]
    left = torch.zeros(1, 1, 1, 16, 24)
    left[..., :12] = 1
    guided = AttentionGuidance(pipe, AStar(words=("circle",), **STRONG))
    plain = draw(guided, "sd")
    assert guided.trace[0].moved == (0.0,) and guided.trace[1].moved[0] > 0.1
    held = draw(guided, "sd", layout=left)
    assert guided.trace[0].retention[0] > 0.5 and guided.trace[0].moved[0] > 0.1
    assert not torch.equal(held, plain)
    assert torch.isfinite(held).all()


def test_other_methods_go_along(pipes):
    pipe = pipes["sd"]
    tome = mmattn.ToMe(ratio=0.3)
    guided = AttentionGuidance(pipe, AStar(words=WORDS, **STRONG), [tome])
    both = draw(guided, "sd")
    assert not torch.equal(both, draw(AttentionGuidance(pipe, guided.method), "sd"))
    off = AttentionGuidance(pipe, AStar(words=WORDS, alpha=0.0), [tome])
    with mmattn.attach(pipe, tome):
        want = draw(pipe, "sd")
    assert torch.equal(draw(off, "sd"), want)


def test_mistakes_are_told_before_anything_is_drawn(pipes, parts):
    pipe = pipes["sd"]
    with pytest.raises(mmattn.ConfigError, match="equally many words"):
        draw(AttentionGuidance(pipe, AStar()), "sd")
    with pytest.raises(mmattn.ConfigError, match="does not have the word 'ring'"):
        draw(AttentionGuidance(pipe, AStar(words=("ring",))), "sd")
    other = _sd(parts)
    other.scheduler = UniPCMultistepScheduler()
    with pytest.raises(mmattn.ConfigError, match="UniPCMultistepScheduler corrects"):
        draw(AttentionGuidance(other, AStar(words=WORDS)), "sd")


def test_failures_and_interruptions_leave_no_trace(pipes):
    pipe = pipes["sd"]
    before, stock = trace_of(pipe), draw(pipe, "sd")
    guided = AttentionGuidance(pipe, AStar(words=WORDS, resolution=2))
    with pytest.raises(mmattn.UnsupportedCall, match="at most resolution=2"):
        draw(guided, "sd")
    assert trace_of(pipe) == before

    def interrupt(*_):
        raise KeyboardInterrupt

    guided = AttentionGuidance(pipe, AStar(words=WORDS, **STRONG))
    with pytest.raises(KeyboardInterrupt):
        draw(guided, "sd", callback_on_step_end=interrupt)
    assert trace_of(pipe) == before and torch.equal(draw(pipe, "sd"), stock)
