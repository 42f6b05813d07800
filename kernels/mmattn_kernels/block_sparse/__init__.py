"""Attention over lists of key blocks, per head."""

from mmattn_kernels.block_sparse.lists import BlockLists
from mmattn_kernels.block_sparse.op import block_sparse_attention

__all__ = ["BlockLists", "block_sparse_attention"]
