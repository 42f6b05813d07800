"""Agent-Swin: Swin transformers whose early blocks see the whole map through agents.

From "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. Blocks of the
early stages hold an `AgentAttention` over the whole map; the others are timm's shifted-window blocks.
Parameters and multiply-adds equal those of the authors' models. Their checkpoints load through
`checkpoint_filter_fn`; they carry no licence and are not offered for download here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import resize_rel_pos_bias_table_simple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from mmattn.nn.agent_pyramid import (
    ConvDown,
    Pyramid,
    Stage,
    agent_block,
    built_grids,
    drop_path_rates,
)
from mmattn.nn.agent_weights import cfg, convert_layers, fit_tables

__all__ = ["AgentSwin"]


class AgentSwin(Pyramid):
    """A Swin transformer with agent attention in the first blocks of its stages.

    Args:
        img_size: side of the image in pixels, or (rows, columns), that bias tables and windows are built
            for. Other sizes are taken too: agent tables are stretched; windows keep their size and pad a
            map that they do not divide, and a stage built with one window per map stays without shift.
        embed_dim: channels of the first stage; every stage doubles them.
        depths, num_heads: blocks and heads per stage.
        agents: agents per stage, square numbers.
        agent_blocks: how many blocks of every stage, counted from its first, use agents.
        window_size: side of the windows of the other blocks in tokens; None: an eighth of the first map,
            at least 7.
        mlp_ratio: hidden channels of the MLPs over channels.
        drop_path_rate, proj_drop_rate, attn_drop_rate: dropouts in [0, 1).
        **kwargs: of `Pyramid`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [embed_dim << i for i in range(len(depths))]
        grids = built_grids(img_size, len(depths))
        window = window_size or max(7, min(grids[0]) // 8)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = []
            for j in range(depths[i]):
                extra = {"mlp_ratio": mlp_ratio, "drop_path": rates[i][j], **dd}
                if j < agent_blocks[i]:
                    drop = (attn_drop_rate, proj_drop_rate)
                    block = agent_block(dim, num_heads[i], agents[i], grids[i], drop, **extra)
                else:
                    block = SwinTransformerBlock(
                        dim,
                        grids[i],
                        num_heads[i],
                        window_size=window,
                        shift_size=window // 2 if j % 2 else 0,
                        dynamic_mask=True,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        **extra,
                    )
                blocks.append(block)
            stem = partial(ConvDown, in_chans, dim, 4, 4, stem=True)
            down = partial(PatchMerging, dims[i - 1], dim) if i else stem
            stages.append(Stage(down(**dd), blocks))
        norm = nn.LayerNorm(dims[-1], **dd)
        super().__init__(stages, dims, norm, in_chans=in_chans, **dd, **kwargs)
        self.apply(init_linear)


def init_linear(module: nn.Module) -> None:
    """Narrow normal weights and zero biases for linear layers, as in all models of this family."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official state dict into ours, and fit it to the model's image size.

    ``patch_embed`` becomes ``stages.0.downsample``; ``layers.s.blocks.j`` becomes ``stages.s.blocks.j``;
    ``layers.s.downsample`` becomes ``stages.{s + 1}.downsample``; ``head`` becomes ``head.fc``. Agent
    layers: see `agent_weights.convert_layer`. Buffers are left out. Row and column tables are stretched
    linearly, window tables resampled bicubically.
    """
    state: dict[str, Tensor] = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if "patch_embed.proj.weight" in state:
        renamed = {}
        for key, value in state.items():
            if key.endswith(("relative_position_index", "attn_mask")):
                continue
            key = re.sub(r"^patch_embed\.", "stages.0.downsample.", key)
            key = re.sub(
                r"^layers\.(\d+)\.downsample\.",
                lambda m: f"stages.{int(m[1]) + 1}.downsample.",
                key,
            )
            key = re.sub(r"^layers\.", "stages.", key)
            renamed[re.sub(r"^head\.(?=weight|bias)", "head.fc.", key)] = value
        state = convert_layers(renamed, model)
    state = fit_tables(state, model)
    for path, layer in model.named_modules():
        key = f"{path}.relative_position_bias_table"
        if isinstance(layer, WindowAttention) and key in state:
            shape = layer.relative_position_bias_table.shape
            state[key] = resize_rel_pos_bias_table_simple(state[key], layer.window_size, shape)
    return state


default_cfgs = generate_default_cfgs(
    {
        f"agent_swin_{size}.untrained": cfg(
            first_conv="stages.0.downsample.proj", classifier="head.fc", pool_size=(7, 7)
        )
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentSwin:
    model: AgentSwin = build_model_with_cfg(
        AgentSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-T: agents in stages 1 to 3; 28.9 M parameters, 4.5 G multiply-adds at 224."""
    return _create("agent_swin_tiny", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-S: agents in stages 1 and 2; 49.7 M parameters, 8.7 G multiply-adds at 224."""
    args = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0), "drop_path_rate": 0.3}
    return _create("agent_swin_small", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-B: agents in stages 1, 2 and two blocks of 3; 88.1 M, 15.4 G multiply-adds at 224."""
    args = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
        "drop_path_rate": 0.5,
    }
    return _create("agent_swin_base", pretrained, **(args | kwargs))
