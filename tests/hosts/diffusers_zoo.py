"""Tiny diffusers models with random weights, one entry per family, and inputs for any token grid."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

Grid = tuple[int, int, int]
TEXT = 5


@dataclass(frozen=True)
class Entry:
    """One family: how to build it, call it, and what its sites must look like.

    Args:
        inputs: ``(batch, grid) -> kwargs`` of one model call whose tokens form `grid`.
        kinds: number of sites per kind.
        grid: a small grid that is not square; `other` is a second one for the same session.
        text: where text tokens sit in joint sequences.
        linear: paths (globs) of attention modules that are no sites.
        compiled_grid: the grid can be read from shapes, so it is known under `torch.compile` too.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int, Grid], dict[str, Any]]
    kinds: dict[str, int]
    grid: Grid = (1, 4, 6)
    other: Grid = (1, 6, 4)
    text: str = "none"
    linear: str | None = None
    compiled_grid: bool = True
    pyramid: bool = False


ZOO: dict[str, Entry] = {}


def _add(name: str, kinds: dict[str, int], **facts: Any) -> Callable[[Any], Any]:
    """Decorator for a function that returns ``(build, inputs)``."""

    def add(make: Any) -> Any:
        build, inputs = make()
        ZOO[name] = Entry(build, inputs, kinds, **facts)
        return make

    return add


def model(name: str) -> torch.nn.Module:
    """A fresh model of the family, always with the same weights, in eval mode."""
    torch.manual_seed(0)
    built = ZOO[name].build()
    with torch.no_grad():
        for parameter in built.parameters():
            # Zero-initialised gates and heads would hide what attention does.
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


@functools.cache
def shared(name: str) -> torch.nn.Module:
    """One model per family for tests that detach what they attach."""
    return model(name)


def inputs(name: str, batch: int = 1, grid: Grid | None = None) -> dict[str, Any]:
    """Arguments of one call, the same for every use."""
    entry = ZOO[name]
    return entry.inputs(batch, entry.grid if grid is None else grid)


def first_tensor(out: Any) -> torch.Tensor:
    """The prediction inside whatever the model returns."""
    while not isinstance(out, torch.Tensor):
        out = out[0] if isinstance(out, tuple | list) else next(iter(out.values()))
    return out


def call(model: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return first_tensor(model(**kwargs))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that never touch the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def steps(batch: int, value: float = 500.0) -> torch.Tensor:
    """A timestep per row."""
    return torch.full((batch,), value)


def _ids(t: int, y: int, x: int, axes: int = 3) -> torch.Tensor:
    grid = torch.stack(
        torch.meshgrid(torch.arange(t), torch.arange(y), torch.arange(x), indexing="ij"), -1
    ).reshape(-1, 3)
    return torch.nn.functional.pad(grid, (0, axes - 3)).float()


def _packed(axes: int, **more: Any) -> Callable[[int, Grid], dict[str, Any]]:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "hidden_states": rand(batch, t * y * x, 4),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "timestep": steps(batch, 0.5),
            "img_ids": _ids(t, y, x, axes),
            "txt_ids": torch.zeros(TEXT, axes),
            **{k: v(batch) for k, v in more.items()},
        }

    return inputs


@_add("flux", {"joint": 3}, text="before", compiled_grid=False)
def _flux() -> Any:
    return lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ), _packed(3, pooled_projections=lambda b: rand(b, 8))


@_add("flux2", {"joint": 3}, text="before", compiled_grid=False)
def _flux2() -> Any:
    return lambda: diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    ), _packed(4, guidance=lambda b: steps(b, 1.0))


@_add("chroma", {"joint": 3}, text="before", compiled_grid=False)
def _chroma() -> Any:
    return lambda: diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ), _packed(3)


@_add("bria", {"joint": 3}, text="before", compiled_grid=False)
def _bria() -> Any:
    return lambda: diffusers.BriaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[0, 4, 4],
    ), _packed(3)


def _image(channels: int, patch: int, **more: Any) -> Callable[[int, Grid], dict[str, Any]]:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        return {
            "hidden_states": rand(batch, channels, grid[1] * patch, grid[2] * patch),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "timestep": steps(batch),
            **{k: v(batch) for k, v in more.items()},
        }

    return inputs


@_add("sd3", {"joint": 2, "self": 1}, text="after")
def _sd3() -> Any:
    return lambda: diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ), _image(4, 2, pooled_projections=lambda b: rand(b, 8))


@_add("pixart", {"self": 2, "cross": 2})
def _pixart() -> Any:
    return lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    ), _image(
        4,
        2,
        encoder_attention_mask=lambda b: torch.tensor([[1.0] * 4 + [0.0]] * b),
        added_cond_kwargs=lambda b: {"resolution": None, "aspect_ratio": None},
    )


@_add("sana", {"cross": 2}, linear="*.attn1")
def _sana() -> Any:
    return lambda: diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    ), _image(4, 1)


