"""Grouped-query attention for trained ViTs: fewer key and value heads, shared out by what keys do.

`convert` turns the attention of a timm ViT into attention with fewer key and value heads, each the mean of a
group of the trained ones. A short training afterwards (`uptrain`) heals most of it. Plain grouping gives
every group as many query heads; key-driven grouping (KDGQA) gives groups with long keys more of them, anew
in every batch; dynamic grouping (DGQA) does so by how key lengths changed, or by their moving average, and
in training only now and then. "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", arXiv
2408.08454; plain grouping is of "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints", arXiv 2305.13245. Compared with numbers of the published layer, with loops over heads, and, on
the embedded ViT, with groups of heads drawn at random.

Deviations: groups whose keys are all equally long, and a single group, share evenly; the published code
divides zero by zero there. Where rounding leaves too many or too few heads, DGQA corrects groups that a hash
of the layer's count of decisions picks, so that no global random state is used. Training steps are counted
by a hook on the model, so that gradient checkpointing, which runs layers twice, decides once. `live=False`
keeps the last shares in eval mode, where the published layer decides anew in every call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mmattn.errors import ConfigError

__all__ = [
    "GroupedQueryAttention",
    "convert",
    "count_steps",
    "key_shares",
    "layers",
    "pool_heads",
    "uptrain",
]

KINDS = ("static", "key", "diff", "ema")
_RECENT = 0.9
"""Weight of the current key lengths in ``ema``."""

M = TypeVar("M", bound=nn.Module)


def key_lengths(k: Tensor) -> Tensor:
    """Frobenius norm of every group's keys ``[B, G, N, D]``, summed over the batch: ``[G]``."""
    work = k.detach() if k.dtype == torch.float64 else k.detach().float()
    total: Tensor = work.flatten(2).norm(dim=-1).sum(0)
    return total


def key_shares(lengths: Tensor, heads: int) -> Tensor:
    """Query heads of every group in proportion to its key length above the least one.

    The group with the shortest keys therefore gets none, unless rounding does. Groups of equal length get
    equal numbers.

    Args:
        lengths: ``[G]``.
        heads: what the result adds up to; a multiple of G.

    Returns:
        int64 ``[G]``.
    """
    least, span = lengths.min(), lengths.max() - lengths.min()
    weight = (lengths - least) / torch.where(span > 0, span, torch.ones_like(span))

    def longest(shares: Tensor, _: int) -> Tensor:
        return shares.argmax()

    def shortest(shares: Tensor, _: int) -> Tensor:
        return shares.argmin()

    return _round(weight, heads, longest, shortest)


