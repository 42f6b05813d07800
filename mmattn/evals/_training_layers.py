"""The attentions and controls of `mmattn.evals.layer_training`, all ``[B, N, C] -> [B, N, C]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mmattn.methods.flashbias import with_factors
from mmattn.nn.agent import AgentAttention
from mmattn.nn.biformer import BiLevelRoutingAttention
from mmattn.nn.flow import FlowSelfAttention
from mmattn.nn.gqa import GroupedQueryAttention
from mmattn.nn.mala import MALA, grid_rope
from mmattn.nn.moh import Heads, MoHAttention
from mmattn.nn.nala import NaLa
from mmattn.nn.nat import NeighborhoodAttention2d
from mmattn.nn.slab import SimplifiedLinearAttention

GRID, DIM, HEADS = (8, 8), 64, 4
CONTROLS = ("nothing", "mean", "convolution")


class Tokens(nn.Module):
    """A layer in the place of timm's attention: ``[B, N, C]`` in, the same out, `run` in between."""

    def __init__(self, layer: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.run(self.layer, x)


class Plain(nn.Module):
    """Values, something done to them, and the output projection: the controls.

    Args:
        mixing: one of `CONTROLS`.

    Shapes:
        ``[B, N, C]`` -> ``[B, N, C]``.
    """

    def __init__(self, dim: int, mixing: str) -> None:
        super().__init__()
        self.mixing = mixing
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if mixing == "convolution":
            self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x)
        if self.mixing == "mean":
            v = v.mean(1, keepdim=True).expand_as(v)
        elif self.mixing == "convolution":
            v = self.conv(v.mT.unflatten(2, GRID)).flatten(2).mT
        out: Tensor = self.proj(v)
        return out


class FactorBias(nn.Module):
    """Softmax attention with a learned low-rank bias per head, by FlashBias's extra channels.

    Args:
        rank: columns of the two factors, which start as noise so that both get gradients.

    Shapes:
        ``[B, N, C]`` -> ``[B, N, C]``; factors ``[1, H, N, rank]``.
    """

    def __init__(self, dim: int, heads: int, tokens: int, rank: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.key = (
            nn.Parameter(0.1 * torch.randn(1, heads, tokens, rank)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def dense(q: Tensor, k: Tensor, v: Tensor, *, mask: None, scale: float) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

        out = with_factors(q, k, v, self.query, self.key, None, dense)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def _call(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def _on_map(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer(x.unflatten(1, GRID)).flatten(1, 2)
    return out


def _turned_map(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer(x.unflatten(1, GRID), grid_rope(GRID, DIM // HEADS, x)).flatten(1, 2)
    return out


def _turned_channels_first(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer(x.mT.unflatten(2, GRID), grid_rope(GRID, DIM // HEADS, x)).flatten(2).mT
    return out


def layer(name: str, depth: int) -> nn.Module:
    """The attention called `name` for block number `depth`, with its own initialisation."""
    tokens = GRID[0] * GRID[1]
    if name in CONTROLS:
        return Tokens(Plain(DIM, name), _call)
    if name == "agent":
        return Tokens(AgentAttention(DIM, HEADS, 9, GRID), _call)
    if name == "bi-level routing":
        return Tokens(BiLevelRoutingAttention(DIM, HEADS, regions=4, topk=4), _on_map)
    if name == "MALA":
        return Tokens(MALA(DIM, HEADS), _turned_channels_first)
    if name == "NaLa":
        return Tokens(NaLa(DIM, HEADS), _turned_map)
    if name == "Flow":
        return Tokens(FlowSelfAttention(DIM, HEADS), _call)
    if name == "SLAB linear":
        return Tokens(SimplifiedLinearAttention(DIM, HEADS, GRID), _call)
    if name == "MoH":
        return Tokens(MoHAttention(DIM, Heads(HEADS, 2, 1), qkv_bias=True), _call)
    if name == "neighborhood":
        return Tokens(NeighborhoodAttention2d(DIM, HEADS, 3), _on_map)
    if name == "dilated neighborhood":
        return Tokens(NeighborhoodAttention2d(DIM, HEADS, 3, dilation=1 + depth % 2), _on_map)
    if name == "GQA, 2 groups":
        return Tokens(GroupedQueryAttention(DIM, HEADS, 2), _call)
    if name == "KDGQA, 2 groups":
        return Tokens(GroupedQueryAttention(DIM, HEADS, 2, "key"), _call)
    return Tokens(FactorBias(DIM, HEADS, tokens), _call)


ATTENTIONS = (
    "softmax",
    "agent",
    "bi-level routing",
    "MALA",
    "NaLa",
    "Flow",
    "SLAB linear",
    "MoH",
    "neighborhood",
    "dilated neighborhood",
    "FlashBias, learned factors",
    "GQA, 2 groups",
    "KDGQA, 2 groups",
)
NAMES = (*ATTENTIONS, *CONTROLS)
