"""Attention to a window around every token of a grid."""

from mmattn_kernels.neighborhood.op import neighborhood_attention
from mmattn_kernels.neighborhood.tiling import Simulation, simulate

__all__ = ["Simulation", "neighborhood_attention", "simulate"]
