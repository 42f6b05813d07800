"""Panel layouts: boxes, the published canvases, joining and cutting."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from mmattn_pipelines.panels import PRESETS, PanelLayout
from PIL import Image

from mmattn import ConfigError

TABLE = {  # width, height, tokens of 16 x 16 pixels, panels
    "couple-profile": (2048, 1024, 8192, 2),
    "film-storyboard": (1024, 1536, 6144, 3),
    "font-design": (1792, 1216, 8512, 4),
    "home-decoration": (1344, 1728, 9072, 4),
    "portrait-illustration": (1152, 1088, 4896, 2),
    "portrait-photography": (1344, 1728, 9072, 4),
    "ppt-templates": (1984, 1152, 8928, 4),
    "sandstorm-effect": (1408, 1600, 8800, 2),
    "sparklers-effect": (960, 1088, 4080, 2),
    "visual-identity": (1472, 1024, 5888, 2),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), Random(seed).randbytes(3 * width * height))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 2), (2, 5)])
def test_boxes_tile_the_canvas_in_reading_order(shape):
    layout = PanelLayout(*shape, 6, 4)
    covered = Image.new("L", (layout.width, layout.height), 0)
    for left, top, right, bottom in layout.boxes:
        assert (right - left, bottom - top) == (4, 6)
        assert not any(covered.crop((left, top, right, bottom)).tobytes())
        covered.paste(1, (left, top, right, bottom))
    assert set(covered.tobytes()) == {1} and len(layout.boxes) == layout.count
    places = [(top, left) for left, top, _, _ in layout.boxes]
    assert all(a < b for a, b in pairwise(places))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 3)])
def test_cutting_undoes_joining(shape):
    layout = PanelLayout(*shape, 9, 7)
    panels = [picture(7, 9, seed) for seed in range(layout.count)]
    back = layout.split(layout.join(panels))
    assert [p.tobytes() for p in back] == [p.tobytes() for p in panels]
    assert layout.join(back).tobytes() == layout.join(panels).tobytes()


def test_the_published_canvases():
    assert set(PRESETS) == set(TABLE)
    for name, (width, height, tokens, count) in TABLE.items():
        layout = PanelLayout.preset(name)
        assert (layout.width, layout.height, layout.count) == (width, height, count)
        assert layout.tokens(16) == tokens
    assert (PRESETS["film-storyboard"].rows, PRESETS["visual-identity"].rows) == (3, 1)
    with pytest.raises(ConfigError, match="film-storyboard"):
        PanelLayout.preset("film-storybord")


def test_auto_is_nearest_to_a_square():
    for count in range(1, 13):
        for size in ((64, 64), (64, 112), (160, 64)):
            layout = PanelLayout.auto(count, *size)
            assert layout.count == count

            def long(rows, size=size, count=count):
                return max(h := rows * size[0], w := count // rows * size[1]) / min(h, w)

            best = min(long(rows) for rows in range(1, count + 1) if count % rows == 0)
            assert max(layout.height, layout.width) / min(layout.height, layout.width) == best
    assert (PanelLayout.auto(2, 64, 64).rows, PanelLayout.auto(2, 64, 96).rows) == (1, 2)
    assert PanelLayout.auto(7, 64, 64).cols == 7


def test_fitting():
    layout, wide = PanelLayout(1, 2, 8, 8), picture(40, 8)
    cropped = layout.fit(wide)
    assert cropped.tobytes() == wide.crop((16, 0, 24, 8)).tobytes()
    padded = layout.fit(wide, "pad", fill="red")
    assert padded.size == (8, 8) and padded.getpixel((0, 0)) == (255, 0, 0)
    assert layout.fit(picture(8, 8)).tobytes() == picture(8, 8).tobytes()
    assert layout.fit(Image.new("RGBA", (8, 8))).mode == "RGB"
    with pytest.raises(ConfigError, match="'crop' or 'pad'"):
        layout.fit(wide, "stretch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PanelLayout(0, 2, 8, 8), "rows is a whole number"),
        (lambda: PanelLayout(1, 2, 8, 8.0), "panel_width is a whole number"),
        (lambda: PanelLayout.auto(0, 8, 8), "count is a whole number"),
        (lambda: PanelLayout(1, 2, 8, 8).split(picture(8, 8)), "canvas of 16 x 8 pixels"),
        (lambda: PanelLayout(1, 2, 8, 8).join([picture(8, 8)]), "takes 2 pictures, got 1"),
        (
            lambda: PanelLayout(1, 2, 8, 8).join([picture(8, 8), picture(9, 8)]),
            "picture 2 has 9 x 8 pixels",
        ),
        (lambda: PanelLayout(1, 2, 24, 40).tokens(16), "such as 32 x 32"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
