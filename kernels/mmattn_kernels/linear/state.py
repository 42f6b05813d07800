"""What linear attention keeps of its keys: sums whose size does not depend on how many there were."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearState:
    """Sums over keys; the state of a union of disjoint sets of keys is the sum of their states.

    Shapes:
        ``products [B, Hkv, D, Dv]``: features (turned, with RoPE) times values. ``sums [B, Hkv, D]``:
        features, never turned. ``values [B, Hkv, Dv]``: values. ``count [B]``: how many keys. All fp32,
        or fp64 for fp64 keys.
    """

    products: Tensor
    sums: Tensor
    values: Tensor
    count: Tensor

    def __add__(self, other: LinearState) -> LinearState:
        """The state of the keys of both."""
        return LinearState(
            self.products + other.products,
            self.sums + other.sums,
            self.values + other.values,
            self.count + other.count,
        )

    def __sub__(self, other: LinearState) -> LinearState:
        """The state without the keys of `other`, to let old keys drop out of a window."""
        return LinearState(
            self.products - other.products,
            self.sums - other.sums,
            self.values - other.values,
            self.count - other.count,
        )

    def detach(self) -> LinearState:
        """The same numbers without their history of gradients."""
        return LinearState(
            self.products.detach(), self.sums.detach(), self.values.detach(), self.count
        )
