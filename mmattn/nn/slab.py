"""SLAB: simplified linear attention, and batch norms that take over from layer norms during training.

Simplified linear attention (SLA) has ReLU features, a learned position added to keys, and a depth-wise
convolution of values that all heads share. Progressive re-parameterised batch norm (PRepBN) starts training
as a layer norm, blends into ``BN(x) + alpha * x``, and ends as that alone. It is then affine, and `fold`
puts it into the linear layer behind it, so that the deployed model has no norms. "SLAB: Efficient
Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization", arXiv
2405.11582. Checked against numbers of the published layer, parameter counts, and unfolded models.

Deviations: the blend is set once per forward of a model (`advance`), outside of what gradient checkpointing
runs twice; the published norm counts inside its own forward. Batch statistics are gathered during warm-up
too, which the published code skips. Position tables are resampled for other resolutions.
"""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

import torch
from mmattn_kernels import linear_attention
from timm.layers import LayerNorm, get_device_dtype, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    checkpoint_filter_fn as swin_checkpoint_filter_fn,
)
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn as vit_checkpoint_filter_fn,
)
from torch import Tensor, nn

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.nn.prepbn import PRepBN, RepBN, advance, convert_norms, fold_into
from mmattn.nn.slab_fold import fold

__all__ = [
    "PRepBN",
    "RepBN",
    "SLABDeiT",
    "SLABSwin",
    "SimplifiedLinearAttention",
    "advance",
    "convert_norms",
    "fold",
    "fold_into",
]


class SimplifiedLinearAttention(nn.Module):
    """Multi-head linear attention with ReLU features, keys that know their place, and a local path.

    Args:
        dim: channels.
        num_heads: heads; divides `dim`.
        grid: rows and columns of the tokens.
        qkv_bias: whether queries, keys and values have a bias.
        kernel_size: side of the convolution of values, odd.
        proj_drop: dropout of the result, 0 to 1.

    Shapes:
        ``x [B, N, C]`` to the same, N tokens of `grid` in row-major order, of the grid named in the call, or
        of another square. Then the position table ``positional_encoding [1, Y * X, C]`` is resampled for
        this call.

    Raises:
        ConfigError: heads that do not divide the channels.
        UnsupportedCall: a mask, or tokens of no square that are not those of `grid`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        qkv_bias: bool = True,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(
                f"SimplifiedLinearAttention: {num_heads} heads do not divide dim {dim}."
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.grid = grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        width = dim // num_heads
        self.dwc = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, **dd
        )
        self.positional_encoding = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim, **dd))
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the position table itself to another grid."""
        if tuple(grid) != tuple(self.grid):
            self.positional_encoding = nn.Parameter(self._positions(grid).detach().clone())
            self.grid = grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table: Tensor = resample_abs_pos_embed(
            self.positional_encoding, list(grid), list(self.grid), num_prefix_tokens=0
        )
        return table

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UnsupportedCall(
                "SimplifiedLinearAttention: a mask was given; every token sees all others here."
            )
        n, c = x.shape[1:]
        grid = grid or self.grid
        if n != grid[0] * grid[1]:
            grid = (isqrt(n), isqrt(n))
            if grid[0] ** 2 != n:
                raise UnsupportedCall(
                    f"SimplifiedLinearAttention: {n} tokens are neither the grid {self.grid} nor a "
                    "square; call set_input_size of the model, or set_grid, first."
                )
        q, k, v = self.qkv(x).split(c, -1)
        k = k + self._positions(grid)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = linear_attention(q, k, v, feature_map="relu", normalizer="sum", eps=1e-6)
        local = self.local(v.transpose(2, 3).unflatten(3, grid)).flatten(2).transpose(1, 2)
        result: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2) + local))
        return result

    def local(self, v: Tensor) -> Tensor:
        """What values ``[B, H, D, Y, X]`` add at their own place: ``[B, C, Y, X]``."""
        out: Tensor = self.dwc(v.flatten(0, 1)).view(v.shape[0], -1, *v.shape[3:])
        return out


class Stepping:
    """Every training forward is a step of the norms; position tables are not decayed."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._advance()
        out: Tensor = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        return out

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in timm."""
        self._advance()
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        assert isinstance(self, nn.Module)
        names = (name for name, _ in self.named_parameters())
        tables = {name for name in names if name.endswith("positional_encoding")}
        return tables | set(super().no_weight_decay())  # type: ignore[misc]

    def _advance(self) -> None:
        assert isinstance(self, nn.Module)
        if self.training:
            advance(self)