@_add("auraflow", {"joint": 2}, text="before")
def _auraflow() -> Any:
    return lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ), _image(4, 2, timestep=lambda b: steps(b, 0.5))


@_add("lumina2", {"joint": 2, "self": 1, "text": 1}, text="before")
def _lumina2() -> Any:
    return lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64),
        cap_feat_dim=16,
    ), _image(
        4,
        2,
        timestep=lambda b: steps(b, 0.5),
        encoder_attention_mask=lambda b: torch.ones(b, TEXT, dtype=torch.bool),
    )


@_add("cogview4", {"joint": 2}, text="before")
def _cogview4() -> Any:
    def size(b: int) -> torch.Tensor:
        return torch.tensor([[20.0, 20.0]] * b)

    return lambda: diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
        sample_size=16,
    ), _image(4, 2, original_size=size, target_size=size, crop_coords=size)


@_add("dit", {"self": 2}, grid=(1, 4, 4), other=(1, 6, 6))
def _dit() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        return {
            "hidden_states": rand(batch, 4, grid[1] * 2, grid[2] * 2),
            "timestep": steps(batch).long(),
            "class_labels": torch.arange(batch),
        }

    return lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        norm_num_groups=2,
        sample_size=8,
        num_embeds_ada_norm=8,
    ), inputs


@_add("prx", {"joint": 2}, text="before")
def _prx() -> Any:
    return lambda: diffusers.PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    ), _image(4, 2, timestep=lambda b: steps(b, 0.5))


@_add("qwenimage", {"joint": 2}, text="before")
def _qwenimage() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "hidden_states": rand(batch, t * y * x, 16),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "timestep": steps(batch, 0.5),
            "img_shapes": [[grid]] * batch,
        }

    return lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    ), inputs


@_add("zimage", {"joint": 2, "self": 1, "text": 1}, text="after")
def _zimage() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "x": [rand(4, t, y * 2, x * 2, seed=i) for i in range(batch)],
            "t": steps(batch, 0.5),
            "cap_feats": [rand(TEXT, 16, seed=i) for i in range(batch)],
        }

    return lambda: diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    ), inputs


def _video(channels: int, patch: int = 2, **more: Any) -> Callable[[int, Grid], dict[str, Any]]:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "hidden_states": rand(batch, channels, t, y * patch, x * patch),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "timestep": steps(batch),
            **{k: v(batch) for k, v in more.items()},
        }

    return inputs


_CLIP = {"grid": (3, 2, 4), "other": (2, 4, 3)}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@_add("wan", {"self": 2, "cross": 2}, **_CLIP)
def _wan() -> Any:
    return lambda: diffusers.WanTransformer3DModel(**_WAN), _video(4)


@_add("wan-i2v", {"self": 2, "cross": 2}, **_CLIP)
def _wan_i2v() -> Any:
    return lambda: diffusers.WanTransformer3DModel(
        **_WAN, image_dim=8, added_kv_proj_dim=24
    ), _video(
        4,
        # The stock processor takes the last 512 entries for text.
        encoder_hidden_states=lambda b: rand(b, 512, 16),
        encoder_hidden_states_image=lambda b: rand(b, 6, 8),
    )


@_add("wan-vace", {"self": 3, "cross": 3}, **_CLIP)
def _wan_vace() -> Any:
    plain = _video(4)

    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        kwargs = plain(batch, grid)
        t, y, x = grid
        return {**kwargs, "control_hidden_states": rand(batch, 6, t, y * 2, x * 2)}

    return lambda: diffusers.WanVACETransformer3DModel(
        **_WAN, vace_layers=[0], vace_in_channels=6
    ), inputs


@_add("skyreels", {"self": 2, "cross": 2}, **_CLIP)
def _skyreels() -> Any:
    return lambda: diffusers.SkyReelsV2Transformer3DModel(**_WAN), _video(4)


@_add("chronoedit", {"self": 2, "cross": 2}, **_CLIP)
def _chronoedit() -> Any:
    return lambda: diffusers.ChronoEditTransformer3DModel(**_WAN), _video(4)


@_add("hunyuan", {"joint": 3, "text": 1}, text="after", **_CLIP)
def _hunyuan() -> Any:
    return lambda: diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ), _video(
        4,
        encoder_attention_mask=lambda b: torch.ones(b, TEXT),
        pooled_projections=lambda b: rand(b, 8),
    )


@_add("hunyuan15", {"joint": 2, "text": 1}, text="after", **_CLIP)
def _hunyuan15() -> Any:
    return lambda: diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    ), _video(
        4,
        1,
        encoder_attention_mask=lambda b: torch.ones(b, TEXT),
        encoder_hidden_states_2=lambda b: rand(b, 3, 8),
        encoder_attention_mask_2=lambda b: torch.ones(b, 3),
        image_embeds=lambda b: torch.zeros(b, 2, 12),
    )


