"""PRepBN: batch norms that take over from layer norms during training and fold into the next linear layer.

The half of SLAB (arXiv 2405.11582) that has nothing to do with attention; `mmattn.nn.slab` uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from mmattn.errors import ConfigError


class RepBN(nn.Module):
    """``BN(x) + alpha * x`` over the last axis of ``x [..., C]``; affine once trained.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.ones(1, **dd))
        self.bn = nn.BatchNorm1d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x.flatten(0, -2)).view(x.shape) + self.alpha * x
        return out

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and summand per channel that this norm is in eval mode."""
        assert self.bn.running_var is not None and self.bn.running_mean is not None
        factor = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        return factor + self.alpha, self.bn.bias - factor * self.bn.running_mean


class PRepBN(nn.Module):
    """A layer norm that becomes a `RepBN` over `steps` training steps; in eval mode always the latter.

    In training the output is ``share * LN(x) + (1 - share) * RepBN(x)``. `advance` sets the share; a model
    that does not call it in its forward stays where it is.

    Args:
        dim: channels.
        steps: training steps from layer norm to `RepBN`, at least 1.
        warm: steps of layer norm alone in front of them.
        start: share of the layer norm when blending begins, 0 to 1.
        eps: of the layer norm.

    Shapes:
        ``x [..., C]`` to the same.

    Raises:
        ConfigError: no steps.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor
    share: Tensor

    def __init__(
        self,
        dim: int,
        steps: int = 300_000,
        warm: int = 0,
        start: float = 1.0,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if steps < 1 or warm < 0:
            raise ConfigError(
                f"PRepBN: steps is {steps} and warm {warm}; at least 1 and 0 are needed."
            )
        dd = {"device": device, "dtype": dtype}
        self.start = start
        self.ln = LayerNorm(dim, eps=eps, **dd)
        self.repbn = RepBN(dim, **dd)
        for name, value in (("warm", warm), ("iter", steps), ("total_step", steps)):
            self.register_buffer(name, torch.tensor(value, device=device))
        self.register_buffer("share", torch.tensor(1.0, device=device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """That of the layer norm, since models ask norms by this name where they are."""
        weight: Tensor = self.ln.weight
        return weight

    def init_non_persistent_buffers(self) -> None:
        """Called by timm after a model leaves the meta device."""
        self.share.fill_(1.0)

    def advance(self) -> None:
        """Set the share of the layer norm for this step, and count the step."""
        warming = self.warm > 0
        share = self.start * self.iter / self.total_step
        self.share.copy_(torch.where(warming, torch.ones_like(share), share))
        self.iter.sub_((~warming & (self.iter > 0)).to(self.iter.dtype))
        self.warm.sub_(warming.to(self.warm.dtype))

    def forward(self, x: Tensor) -> Tensor:
        new: Tensor = self.repbn(x)
        if not self.training:
            return new
        share = self.share.to(x.dtype)
        blend: Tensor = share * self.ln(x) + (1 - share) * new
        return blend


def advance(model: nn.Module) -> None:
    """Count one training step in every `PRepBN` of a model; call it before each training forward.

    The models of this module do so themselves.
    """
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.advance()


def convert_norms(model: nn.Module, steps: int = 300_000) -> None:
    """Put a `PRepBN` around every layer norm of a model whose last axis is channels, keeping its weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            weight = module.weight
            norm = PRepBN(len(weight), steps, device=weight.device, dtype=weight.dtype)
            norm.ln = module
            model.set_submodule(name, norm)


@torch.no_grad()
def fold_into(norm: PRepBN | RepBN, linear: nn.Linear) -> nn.Linear:
    """A linear layer that computes ``linear(norm(x))`` of eval mode by itself."""
    factor, summand = (norm.repbn if isinstance(norm, PRepBN) else norm).affine()
    weight = linear.weight * factor
    bias = linear.weight @ summand
    if linear.bias is not None:
        bias = bias + linear.bias
    folded = nn.Linear(
        linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype
    )
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    return folded
