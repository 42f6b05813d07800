"""Attention operators for sparse, routed, windowed, re-weighted and linear attention.

Depends on torch alone; Triton loads on first use. Every op takes ``[B, H, N, D]`` with any strides, has a
gradient, and says through ``backend=`` and its errors what runs and why.
"""

from mmattn_kernels._backends import BackendUnavailable
from mmattn_kernels._merge import merge
from mmattn_kernels.block_sparse import BlockLists, block_sparse_attention
from mmattn_kernels.column_mass import attention_with_column_mass
from mmattn_kernels.grouped import grouped_attention
from mmattn_kernels.linear import LinearState, linear_apply, linear_attention, linear_state
from mmattn_kernels.neighborhood import neighborhood_attention
from mmattn_kernels.routed import routed_attention

__all__ = [
    "BackendUnavailable",
    "BlockLists",
    "LinearState",
    "attention_with_column_mass",
    "block_sparse_attention",
    "grouped_attention",
    "linear_apply",
    "linear_attention",
    "linear_state",
    "merge",
    "neighborhood_attention",
    "routed_attention",
]
