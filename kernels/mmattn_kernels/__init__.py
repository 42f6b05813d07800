"""Attention operators: block-sparse, and the like. Depends on torch alone; Triton loads on first use."""

from mmattn_kernels._backends import BackendUnavailable
from mmattn_kernels._merge import merge
from mmattn_kernels.block_sparse import BlockLists, block_sparse_attention
from mmattn_kernels.routed import routed_attention

__all__ = ["BackendUnavailable", "BlockLists", "block_sparse_attention", "merge", "routed_attention"]
