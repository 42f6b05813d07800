"""Agent attention: a few pooled tokens stand between the queries and the keys."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import trunc_normal_
from torch import Tensor, nn

Grid = tuple[int, int]

_BLOCK = 7
"""Side of the coarse bias map, which is stretched over whatever grid comes."""


class GridBias(nn.Module):
    """Learnt bias between agents and the cells of a token grid.

    The sum of a coarse 7x7 map stretched over the grid, of one value per row and of one per column. Other
    grids than the built one stretch rows and columns too (linearly), inside the graph, so that training at
    several sizes reaches the one set of tables.

    Args:
        num_heads, agents: heads H and agents n.
        grid: rows and columns of the tables.
        prefix: tokens in front of the grid that have a bias of their own (a class token), >= 0.

    Shapes:
        ``forward((Y, X)) -> [H, n, prefix + Y * X]``.
    """

    prefix: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        agents: int,
        grid: Grid,
        prefix: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.block = nn.Parameter(torch.empty(num_heads, agents, _BLOCK, _BLOCK, **dd))
        self.row = nn.Parameter(torch.empty(num_heads, agents, grid[0], **dd))
        self.col = nn.Parameter(torch.empty(num_heads, agents, grid[1], **dd))
        self.prefix = nn.Parameter(torch.empty(num_heads, agents, prefix, **dd)) if prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every table from a narrow normal distribution."""
        for table in self.parameters():
            trunc_normal_(table, std=0.02)

    def set_grid(self, grid: Grid) -> None:
        """Resize the row and column tables themselves to another grid."""
        for name, size in (("row", grid[0]), ("col", grid[1])):
            old = getattr(self, name)
            new = stretch(old.detach(), size).clone()
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))

    def forward(self, grid: Grid) -> Tensor:
        block = F.interpolate(self.block, size=grid, mode="bilinear", align_corners=False)
        row, col = stretch(self.row, grid[0]), stretch(self.col, grid[1])
        bias = (block + row[..., :, None] + col[..., None, :]).flatten(2)
        return bias if self.prefix is None else torch.cat([self.prefix, bias], dim=2)


def stretch(table: Tensor, size: int) -> Tensor:
    """Resample the last axis of ``[H, n, L]`` linearly to `size`; the same size returns the table."""
    if table.shape[-1] == size:
        return table
    return F.interpolate(table, size=size, mode="linear", align_corners=False)


