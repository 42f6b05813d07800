"""MALA, linear attention that keeps the length of its queries, and MAViT, backbones of it.

Dividing linear attention by the sum of its weights cancels the length of a query's features, and with it
how sharply the query looks. MALA scales the weights and subtracts a constant instead, so that they still sum
to one and a longer query looks more sharply. "Rectifying Magnitude Neglect in Linear Attention", arXiv
2507.00698. Layers and sizes are checked against numbers of the published code.

Deviations: the default computes what the published code does, which is not the paper's equation: there,
sums over keys are means, and features are scaled by ``head_dim ** -0.5``. ``variant="paper"`` is the
equation, for models trained from scratch. Like the published model, MAViT is linear in its first two stages
only; the other two are softmax attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import linear_attention
from mmattn_kernels.linear.features import rotate
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from mmattn.errors import ConfigError
from mmattn.nn._timm import pyramid_cfg, register_pyramid

__all__ = ["MALA", "GatedSoftmaxAttention", "MAViT", "MAViTBlock", "grid_rope"]

Rope = tuple[Tensor, Tensor]


def grid_rope(grid: tuple[int, int], head_dim: int, x: Tensor) -> Rope:
    """Cosines and sines ``[N, D / 2]`` of a grid: half of the pairs turn with the row, half with the column.

    Raises:
        ConfigError: a head dimension that is not a multiple of 4.
    """
    if head_dim % 4:
        raise ConfigError(
            f"grid_rope: the head dimension is {head_dim}; rows and columns both need pairs, so it has to "
            "be a multiple of 4."
        )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Angles are fp32 in published checkpoints.
    angle = 1.0 / 10000 ** torch.linspace(0, 1, head_dim // 4, device=x.device)
    rows, columns = (torch.arange(n, device=x.device, dtype=work) for n in grid)
    turns = torch.cat(
        [
            (rows[:, None, None] * angle.to(work)).expand(*grid, -1),
            (columns[None, :, None] * angle.to(work)).expand(*grid, -1),
        ],
        -1,
    ).flatten(0, 1)
    return turns.cos(), turns.sin()


class _GatedAttention(nn.Module):
    """What both attentions of MAViT share: projection, local convolution and gate."""

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"{type(self).__name__}: {num_heads} heads do not divide dim {dim}.")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        b, c, y, w = x.shape
        qkv, gate = self.qkvo(x).split([3 * c, c], 1)
        local = self.lepe(qkv[:, 2 * c :])
        q, k, v = qkv.reshape(b, 3, self.num_heads, -1, y * w).transpose(3, 4).unbind(1)
        out = self.attend(q, k, v, rope).transpose(2, 3).reshape(b, c, y, w)
        projected: Tensor = self.proj((out + local) * gate)
        return projected


class MALA(_GatedAttention):
    """Magnitude-aware linear attention on a map, in time linear in its tokens.

    Args:
        dim: channels.
        num_heads: heads; divides `dim`.
        variant: ``released`` for the published code and its checkpoints, ``paper`` for the equation.

    Shapes:
        ``x [B, C, Y, X]`` to the same; ``rope`` cosines and sines ``[Y * X, D / 2]`` (see `grid_rope`).

    Raises:
        ConfigError: heads that do not divide the channels, an unknown variant.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        variant: str = "released",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        if variant not in ("released", "paper"):
            raise ConfigError(f"MALA: variant {variant!r} is neither 'released' nor 'paper'.")
        self.variant = variant

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        released = self.variant == "released"
        return linear_attention(
            q,
            k,
            v,
            feature_map="elu1",
            normalizer="mala" if released else "mala_paper",
            rope=rope,
            scale=self.head_dim**-0.5 if released else 1.0,
            eps=1e-6,
        )


class GatedSoftmaxAttention(_GatedAttention):
    """Softmax attention with the projection, convolution and gate of `MALA`; same arguments and shapes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return F.scaled_dot_product_attention(q, k, v)


class ConvMlp(nn.Module):
    """An MLP on a map ``[B, C, Y, X]`` whose hidden channels also see their 3 x 3 neighborhood."""

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        out: Tensor = self.fc2(x + self.dwconv(x))
        return out


class MAViTBlock(nn.Module):
    """Positional convolution, attention and MLP on a map ``[B, C, Y, X]``.

    Args:
        linear: `MALA`; otherwise `GatedSoftmaxAttention`.
        layer_scale: start of the learned factor per channel on attention and MLP.
        variant: of `MALA`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float = 0.0,
        variant: str = "released",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm2d(dim, **dd)
        self.attn: nn.Module = (
            MALA(dim, num_heads, variant, **dd)
            if linear
            else GatedSoftmaxAttention(dim, num_heads, **dd)
        )
        self.ls1 = LayerScale2d(dim, layer_scale, **dd)
        self.norm2 = LayerNorm2d(dim, **dd)
        self.ffn = ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.ls2 = LayerScale2d(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rope)))
        out: Tensor = x + self.drop_path(self.ls2(self.ffn(self.norm2(x))))
        return out


