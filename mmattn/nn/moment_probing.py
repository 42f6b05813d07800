"""Moment Probing: a head that reads first and second moments of a frozen vision transformer's tokens.

A linear probe sees one vector, the class token or the mean. Here a second classifier sees how channels vary
together over the tokens: tokens are projected, channels split into heads, and the cross-covariances of
neighbouring heads, made smaller by two strided convolutions, are classified; the two scores are averaged.
"Tuning Pre-trained Model via Moment Probing", arXiv 2307.11342. Compared in tests with sums written out.

Deviations: a covariance here subtracts every channel's own mean over the tokens; the published code
subtracts one mean over tokens and channels (`compat`). The variant that also recalibrates the backbone (MP+)
is not part of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmattn.errors import ConfigError

__all__ = ["MomentProbing"]


class MomentProbing(nn.Module):
    """Class scores of tokens, from their first token and their second moments.

    Train it with `mmattn.nn.probes.fit` on ``features(model, images, prefix=True)``.

    Args:
        dim: channels C of the tokens.
        classes: number of classes.
        hidden: channels after the projection; published 512.
        heads: parts of these channels; ``heads - 1`` covariances of ``hidden / heads`` squared. Published 4.
        class_token: token 0 is the class token and no part of the moments; False: the mean of all tokens is
            the first moment.
        compat: centre as the published code does.

    Shapes:
        ``[B, N, C]`` -> ``[B, classes]``.

    Raises:
        ConfigError: fewer than two heads, heads that do not divide `hidden`, or heads of fewer than 7
            channels, for which the convolutions leave nothing.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        hidden: int = 512,
        heads: int = 4,
        *,
        class_token: bool = True,
        compat: bool = False,
    ) -> None:
        super().__init__()
        if heads < 2 or hidden % heads:
            raise ConfigError(
                f"hidden={hidden} must divide into two heads or more, got heads={heads}"
            )
        width = hidden // heads
        if width < 7:
            raise ConfigError(
                f"a head of {width} channels is too narrow for two strided convolutions; 7 are the least"
            )
        self.heads, self.class_token, self.compat = heads, class_token, compat
        self.proj = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(width)
        maps = heads - 1
        self.shrink = nn.Sequential(
            nn.Conv2d(maps, maps, 3, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(maps, maps, 3, stride=2, bias=False),
        )
        side = ((width - 3) // 2 + 1 - 3) // 2 + 1
        self.first = nn.Linear(dim, classes)
        self.second = nn.Linear(maps * side * side, classes)

    def moments(self, x: Tensor) -> Tensor:
        """Cross-covariances of neighbouring heads ``[B, heads - 1, width, width]``, columns of length 1."""
        parts = self.norm(self.proj(x).unflatten(2, (self.heads, -1)))  # [B, N, H, D]
        over = (1, 3) if self.compat else (1,)
        parts = (parts - parts.mean(over, keepdim=True)).transpose(1, 2)
        products = parts[:, :-1].mT @ parts[:, 1:] / x.shape[1]
        return normalize(products, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the scores that both moments give."""
        lead, rest = (x[:, 0], x[:, 1:]) if self.class_token else (x.mean(1), x)
        second = self.shrink(self.moments(rest)).flatten(1)
        return torch.lerp(self.first(lead), self.second(second), 0.5)
