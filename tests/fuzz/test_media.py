"""Bombs are refused, unusual pictures come out right, and either is quick: as reference and as upload."""

from __future__ import annotations

import time
from functools import partial

import media
import pytest
import trials
from mmattn_demos.uploads import read_picture

from mmattn.batch.limits import open_picture
from mmattn.errors import ConfigError


def bounded(work):
    """What `work` returns, after less than a second and 300 MB."""
    start, level = time.process_time(), trials.reset_peak()
    done = work()
    assert time.process_time() - start < 1
    assert trials.kib("VmHWM") - level < 300 * 1024
    return done


@pytest.mark.parametrize("name", media.REFUSED)
def test_bombs_and_scraps(name, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(media.REFUSED[name]())
    for reader in (open_picture, read_picture):
        with pytest.raises(ConfigError, match=r"\w+ \w+ \w+"):
            bounded(partial(reader, path))


@pytest.mark.parametrize("name", media.READ)
def test_unusual_pictures(name, tmp_path):
    build, pixels = media.READ[name]
    path = tmp_path / "x.png"
    path.write_bytes(build())
    for reader in (open_picture, read_picture):
        picture = bounded(partial(reader, path))
        assert picture.mode == "RGB" and not picture.info and not picture.getexif()
        for place, colour in pixels.items():
            found = picture.getpixel(place)
            assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 4, (place, found)
