"""Mixture-of-Head attention: every token chooses its heads; plain ViTs and DiTs with it.

From "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. All tokens use the shared
heads; of the other heads each token takes the best few by a router, and head outputs are weighed before the
out-projection. Compared with the authors' numbers for their attention class and with the parameter
counts of their DiTs, whose checkpoints load through `official_keys`.

Deviations. The authors compute all heads and multiply the unchosen ones by zero; here, at inference, a head
runs only for the queries that chose it. The balancing loss is kept on its layer and not in a list of the
class. The authors' classifiers are TransNeXt, whose own attention timm does not have; the ViTs here
are plain ones that follow the head plans of the DiTs of the same width, so no published number belongs
to them. DiTs are plain modules: timm registers backbones of classifiers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import Mlp, PatchEmbed, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_filter_fn as vit_checkpoint_filter_fn,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmattn.rebind import SLOT

__all__ = ["Heads", "MoHAttention", "MoHDiT", "MoHVisionTransformer", "balance_loss"]


class Heads(NamedTuple):
    """Heads of one layer: how many there are, how many every token uses, how many it chooses."""

    total: int
    shared: int
    routed: int = 0


def _plan(*runs: tuple[int, int, int, int]) -> tuple[Heads, ...]:
    return tuple(Heads(h, s, r) for layers, h, s, r in runs for _ in range(layers))


PLANS: dict[str, tuple[Heads, ...]] = {
    "small-90": _plan((8, 6, 3, 2), (4, 6, 6, 0)),
    "small-75": _plan((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
    "base-90": _plan((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    "base-75": _plan((2, 12, 4, 2), (6, 12, 6, 3), (2, 12, 6, 3), (2, 12, 12, 0)),
    "large-90": _plan((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    "large-75": _plan((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    "xlarge-90": _plan((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    "xlarge-75": _plan((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
}
"""Heads per layer of the authors' DiTs, by width and by the percentage of heads in use."""


