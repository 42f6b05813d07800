"""Token layouts: grids, text before or after, UNet pyramids."""

import pytest

from mmattn import Layout, UnsupportedCall


def test_text_before_and_after():
    assert Layout((2, 3, 4), "before").image_slice(24 + 5) == slice(5, 29)
    assert Layout((2, 3, 4), "after").image_slice(24 + 5) == slice(0, 24)
    assert Layout((2, 3, 4)).image_slice(24) == slice(0, 24)


@pytest.mark.parametrize(
    ("grid", "tokens", "expected"),
    [
        ((1, 16, 24), 384, (1, 16, 24)),
        ((1, 16, 24), 96, (1, 8, 12)),
        ((1, 15, 9), 135, (1, 15, 9)),
        ((1, 15, 9), 40, (1, 8, 5)),
        ((1, 15, 9), 12, (1, 4, 3)),
    ],
)
def test_pyramid_levels_round_up_like_strided_convolutions(grid, tokens, expected):
    assert Layout(grid, pyramid=True).grid_for(tokens) == expected


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedCall, match="no token grid"):
        Layout().image_slice(10)
    with pytest.raises(UnsupportedCall, match="has 10 tokens but the grid"):
        Layout((1, 4, 4)).image_slice(10)
    with pytest.raises(UnsupportedCall, match="has 20 tokens but the grid"):
        Layout((1, 4, 4)).image_slice(20)
    with pytest.raises(UnsupportedCall, match="No halving"):
        Layout((1, 8, 8), pyramid=True).grid_for(17)
