"""How much one visitor may ask for. The page's own bounds are advice: text fields are not checked by it."""

from __future__ import annotations

from collections.abc import Sized

from mmattn.errors import ConfigError
from mmattn.loading import Loaded

PROMPT_LENGTH, METHOD_LENGTH, WORD_LENGTH = 600, 300, 40
STEPS, REPEATS, NEW_TOKENS, SEED, SIDE, FRAMES = 50, 10, 256, 2**31 - 1, 1536, 121
FILES = 4
UPLOAD_BYTES = 8 * 2**20
PICTURE_PIXELS = 20_000_000
WORK = {"t2i": 1024 * 1024 * 60, "t2v": 832 * 480 * 81 * 50}
"""Pixels times frames times steps of one call."""


def short_enough(text: str | None, what: str, length: int) -> str:
    """`text` without blanks around it.

    Raises:
        ConfigError: when it is longer than `length` characters or holds control characters.
    """
    text = (text or "").strip()
    if len(text) > length:
        raise ConfigError(
            f"{what} may have {length} characters, this has {len(text)}; shorten it and try again"
        )
    if any(ord(char) < 32 and char not in "\n\t" for char in text):
        raise ConfigError(f"{what} holds control characters; type it again as plain text")
    return text


def prompt(text: str | None) -> str:
    """A prompt or a question.

    Raises:
        ConfigError: when it is empty or too long.
    """
    text = short_enough(text, "the prompt", PROMPT_LENGTH)
    if not text:
        raise ConfigError("the prompt is empty; type one, or press “New example”")
    return text


def whole(value: float | None, what: str, low: int, high: int) -> int:
    """A whole number between `low` and `high`.

    Raises:
        ConfigError: for anything else.
    """
    if value is None or value != value or not low <= value <= high or int(value) != value:
        raise ConfigError(f"{what} is a whole number from {low} to {high}; got {value}")
    return int(value)


def seed(value: float | None) -> int:
    """A seed.

    Raises:
        ConfigError: outside 0 .. 2**31 - 1.
    """
    return whole(value, "the seed", 0, SEED)


def guidance(value: float | None) -> float:
    """A guidance scale.

    Raises:
        ConfigError: outside 0 .. 20.
    """
    if value is None or not 0 <= value <= 20:
        raise ConfigError(f"guidance is a number from 0 to 20; got {value}")
    return float(value)


def few(files: Sized | None) -> None:
    """Raise for too many files.

    Raises:
        ConfigError: for more than `FILES`.
    """
    if files is not None and len(files) > FILES:
        raise ConfigError(f"at most {FILES} pictures at once; got {len(files)}. Leave some out")


def size(
    loaded: Loaded,
    steps: int,
    width: float | None,
    height: float | None,
    frames: float | None = None,
) -> dict[str, int | None]:
    """Width, height and frames for `mmattn.calls.draw`; the embedded models have their own.

    Raises:
        ConfigError: for sizes that are no multiples of 16, or for too much work in one call.
    """
    if loaded.embedded:
        return {}
    wide, high = (
        whole(side, what, 64, SIDE) for side, what in ((width, "the width"), (height, "the height"))
    )
    if wide % 16 or high % 16:
        raise ConfigError(f"width and height must be multiples of 16; got {wide} x {high}")
    asked: dict[str, int | None] = {"width": wide, "height": high}
    long = 1
    if loaded.kind == "t2v":
        long = whole(frames, "the number of frames", 5, FRAMES)
        asked["num_frames"] = long
    work = wide * high * long * steps
    if work > WORK[loaded.kind]:
        raise ConfigError(
            f"{wide} x {high} pixels, {long} frames and {steps} steps are "
            f"{work / WORK[loaded.kind]:.1f} times the work that one visitor may ask for; lower one of them"
        )
    return asked