class AgentAttention(nn.Module):
    """Attention through agents: they gather from the keys, then every query reads from them.

    The agents are the queries, averaged over a p x p partition of the grid. They attend to all keys; then
    all queries attend to the agents, which now carry what was gathered. Two small softmax attentions cost
    ``N * n`` instead of ``N * N`` and make a linear attention whose feature maps are the two softmax
    matrices. A depthwise convolution of the values gives back the variety that a product of rank n lacks.

    From "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. Written
    from the paper and compared with the output of the authors' layers on fixed numbers (class-token,
    window, pyramid and reduced-key kinds). Deviations: biases broadcast over the batch instead of being
    repeated; the grid may be a rectangle and may differ from the built one; both attentions run in torch's
    `scaled_dot_product_attention`, because every pair carries a bias, which the linear and sparse kernels
    do not take, and n is at most 81. The number of agents stays the same at every grid.

    Args:
        dim: channels C, divisible by num_heads.
        num_heads: heads H.
        agents: agents n, a square number.
        grid: rows and columns that the bias tables are built for.
        prefix: tokens in front of the grid; they attend and are attended to, but take no part in pooling
            and convolution.
        reduction: stride at which keys and values are read from the grid, >= 1 (1 in all published models).
        qkv_bias: whether the projection of queries, keys and values has a bias.
        attn_drop, proj_drop: dropout of both attention maps and of the output, in [0, 1).

    Shapes:
        ``forward(x [B, prefix + Y * X, C], (Y, X)) -> [B, prefix + Y * X, C]``, tokens row by row.

    Raises:
        ValueError: agents that are no square, heads that do not divide the channels, a prefix together with
            a reduction, tokens that do not fit the grid, or a mask.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int,
        grid: Grid,
        prefix: int = 0,
        reduction: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.side = math.isqrt(agents)
        if agents < 1 or self.side**2 != agents:
            raise ValueError(f"AgentAttention needs a square number of agents, got {agents}.")
        if dim % num_heads:
            raise ValueError(
                f"AgentAttention: {dim} channels cannot be split into {num_heads} heads."
            )
        if prefix and reduction > 1:
            raise ValueError(
                "AgentAttention cannot reduce keys that have prefix tokens among them."
            )
        self.num_heads, self.prefix, self.reduction, self.grid = num_heads, prefix, reduction, grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction, **dd)
            self.reduce_norm = nn.LayerNorm(dim, **dd)
        self.value_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.key_bias = GridBias(num_heads, agents, self._key_grid(grid), prefix, **dd)
        self.query_bias = GridBias(num_heads, agents, grid, prefix, **dd)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.qkv, self.proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _key_grid(self, grid: Grid) -> Grid:
        return grid[0] // self.reduction, grid[1] // self.reduction

    def set_grid(self, grid: Grid) -> None:
        """Resize the bias tables to another grid for good; a forward at another grid only stretches them."""
        self.grid = grid
        self.key_bias.set_grid(self._key_grid(grid))
        self.query_bias.set_grid(grid)

    def _grid_of(self, tokens: int) -> Grid:
        cells = tokens - self.prefix
        if cells == self.grid[0] * self.grid[1]:
            return self.grid
        side = math.isqrt(max(cells, 0))
        if side**2 != cells:
            raise ValueError(
                f"AgentAttention: {cells} grid tokens are neither the built grid {self.grid} nor a square; "
                "pass the grid, or resize the model with set_input_size((height, width))."
            )
        return side, side

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        if self.reduction == 1:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v
        c = x.shape[-1]
        small = self.reduce(_to_map(x, grid)).flatten(2).transpose(1, 2)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[:c], None if bias is None else bias[:c])
        kv = F.linear(self.reduce_norm(small), weight[c:], None if bias is None else bias[c:])
        k, v = kv.chunk(2, dim=-1)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("AgentAttention takes no mask: every agent pools over the whole grid.")
        grid = grid or self._grid_of(x.shape[1])
        key_grid = self._key_grid(grid)
        if x.shape[1] != self.prefix + grid[0] * grid[1]:
            raise ValueError(
                f"AgentAttention got {x.shape[1]} tokens for a grid of {grid} and {self.prefix} in front."
            )
        q, k, v = self._project(x, grid)
        pooled = F.adaptive_avg_pool2d(_to_map(q[:, self.prefix :], grid), (self.side, self.side))
        values = _to_map(v[:, self.prefix :], key_grid)
        q, k, v, agents = map(self._split, (q, k, v, pooled.flatten(2).transpose(1, 2)))
        drop = self.attn_drop if self.training else 0.0
        to_keys = self.key_bias(key_grid)[None].to(q.dtype)
        gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=to_keys, dropout_p=drop)
        to_agents = self.query_bias(grid).transpose(1, 2)[None].to(q.dtype)
        out = F.scaled_dot_product_attention(
            q, agents, gathered, attn_mask=to_agents, dropout_p=drop
        )
        if self.reduction > 1:
            values = F.interpolate(values, size=grid, mode="bilinear", align_corners=False)
        local = self.value_conv(values).flatten(2).transpose(1, 2)
        # Prefix tokens have no neighbours on the grid; the padding gives them a zero.
        out = out.transpose(1, 2).flatten(2) + F.pad(local, (0, 0, self.prefix, 0))
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def _to_map(x: Tensor, grid: Grid) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]
