"""Parts of one softmax, computed apart and joined by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys; differentiable in every argument.

    Args:
        outs: outputs ``[B, H, Q, D]``, each normalised over its own keys.
        lses: their log-sum-exp ``[B, H, Q]``; -inf where a part has no key.

    Returns:
        What one softmax over all the keys gives: output and log-sum-exp. A row without any key is 0 and
        -inf.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"merge needs as many outputs as LSEs, got {len(outs)} and {len(lses)}.")
    stacked = torch.stack(lses)
    empty = (stacked == float("-inf")).all(0)
    lse = torch.logsumexp(stacked.masked_fill(empty, 0.0), dim=0)
    weights = torch.exp(stacked - lse).masked_fill(empty, 0.0)
    dtype = outs[0].dtype
    out = sum((w[..., None] * o.to(w.dtype) for w, o in zip(weights, outs, strict=True)))
    assert isinstance(out, Tensor)
    return out.to(dtype), lse.masked_fill(empty, float("-inf"))
