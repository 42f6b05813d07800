"""Probes: small heads trained on the frozen tokens of a vision transformer.

`EfficientProbing` is from "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
arXiv 2506.10178; `ClassToken` and `MeanToken` make the linear probes it is compared with. Features are
computed once, so that a probe trains in seconds to minutes on a CPU:

    tokens = features(model, images)
    probe = Probe(EfficientProbing(tokens.shape[-1]), classes=48)
    fit(probe, tokens, labels)
    accuracy(probe, features(model, other_images), other_labels)

The authors train with LARS, a base rate of 0.1 and batches of 4096 for 90 epochs; `fit` uses AdamW with a
cosine schedule, which reaches its plateau sooner on few images.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = [
    "ClassToken",
    "EfficientProbing",
    "MeanToken",
    "Probe",
    "accuracy",
    "features",
    "fit",
]


class EfficientProbing(nn.Module):
    """Pool tokens by learned queries, each of which fills its own share of the output channels.

    Keys are the tokens themselves; only queries and one value projection are learned, ``M * C + C * C /
    shrink`` parameters. A query pools tokens before the projection and not after it, which is the same sum
    in another order and ``C / M`` times cheaper.

    Args:
        dim: channels C of the tokens.
        queries: learned queries M.
        shrink: C divided by the output channels; ``queries * shrink`` must divide C.

    Shapes:
        ``[B, N, C]`` -> ``[B, C / shrink]``.

    Raises:
        ValueError: when C cannot be shared out among the queries.
    """

    def __init__(
        self,
        dim: int,
        queries: int = 32,
        shrink: int = 1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if queries < 1 or shrink < 1 or dim % (queries * shrink):
            raise ValueError(
                f"{dim} channels cannot be shared out among {queries} queries at shrink={shrink}; "
                "queries * shrink must divide the channels."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = nn.Parameter(torch.empty(1, queries, dim, **dd))
        self.value = nn.Linear(dim, dim // shrink, bias=False, **dd)
        self.outputs = dim // shrink
        nn.init.normal_(self.queries, std=0.02)

    def attention(self, x: Tensor) -> Tensor:
        """Where every query looks: ``[B, M, N]``, rows add up to 1."""
        weight: Tensor = (self.queries * x.shape[-1] ** -0.5 @ x.mT).softmax(-1)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Pool, project every query's share, concatenate."""
        pooled = self.attention(x) @ x
        weight = self.value.weight.unflatten(0, (self.queries.shape[1], -1))
        return torch.einsum("bmd,mcd->bmc", pooled, weight).flatten(1)


class ClassToken(nn.Module):
    """The first token ``[B, N, C] -> [B, C]``: the ordinary linear probe."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.outputs = dim

    def forward(self, x: Tensor) -> Tensor:
        """Take token 0."""
        return x[:, 0]


class MeanToken(nn.Module):
    """The mean of the tokens ``[B, N, C] -> [B, C]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.outputs = dim

    def forward(self, x: Tensor) -> Tensor:
        """Average over tokens."""
        return x.mean(1)


class Probe(nn.Module):
    """Pooling, batch norm without parameters, and a linear classifier.

    Args:
        pool: `EfficientProbing`, `ClassToken`, `MeanToken`, or any module ``[B, N, C] -> [B, pool.outputs]``.
        classes: number of classes.

    Shapes:
        ``[B, N, C]`` -> ``[B, classes]``.
    """

    def __init__(self, pool: nn.Module, classes: int) -> None:
        super().__init__()
        self.pool = pool
        outputs = int(pool.outputs)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm1d(outputs, affine=False, eps=1e-6)
        self.head = nn.Linear(outputs, classes)
        trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        out: Tensor = self.head(self.norm(self.pool(x)))
        return out


@torch.no_grad()
def features(
    model: nn.Module,
    images: Tensor,
    *,
    layer: int | None = None,
    prefix: bool = False,
    batch: int = 64,
) -> Tensor:
    """Tokens of a frozen timm ViT, ``[B, N, C]`` on the CPU.

    The model is put into eval mode for the call and back afterwards.

    Args:
        model: timm ViT.
        images: ``[B, 3, Y, X]``, preprocessed.
        layer: block whose output to take, normed by the model's last norm; None: the last one.
        prefix: True keeps class and register tokens in front.
        batch: images per call.

    Raises:
        ValueError: for a model whose features are no tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    parts = []
    try:
        for part in images.split(batch):
            parts.append(_tokens(model, part.to(device), layer, prefix).cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(parts)


def _tokens(model: Any, images: Tensor, layer: int | None, prefix: bool) -> Tensor:
    front = int(getattr(model, "num_prefix_tokens", 0))
    if layer is None:
        out: Tensor = model.forward_features(images)
        if out.ndim != 3:
            raise ValueError(
                f"{type(model).__name__} returns features {list(out.shape)}; a probe needs tokens [B, N, C]."
            )
        return out if prefix else out[:, front:]
    found = model.forward_intermediates(
        images,
        indices=[layer],
        return_prefix_tokens=prefix,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    # timm returns (tokens, prefix) where prefix tokens were asked for.
    return torch.cat([found[1], found[0]], dim=1) if prefix else found


def fit(
    probe: Probe,
    tokens: Tensor,
    labels: Tensor,
    *,
    epochs: int = 30,
    batch: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> list[float]:
    """Train a probe on tokens that were computed once, and leave it in eval mode.

    Args:
        probe: trained in place, on the device it is on.
        tokens: ``[B, N, C]``, of `features`.
        labels: ``[B]`` class indices.
        epochs, batch: passes over the tokens, and rows per step; at least 2, for the batch norm.
        lr: highest learning rate of AdamW; a cosine takes it to zero.
        weight_decay: of AdamW.
        seed: of the order of the rows; the global generator is not touched.

    Returns:
        Mean loss of every epoch.

    Raises:
        ValueError: when rows and labels do not match, or there are fewer than two.
    """
    if len(tokens) != len(labels) or min(len(tokens), batch) < 2:
        raise ValueError(
            f"A probe is fitted to at least two rows with a label each, in batches of at least two; found "
            f"{len(tokens)} rows, {len(labels)} labels and batch={batch}."
        )
    device = next(probe.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    # A last batch of one row has no variance for the norm; it goes into the batch before.
    cuts = list(range(0, len(tokens), batch))
    if len(tokens) - cuts[-1] < 2:
        cuts.pop()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(cuts))
    losses = []
    probe.train()
    for _ in range(epochs):
        order = torch.randperm(len(tokens), generator=draw)
        total = 0.0
        for start, stop in zip(cuts, [*cuts[1:], len(tokens)], strict=True):
            rows = order[start:stop]
            loss = cross_entropy(probe(tokens[rows].to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(tokens))
    probe.eval()
    return losses


@torch.no_grad()
def accuracy(probe: Probe, tokens: Tensor, labels: Tensor, *, batch: int = 512) -> float:
    """Share of rows whose highest score is their label."""
    device = next(probe.parameters()).device
    right = 0
    for some, want in zip(tokens.split(batch), labels.split(batch), strict=True):
        right += int((probe(some.to(device)).argmax(-1).cpu() == want.cpu()).sum())
    return right / len(labels)
