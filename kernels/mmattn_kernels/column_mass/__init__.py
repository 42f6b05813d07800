"""Attention that also says how much every key was looked at."""

from mmattn_kernels.column_mass.op import attention_with_column_mass

__all__ = ["attention_with_column_mass"]
