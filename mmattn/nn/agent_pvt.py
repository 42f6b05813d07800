"""Agent-PVT: pyramid vision transformers with agent attention in every block.

From "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. Keys and values
are read at full resolution in all published models, so the keys' reduction of PVT is gone. Parameters and
multiply-adds equal those of the authors' models. Their checkpoints load through `checkpoint_filter_fn`;
they carry no licence and are not offered for download here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmattn.nn.agent_pyramid import ConvDown, Pyramid, Stage, agent_block, drop_path_rates
from mmattn.nn.agent_swin import init_linear
from mmattn.nn.agent_weights import cfg, convert_layers, fit_tables

__all__ = ["AgentPVT"]


class PositionedDown(ConvDown):
    """Patches, norm, and a learnt position, which is resampled (bicubic) where the map is another."""

    def __init__(self, *args: Any, grid: tuple[int, int], drop: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.norm.weight
        self.pos_embed = nn.Parameter(
            torch.empty(1, *grid, weight.shape[0], device=weight.device, dtype=weight.dtype)
        )
        trunc_normal_(self.pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        position = resample_abs_pos_embed_nhwc(self.pos_embed, list(x.shape[1:3]))
        out: Tensor = self.pos_drop(x + position)
        return out


class AgentPVT(Pyramid):
    """A pyramid vision transformer with agent attention; no class token and no final norm.

    Args:
        img_size: side of the image in pixels, or (rows, columns), that positions and bias tables are built
            for; at other sizes both are resampled.
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and MLP widths per stage.
        agents: agents per stage, square numbers.
        drop_path_rate, proj_drop_rate, attn_drop_rate, pos_drop_rate: dropouts in [0, 1).
        **kwargs: of `Pyramid`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agents: Sequence[int] = (9, 16, 49, 49),
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = drop_path_rates(drop_path_rate, depths)
        drop = (attn_drop_rate, proj_drop_rate)
        rows, cols = to_2tuple(img_size)
        stages = []
        for i, dim in enumerate(embed_dims):
            grid = (rows // (4 << i), cols // (4 << i))
            patch = 2 if i else 4
            before = embed_dims[i - 1] if i else in_chans
            down = PositionedDown(
                before, dim, patch, patch, stem=i == 0, grid=grid, drop=pos_drop_rate, **dd
            )
            extra = {"mlp_ratio": mlp_ratios[i], "eps": 1e-6, **dd}
            blocks = [
                agent_block(dim, num_heads[i], agents[i], grid, drop, drop_path=rate, **extra)
                for rate in rates[i]
            ]
            stages.append(Stage(down, blocks))
        super().__init__(stages, embed_dims, nn.Identity(), in_chans=in_chans, **dd, **kwargs)
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official state dict into ours, and fit it to the model's image size.

    ``patch_embed{s}`` and ``pos_embed{s}`` become ``stages.{s - 1}.downsample``, ``block{s}.j`` becomes
    ``stages.{s - 1}.blocks.j``, ``head`` becomes ``head.fc``; ``q`` and ``kv`` are joined to ``qkv``. Agent
    layers: see `agent_weights.convert_layer`. Positions are resampled bicubically, row and column tables
    stretched linearly. Position embeddings are taken for square maps.
    """
    state: dict[str, Tensor] = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if "patch_embed1.proj.weight" in state:
        renamed = {}
        for key, value in state.items():
            if key.startswith("pos_embed"):
                side = math.isqrt(value.shape[1])
                value = value.unflatten(1, (side, side))
                key = f"stages.{int(key[9:]) - 1}.downsample.pos_embed"
            if match := re.match(r"(patch_embed|block)(\d)\.", key):
                part = "blocks" if match[1] == "block" else "downsample"
                key = f"stages.{int(match[2]) - 1}.{part}.{key[match.end() :]}"
            renamed[re.sub(r"^head\.(?=weight|bias)", "head.fc.", key)] = value
        state = convert_layers(renamed, model)
    state = fit_tables(state, model)
    for path, layer in model.named_modules():
        key = f"{path}.pos_embed"
        if isinstance(layer, PositionedDown) and key in state:
            state[key] = resample_abs_pos_embed_nhwc(state[key], list(layer.pos_embed.shape[1:3]))
    return state


default_cfgs = generate_default_cfgs(
    {
        f"agent_pvt_{size}.untrained": cfg(
            first_conv="stages.0.downsample.proj", classifier="head.fc", pool_size=(7, 7)
        )
        for size in ("tiny", "small", "medium", "large")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentPVT:
    model: AgentPVT = build_model_with_cfg(
        AgentPVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-T: 11.6 M parameters, 2.0 G multiply-adds at 224."""
    return _create("agent_pvt_tiny", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-S: 20.6 M parameters, 4.0 G multiply-adds at 224."""
    return _create("agent_pvt_small", pretrained, **({"depths": (3, 4, 6, 3)} | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-M: 35.9 M parameters, 7.0 G multiply-adds at 224; published at 224 and 256."""
    return _create("agent_pvt_medium", pretrained, **({"depths": (3, 4, 18, 3)} | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-L: 48.7 M parameters, 10.4 G multiply-adds at 224."""
    return _create("agent_pvt_large", pretrained, **({"depths": (3, 8, 27, 3)} | kwargs))
