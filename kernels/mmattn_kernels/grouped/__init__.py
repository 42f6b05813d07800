"""Attention whose probabilities are re-weighted per group of keys."""

from mmattn_kernels.grouped.op import grouped_attention

__all__ = ["grouped_attention"]
