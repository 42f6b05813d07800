"""Agent-CSwin: cross-shaped-window transformers whose early stages see the whole map through agents.

From "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, on the frame of
"CSWin Transformer", arXiv 2107.00652. Parameters and multiply-adds equal those of the authors' models.
Their checkpoints load through `checkpoint_filter_fn`; they carry no licence and are not offered for download
here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmattn.nn.agent_pyramid import (
    ConvDown,
    MapBlock,
    Pyramid,
    Stage,
    agent_block,
    built_grids,
    drop_path_rates,
)
from mmattn.nn.agent_swin import init_linear
from mmattn.nn.agent_weights import cfg, convert_layers, fit_tables

__all__ = ["AgentCSwin", "StripeAttention"]


class StripeAttention(nn.Module):
    """Attention inside stripes: half of the heads in columns of the map, half in rows.

    A depthwise convolution of the values, which stops at the stripe's border, is added per stripe (locally
    enhanced position encoding). Stripes that do not divide the map are filled up with cells nobody attends
    to. Plain torch, because a stripe is a dense problem of a few hundred tokens.

    Args:
        dim: channels C.
        num_heads: heads H; even with a `stripe`.
        stripe: width of the stripes in tokens; None: one stripe, the whole map, for all heads.
        attn_drop, proj_drop: dropout of attention map and output, in [0, 1).

    Shapes:
        ``forward(x [B, Y * X, C], (Y, X)) -> [B, Y * X, C]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int | None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stripe, self.attn_drop = stripe, attn_drop
        branches = 1 if stripe is None else 2
        self.branch_heads = num_heads // branches
        part = dim // branches
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.value_conv = nn.ModuleList(
            nn.Conv2d(part, part, 3, padding=1, groups=part, **dd) for _ in range(branches)
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, cols = grid
        qkv = self.qkv(x).unflatten(2, (3, -1)).unflatten(1, grid)
        if self.stripe is None:
            shapes = [grid]
        else:
            shapes = [(rows, min(self.stripe, cols)), (min(self.stripe, rows), cols)]
        parts = qkv.chunk(len(shapes), dim=-1)
        out = [
            self._branch(i, part, shape)
            for i, (part, shape) in enumerate(zip(parts, shapes, strict=False))
        ]
        mixed: Tensor = self.proj_drop(self.proj(torch.cat(out, dim=-1).flatten(1, 2)))
        return mixed

    def _branch(self, branch: int, qkv: Tensor, stripe: tuple[int, int]) -> Tensor:
        b, rows, cols = qkv.shape[:3]
        below, beside = -rows % stripe[0], -cols % stripe[1]
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, beside, 0, below))
        tiles = _tiles(qkv, stripe)
        q, k, v = (
            t.unflatten(2, (self.branch_heads, -1)).transpose(1, 2) for t in tiles.unbind(dim=2)
        )
        mask = None
        if below or beside:
            real = F.pad(qkv.new_ones(1, rows, cols, 1), (0, 0, 0, beside, 0, below))
            mask = _tiles(real, stripe)[:, None, None, :, 0].bool().repeat(b, 1, 1, 1)
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        value_map = tiles[:, :, 2].transpose(1, 2).unflatten(2, stripe)
        out = out.transpose(1, 2).flatten(2)
        out = out + self.value_conv[branch](value_map).flatten(2).transpose(1, 2)
        high, wide = (rows + below) // stripe[0], (cols + beside) // stripe[1]
        out = out.view(b, high, wide, *stripe, -1).transpose(2, 3)
        whole: Tensor = out.flatten(3, 4).flatten(1, 2)
        return whole[:, :rows, :cols]


def _tiles(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, Y, X, ...]`` to ``[B * tiles, size[0] * size[1], ...]``, tiles row by row."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    tiles: Tensor = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return tiles


