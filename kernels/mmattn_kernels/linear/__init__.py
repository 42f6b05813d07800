"""Linear attention over all keys, through a state of fixed size."""

from mmattn_kernels.linear.op import linear_apply, linear_attention, linear_state
from mmattn_kernels.linear.state import LinearState

__all__ = ["LinearState", "linear_apply", "linear_attention", "linear_state"]
