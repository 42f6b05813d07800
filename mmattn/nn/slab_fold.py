"""SLAB models without norms: every trained `PRepBN` becomes part of the linear layer next to it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import nn

from mmattn.nn.prepbn import PRepBN, fold_into

M = TypeVar("M", bound=nn.Module)


def fold(model: M) -> M:
    """A copy of a trained SLAB model in eval mode whose norms are part of the linear layers next to them.

    The final norm goes into the classifier, across the mean over tokens; a model without classifier or mean
    keeps it. So do blocks of a Swin transformer that pad their map to whole windows: they pad behind the
    norm, with zeros that the folded layer would see otherwise.

    Args:
        model: a `SLABDeiT`, `SLABSwin`, `SLABPVT` or `SLABCSwin`.
    """
    folded: Any = copy.deepcopy(model).eval()
    for part in list(folded.modules()):
        if isinstance(getattr(part, "norm2", None), PRepBN):
            part.mlp.fc1, part.norm2 = fold_into(part.norm2, part.mlp.fc1), nn.Identity()
            if not _pads(part):
                part.attn.qkv, part.norm1 = fold_into(part.norm1, part.attn.qkv), nn.Identity()
        elif isinstance(part, PatchMerging):
            part.reduction, part.norm = fold_into(part.norm, part.reduction), nn.Identity()
        elif isinstance(getattr(part, "proj", None), nn.Conv2d) and isinstance(part.norm, PRepBN):
            _fold_behind(part.proj, part.norm)
            part.norm = nn.Identity()
    head = folded.head
    holder, name = (head, "fc") if hasattr(head, "fc") else (folded, "head")
    pool = head.global_pool.pool_type if hasattr(head, "fc") else folded.global_pool
    classifier = getattr(holder, name)
    if isinstance(classifier, nn.Linear) and pool == "avg" and isinstance(folded.norm, PRepBN):
        setattr(holder, name, fold_into(folded.norm, classifier))
        folded.norm = nn.Identity()
    return cast(M, folded)


def _pads(block: nn.Module) -> bool:
    if not isinstance(block, SwinTransformerBlock):
        return False
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return any(side % window for side, window in sides)


@torch.no_grad()
def _fold_behind(conv: nn.Conv2d, norm: PRepBN) -> None:
    """Let `conv` do what the norm behind it does."""
    factor, summand = norm.repbn.affine()
    assert conv.bias is not None
    conv.weight.mul_(factor[:, None, None, None])
    conv.bias.mul_(factor).add_(summand)
