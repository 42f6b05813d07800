"""NAT and DiNAT: image backbones whose tokens attend to the window around them.

Every token of a feature map sees the 7 x 7 tokens nearest to it; at a border the window moves inward and
keeps its size. DiNAT spreads the window of every other block by a dilation, so that local and far sight
alternate. "Neighborhood Attention Transformer", arXiv 2204.07143, and "Dilated Neighborhood Attention
Transformer", arXiv 2209.15001. The attention is checked against a loop over tokens, parameters and
multiply-accumulates against the published tables.

Deviations: the attention is `mmattn_kernels.neighborhood_attention`, which knows no learned relative bias;
today's NATTEN does not either. Models are therefore built without it. ``rel_pos_bias=True`` brings it
back, gathering keys in plain torch at 49 times their memory: published checkpoints need it, and loading one
without it is refused rather than done wrong. Where a window does not fit a small map, dilation shrinks
first and then the window; the published code pads with zeros that take part in the softmax.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mmattn_kernels import neighborhood_attention
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from mmattn.errors import ConfigError
from mmattn.nn._timm import pyramid_cfg, register_pyramid

__all__ = ["NAT", "NATBlock", "NeighborhoodAttention2d", "fit_window", "neighbors"]


def fit_window(length: int, window: int, dilation: int) -> tuple[int, int]:
    """The window and dilation that an axis of `length` tokens has room for."""
    window = min(window, length)
    return window, min(dilation, length // window)


def neighbors(length: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """Keys that every query of an axis sees, int64 ``[length, window]``."""
    position = torch.arange(length, device=device)
    residue, place = position % dilation, position // dilation
    last = (length - residue + dilation - 1) // dilation - window
    first = torch.minimum((place - window // 2).clamp(min=0), last)
    return (first[:, None] + torch.arange(window, device=device)) * dilation + residue[:, None]


class NeighborhoodAttention2d(nn.Module):
    """Multi-head self-attention of every token of a map to the window around it.

    Args:
        dim: channels.
        num_heads: heads; divides `dim`.
        kernel_size: tokens along each side of the window.
        dilation: distance of neighboring tokens of the window.
        qkv_bias: whether queries, keys and values have a bias.
        rel_pos_bias: learn a bias for every head and offset inside the window. This leaves the kernel.
        proj_drop: dropout of the output, 0 to 1.

    Shapes:
        ``x [B, Y, X, C]`` to the same; ``rpb [H, 2 * kernel_size - 1, 2 * kernel_size - 1]``.

    Raises:
        ConfigError: heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        rel_pos_bias: bool = False,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(
                f"NeighborhoodAttention2d: {num_heads} heads do not divide dim {dim}."
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads, side, side, **dd)) if rel_pos_bias else None
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        b, y, w, c = x.shape
        qkv = self.qkv(x).view(b, y * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        axes = [fit_window(n, self.kernel_size, self.dilation) for n in (y, w)]
        if self.rpb is None:
            windows, dilations = zip(*axes, strict=True)
            out = neighborhood_attention(q, k, v, (y, w), window=windows, dilation=dilations)
            assert isinstance(out, Tensor)
        else:
            out = self._with_bias(q, k, v, (y, w), axes)
        out = out.transpose(1, 2).reshape(b, y, w, c)
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def _with_bias(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], axes: list[tuple[int, int]]
    ) -> Tensor:
        """The same with the learned bias, on keys gathered for every query."""
        assert self.rpb is not None
        keys, offsets = [], []
        for length, (window, dilation) in zip(grid, axes, strict=True):
            seen = neighbors(length, window, dilation, q.device)
            own = torch.arange(length, device=q.device)[:, None]
            keys.append(seen)
            offsets.append((seen - own) // dilation + self.kernel_size - 1)
        rows, columns = (keys[0][:, None, :, None], keys[1][None, :, None, :])
        places = (rows * grid[1] + columns).reshape(grid[0] * grid[1], -1)
        bias = self.rpb[:, offsets[0][:, None, :, None], offsets[1][None, :, None, :]]
        bias = bias.reshape(bias.shape[0], *places.shape)
        scores = torch.einsum("bhnd,bhnwd->bhnw", q * q.shape[-1] ** -0.5, k[:, :, places]) + bias
        return torch.einsum("bhnw,bhnwd->bhnd", scores.softmax(-1), v[:, :, places])


class NATBlock(nn.Module):
    """Neighborhood attention and an MLP, each on a normalised map, ``[B, Y, X, C]`` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        rel_pos_bias: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def scaled() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention2d(
            dim,
            num_heads,
            kernel_size,
            dilation,
            rel_pos_bias=rel_pos_bias,
            proj_drop=proj_drop,
            **dd,
        )
        self.ls1 = scaled()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = scaled()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class Tokenizer(nn.Module):
    """An image ``[B, 3, Y, X]`` as a normalised map ``[B, Y / 4, X / 4, C]``, by two convolutions."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd), nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class Downsample(nn.Module):
    """Halve both sides of a map ``[B, Y, X, C]`` and double its channels."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return out


class NATStage(nn.Module):
    """Downsampling, except in the first stage, and the blocks of one resolution."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class NAT(nn.Module):
    """Pyramid of four stages of neighborhood attention, for images of any size from 32 pixels on.

    Args:
        in_chans, num_classes, global_pool, drop_rate, proj_drop_rate, drop_path_rate: as in timm.
        dim: channels of the first stage; each later one doubles them.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden channels of the MLPs, as a multiple.
        kernel_size: tokens along each side of a window.
        dilations: for every stage the dilations of its blocks, repeated as often as needed.
        layer_scale: start of a learned factor per channel on both branches of a block; None: no factor.
        rel_pos_bias: learn a relative bias (see `NeighborhoodAttention2d`).

    Shapes:
        Images ``[B, in_chans, Y, X]``; `forward_features` returns ``[B, Y / 32, X / 32, C]``, rounded up.

    Raises:
        ConfigError: heads that do not divide the channels, or stages that differ in number.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        layer_scale: float | None = None,
        rel_pos_bias: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dilations = dilations or ((1,),) * len(depths)
        if not len(depths) == len(num_heads) == len(dilations):
            raise ConfigError(
                f"NAT: {len(depths)} depths, {len(num_heads)} numbers of heads and {len(dilations)} "
                "dilations were given; one of each is needed per stage."
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_embed = Tokenizer(in_chans, dim, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i, depth in enumerate(depths):
            width = dim * 2**i
            blocks = [
                NATBlock(
                    width,
                    num_heads[i],
                    kernel_size,
                    dilations[i][j % len(dilations[i])],
                    mlp_ratio,
                    rel_pos_bias=rel_pos_bias,
                    proj_drop=proj_drop_rate,
                    drop_path=rates[i][j],
                    layer_scale=layer_scale,
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(NATStage(Downsample(width // 2, **dd) if i else nn.Identity(), blocks))
            self.feature_info.append(
                {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dim * 2 ** (len(depths) - 1)
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd
        )
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, NATStage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after chosen stages ``[B, C, Y, X]``, and the final features unless told otherwise."""
        if output_fmt != "NCHW":
            raise ConfigError(f"NAT: output_fmt {output_fmt!r} was asked for; NCHW is available.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            final = i == len(self.stages) - 1
            if i in take:
                kept = self.norm(x) if norm and final else x
                maps.append(kept.permute(0, 3, 1, 2).contiguous())
            if final and not intermediates_only:
                x = self.norm(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take out what the chosen intermediate maps do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        kept: list[int] = take
        return kept

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.stages(self.patch_embed(x)))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the published state dict: ``levels.i`` to ``stages.i``, where downsampling opens a stage.

    ``gamma1/gamma2`` become ``ls1.gamma/ls2.gamma`` and ``head`` becomes ``head.fc``.

    Raises:
        ConfigError: the checkpoint has a relative bias that the model has no place for.
    """
    if "head.fc.weight" in state_dict or any(key.startswith("stages.") for key in state_dict):
        return state_dict
    if any(key.endswith(".rpb") for key in state_dict) and not any(
        key.endswith(".rpb") for key in model.state_dict()
    ):
        raise ConfigError(
            "NAT: the checkpoint was trained with a learned relative bias, which this model lacks; "
            "create the model with rel_pos_bias=True."
        )
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(
            r"^levels\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key
        )
        key = re.sub(r"^levels\.", "stages.", key)
        key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
        renamed[re.sub(r"^head\.", "head.fc.", key)] = value
    return renamed


_DILATIONS = ((1, 8, 1), (1, 4, 1, 4), (1, 2), (1,))
_MINI = {"dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_TINY = {"dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
_SMALL = {
    "dim": 96,
    "depths": (3, 4, 18, 5),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2.0,
    "layer_scale": 1e-5,
}
_BASE = {**_SMALL, "dim": 128, "num_heads": (4, 8, 16, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    name + size: {**config, "dilations": dilations}
    for name, dilations in (("nat_", None), ("dinat_", _DILATIONS))
    for size, config in (("mini", _MINI), ("tiny", _TINY), ("small", _SMALL), ("base", _BASE))
}
"""Settings of every registered model."""

default_cfgs = generate_default_cfgs({name: pyramid_cfg() for name in VARIANTS})


def _register(name: str) -> Any:
    return register_pyramid(NAT, name, VARIANTS[name], checkpoint_filter_fn, __name__)


nat_mini = _register("nat_mini")
nat_tiny = _register("nat_tiny")
nat_small = _register("nat_small")
nat_base = _register("nat_base")
dinat_mini = _register("dinat_mini")
dinat_tiny = _register("dinat_tiny")
dinat_small = _register("dinat_small")
dinat_base = _register("dinat_base")
