"""Calls with extra or missing axes reach methods as [B, H, N, D] with the heads where they belong."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mmattn.folding import WINDOWS_FIRST, Fold
from mmattn.sites import Site


def site(heads, *tags):
    return Site("x", "self", torch.nn.Identity(), heads=heads, tags=frozenset(tags))


@pytest.mark.parametrize(
    ("shape", "where", "folded"),
    [
        ((2, 3, 5, 7, 4), site(3), (10, 3, 7, 4)),
        ((2, 5, 3, 7, 4), site(3, WINDOWS_FIRST), (10, 3, 7, 4)),
        ((2, 3, 5, 6, 7, 4), site(3), (60, 3, 7, 4)),
        ((6, 7, 4), site(3), (2, 3, 7, 4)),
        ((6, 7, 4), site(None), (6, 1, 7, 4)),
        ((7, 4), site(None), (1, 1, 7, 4)),
    ],
)
def test_round_trip_keeps_heads_apart(shape, where, folded):
    q, k, v = torch.randn(3, *shape)
    fold = Fold(q, where)
    assert fold(q).shape == folded
    assert torch.equal(fold.back(fold(q)), q)
    out = fold.back(sdpa(fold(q), fold(k), fold(v)))
    assert torch.allclose(out, sdpa(q, k, v), atol=1e-6)
    if len(shape) == 5:  # scaling head 1 of the folded tensor scales head 1 of the call
        axis = shape.index(3, 1)
        changed = fold(q).clone()
        changed[:, 1] *= 2
        expected = q.clone()
        expected.select(axis, 1).mul_(2)
        assert torch.equal(fold.back(changed), expected)


@pytest.mark.parametrize("mask_shape", [(7, 7), (6, 7, 7), (1, 7, 7)])
def test_masks_follow(mask_shape):
    q, mask = torch.randn(6, 7, 4), torch.randn(mask_shape)
    fold = Fold(q, site(3))
    out = fold.back(sdpa(fold(q), fold(q), fold(q), attn_mask=fold.mask(mask)))
    assert torch.allclose(out, sdpa(q, q, q, attn_mask=mask), atol=1e-6)
    assert Fold(q, site(3)).mask(None) is None
