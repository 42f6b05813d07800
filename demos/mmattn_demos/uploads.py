"""Pictures from visitors: three formats, bounded before they are decoded, and drawn anew."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mmattn.errors import ConfigError
from mmattn_demos.limits import PICTURE_PIXELS, UPLOAD_BYTES

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST = 1024


def read_picture(source: str | Path) -> Image.Image:
    """The first frame of a picture file as RGB, upright, and without anything else that was in the file.

    Args:
        source: a PNG, JPEG or WebP file of at most 8 MB and 20 megapixels. Sides above 1024 pixels are
            scaled down.

    Raises:
        ConfigError: for every other file; the message does not name a path.
    """
    path = Path(source)
    if path.stat().st_size > UPLOAD_BYTES:
        raise ConfigError("pictures may have 8 MB; save this one smaller and try again")
    # One read, so that what was checked is what is decoded.
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > PICTURE_PIXELS:
                    raise ConfigError(
                        f"pictures may have {PICTURE_PIXELS // 10**6} megapixels, this has "
                        f"{picture.width} x {picture.height}; make it smaller and try again"
                    )
                picture.draft("RGB", (LONGEST, LONGEST))
                picture.load()
                upright = _opaque(ImageOps.exif_transpose(picture))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ConfigError(
            "that picture is far too large when unpacked; make it smaller and try again"
        ) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "that file is not a whole PNG, JPEG or WebP picture; save it as PNG and try again"
        ) from error
    upright.thumbnail((LONGEST, LONGEST))
    return Image.frombytes("RGB", upright.size, upright.tobytes())


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, with transparent parts on white, and 16-bit grey scaled to 8."""
    if picture.mode.startswith("I"):
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return picture.convert("RGB")