class AgentCSwin(Pyramid):
    """A cross-shaped-window transformer with agent attention in its early stages.

    Args:
        img_size: side of the image in pixels, or (rows, columns), that bias tables and stripes are built
            for; other sizes stretch the tables and keep the stripes' width.
        embed_dim: channels of the first stage; every stage doubles them.
        depths, num_heads: blocks and heads per stage.
        agents: agents per stage, square numbers.
        agent_stages: how many stages, counted from the first, use agents.
        stripe: width of the stripes of the other stages but the last, in tokens; None: an eighth of the
            first map. The last stage attends over its whole map.
        mlp_ratio: hidden channels of the MLPs over channels.
        drop_path_rate, proj_drop_rate, attn_drop_rate: dropouts in [0, 1).
        **kwargs: of `Pyramid`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_stages: int = 2,
        stripe: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [embed_dim << i for i in range(len(depths))]
        grids = built_grids(img_size, len(depths))
        stripe = stripe or max(1, min(grids[0]) // 8)
        rates = drop_path_rates(drop_path_rate, depths)
        drop = (attn_drop_rate, proj_drop_rate)
        stages = []
        for i, dim in enumerate(dims):
            last = i == len(dims) - 1
            blocks = []
            for rate in rates[i]:
                extra = {"mlp_ratio": mlp_ratio, "drop_path": rate, **dd}
                if i < agent_stages:
                    block = agent_block(dim, num_heads[i], agents[i], grids[i], drop, **extra)
                else:
                    width = None if last else stripe
                    attn = StripeAttention(dim, num_heads[i], width, *drop, **dd)
                    block = MapBlock(attn, dim, proj_drop=proj_drop_rate, **extra)
                blocks.append(block)
            if i == 0:
                down = ConvDown(in_chans, dim, 7, 4, 2, stem=True, **dd)
            else:
                down = ConvDown(dims[i - 1], dim, 3, 2, 1, **dd)
            stages.append(Stage(down, blocks))
        norm = nn.LayerNorm(dims[-1], **dd)
        super().__init__(stages, dims, norm, in_chans=in_chans, **dd, **kwargs)
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official state dict into ours, and fit it to the model's image size.

    ``stage1_conv_embed.{0,2}`` become ``stages.0.downsample.{proj,norm}``; ``merge{s}.conv`` becomes
    ``stages.{s}.downsample.proj``; ``stage{s}.j`` becomes ``stages.{s - 1}.blocks.j``, where ``qkv``,
    ``proj`` and ``attns.{0,1}.get_v`` move into ``attn``; ``head`` becomes ``head.fc``. Agent layers: see
    `agent_weights.convert_layer`. Row and column tables are stretched linearly.
    """
    state: dict[str, Tensor] = state_dict
    for container in ("state_dict_ema", "model"):
        state = state.get(container, state)  # type: ignore[assignment]
    if "stage1_conv_embed.0.weight" in state:
        with_agents = {k.split("attns.")[0] for k in state if k.endswith("an_bias")}
        renamed = {}
        for key, value in state.items():
            block = re.match(r"stage(\d+)\.(\d+)\.", key)
            if block:
                rest = key[block.end() :]
                rest = re.sub(r"^(qkv|proj)\.", r"attn.\1.", rest)
                if block[0] in with_agents:
                    rest = rest.replace("attns.0.", "attn.")
                else:
                    rest = re.sub(r"attns\.(\d)\.get_v\.", r"attn.value_conv.\1.", rest)
                key = f"stages.{int(block[1]) - 1}.blocks.{block[2]}.{rest}"
            key = key.replace("stage1_conv_embed.0.", "stages.0.downsample.proj.")
            key = key.replace("stage1_conv_embed.2.", "stages.0.downsample.norm.")
            key = re.sub(r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj.", key)
            key = re.sub(r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm.", key)
            renamed[re.sub(r"^head\.(?=weight|bias)", "head.fc.", key)] = value
        state = convert_layers(renamed, model)
    return fit_tables(state, model)


default_cfgs = generate_default_cfgs(
    {
        f"agent_cswin_{size}.untrained": cfg(
            first_conv="stages.0.downsample.proj", classifier="head.fc", pool_size=(7, 7)
        )
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentCSwin:
    model: AgentCSwin = build_model_with_cfg(
        AgentCSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-T: 20.5 M parameters, 4.3 G multiply-adds at 224."""
    return _create("agent_cswin_tiny", pretrained, **({"drop_path_rate": 0.2} | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-S: 32.8 M parameters, 6.8 G multiply-adds at 224."""
    return _create("agent_cswin_small", pretrained, **({"depths": (3, 6, 29, 2)} | kwargs))


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    """Agent-CSwin-B: 73.2 M parameters, 14.9 G multiply-adds at 224; published at 224 and 384."""
    args = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
    return _create("agent_cswin_base", pretrained, **(args | kwargs))
