"""BiFormer: every region of the map attends to the few regions that resemble it most.

Bi-level routing attention cuts the map into S x S regions. Means of the projected queries and keys per region
say how well regions fit each other; every region's queries then attend to all tokens of the k best regions
and nothing else. A depthwise convolution of the values adds what lies close by.

From "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810. Compared with: dense
attention when every region is chosen, loops over pairs, and the parameter and multiply-add counts of the
authors' models. Their checkpoints load through `checkpoint_filter_fn`. Deviations: gathered keys are not
copied, the block-sparse kernel reads them in place; what pads a map that regions do not divide is masked out
unless `padding="legacy"`; the variants no published model uses (soft routing, pooled keys) are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import BlockLists, block_sparse_attention
from timm.layers import DropPath, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmattn.nn.agent_pyramid import Pyramid, Stage, drop_path_rates
from mmattn.nn.agent_swin import init_linear
from mmattn.nn.agent_weights import cfg

__all__ = ["BiFormer", "BiLevelRoutingAttention"]

_SMALL_REGION = 16
"""Below so many tokens per region a block is smaller than the least tile of the kernel."""


class BiLevelRoutingAttention(nn.Module):
    """Attention between regions that are routed to each other; one graph serves all heads.

    The scale of the scores is ``C ** -0.5``, of all channels rather than of one head's: so the published
    models were trained. No gradient passes through the choice of regions.

    Args:
        dim: channels C, divisible by num_heads.
        num_heads: heads H.
        regions: regions S per side of the map, >= 1.
        topk: regions k that a region attends to, in [1, S * S]; its own is not forced among them.
        padding: what happens where S does not divide the map. ``mask``: filled-up tokens are not seen,
            and means are over real tokens. ``legacy``: zeros are filled in before the projection and take
            part in everything, as in the published segmentation and detection models.

    Shapes:
        ``forward(x [B, Y, X, C]) -> [B, Y, X, C]``.

    Raises:
        ValueError: a `topk` outside its range, heads that do not divide channels, another padding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        regions: int = 7,
        topk: int = 4,
        padding: str = "mask",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not 1 <= topk <= regions**2:
            raise ValueError(
                f"topk must be in [1, {regions**2}], the number of regions, got {topk}."
            )
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads.")
        if padding not in ("mask", "legacy"):
            raise ValueError(f"padding must be 'mask' or 'legacy', got {padding!r}.")
        self.num_heads, self.regions, self.topk, self.padding = num_heads, regions, topk, padding
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.value_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = x.shape[1:3]
        if self.padding == "legacy":
            x = F.pad(x, self._fill(x))
        grid = (x.shape[1], x.shape[2])
        qkv = self.qkv(x)
        values = qkv.chunk(3, dim=-1)[2].permute(0, 3, 1, 2)
        local = self.value_conv(values).permute(0, 2, 3, 1)[:, :rows, :cols]
        real = self._to_regions(F.pad(x.new_ones(1, *grid, 1), self._fill(x)))[..., 0]
        qkv = F.pad(qkv, self._fill(x))
        size = (qkv.shape[1] // self.regions, qkv.shape[2] // self.regions)
        q, k, v = self._to_regions(qkv).chunk(3, dim=-1)
        graph = self.route(q, k, real)
        q, k, v = (
            t.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)
        )
        if size[0] * size[1] < _SMALL_REGION:
            mask = graph.repeat_interleave(size[0] * size[1], 2)
            mask = mask.repeat_interleave(size[0] * size[1], 3) & real.flatten().bool()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            lists = self._lists(graph, grid, size)
            attended = block_sparse_attention(q, k, v, lists, scale=self.scale)
            assert isinstance(attended, Tensor)
            out = attended
        out = out.transpose(1, 2).flatten(2)
        out = out.unflatten(1, (self.regions, self.regions, *size)).transpose(2, 3)
        out = out.flatten(3, 4).flatten(1, 2)[:, :rows, :cols]
        mixed: Tensor = self.proj(out + local)
        return mixed

    def _fill(self, x: Tensor) -> tuple[int, ...]:
        """What `F.pad` adds so that the regions divide ``[B, Y, X, C]``."""
        return 0, 0, 0, -x.shape[2] % self.regions, 0, -x.shape[1] % self.regions

    def _to_regions(self, x: Tensor) -> Tensor:
        """``[B, Y, X, C]`` to ``[B, S * S, tokens, C]``."""
        s = self.regions
        x = x.unflatten(2, (s, -1)).unflatten(1, (s, -1)).transpose(2, 3)
        out: Tensor = x.flatten(3, 4).flatten(1, 2)
        return out

    def route(self, q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """Which regions see which.

        Shapes:
            ``q, k [B, S * S, tokens, C]``, ``real [1, S * S, tokens]`` one or zero; returns bool
            ``[B, 1, S * S, S * S]``.
        """
        count = real.sum(-1)
        query, key = (
            (t.detach() * real[..., None]).sum(2) / count.clamp(min=1)[..., None] for t in (q, k)
        )
        affinity = query @ key.transpose(1, 2)
        affinity = affinity.masked_fill(count[:, None] == 0, -torch.inf)
        best = affinity.topk(self.topk, dim=-1).indices
        graph = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, best, True)
        # A small map may have fewer regions with anything in them than are asked for.
        return (graph & (count[:, None] > 0))[:, None]

    def _lists(self, graph: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> BlockLists:
        """The graph as lists of key blocks; regions cut by the map's edge get a pattern."""
        s, tokens, device = self.regions, size[0] * size[1], graph.device
        patterns = pattern_of = None
        if any(side % part for side, part in zip(grid, size, strict=True)):
            cut, kept = [], []
            for side, part in zip(grid, size, strict=True):
                # At most one row and one column of regions is cut; those behind hold nothing.
                at = torch.arange(s, device=device)
                cut.append((at == side // part) & (side % part > 0))
                inside = torch.arange(part, device=device) < (side % part or part)
                kept.append(torch.stack([torch.ones_like(inside), inside]))
            kinds = [(0, 1), (1, 0), (1, 1)]
            keys = torch.stack([(kept[0][y][:, None] & kept[1][x]).flatten() for y, x in kinds])
            patterns = keys[:, None].repeat(1, tokens, 1)
            kind = cut[0].int()[:, None] * 2 + cut[1].int() - 1
            pattern_of = kind.flatten().repeat(1, 1, s * s, 1)
        length = s * s * tokens
        return BlockLists.from_mask(
            graph,
            q_len=length,
            k_len=length,
            q_block=tokens,
            k_block=tokens,
            patterns=patterns,
            pattern_of=pattern_of,
        )


class WholeAttention(nn.Module):
    """Attention over the whole map with eight heads, for the last stage.

    Its convolution reads the input and not the values, and its projection has no bias: so the published
    models were trained.

    Shapes:
        ``forward(x [B, Y, X, C]) -> [B, Y, X, C]``.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = 8
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.value_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view(x.shape)
        local = self.value_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = self.proj(out + local)
        return mixed


class Block(nn.Module):
    """Position by convolution, attention, MLP; on maps ``[B, C, Y, X]``."""

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.position(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Pyramid):
    """A four-stage backbone with routed attention in all stages but the last; takes any image size.

    Args:
        embed_dims, depths: channels (multiples of `head_dim`) and blocks per stage.
        regions: regions per side of the map in every routed stage (published: 7 for classification, 8 for
            segmentation at 512, 16 for detection).
        topks: regions attended to, per stage; 0 for attention over the whole map.
        head_dim: channels per head of the routed stages.
        mlp_ratio: hidden channels of the MLPs over channels.
        padding: of `BiLevelRoutingAttention`.
        drop_path_rate: in [0, 1).
        **kwargs: of `Pyramid`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        regions: int = 7,
        topks: Sequence[int] = (1, 4, 16, 0),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        padding: str = "mask",
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(embed_dims):
            widths = [embed_dims[i - 1], dim] if i else [in_chans, dim // 2, dim]
            down: list[nn.Module] = []
            for before, after in itertools.pairwise(widths):
                conv = nn.Conv2d(before, after, 3, stride=2, padding=1, **dd)
                down += [nn.GELU()] if down else []
                down += [conv, nn.BatchNorm2d(after, **dd)]
            blocks = []
            for rate in rates[i]:
                attn: nn.Module = WholeAttention(dim, **dd)
                if topks[i]:
                    attn = BiLevelRoutingAttention(
                        dim, dim // head_dim, regions, topks[i], padding, **dd
                    )
                blocks.append(Block(attn, dim, mlp_ratio, rate, **dd))
            stages.append(Stage(nn.Sequential(*down), blocks))
        norm = nn.BatchNorm2d(embed_dims[-1], **dd)
        super().__init__(
            stages, embed_dims, norm, in_chans=in_chans, channels_last=False, **dd, **kwargs
        )
        self.apply(init_linear)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename an official state dict.

    ``downsample_layers.i`` becomes ``stages.i.downsample``, ``stages.i.j`` becomes ``stages.i.blocks.j``;
    inside a block ``pos_embed`` becomes ``position``, ``attn.qkv.qkv`` ``attn.qkv``, ``attn.wo``
    ``attn.proj``, ``attn.lepe`` ``attn.value_conv``, ``mlp.{0,3}`` ``mlp.{fc1,fc2}``; ``head`` becomes
    ``head.fc``.
    """
    state: dict[str, Tensor] = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if not any(key.startswith("downsample_layers.") for key in state):
        return state
    out = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d+)\.", r"stages.\1.blocks.", key)
        key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
        key = key.replace(".pos_embed.", ".position.").replace(".qkv.qkv.", ".qkv.")
        key = key.replace(".attn.wo.", ".attn.proj.").replace(".attn.lepe.", ".attn.value_conv.")
        key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        out[re.sub(r"^head\.(?=weight|bias)", "head.fc.", key)] = value
    return out


default_cfgs = generate_default_cfgs(
    {
        f"biformer_{size}.untrained": cfg(
            first_conv="stages.0.downsample.0",
            classifier="head.fc",
            pool_size=(7, 7),
            paper_ids="arXiv:2303.08810",
        )
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    # There are no tables tied to a size, so `img_size` has nothing to set.
    kwargs.pop("img_size", None)
    model: BiFormer = build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds at 224."""
    return _create("biformer_tiny", pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds at 224."""
    args = {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
    return _create("biformer_small", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds at 224."""
    args = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768), "drop_path_rate": 0.4}
    return _create("biformer_base", pretrained, **(args | kwargs))
