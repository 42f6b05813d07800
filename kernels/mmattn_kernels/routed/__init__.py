"""Attention of every query to the chunks of keys it chose."""

from mmattn_kernels.routed.op import routed_attention

__all__ = ["routed_attention"]
