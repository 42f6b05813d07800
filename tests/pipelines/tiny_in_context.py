"""Tiny FLUX, FLUX.2, SD3, PixArt and FLUX.1-Fill pipelines with random weights, and sets drawn with them."""

from __future__ import annotations

import functools
from random import Random

import diffusers as d
import torch
import transformers as t
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

from mmattn.mini.text import clip_tokenizer, t5_tokenizer

LAYOUT = PanelLayout(1, 2, 16, 24)
CAPTION = SetCaption("PAIR", "a red circle", ("on the left", "on the right"), ("LEFT", "RIGHT"))
TWO = ["a red circle", "a blue square"]
FAMILIES = ("flux", "flux2", "sd3", "pixart")


def picture(seed=0, width=24, height=16):
    return Image.frombytes("RGB", (width, height), Random(seed).randbytes(3 * width * height))


def _shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _vae(cls=d.AutoencoderKL, **more):
    return _shaken(
        cls(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            **more,
        )
    )


def _clip(cls):
    small = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16}
    return cls(
        t.CLIPTextConfig(
            vocab_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            **small,
        )
    ).eval()


def _t5():
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return t.T5EncoderModel(
        t.T5Config(vocab_size=256, is_encoder_decoder=False, dropout_rate=0.0, **small)
    ).eval()


def _flux(cls=d.FluxPipeline, channels=16):
    model = d.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return cls(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.5, shift_factor=0.1),
        text_encoder=_clip(t.CLIPTextModel),
        tokenizer=clip_tokenizer(24),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(16),
        transformer=_shaken(model),
    )


def _flux2():
    model = d.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 1}
    text = t.Qwen3ForCausalLM(
        t.Qwen3Config(vocab_size=256, num_hidden_layers=3, num_attention_heads=2, **small)
    ).eval()
    tokenizer = t5_tokenizer(16)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = _vae(d.AutoencoderKLFlux2)
    vae.bn.running_mean.uniform_(-0.2, 0.2)
    return d.Flux2KleinPipeline(scheduler, vae, text, tokenizer, _shaken(model))


def _sd3():
    model = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
    )
    clips = (
        part
        for _ in range(2)
        for part in (_clip(t.CLIPTextModelWithProjection), clip_tokenizer(24))
    )
    vae = _vae(scaling_factor=0.5, shift_factor=0.1)
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    return d.StableDiffusion3Pipeline(
        _shaken(model), scheduler, vae, *clips, _t5(), t5_tokenizer(16)
    )


def _pixart():
    model = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=16,
        patch_size=2,
    )
    vae = _vae(scaling_factor=0.5)
    return d.PixArtSigmaPipeline(
        t5_tokenizer(16), _t5(), vae, _shaken(model), d.DPMSolverMultistepScheduler()
    )


@functools.cache
def tiny(family):
    torch.manual_seed(0)
    if family == "fill":
        pipe = _flux(d.FluxFillPipeline, 16 + 16 + 4 * 4)
    else:
        pipe = {"flux": _flux, "flux2": _flux2, "sd3": _sd3, "pixart": _pixart}[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(family, seed=0, **more):
    own = {"flux2": {"text_encoder_out_layers": (0, 1, 2)}, "pixart": {"clean_caption": False}}
    return {
        "num_inference_steps": 3,
        "max_sequence_length": 16,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
        **own.get(family, {}),
        **more,
    }


def draw(family, caption=CAPTION, seed=0, **more):
    more = {"layout": LAYOUT, **more}
    return InContextPipeline(tiny(family))(caption, **settings(family, seed, **more))


def group(family, seed=0, **more):
    more = {"size": (16, 24), **more}
    return InContextPipeline(tiny(family)).group(TWO, **settings(family, seed, **more))


def same(one, two):
    return [torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True)]