class Stem(nn.Module):
    """An image ``[B, 3, Y, X]`` as a map ``[B, C, Y / 4, X / 4]``, by four convolutions."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        widths, layers = [in_chans, dim // 2, dim // 2, dim // 2, dim], []
        for i, stride in enumerate((2, 1, 1, 2)):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, **dd),
                nn.BatchNorm2d(widths[i + 1], **dd),
                nn.GELU(),
            ]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class Downsample(nn.Module):
    """Halve both sides of a map by a strided convolution."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.reduction(x))
        return out


class Stage(nn.Module):
    """Downsampling, except in the first stage, and the blocks of one resolution, which share RoPE."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], head_dim: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.head_dim = head_dim
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        rope = grid_rope((x.shape[2], x.shape[3]), self.head_dim, x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, rope)
            else:
                x = block(x, rope)
        return x


class MAViT(nn.Module):
    """Pyramid of four stages of gated attention, for images of any size.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: as in timm.
        dims, depths, num_heads, linear: channels, blocks and heads of every stage, and whether its
            attention is linear.
        mlp_ratio: hidden channels of the MLPs, as a multiple.
        layer_scale: start of the learned factors, one per stage.
        head_dim: channels of the projection in front of the classifier.
        block: keyword arguments for every block, such as ``{"variant": "paper"}``.

    Shapes:
        Images ``[B, in_chans, Y, X]``; `forward_features` returns ``[B, head_dim, Y / 32, X / 32]``.

    Raises:
        ConfigError: stages that differ in number; heads that do not divide the channels by a multiple of 4.
    """

    block_type: ClassVar[type[nn.Module]] = MAViTBlock

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        linear: Sequence[bool] = (True, True, False, False),
        mlp_ratio: float = 3.5,
        layer_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        head_dim: int = 2048,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        lengths = {len(x) for x in (dims, depths, num_heads, linear, layer_scale)}
        if len(lengths) > 1:
            raise ConfigError(
                f"{type(self).__name__}: dims, depths, num_heads, linear and layer_scale have lengths "
                f"{sorted(lengths)}; one entry of each is needed per stage."
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_embed = Stem(in_chans, dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i, dim in enumerate(dims):
            blocks = [
                self.block_type(
                    dim,
                    num_heads[i],
                    linear[i],
                    mlp_ratio,
                    layer_scale[i],
                    rate,
                    **block or {},
                    **dd,
                )
                for rate in rates[i]
            ]
            down = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(down, blocks, dim // num_heads[i]))
            self.feature_info.append(
                {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = head_dim
        self.proj: nn.Module = nn.Conv2d(dims[-1], head_dim, 1, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(head_dim, **dd)
        self.head = ClassifierHead(head_dim, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:proj|norm)", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def _project(self, x: Tensor) -> Tensor:
        # After pruning there is no projection, and features are the last map as it is.
        return x if isinstance(self.proj, nn.Identity) else F.silu(self.norm(self.proj(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after chosen stages ``[B, C, Y, X]``, and the final features unless told otherwise.

        `norm` has nothing to act on: the only norm after the stages belongs to the projection.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"MAViT: output_fmt {output_fmt!r} was asked for; NCHW is available.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                maps.append(x)
            if i == len(self.stages) - 1 and not intermediates_only:
                x = self._project(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take out what the chosen intermediate maps do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.proj, self.norm = nn.Identity(), nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        kept: list[int] = take
        return kept

    def forward_features(self, x: Tensor) -> Tensor:
        return self._project(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the published state dict: ``layers.i`` to ``stages.i``, where downsampling opens a stage.

    ``gamma_1 [1, C, 1, 1]`` becomes ``ls1.gamma [C]``, ``norm1.norm`` becomes ``norm1``, ``head``, there a
    convolution, becomes the linear ``head.fc``; angles of RoPE are computed and not loaded.
    """
    if not any(key.startswith("layers.") for key in state_dict):
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        if key.endswith("RoPE.angle"):
            continue
        key = re.sub(
            r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key
        )
        key = re.sub(r"^layers\.", "stages.", key)
        key = re.sub(r"\.norm([12])\.norm\.", r".norm\1.", key)
        if key.startswith("head."):
            key, value = "head.fc." + key[5:], value.flatten(1) if value.ndim == 4 else value
        if found := re.match(r"(.*)\.gamma_([12])$", key):
            key, value = f"{found[1]}.ls{found[2]}.gamma", value.flatten()
        renamed[key] = value
    return renamed


VARIANTS: dict[str, dict[str, Any]] = {
    "mavit_tiny": {"drop_path_rate": 0.1},
    "mavit_small": {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    },
    "mavit_base": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "mavit_large": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6,) * 4,
        "head_dim": 2560,
        "drop_path_rate": 0.55,
    },
}
"""Settings of every registered model; stochastic depth is that of the published training."""

default_cfgs = generate_default_cfgs({name: pyramid_cfg() for name in VARIANTS})


def _register(name: str) -> Any:
    return register_pyramid(MAViT, name, VARIANTS[name], checkpoint_filter_fn, __name__)


mavit_tiny = _register("mavit_tiny")
mavit_small = _register("mavit_small")
mavit_base = _register("mavit_base")
mavit_large = _register("mavit_large")
