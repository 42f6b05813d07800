"""The frame of the four-stage backbones: stem, stages, norm, head, and what timm asks of such a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, Mlp, get_device_dtype, to_2tuple
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mmattn.nn.agent import AgentAttention


class MapBlock(nn.Module):
    """Attention and MLP, each behind a norm and with a shortcut, on a map of channels-last tokens.

    Args:
        attn: called with ``(tokens [B, Y * X, C], (Y, X))``, returns tokens.
        dim: channels C.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: chance in [0, 1) that a sample skips a branch in training.
        proj_drop: dropout of the MLP, in [0, 1).
        eps: of both norms.

    Shapes:
        ``forward(x [B, Y, X, C]) -> [B, Y, X, C]``.
    """

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        mixed = self.attn(self.norm1(x).flatten(1, 2), grid).unflatten(1, grid)
        x = x + self.drop_path1(mixed)
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class Stage(nn.Module):
    """A change of resolution and the blocks behind it."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)  # type: ignore[no-any-return]
        out: Tensor = self.blocks(x)
        return out


class ConvDown(nn.Module):
    """A strided convolution and a norm: from channels first (`stem`) or channels last, to channels last."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        stem: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stem = stem
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.stem else x.permute(0, 3, 1, 2)
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class Pyramid(nn.Module):
    """A backbone of stages at strides 4, 8, 16 and 32 with timm's interface.

    Args:
        stages: the stages; the first one's `downsample` is the stem.
        dims: channels behind every stage.
        norm: behind the last stage.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: ``avg``, ``max``, or empty for none; see timm's `ClassifierHead`.
        drop_rate: dropout before the classifier, in [0, 1).
        channels_last: whether stages give ``[B, Y, X, C]`` rather than ``[B, C, Y, X]``.

    Shapes:
        ``forward(image [B, in_chans, Y, X]) -> [B, num_classes]``.
    """

    stages: nn.Sequential

    def __init__(
        self,
        stages: Sequence[Stage],
        dims: Sequence[int],
        norm: nn.Module,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        channels_last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.output_fmt = "NHWC" if channels_last else "NCHW"
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            device=device,
            dtype=dtype,
        )

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the windows' bias tables are not decayed, as in Swin and PVT."""
        kinds = ("relative_position_bias_table", "pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, from stem to head."""
        if coarse:
            return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stages\.0\.downsample",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, and with `global_pool` another pooling."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head.reset(num_classes, pool_type=global_pool, **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps behind stages, as timm's models give them.

        Args:
            x: image ``[B, in_chans, Y, X]``.
            indices: the last n stages, or which ones; None: all.
            norm: pass the last map through the final norm.
            stop_early: leave out the stages behind the last index.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final features.

        Raises:
            ValueError: another output format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"forward_intermediates gives NCHW or NHWC, not {output_fmt!r}.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                out = self.norm(x) if norm and i == len(self.stages) - 1 else x
                if output_fmt != self.output_fmt:
                    out = (
                        out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out.permute(0, 2, 3, 1)
                    )
                maps.append(out.contiguous())
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last index; the norm and head go with them."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head.in_features = self.num_features
        if cut or prune_head:
            self.reset_classifier(0, "")
        return take  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the normed map behind the last stage."""
        out: Tensor = self.norm(self.stages(x))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to pooled features or class scores."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop-path rates per stage and block, rising linearly over all blocks from 0 to `rate`."""
    return [part.tolist() for part in torch.linspace(0, rate, sum(depths)).split(list(depths))]


def agent_block(
    dim: int,
    num_heads: int,
    agents: int,
    grid: tuple[int, int],
    drop: tuple[float, float],
    **kwargs: Any,
) -> MapBlock:
    """A block with agent attention; `drop` is of attention maps and of outputs, `kwargs` of `MapBlock`."""
    dd: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
    attn = AgentAttention(dim, num_heads, agents, grid, attn_drop=drop[0], proj_drop=drop[1], **dd)
    return MapBlock(attn, dim, proj_drop=drop[1], **kwargs)


def built_grids(img_size: int | tuple[int, int], dims: int = 4) -> list[tuple[int, int]]:
    """Rows and columns of the token map in every stage; odd sizes are rounded up between stages."""
    grid = tuple(side // 4 for side in to_2tuple(img_size))
    return [tuple(-(-side // (1 << i)) for side in grid) for i in range(dims)]  # type: ignore[misc]
