"""NaLaFormer: linear attention in which the length of a query decides how sharply it looks.

Linear attention divides a query's length away. Here the direction of a query, with positive and negative
parts as features of their own, is raised to a power that grows with its length: long queries get peaked
features and look sharply. Keys are cubed. "NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
arXiv 2506.21137. Checked against its scores written out and against the sizes of the published models.

Deviations: a query of length zero, which is NaN in the published code, reads nothing. As published, only
the first two stages are linear; the other two are softmax attention. The skeleton is that of
`mmattn.nn.mala.MAViT`. No weights were published, so the models are checked by their sizes; that of
`nalaformer_xtiny` is 6.1 M parameters from the published settings, against 8 M in the paper.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from mmattn_kernels import linear_attention
from mmattn_kernels.linear.features import rotate
from timm.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale2d
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from mmattn.errors import ConfigError
from mmattn.nn._timm import pyramid_cfg, register_pyramid
from mmattn.nn.mala import ConvMlp, MAViT, Rope, checkpoint_filter_fn

__all__ = ["NaLa", "NaLaBlock", "NaLaFormer", "NaLaSoftmax", "key_features", "query_features"]


def query_features(q: Tensor) -> Tensor:
    """Features ``[..., 2 * D]`` of ``q [..., D]``: parts of both signs, to a power between 1.5 and 4.5.

    The power is ``3 * (0.5 + tanh |q|)``. Zero queries have zero features.
    """
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    direction = q / length.clamp(min=torch.finfo(q.dtype).tiny)
    power = 3 * (0.5 + length.tanh())
    return torch.cat([direction, -direction], -1).relu().pow(power)


def key_features(k: Tensor) -> Tensor:
    """Features ``[..., 2 * D]`` of ``k [..., D]``: its cube, parts of both signs."""
    cube = k.pow(3)
    return torch.cat([cube, -cube], -1).relu()


class _NormGated(nn.Module):
    """What both attentions of NaLaFormer share: projection, local convolution, norm and gate."""

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"{type(self).__name__}: {num_heads} heads do not divide dim {dim}.")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkvg = nn.Linear(dim, 4 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.norm = LayerNorm(dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        b, y, w, c = x.shape
        q, k, v, gate = self.qkvg(x).split(c, -1)
        local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (t.reshape(b, y * w, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        out = self.attend(q, k, v, rope).transpose(1, 2).reshape(b, y, w, c)
        projected: Tensor = self.out_proj(self.norm(out + local) * F.silu(gate))
        return projected


class NaLa(_NormGated):
    """Norm-aware linear attention on a map, in time linear in its tokens.

    Features are computed in fp32 for half-precision inputs: cubes of keys outgrow fp16.

    Args:
        dim: channels.
        num_heads: heads; divides `dim`.

    Shapes:
        ``x [B, Y, X, C]`` to the same; ``rope`` cosines and sines ``[Y * X, D / 2]``
        (see `mmattn.nn.mala.grid_rope`).

    Raises:
        ConfigError: heads that do not divide the channels.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        work = torch.float64 if v.dtype == torch.float64 else torch.float32
        if rope is not None:
            # Parts of both signs turn alike.
            rope = (torch.cat([rope[0]] * 2, -1), torch.cat([rope[1]] * 2, -1))
        out = linear_attention(
            query_features(q.to(work)),
            key_features(k.to(work)),
            v.to(work),
            feature_map="identity",
            normalizer="mean",
            rope=rope,
            eps=1e-6,
        )
        return out.to(v.dtype)


class NaLaSoftmax(_NormGated):
    """Softmax attention with projection, convolution, norm and gate of `NaLa`; same arguments and shapes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return F.scaled_dot_product_attention(q, k, v)


class NaLaBlock(nn.Module):
    """Attention and MLP on a map ``[B, C, Y, X]``, each behind a positional convolution.

    Args:
        linear: `NaLa`; otherwise `NaLaSoftmax`.
        layer_scale: start of the learned factor per channel on attention and MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm2d(dim, **dd)
        self.attn = (NaLa if linear else NaLaSoftmax)(dim, num_heads, **dd)
        self.ls1 = LayerScale2d(dim, layer_scale, **dd)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = LayerNorm2d(dim, **dd)
        self.ffn = ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.ls2 = LayerScale2d(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.cpe1(x)
        mixed = self.attn(self.norm1(x).permute(0, 2, 3, 1), rope).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.ls1(mixed))
        x = x + self.cpe2(x)
        out: Tensor = x + self.drop_path(self.ls2(self.ffn(self.norm2(x))))
        return out


class NaLaFormer(MAViT):
    """Pyramid of four stages of norm-aware attention, for images of any size; arguments of `MAViT`."""

    block_type: ClassVar[type[nn.Module]] = NaLaBlock


VARIANTS: dict[str, dict[str, Any]] = {
    "nalaformer_xtiny": {
        "dims": (32, 64, 128, 384),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 12),
        "drop_path_rate": 0.1,
    },
    "nalaformer_tiny": {"mlp_ratio": 4.0, "drop_path_rate": 0.1},
    "nalaformer_small": {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    },
    "nalaformer_base": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "mlp_ratio": 4.0,
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "nalaformer_large": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6,) * 4,
        "drop_path_rate": 0.55,
    },
}
"""Settings of every registered model; stochastic depth is that of the published training."""

default_cfgs = generate_default_cfgs({name: pyramid_cfg() for name in VARIANTS})


def _register(name: str) -> Any:
    return register_pyramid(
        NaLaFormer, name, {"head_dim": 1024, **VARIANTS[name]}, checkpoint_filter_fn, __name__
    )


nalaformer_xtiny = _register("nalaformer_xtiny")
nalaformer_tiny = _register("nalaformer_tiny")
nalaformer_small = _register("nalaformer_small")
nalaformer_base = _register("nalaformer_base")
nalaformer_large = _register("nalaformer_large")
