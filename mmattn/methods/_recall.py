"""What sparse attention left out: the share of the dense attention mass on the keys it kept."""

from __future__ import annotations

import torch
from mmattn_kernels import attention_with_column_mass
from torch import Tensor

from mmattn.sites import Site


def recall(
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Share of every query's dense attention mass on the keys that sparse attention kept, ``[B, H, Q]``.

    Exact, because it is the ratio of two softmax denominators: ``exp(lse - dense lse)``.

    Args:
        lse: natural log-sum-exp of the scores that were kept, ``[B, H, Q]``.
        q, k, v: ``[B, H, Q, D]`` and ``[B, H, K, D]``.
        mask: mask of the call, broadcastable to ``[B, H, Q, K]``.
    """
    _, dense, _ = attention_with_column_mass(q, k, v, mask=mask, scale=scale)
    share = torch.exp(lse - dense)
    return torch.where(dense == float("-inf"), 1.0, share).clamp(max=1.0)


def masked_lse(
    allowed: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> Tensor:
    """Log-sum-exp over the pairs that `allowed` keeps (bool or added), ``[B, H, Q]``; quadratic."""
    return attention_with_column_mass(q, k, v, mask=allowed, scale=scale)[1]


def note_recall(
    site: Site,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Add the mean `recall` of these queries to the report; call it while ``site.probing``."""
    site.note("recall", recall(lse, q, k, v, mask=mask, scale=scale))
