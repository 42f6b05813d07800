"""Panels of one canvas: where they are, and pictures into them and out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from PIL import Image, ImageOps

from mmattn.errors import ConfigError, suggest

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, as `PIL.Image.Image.crop` takes them."""


@dataclass(frozen=True)
class PanelLayout:
    """Equal panels that tile a canvas without gaps, in reading order (row by row).

    A set of related pictures is drawn as one picture: the panels of a canvas. "In-Context LoRA for
    Diffusion Transformers", arXiv 2410.23775, whose ten canvases `preset` knows by name.

    Args:
        rows, cols: panels down and across, at least 1.
        panel_height, panel_width: size of every panel in pixels, at least 1. Models work on squares of
            pixels; `tokens` says whether panels and squares fit.

    Raises:
        ConfigError: for a number that is not a positive integer.
    """

    rows: int
    cols: int
    panel_height: int
    panel_width: int

    def __post_init__(self) -> None:
        """Check that all four numbers are positive integers."""
        for name in ("rows", "cols", "panel_height", "panel_width"):
            _positive(name, getattr(self, name))

    @classmethod
    def auto(cls, count: int, panel_height: int, panel_width: int) -> Self:
        """The arrangement of `count` panels whose canvas is nearest to a square.

        No panel is left empty, so a prime number of panels makes a strip. Of two arrangements that are
        equally near, the one with fewer rows is taken.

        Raises:
            ConfigError: for a number that is not a positive integer.
        """
        _positive("count", count)
        _positive("panel_height", panel_height)
        _positive("panel_width", panel_width)

        def elongation(rows: int) -> float:
            height, width = rows * panel_height, count // rows * panel_width
            return max(height / width, width / height)

        rows = min((r for r in range(1, count + 1) if count % r == 0), key=elongation)
        return cls(rows, count // rows, panel_height, panel_width)

    @classmethod
    def preset(cls, name: str) -> PanelLayout:
        """One of the ten canvases of the published In-Context LoRAs; `PRESETS` lists them.

        Raises:
            ConfigError: for another name, with the nearest ones.
        """
        if name not in PRESETS:
            raise ConfigError(
                f"there is no panel preset {name!r}{suggest(name, PRESETS)} "
                f"The presets are {sorted(PRESETS)}."
            )
        return PRESETS[name]

    @property
    def count(self) -> int:
        """Number of panels."""
        return self.rows * self.cols

    @property
    def height(self) -> int:
        """Height of the canvas in pixels."""
        return self.rows * self.panel_height

    @property
    def width(self) -> int:
        """Width of the canvas in pixels."""
        return self.cols * self.panel_width

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Box of every panel ``(left, top, right, bottom)`` in pixels, row by row."""
        h, w = self.panel_height, self.panel_width
        return tuple(
            (c * w, r * h, (c + 1) * w, (r + 1) * h)
            for r in range(self.rows)
            for c in range(self.cols)
        )

    def split(self, image: Image.Image) -> list[Image.Image]:
        """The panels of a canvas, in reading order.

        Raises:
            ConfigError: the picture does not have the size of this canvas.
        """
        if image.size != (self.width, self.height):
            raise ConfigError(
                f"a canvas of {self.width} x {self.height} pixels was expected ({self.rows} x "
                f"{self.cols} panels), the picture has {image.width} x {image.height}; resize it, or "
                "use the layout that it was drawn with"
            )
        return [image.crop(box) for box in self.boxes]

    def join(self, images: Sequence[Image.Image]) -> Image.Image:
        """One canvas from a picture for every panel, in reading order; in RGB.

        Raises:
            ConfigError: another number of pictures, or a picture that does not have the size of a panel
                (`fit` makes it so).
        """
        if len(images) != self.count:
            raise ConfigError(
                f"a layout of {self.rows} x {self.cols} panels takes {self.count} pictures, "
                f"got {len(images)}"
            )
        canvas = Image.new("RGB", (self.width, self.height))
        for number, (image, box) in enumerate(zip(images, self.boxes, strict=True), 1):
            if image.size != (self.panel_width, self.panel_height):
                raise ConfigError(
                    f"picture {number} has {image.width} x {image.height} pixels, a panel has "
                    f"{self.panel_width} x {self.panel_height}; layout.fit(picture) resizes it"
                )
            canvas.paste(image.convert("RGB"), box[:2])
        return canvas

    def fit(
        self, image: Image.Image, how: Literal["crop", "pad"] = "crop", fill: str = "gray"
    ) -> Image.Image:
        """A picture of any size as one panel, in RGB.

        Args:
            how: ``crop`` scales until the panel is covered and cuts what stands out, evenly;
                ``pad`` scales until the whole picture fits and fills the rest.
            fill: colour of the rest, as Pillow names colours.

        Raises:
            ConfigError: for another `how`.
        """
        if how not in ("crop", "pad"):
            raise ConfigError(f"how is 'crop' or 'pad', got {how!r}")
        size, rgb = (self.panel_width, self.panel_height), image.convert("RGB")
        if rgb.size == size:
            return rgb
        if how == "crop":
            return ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)
        return ImageOps.pad(rgb, size, Image.Resampling.LANCZOS, color=fill)

    def tokens(self, patch: int) -> int:
        """How many tokens the canvas has where one stands for `patch` x `patch` pixels.

        Raises:
            ConfigError: a token would lie across two panels.
        """
        if self.panel_height % patch or self.panel_width % patch:
            raise ConfigError(
                f"panels of {self.panel_width} x {self.panel_height} pixels do not divide into tokens of "
                f"{patch} x {patch}; make both sides multiples of {patch}, such as "
                f"{_nearest(self.panel_width, patch)} x {_nearest(self.panel_height, patch)}"
            )
        return self.height * self.width // patch**2


def _nearest(length: int, patch: int) -> int:
    return max(1, round(length / patch)) * patch


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is a whole number of at least 1, got {value!r}")


def _canvas(width: int, height: int, rows: int, cols: int) -> PanelLayout:
    return PanelLayout(rows, cols, height // rows, width // cols)


PRESETS: dict[str, PanelLayout] = {
    "couple-profile": _canvas(2048, 1024, 1, 2),
    "film-storyboard": _canvas(1024, 1536, 3, 1),
    "font-design": _canvas(1792, 1216, 2, 2),
    "home-decoration": _canvas(1344, 1728, 2, 2),
    "portrait-illustration": _canvas(1152, 1088, 1, 2),
    "portrait-photography": _canvas(1344, 1728, 2, 2),
    "ppt-templates": _canvas(1984, 1152, 2, 2),
    "sandstorm-effect": _canvas(1408, 1600, 2, 1),
    "sparklers-effect": _canvas(960, 1088, 2, 1),
    "visual-identity": _canvas(1472, 1024, 1, 2),
}
"""Canvases of the ten LoRAs that were published with the paper, by the name of their task."""
