"""UPLiFT's local attender: upsampling features or latents by attention to a fixed neighbourhood.

There are neither queries nor keys. A guide map, as large as the output, says for every output place how much
it takes from each of K neighbours of the low-resolution feature below it; the weights are a softmax, so every
output is a convex combination and no value appears that was not there. "UPLiFT: Efficient Pixel-Dense Feature
Upsampling with Local Attenders", arXiv 2601.17950. Compared with numbers of the published module and with
loops. The network around it (encoder of the picture, decoder of guides, refiner) is not part of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmattn.errors import ConfigError, UnsupportedCall

__all__ = ["NEIGHBORHOODS", "LocalAttender", "local_attention"]

Offsets = tuple[tuple[int, int], ...]


def _square(radius: int) -> Offsets:
    side = range(-radius, radius + 1)
    return tuple((dy, dx) for dy in side for dx in side)


NEIGHBORHOODS: dict[int, Offsets] = {
    5: tuple(o for o in _square(1) if abs(o[0]) + abs(o[1]) <= 1),
    9: _square(1),
    13: tuple(o for o in _square(2) if abs(o[0]) + abs(o[1]) <= 2),
    17: tuple(o for o in _square(2) if sorted(map(abs, o)) != [1, 2]),
    25: _square(2),
}
"""Offsets (rows, columns) by their number, row by row: plus, square, diamond, square and ring, 5 x 5."""


def local_attention(logits: Tensor, value: Tensor, offsets: Offsets) -> Tensor:
    """Mix the neighbours of every place of `value`, with weights for every place of a finer grid.

    Args:
        logits: ``[B, K, I * Y, I * X]``, K the number of `offsets`, I a whole number.
        value: ``[B, C, Y, X]``.
        offsets: neighbours as (rows, columns); outside the map its border is repeated.

    Returns:
        ``[B, C, I * Y, I * X]`` in the dtype of `value`. The K shifted maps are never held together.

    Raises:
        UnsupportedCall: sizes that are not a whole multiple, or other numbers of neighbours or rows.
    """
    (b, k, fine_y, fine_x), (batch, channels, y, x) = logits.shape, value.shape
    if k != len(offsets) or b != batch:
        raise UnsupportedCall(
            f"logits for {b} rows and {k} neighbours, where value has {batch} rows and {len(offsets)} "
            "offsets are given"
        )
    factor = fine_y // y
    if factor < 1 or (fine_y, fine_x) != (factor * y, factor * x):
        raise UnsupportedCall(
            f"a guide of {fine_y} x {fine_x} is no whole multiple of features of {y} x {x}; resize it"
        )
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    padded = pad(value, (reach,) * 4, mode="replicate")
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.softmax(dim=1, dtype=wide).to(value.dtype)
    # [B, K, Y, I, X, I]: the sub-places of a place share its neighbours.
    weights = weights.view(b, k, y, factor, x, factor)
    out = value.new_zeros(b, channels, y, factor, x, factor)
    for i, (dy, dx) in enumerate(offsets):
        shifted = padded[:, :, reach + dy : reach + dy + y, reach + dx : reach + dx + x]
        out = torch.addcmul(out, weights[:, None, i], shifted[:, :, :, None, :, None])
    return out.reshape(b, channels, fine_y, fine_x)


class LocalAttender(nn.Module):
    """Upsamples a map by `local_attention`, with weights read off a guide map.

    Args:
        guide_channels: channels of the guide.
        neighbors: 5, 9, 13, 17 or 25 (`NEIGHBORHOODS`).

    Shapes:
        guide ``[B, guide_channels, I * Y, I * X]``, value ``[B, C, Y, X]``, output ``[B, C, I * Y, I * X]``.
        Keys of the published weights, ``attender.conv1.{weight,bias}``, fit after their prefix is taken off.

    Raises:
        ConfigError: for another number of neighbours, or no channel.
    """

    def __init__(self, guide_channels: int, neighbors: int = 17) -> None:
        super().__init__()
        if neighbors not in NEIGHBORHOODS:
            raise ConfigError(f"neighbors must be one of {sorted(NEIGHBORHOODS)}, got {neighbors}")
        if guide_channels < 1:
            raise ConfigError(f"guide_channels must be at least 1, got {guide_channels}")
        self.offsets = NEIGHBORHOODS[neighbors]
        self.conv1 = nn.Conv2d(guide_channels, neighbors, 1)

    def forward(self, guide: Tensor, value: Tensor) -> Tensor:
        """Upsample `value` to the size of `guide`.

        Raises:
            UnsupportedCall: when the guide is no whole multiple of the value's size.
        """
        missing = len(self.offsets) - guide.shape[1]
        residual = pad(guide, (0, 0, 0, 0, 0, max(missing, 0)))[:, : len(self.offsets)]
        return local_attention(self.conv1(guide) + residual, value, self.offsets)