class MoHAttention(nn.Module):
    """Attention whose heads are weighed per token, and partly chosen per token.

    With router scores ``r = softmax(W x)`` of the unshared heads, the best `routed` get the weights
    ``routed * r / sum of the chosen r``, the others 0; shared heads get ``shared * softmax(W_s x)``; where
    both exist, ``2 * softmax(W_b x)`` weighs the two groups. Uniform routers give every used head the
    weight 1.

    At inference a routed head computes scores only for the queries that chose it (`skips`); keys and
    values are still projected for all tokens, as any query may need them. Training, masked calls, compiled
    calls and calls with a method attached compute all heads.

    Args:
        dim: channels C.
        heads: of this layer; the product of ``heads.total`` and `head_dim` need not be C.
        head_dim: channels per head D; None takes ``dim // heads.total``.
        qkv_bias, attn_drop, proj_drop: as in timm's attention.

    Shapes:
        ``[B, N, C]`` -> ``[B, N, C]``; attn_mask broadcasts to ``[B, H, N, N]``.

    Raises:
        ValueError: when shared plus routed heads are none or more than there are.
    """

    def __init__(
        self,
        dim: int,
        heads: Heads,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        total, shared, routed = heads
        if min(heads) < 0 or not 1 <= shared + routed <= total:
            raise ValueError(
                f"Of {total} heads, {shared} shared and {routed} routed cannot be in use; the two must add "
                f"up to 1 .. {total}."
            )
        if routed == 0 and shared < total:
            raise ValueError(f"{total - shared} of {total} heads are neither shared nor routed.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.shared, self.routed = heads
        self.head_dim = dim // total if head_dim is None else head_dim
        inner = total * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **dd)
        self.proj = nn.Linear(inner, dim, **dd)
        unshared = total - shared

        def router(outputs: int, wanted: bool) -> nn.Linear | None:
            return nn.Linear(dim, outputs, bias=False, **dd) if wanted else None

        self.router_routed = router(unshared, routed > 0)
        self.router_balance = router(2, routed > 0 and shared > 0)
        self.router_shared = router(shared, shared > 1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.skips = True
        self.load: Tensor | None = None

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight of every head ``[B, N, H]``, and which unshared heads are chosen, bool ``[B, N, H - S]``.

        While training, `load` becomes the balancing loss of this call.
        """
        parts, chosen = [], None
        if self.shared:
            ones = x.new_ones(*x.shape[:-1], self.shared)
            scores = None if self.router_shared is None else self.router_shared(x)
            parts.append(ones if scores is None else self.shared * scores.softmax(-1))
        if self.router_routed is not None:
            share = self.router_routed(x).softmax(-1)
            chosen = torch.zeros_like(share, dtype=torch.bool)
            chosen = chosen.scatter(-1, share.topk(self.routed, dim=-1).indices, True)
            kept = share * chosen
            total = kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)
            parts.append(self.routed * kept / total)
            if self.training:
                busy = chosen.to(share.dtype).mean((0, 1))
                self.load = share.shape[-1] ** 2 * (share.mean((0, 1)) * busy).mean()
        if self.router_balance is not None:
            both = 2 * self.router_balance(x).softmax(-1)
            parts = [parts[0] * both[..., :1], parts[1] * both[..., 1:]]
        return torch.cat(parts, dim=-1), chosen

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend, weigh the heads, project."""
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weight, chosen = self.gates(x)
        if chosen is not None and attn_mask is None and not is_causal and self._may_skip():
            y = self._chosen_only(q, k, v, chosen)
        else:
            drop = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=drop
            )
        y = y.transpose(1, 2) * weight[..., None]
        out: Tensor = self.proj_drop(self.proj(y.flatten(2)))
        return out

    def _may_skip(self) -> bool:
        """Counts of queries are data: a compiled graph computes all heads, and so do attached methods."""
        if not self.skips or self.training or torch.compiler.is_compiling():
            return False
        site = self.__dict__.get(SLOT)
        return site is None or site.run is None or not site.run.enabled

    def _chosen_only(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """Like SDPA on ``[B, H, N, D]``, zero where a token did not choose a head."""
        s = self.shared
        out = torch.zeros_like(q)
        if s:
            out[:, :s] = F.scaled_dot_product_attention(q[:, :s], k[:, :s], v[:, :s])
        # Choosers first; rows of a batch with fewer of them are filled up with queries that get weight 0.
        order = chosen.transpose(1, 2).int().argsort(dim=-1, descending=True, stable=True)
        counts = chosen.sum(1).amax(0).tolist()
        for h, count in enumerate(counts, start=s):
            if count:
                at = order[:, h - s, :count, None].expand(-1, -1, self.head_dim)
                some = q[:, h].gather(1, at)[:, None]
                y = F.scaled_dot_product_attention(some, k[:, h : h + 1], v[:, h : h + 1])
                out[:, h].scatter_(1, at, y[:, 0])
        return out


def balance_loss(model: nn.Module) -> Tensor:
    """Mean balancing loss of the layers that route, from the last training forward, which it forgets.

    Equal use of all heads gives the number of routed heads; the authors add 0.01 times this to the task's
    loss.

    Raises:
        ValueError: when no layer routed in training mode since the last call.
    """
    layers = [m for m in model.modules() if isinstance(m, MoHAttention) and m.load is not None]
    if not layers:
        raise ValueError(
            "No layer has routed tokens since the last balance_loss; call model.train() and run it first."
        )
    loads = [layer.load for layer in layers]
    for layer in layers:
        layer.load = None
    return torch.stack(loads).mean()  # type: ignore[arg-type]


def set_skipping(model: nn.Module, on: bool) -> None:
    """Whether the layers of `model` leave out unchosen queries at inference."""
    for module in model.modules():
        if isinstance(module, MoHAttention):
            module.skips = on


def official_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names as ours: ``attn.wg``, ``wg_0``, ``wg_1`` -> ``router_{routed,balance,shared}``."""
    names = {"wg": "routed", "wg_0": "balance", "wg_1": "shared"}
    pattern = re.compile(r"\b(wg|wg_0|wg_1)\.weight$")
    return {
        pattern.sub(lambda m: f"router_{names[m[1]]}.weight", key): value
        for key, value in state_dict.items()
    }


class MoHVisionTransformer(VisionTransformer):
    """timm's ViT with a choice of heads in every block.

    Args:
        plan: a key of `PLANS`, or `Heads` (or triples) for every block.
        head_dim: channels per head; None: C divided by the heads of the layer.
        **kwargs: of timm's `VisionTransformer`.

    Raises:
        ValueError: for a plan that does not have one entry per block, or does not exist.
    """

    def __init__(
        self,
        plan: str | Sequence[Sequence[int]] = "small-75",
        head_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        mode = kwargs.pop("weight_init", "")
        super().__init__(weight_init="skip", **kwargs)
        layers = _layers(plan, len(self.blocks))
        for block, heads in zip(self.blocks, layers, strict=True):
            block.attn = MoHAttention(
                self.embed_dim,
                heads,
                head_dim,
                qkv_bias=kwargs.get("qkv_bias", True),
                attn_drop=kwargs.get("attn_drop_rate", 0.0),
                proj_drop=kwargs.get("proj_drop_rate", 0.0),
                **get_device_dtype(self),
            )
        if mode != "skip":
            self.init_weights(mode, needs_reset=False)


def _layers(plan: str | Sequence[Sequence[int]], depth: int) -> list[Heads]:
    if isinstance(plan, str):
        if plan not in PLANS:
            raise ValueError(f"There is no plan {plan!r}; choose one of {sorted(PLANS)}.")
        plan = PLANS[plan]
    layers = [Heads(*heads) for heads in plan]
    if len(layers) != depth:
        raise ValueError(
            f"The plan has {len(layers)} layers, the model {depth}; give one per block."
        )
    return layers


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: MoHVisionTransformer
) -> dict[str, Tensor]:
    """Routers under the authors' names become ours; position embeddings are resampled."""
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    return vit_checkpoint_filter_fn(official_keys(state_dict), model)  # type: ignore[no-any-return]


default_cfgs = generate_default_cfgs(
    {
        f"moh_vit_{size}_patch16_224.untrained": {
            "input_size": (3, 224, 224),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MoHVisionTransformer:
    model: MoHVisionTransformer = build_model_with_cfg(
        MoHVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


@register_model  # type: ignore[untyped-decorator]
def moh_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MoHVisionTransformer:
    """192 channels, 6 heads of 32, three quarters of them in use."""
    args = {"embed_dim": 192, "num_heads": 6, "plan": "small-75"}
    return _create("moh_vit_tiny_patch16_224", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def moh_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MoHVisionTransformer:
    """384 channels, 6 heads of 64, three quarters of them in use."""
    args = {"embed_dim": 384, "num_heads": 6, "plan": "small-75"}
    return _create("moh_vit_small_patch16_224", pretrained, **(args | kwargs))


@register_model  # type: ignore[untyped-decorator]
def moh_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MoHVisionTransformer:
    """768 channels, 12 heads of 64, three quarters of them in use."""
    args = {"embed_dim": 768, "num_heads": 12, "plan": "base-75"}
    return _create("moh_vit_base_patch16_224", pretrained, **(args | kwargs))


class _DiTBlock(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, heads: Heads, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = MoHAttention(dim, heads, head_dim, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + a[2] * self.attn(self.norm1(x) * (1 + a[1]) + a[0])
        out: Tensor = x + a[5] * self.mlp(self.norm2(x) * (1 + a[4]) + a[3])
        return out


class _Timestep(nn.Module):
    """Cosines and sines of the timestep, then two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        rate = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angle = t.float()[:, None] * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        first: Any = self.mlp[0]
        out: Tensor = self.mlp(wave.to(first.weight.dtype))
        return out


class _Labels(nn.Module):
    """A vector per class, and one for no class."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(labels)
        return out


class _Final(nn.Module):
    """Modulated norm and the projection to pixels of a patch."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class MoHDiT(nn.Module):
    """Class-conditional diffusion transformer whose tokens choose their heads.

    The frame of DiT (arXiv 2212.09748) with `MoHAttention`. Module names are the authors'; routers are
    renamed by `official_keys`. Label dropout and samplers are left to the training code; the label
    `classes` means none.

    Args:
        dim: channels; a multiple of 4.
        plan: a key of `PLANS`, or heads per block.
        head_dim: channels per head.
        input_size: side of the latent; a multiple of `patch`.
        patch: side of a patch.
        in_chans: channels of the latent; twice as many come out, the noise and its variance.
        classes: number of classes.

    Shapes:
        ``x [B, in_chans, Y, X]``, ``t [B]``, ``y [B]`` -> ``[B, 2 * in_chans, Y, X]``.

    Raises:
        ValueError: for a plan that does not exist.
    """

    pos_embed: Tensor

    def __init__(
        self,
        dim: int = 384,
        plan: str | Sequence[Sequence[int]] = "small-75",
        head_dim: int = 64,
        *,
        input_size: int = 32,
        patch: int = 2,
        in_chans: int = 4,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch, self.outputs, self.grad_checkpointing = patch, 2 * in_chans, False
        self.x_embedder = PatchEmbed(input_size, patch, in_chans, dim)
        self.t_embedder = _Timestep(dim)
        self.y_embedder = _Labels(classes, dim)
        table = _sincos(dim, input_size // patch)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        depth = len(PLANS.get(plan, ())) if isinstance(plan, str) else len(plan)
        layers = _layers(plan, depth)
        self.blocks = nn.ModuleList(_DiTBlock(dim, heads, head_dim) for heads in layers)
        self.final_layer = _Final(dim, patch * patch * self.outputs)
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1)
        )
        nn.init.zeros_(self.x_embedder.proj.bias)
        # Blocks begin as the identity and the model as zero.
        for name, value in self.named_parameters():
            if re.search(r"embedding_table|t_embedder\.mlp\.\d\.weight", name):
                nn.init.normal_(value, std=0.02)
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(value)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance."""
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            again = self.grad_checkpointing and self.training
            x = checkpoint(block, x, c, use_reentrant=False) if again else block(x, c)
        x = self.final_layer(x, c)
        x = x.reshape(-1, height, width, self.patch, self.patch, self.outputs)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _sincos(dim: int, side: int) -> Tensor:
    """Fixed positions ``[1, N, C]``: first half of the columns, second half of the rows, as in MAE."""
    rate = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows = axis[:, None].expand(-1, side, -1)
    columns = axis[None].expand(side, -1, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, dim).float()