class SLABDeiT(Stepping, VisionTransformer):
    """A vision transformer without class token, with SLA in every block and `PRepBN` for every norm.

    Args:
        norm_steps: training steps in which layer norms become batch norms.
        **kwargs: of timm's `VisionTransformer`. With `dynamic_img_size` any square image is taken;
            `set_input_size` resizes the model to any rectangle.

    Raises:
        ConfigError: prefix tokens or patch dropout, which leave no grid for the convolution; norms inside
            attention; a pooling other than the mean or none.
    """

    def __init__(self, norm_steps: int = 60_000, **kwargs: Any) -> None:
        kwargs = {
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            **kwargs,
        }
        refused = (
            "class_token",
            "reg_tokens",
            "patch_drop_rate",
            "fc_norm",
            "qk_norm",
            "scale_attn_norm",
        )
        for name in refused:
            if kwargs.get(name):
                raise ConfigError(
                    f"SLABDeiT: {name}={kwargs[name]!r} was asked for; it has no {name}."
                )
        if kwargs["global_pool"] not in ("avg", ""):
            raise ConfigError(
                f"SLABDeiT: global_pool {kwargs['global_pool']!r} was asked for; 'avg' and '' are "
                "available."
            )
        super().__init__(**kwargs)
        convert_norms(self, norm_steps)
        for block in self.blocks:
            block.attn = SimplifiedLinearAttention(
                self.embed_dim,
                block.attn.num_heads,
                self.patch_embed.grid_size,
                qkv_bias=kwargs.get("qkv_bias", True),
                proj_drop=kwargs.get("proj_drop_rate", 0.0),
                **get_device_dtype(self),
            )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resize all position tables to another image or patch size."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            block.attn.set_grid(self.patch_embed.grid_size)


class MapBlock(nn.Module):
    """A block of a Swin transformer with SLA over the whole map ``[B, Y, X, C]``, not over windows."""

    def __init__(self, block: SwinTransformerBlock, attn: SimplifiedLinearAttention) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = attn
        self.drop_path1 = block.drop_path1
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.drop_path2 = block.drop_path2

    def set_input_size(self, feat_size: tuple[int, int], *_: Any, **__: Any) -> None:
        """Resize the position table; there is no window whose size could be set."""
        self.attn.set_grid((feat_size[0], feat_size[1]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x).flatten(1, 2)
        x = x + self.drop_path1(self.attn(tokens, grid=(x.shape[1], x.shape[2])).view(x.shape))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class SLABSwin(Stepping, SwinTransformer):
    """A Swin transformer with SLA in its first stages, and `PRepBN` for every norm.

    Args:
        linear_stages: how many stages, from the first, attend to the whole map by SLA.
        norm_steps: training steps in which layer norms become batch norms.
        **kwargs: of timm's `SwinTransformer`. With ``strict_img_size=False`` any image is taken.
    """

    def __init__(self, linear_stages: int = 2, norm_steps: int = 60_000, **kwargs: Any) -> None:
        super().__init__(**{"norm_layer": LayerNorm, **kwargs})
        for stage in self.layers[:linear_stages]:
            for i, block in enumerate(stage.blocks):
                attn = SimplifiedLinearAttention(
                    block.dim,
                    block.attn.num_heads,
                    tuple(block.input_resolution),
                    qkv_bias=kwargs.get("qkv_bias", True),
                    proj_drop=kwargs.get("proj_drop_rate", 0.0),
                    **get_device_dtype(self),
                )
                stage.blocks[i] = MapBlock(block, attn)
        convert_norms(self, norm_steps)


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: SLABDeiT | SLABSwin
) -> dict[str, Tensor]:
    """Rename the published state dict and fit its position tables to the model's image size.

    In every norm ``norm1`` becomes ``ln`` and ``norm2`` becomes ``repbn``. Downsampling and classifier of
    Swin transformers are where timm has them; all else keeps its name. A class token, which published
    models store and do not use, is left out.
    """
    state = official_names(state_dict.get("model", state_dict), model)  # type: ignore[arg-type]
    state.pop("cls_token", None)
    fit = swin_checkpoint_filter_fn if isinstance(model, SLABSwin) else vit_checkpoint_filter_fn
    return fit(state, model)  # type: ignore[no-any-return]


def official_names(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' norms renamed, position tables of keys fitted to the grids of `model`."""
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"(^|\.)(norm\d?)\.norm1\.", r"\1\2.ln.", key)
        key = re.sub(r"(^|\.)(norm\d?)\.norm2\.", r"\1\2.repbn.", key)
        if key.endswith(".positional_encoding"):
            layer: Any = model.get_submodule(key.rpartition(".")[0])
            grid = layer.grid
            value = resample_abs_pos_embed(value, list(grid), num_prefix_tokens=0)
        renamed[key] = value
    return renamed


VARIANTS: dict[str, dict[str, Any]] = {
    "slab_deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "slab_deit_small": {"embed_dim": 384, "num_heads": 6},
    "slab_swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "slab_swin_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "slab_swin_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
"""Settings of every registered model."""


def _cfg(name: str) -> dict[str, Any]:
    swin = name.startswith("slab_swin")
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7) if swin else None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc" if swin else "head",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})


def _register(name: str) -> Any:
    swin = name.startswith("slab_swin")

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        indices = kwargs.pop("out_indices", (0, 1, 2, 3) if swin else 3)
        return build_model_with_cfg(
            SLABSwin if swin else SLABDeiT,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            **{**VARIANTS[name], **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`{'SLABSwin' if swin else 'SLABDeiT'}` with the settings of {name}."
    return register_model(create)


slab_deit_tiny = _register("slab_deit_tiny")
slab_deit_small = _register("slab_deit_small")
slab_swin_tiny = _register("slab_swin_tiny")
slab_swin_small = _register("slab_swin_small")
slab_swin_base = _register("slab_swin_base")
