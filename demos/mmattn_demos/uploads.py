"""Pictures from visitors: three formats, bounded before they are decoded, and drawn anew."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from mmattn.batch.limits import PICTURE_DAMAGE, flat, slow_to_read
from mmattn.errors import ConfigError
from mmattn_demos.limits import PICTURE_PIXELS, UPLOAD_BYTES

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST = 1024
_BROKEN = "that file is not a whole PNG, JPEG or WebP picture; save it as PNG and try again"


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
    if problem := slow_to_read(data):
        raise ConfigError(f"that picture {problem}; save it as PNG and try again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ConfigError(
            "that picture is far too large when unpacked; make it smaller and try again"
        ) from error
    except PICTURE_DAMAGE as error:
        raise ConfigError(_BROKEN) from error
    with opened as picture:
        if picture.width * picture.height > PICTURE_PIXELS:
            raise ConfigError(
                f"pictures may have {PICTURE_PIXELS // 10**6} megapixels, this has "
                f"{picture.width} x {picture.height}; make it smaller and try again"
            )
        try:
            picture.draft("RGB", (LONGEST, LONGEST))
            picture.load()
            upright = flat(picture)
        except PICTURE_DAMAGE as error:
            raise ConfigError(_BROKEN) from error
    upright.thumbnail((LONGEST, LONGEST))
    return upright