def _round(
    weight: Tensor,
    heads: int,
    less: Callable[[Tensor, int], Tensor],
    more: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Shares in proportion to `weight`, rounded; `less` and `more` say which group to correct."""
    groups = len(weight)
    total = weight.sum()
    even = torch.full_like(weight, heads / groups)
    shares = torch.where(total > 0, weight / torch.where(total > 0, total, 1) * heads, even)
    shares = shares.round().long()
    place = torch.arange(groups, device=weight.device)
    # Every rounding is off by a half at most.
    for i in range((groups + 1) // 2):
        over = (shares.sum() - heads).sign()
        down, up = place == less(shares, i), place == more(shares, i)
        shares = shares - torch.where(over > 0, down, up & (over < 0)) * over
    return shares


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share fewer key and value heads.

    Query heads stay in order: the first ones read the first group, as many as its share says.
    **Except for ``static``, the shares depend on the whole batch**: one picture alone may give another
    result than in company. That is the technique; use ``static`` or ``live=False`` where it must not be.

    Args:
        dim: channels C.
        num_heads: query heads H; divides C.
        groups: key and value heads G; divides H.
        kind: ``static`` equal shares; ``key`` by key length (KDGQA); ``diff`` by the change of key lengths
            against the cached ones, ``ema`` by their moving average (DGQA).
        window: training steps between two decisions of ``diff`` and ``ema``, >= 1; 300 in the paper.
        live: whether ``diff`` and ``ema`` decide, and change their cache, in eval mode as well.
        qkv_bias, attn_drop, proj_drop: as in timm's attention.

    Shapes:
        ``[B, N, C]`` -> ``[B, N, C]``; attn_mask broadcasts to ``[B, H, N, N]``.

    Raises:
        ConfigError: heads that cannot be shared out, an unknown kind, a window below 1.
    """

    cache: Tensor
    shares: Tensor
    step: Tensor
    decided: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        kind: str = "static",
        *,
        window: int = 300,
        live: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads or groups < 1 or num_heads % groups:
            raise ConfigError(
                f"GroupedQueryAttention: {dim} channels, {num_heads} heads and {groups} groups were asked "
                "for; heads must divide channels, and groups heads."
            )
        if kind not in KINDS:
            raise ConfigError(f"GroupedQueryAttention: kind {kind!r} is none of {KINDS}.")
        if window < 1:
            raise ConfigError(f"GroupedQueryAttention: window must be at least 1, got {window}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.groups, self.kind = num_heads, groups, kind
        self.window, self.live = window, live
        inner = groups * (dim // num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.k = nn.Linear(dim, inner, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, inner, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        if kind in ("diff", "ema"):
            even = torch.full((groups,), num_heads // groups, device=device)
            self.register_buffer("cache", torch.zeros(groups, device=device))
            self.register_buffer("shares", even)
            self.register_buffer("step", torch.tensor(-1, device=device))
            self.register_buffer("decided", torch.tensor(-1, device=device))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Project, share out, attend, project."""
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, heads in (
                (self.q(x), self.num_heads),
                (self.k(x), self.groups),
                (self.v(x), self.groups),
            )
        )
        if self.kind != "static":
            ends = self.decide(k).cumsum(0)
            head = torch.arange(self.num_heads, device=x.device)
            group = (head[:, None] >= ends).sum(1)
            k, v = k[:, group], v[:, group]
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=self.kind == "static",
        )
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return projected

    def decide(self, k: Tensor) -> Tensor:
        """Query heads of every group for keys ``[B, G, N, D]``: int64 ``[G]``."""
        lengths = key_lengths(k)
        if self.kind == "key":
            return key_shares(lengths, self.num_heads)
        if not (self.training or self.live):
            return self.shares
        if self.training:
            due = (self.step % self.window == 0) & (self.step != self.decided)
            after = (self.cache + lengths) / self.window
        else:
            due, after = torch.ones_like(self.step, dtype=torch.bool), lengths
        if self.kind == "diff":
            weight = (self.cache - lengths).abs()
        else:
            weight = _RECENT * lengths + (1 - _RECENT) * self.cache
        new = self._rounded_at_random(weight)
        # A batch that changed nothing says nothing about shares.
        due = due & (weight.sum() > 0)
        self.shares.copy_(torch.where(due, new, self.shares))
        self.cache.copy_(torch.where(due, after, self.cache))
        if self.training:
            self.decided.copy_(torch.where(due, self.step, self.decided))
        return self.shares.clone()

    def _rounded_at_random(self, weight: Tensor) -> Tensor:
        place = torch.arange(self.groups, device=weight.device)

        def order(i: int) -> Tensor:
            mixed = (self.step + 1) * 7919 + (place + 1) * 104729 + i * 1299709
            mixed = (mixed ^ (mixed >> 7)) * 2654435761 % 2**32
            return (mixed ^ (mixed >> 15)) * 2246822519 % 2**32

        def less(shares: Tensor, i: int) -> Tensor:
            return torch.where(shares > 0, order(i), -1).argmax()

        def more(shares: Tensor, i: int) -> Tensor:
            return order(i).argmax()

        return _round(weight, self.num_heads, less, more)


def layers(model: nn.Module) -> list[GroupedQueryAttention]:
    """The grouped layers of a model."""
    return [m for m in model.modules() if isinstance(m, GroupedQueryAttention)]


def pool_heads(value: Tensor, heads: int, groups: int, order: Tensor | None = None) -> Tensor:
    """Mean over the heads of each group, of a weight ``[H * D, C]`` or bias ``[H * D]``.

    Args:
        order: the heads in the order in which groups are cut; None: as they are.
    """
    split = value.unflatten(0, (heads, -1))
    if order is not None:
        split = split[order]
    pooled: Tensor = split.unflatten(0, (groups, -1)).mean(1).flatten(0, 1)
    return pooled


@torch.no_grad()
def convert(
    model: M,
    groups: int,
    kind: str = "static",
    *,
    window: int = 300,
    live: bool = True,
    shuffle: int | None = None,
) -> M:
    """A copy of a trained timm ViT whose attention layers are grouped.

    Keys and values of a group are means of consecutive trained heads, weights and biases alike; queries and
    the output projection stay. As many groups as heads leave the function as it was (``static``).

    Args:
        model: a model with timm's `Attention`.
        groups, kind, window, live: of `GroupedQueryAttention`.
        shuffle: seed of a random order of heads per layer, to compare with; queries and output projection
            follow, so it only changes which heads are averaged.

    Raises:
        ConfigError: no such attention, or one with norms or a gate inside, which have no place here.
    """
    model = copy.deepcopy(model)
    old = {n: m for n, m in model.named_modules() if isinstance(m, Attention)}
    if not old:
        raise ConfigError(
            f"convert: {type(model).__name__} has no timm Attention; ViTs and DeiTs of timm have."
        )
    draw = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    for name, attn in old.items():
        plain = all(isinstance(m, nn.Identity) for m in (attn.q_norm, attn.k_norm, attn.norm))
        if not plain or attn.gate is not None:
            raise ConfigError(
                f"convert: {name} normalises or gates inside; only plain attention can be grouped."
            )
        model.set_submodule(name, _grouped(attn, groups, kind, window, live, draw))
    count_steps(model)
    return model


def _grouped(
    attn: Attention,
    groups: int,
    kind: str,
    window: int,
    live: bool,
    draw: torch.Generator | None,
) -> GroupedQueryAttention:
    heads, weight = attn.num_heads, attn.qkv.weight
    new = GroupedQueryAttention(
        weight.shape[1],
        heads,
        groups,
        kind,
        window=window,
        live=live,
        qkv_bias=attn.qkv.bias is not None,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        device=weight.device,
        dtype=weight.dtype,
    ).train(attn.training)
    order = None if draw is None else torch.randperm(heads, generator=draw).to(weight.device)
    for part in ("weight", "bias"):
        trained = getattr(attn.qkv, part)
        if trained is None:
            continue
        q, k, v = trained.chunk(3)
        getattr(new.q, part).copy_(pool_heads(q, heads, heads, order))
        getattr(new.k, part).copy_(pool_heads(k, heads, groups, order))
        getattr(new.v, part).copy_(pool_heads(v, heads, groups, order))
    columns = attn.proj.weight.T
    new.proj.weight.copy_(pool_heads(columns, heads, heads, order).T)
    new.proj.bias.copy_(attn.proj.bias)
    return new


def count_steps(model: nn.Module) -> None:
    """Let every training forward of `model` be a step for its ``diff`` and ``ema`` layers.

    Without this, which `convert` does, they never decide in training. A model that is built from
    `GroupedQueryAttention` layers needs it once.
    """
    model.register_forward_pre_hook(_count)


def _count(model: nn.Module, _: Any) -> None:
    if model.training:
        for layer in layers(model):
            if layer.kind in ("diff", "ema"):
                layer.step += 1


def uptrain(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    learning_rate: float = 1e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a converted model on what is left of its task; AdamW, rate falling linearly to zero.

    Args:
        model: of `convert`; it is left in eval mode.
        batches: inputs and targets, one pair per step.
        learning_rate: of the first step.
        loss: of outputs and targets.
        after: called after every step with its number and loss.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for i, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / len(batches))
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
        after(i, losses[-1])
    model.eval()
    return losses