@_add("cogvideox", {"joint": 2}, text="before", **_CLIP)
def _cogvideox() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "hidden_states": rand(batch, t, 4, y * 2, x * 2),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "timestep": steps(batch).long(),
        }

    return lambda: diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
    ), inputs


@_add("ltx", {"self": 2, "cross": 2}, **_CLIP)
def _ltx() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        t, y, x = grid
        return {
            "hidden_states": rand(batch, t * y * x, 4),
            "encoder_hidden_states": rand(batch, TEXT, 16),
            "timestep": steps(batch).long(),
            "encoder_attention_mask": torch.ones(batch, TEXT),
            "num_frames": t,
            "height": y,
            "width": x,
        }

    return lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    ), inputs


@_add("mochi", {"joint": 2}, text="after", **_CLIP)
def _mochi() -> Any:
    return lambda: diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=TEXT,
    ), _video(4, encoder_attention_mask=lambda b: torch.tensor([[True] * (TEXT - 1) + [False]] * b))


@_add("allegro", {"self": 2, "cross": 2}, **_CLIP)
def _allegro() -> Any:
    plain = _video(4, timestep=lambda b: steps(b).long())

    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

        t, y, x = grid
        rope = get_3d_rotary_pos_embed_allegro(
            embed_dim=12, crops_coords=((0, 0), (y, x)), grid_size=(y, x), temporal_size=t
        )
        places = tuple(axis.long()[None] for axis in _ids(t, y, x).T)
        return {
            **plain(batch, grid),
            "attention_mask": torch.ones(batch, t, y * 2, x * 2),
            "encoder_attention_mask": torch.ones(batch, TEXT),
            "image_rotary_emb": (rope[:3], places),
        }

    return lambda: diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=3,
        caption_channels=16,
    ), inputs


@_add("cosmos", {"self": 2, "cross": 2}, **_CLIP)
def _cosmos() -> Any:
    plain = _video(4, timestep=lambda b: steps(b, 0.5))

    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        _, y, x = grid
        return {**plain(batch, grid), "padding_mask": torch.zeros(1, 1, y * 2, x * 2)}

    return lambda: diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        extra_pos_embed_type=None,
    ), inputs


@_add("sana-video", {"cross": 2}, linear="*.attn1", **_CLIP)
def _sana_video() -> Any:
    return lambda: diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
    ), _video(4)


@_add("hunyuan-image", {"joint": 3, "text": 1}, text="after")
def _hunyuan_image() -> Any:
    return lambda: diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        rope_axes_dim=(4, 4),
    ), _image(4, 1, encoder_attention_mask=lambda b: torch.ones(b, TEXT))


@_add("hidream", {"joint": 2}, text="after")
def _hidream() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        return {
            "hidden_states": rand(batch, 4, grid[1] * 2, grid[2] * 2),
            "timesteps": steps(batch),
            "encoder_hidden_states_t5": rand(batch, TEXT, 16),
            "encoder_hidden_states_llama3": rand(2, batch, TEXT, 16),
            "pooled_embeds": rand(batch, 8),
        }

    return lambda: diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=8,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    ), inputs


@_add("omnigen", {"joint": 2}, text="before")
def _omnigen() -> Any:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        total = TEXT + 1 + grid[1] * grid[2]
        return {
            "hidden_states": rand(batch, 4, grid[1] * 2, grid[2] * 2),
            "timestep": steps(batch, 0.5),
            "input_ids": torch.ones(batch, TEXT, dtype=torch.long),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(batch, total, total),
            "position_ids": torch.arange(total).expand(batch, -1),
        }

    return lambda: diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=2,
        pad_token_id=0,
        vocab_size=32,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        pos_embed_max_size=16,
        time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    ), inputs


def _unet_inputs(*, sdxl: bool = False) -> Callable[[int, Grid], dict[str, Any]]:
    def inputs(batch: int, grid: Grid) -> dict[str, Any]:
        kwargs: dict[str, Any] = {
            "sample": rand(batch, 4, grid[1], grid[2]),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": rand(batch, TEXT, 16),
        }
        if sdxl:
            kwargs["added_cond_kwargs"] = {
                "text_embeds": rand(batch, 8),
                "time_ids": torch.ones(batch, 6),
            }
        return kwargs

    return inputs


_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


@_add("unet", {"self": 7, "cross": 7}, pyramid=True, grid=(1, 8, 12), other=(1, 12, 6))
def _unet() -> Any:
    return lambda: diffusers.UNet2DConditionModel(**_UNET), _unet_inputs()


@_add("unet-small", {"self": 4, "cross": 4}, pyramid=True)
def _unet_small() -> Any:
    one_level = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    return lambda: diffusers.UNet2DConditionModel(**{**_UNET, **one_level}), _unet_inputs()


@_add("unet-sdxl", {"self": 7, "cross": 7}, pyramid=True, grid=(1, 8, 12), other=(1, 12, 6))
def _unet_sdxl() -> Any:
    return lambda: diffusers.UNet2DConditionModel(
        **_UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    ), _unet_inputs(sdxl=True)
