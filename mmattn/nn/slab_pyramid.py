"""SLAB on pyramids: PVT with simplified linear attention everywhere, CSwin with it in two stages.

"SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", arXiv 2405.11582; layer and norm are those of `mmattn.nn.slab`. State dicts of the authors
load through `checkpoint_filter_fn`. Parameters and multiply-adds are checked against sums written out from
the published settings; the authors print none for these models.

Deviations: those of `mmattn.nn.slab`. Keys of the PVTs are read at full resolution, as in all published
settings, so there is no reduction. The published CSwin stores a parameter ``scale`` in every linear layer
that nothing reads; it is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm, resample_abs_pos_embed_nhwc, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmattn.nn.agent_cswin import StripeAttention
from mmattn.nn.agent_pvt import PositionedDown
from mmattn.nn.agent_pyramid import (
    ConvDown,
    MapBlock,
    Pyramid,
    Stage,
    built_grids,
    drop_path_rates,
)
from mmattn.nn.agent_swin import init_linear
from mmattn.nn.agent_weights import cfg
from mmattn.nn.prepbn import convert_norms
from mmattn.nn.slab import SimplifiedLinearAttention, Stepping, official_names

__all__ = ["SLABPVT", "MapSLA", "SLABCSwin"]


class MapSLA(SimplifiedLinearAttention):
    """`SimplifiedLinearAttention` that is told its grid, with or without a second convolution of values.

    Args:
        value_conv: add a 3 x 3 depth-wise convolution that heads do not share (CSwin's position encoding).
        dim, num_heads, grid, **kwargs: of `SimplifiedLinearAttention`.

    Shapes:
        ``forward(x [B, Y * X, C], (Y, X)) -> [B, Y * X, C]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        value_conv: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid, **dd, **kwargs)
        self.value_conv = (
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if value_conv else None
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return super().forward(x, grid=grid)

    def local(self, v: Tensor) -> Tensor:
        """Both convolutions of values ``[B, H, D, Y, X]``: ``[B, C, Y, X]``."""
        shared = super().local(v)
        return shared if self.value_conv is None else shared + self.value_conv(v.flatten(1, 2))


class SLABPVT(Stepping, Pyramid):
    """A pyramid vision transformer with SLA in every block and `PRepBN` for every norm.

    Args:
        img_size: side of the image in pixels, or (rows, columns), that positions are built for; they are
            resampled at other sizes.
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and MLP widths per stage.
        norm_steps: training steps in which layer norms become batch norms.
        drop_path_rate, proj_drop_rate, pos_drop_rate: dropouts in [0, 1).
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
        norm_steps: int = 300_000,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = drop_path_rates(drop_path_rate, depths)
        rows, cols = to_2tuple(img_size)
        stages = []
        for i, dim in enumerate(embed_dims):
            grid = (rows // (4 << i), cols // (4 << i))
            patch = 2 if i else 4
            before = embed_dims[i - 1] if i else in_chans
            down = PositionedDown(
                before, dim, patch, patch, stem=i == 0, grid=grid, drop=pos_drop_rate, **dd
            )
            blocks = [
                MapBlock(
                    MapSLA(dim, num_heads[i], grid, proj_drop=proj_drop_rate, **dd),
                    dim,
                    mlp_ratio=mlp_ratios[i],
                    drop_path=rate,
                    proj_drop=proj_drop_rate,
                    **dd,
                )
                for rate in rates[i]
            ]
            stages.append(Stage(down, blocks))
        super().__init__(stages, embed_dims, nn.Identity(), in_chans=in_chans, **dd, **kwargs)
        _finish(self, norm_steps, eps=1e-6)


class SLABCSwin(Stepping, Pyramid):
    """A cross-shaped-window transformer with SLA in its first stages, and `PRepBN` for every norm.

    Args:
        img_size: side of the image in pixels, or (rows, columns), that positions and stripes are built for;
            other sizes resample the positions and keep the stripes' width.
        embed_dim: channels of the first stage; every stage doubles them.
        depths, num_heads: blocks and heads per stage.
        linear_stages: how many stages, from the first, attend to the whole map by SLA.
        stripe: width of the stripes of the other stages but the last, in tokens; None: an eighth of the
            first map. The last stage attends over its whole map.
        mlp_ratio: hidden channels of the MLPs over channels.
        norm_steps: training steps in which layer norms become batch norms.
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
        linear_stages: int = 2,
        stripe: int | None = None,
        mlp_ratio: float = 4.0,
        norm_steps: int = 120_000,
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
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                if i < linear_stages:
                    attn = MapSLA(
                        dim, num_heads[i], grids[i], value_conv=True, proj_drop=proj_drop_rate, **dd
                    )
                else:
                    width = None if i == len(dims) - 1 else stripe
                    attn = StripeAttention(
                        dim, num_heads[i], width, attn_drop_rate, proj_drop_rate, **dd
                    )
                blocks.append(
                    MapBlock(attn, dim, mlp_ratio, drop_path=rate, proj_drop=proj_drop_rate, **dd)
                )
            if i == 0:
                down = ConvDown(in_chans, dim, 7, 4, 2, stem=True, **dd)
            else:
                down = ConvDown(dims[i - 1], dim, 3, 2, 1, **dd)
            stages.append(Stage(down, blocks))
        norm = nn.LayerNorm(dims[-1], **dd)
        super().__init__(stages, dims, norm, in_chans=in_chans, **dd, **kwargs)
        _finish(self, norm_steps, eps=1e-5)


def _finish(model: nn.Module, norm_steps: int, eps: float) -> None:
    model.apply(init_linear)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            weight = module.weight
            norm = LayerNorm(len(weight), eps=eps, device=weight.device, dtype=weight.dtype)
            model.set_submodule(name, norm)
    convert_norms(model, norm_steps)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official state dict into ours, and fit it to the model's image size.

    PVT: ``patch_embed{s}`` and ``pos_embed{s}`` become ``stages.{s - 1}.downsample``, ``block{s}.j`` becomes
    ``stages.{s - 1}.blocks.j``, ``q`` and ``kv`` are joined to ``qkv``. CSwin: ``stage1_conv_embed.{0,2}``
    and ``merge{s}.{conv,norm}`` become ``downsample.{proj,norm}``; ``stage{s}.j`` becomes
    ``stages.{s - 1}.blocks.j``, where ``qkv``, ``proj``, ``attns.0.{dwc,positional_encoding}`` and
    ``get_v`` (``value_conv``) move into ``attn``. Both: ``head`` becomes ``head.fc``, norms as in
    `mmattn.nn.slab`. Position tables are taken for square maps and resampled bicubically.
    """
    state: dict[str, Tensor] = state_dict
    for container in ("state_dict_ema", "model"):
        state = state.get(container, state)  # type: ignore[assignment]
    renamed = {}
    for key, value in state.items():
        if key.startswith("pos_embed"):
            side = math.isqrt(value.shape[1])
            value = value.unflatten(1, (side, side))
            key = f"stages.{int(key[9:]) - 1}.downsample.pos_embed"
        if key.endswith("attns.0.scale"):
            continue
        if match := re.match(r"(patch_embed|block|stage)(\d)\.", key):
            part = "downsample" if match[1] == "patch_embed" else "blocks"
            key = f"stages.{int(match[2]) - 1}.{part}.{key[match.end() :]}"
        key = key.replace("stage1_conv_embed.0.", "stages.0.downsample.proj.")
        key = key.replace("stage1_conv_embed.2.", "stages.0.downsample.norm.")
        key = re.sub(r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj.", key)
        key = re.sub(r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm.", key)
        key = re.sub(r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2.", key)
        renamed[re.sub(r"^head\.(?=weight|bias)", "head.fc.", key)] = value
    for path, layer in model.named_modules():
        if isinstance(layer, MapSLA):
            _collect_linear(renamed, path)
        elif isinstance(layer, StripeAttention):
            old = path.removesuffix("attn")
            for key in [k for k in renamed if k.startswith(f"{old}attns.")]:
                renamed[re.sub(r"attns\.(\d)\.get_v\.", r"attn.value_conv.\1.", key)] = renamed.pop(
                    key
                )
    state = official_names(renamed, model)
    for path, layer in model.named_modules():
        key = f"{path}.pos_embed"
        if isinstance(layer, PositionedDown) and key in state:
            state[key] = resample_abs_pos_embed_nhwc(state[key], list(layer.pos_embed.shape[1:3]))
    return state


def _collect_linear(state: dict[str, Tensor], path: str) -> None:
    """Gather one official linear layer under `path`."""
    old = path.removesuffix("attn") + "attns.0."
    for key in [k for k in state if k.startswith(old)]:
        name = key.removeprefix(old).replace("get_v.", "value_conv.")
        state[f"{path}.{name}"] = state.pop(key)
    for kind in ("weight", "bias"):
        if f"{path}.q.{kind}" in state:
            parts = [state.pop(f"{path}.{part}.{kind}") for part in ("q", "kv")]
            state[f"{path}.qkv.{kind}"] = torch.cat(parts)


VARIANTS: dict[str, dict[str, Any]] = {
    "slab_pvt_tiny": {},
    "slab_pvt_small": {"depths": (3, 4, 6, 3)},
    "slab_pvt_medium": {"depths": (3, 4, 18, 3)},
    "slab_cswin_tiny": {},
    "slab_cswin_small": {"depths": (2, 4, 32, 2)},
}
"""Settings of every registered model: those that the authors trained."""

default_cfgs = generate_default_cfgs(
    {
        name: cfg(
            first_conv="stages.0.downsample.proj",
            classifier="head.fc",
            pool_size=(7, 7),
            paper_ids="arXiv:2405.11582",
        )
        for name in VARIANTS
    }
)


def _register(name: str) -> Any:
    cls = SLABPVT if name.startswith("slab_pvt") else SLABCSwin

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name], **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`{cls.__name__}` with the settings of {name}."
    return register_model(create)


slab_pvt_tiny = _register("slab_pvt_tiny")
slab_pvt_small = _register("slab_pvt_small")
slab_pvt_medium = _register("slab_pvt_medium")
slab_cswin_tiny = _register("slab_cswin_tiny")
slab_cswin_small = _register("slab_cswin_small")
