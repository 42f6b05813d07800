"""Write pictures, clips and grids with their metadata. Every file appears whole or not at all.

Pictures carry ``parameters`` (the line that image viewers of the Stable Diffusion world read) and
``mmattn`` (JSON) as PNG text. Clips carry the JSON as the container's comment and in a sidecar file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]
Ink = tuple[int, int, int]

PAPER: Ink = (255, 255, 255)
INK: Ink = (32, 33, 36)
FAINT: Ink = (110, 112, 118)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds.

    File and folder are synced, so a file under its own name survives a power cut whole.
    """
    path = Path(path)
    make_folder(path.parent)
    # Names are limited to 255 bytes; the pid tells whose litter a leftover is.
    stem = path.name.encode()[:180].decode(errors="ignore")
    temporary = path.parent / f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. A new folder lasts only once the one above it is synced too."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)  # another shard may have been faster
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some folders can be written and not read, and some network mounts cannot sync folders.
        if error.errno not in (errno.EACCES, errno.EINVAL) or not path.is_dir():
            raise


def put(descriptor: int, data: bytes) -> None:
    """Write all of `data`, also where the system takes it in pieces."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write bytes."""
    with atomic(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY)
        try:
            put(descriptor, data)
        finally:
            os.close(descriptor)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text. What is no text, such as a byte of a strange file name, becomes a ``?``."""
    return write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | Path, data: Any) -> Path:
    """Write JSON, two spaces deep, with a newline at the end."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _comment(meta: Mapping[str, Any]) -> str:
    return _text(json.dumps(meta, ensure_ascii=False, default=str))


def parameters_line(meta: Mapping[str, Any]) -> str:
    """`meta` as the ``parameters`` text of PNG files: the prompt, then ``Key: value`` pairs."""
    names = {"steps": "Steps", "guidance": "CFG scale", "seed": "Seed", "size": "Size"}
    pairs = [f"{label}: {meta[key]}" for key, label in names.items() if meta.get(key) is not None]
    pairs += [f"{key.capitalize()}: {meta[key]}" for key in ("model", "method") if meta.get(key)]
    return f"{meta.get('prompt', '')}\n{', '.join(pairs)}"


def to_pixels(picture: Any) -> Pixels:
    """8-bit pixels ``[Y, X, 3]`` of a PIL image, or of a tensor ``[3, Y, X]`` in [0, 1]."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    if hasattr(picture, "detach"):
        picture = picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
        picture = (picture * 255).round()
    return np.ascontiguousarray(picture, dtype=np.uint8)


def to_image(picture: Any) -> Image.Image:
    """A PIL image of what `to_pixels` takes."""
    return Image.fromarray(to_pixels(picture))


def upscale(picture: Any, factor: int, *, smooth: bool = False) -> Image.Image:
    """Enlarge by a whole `factor`, keeping hard pixels unless `smooth`."""
    image = to_image(picture)
    size = (image.width * factor, image.height * factor)
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return image.resize(size, how) if factor != 1 else image


def write_image(
    path: str | Path, picture: Any, meta: Mapping[str, Any] | None = None, *, scale: int = 1
) -> Path:
    """Write a PNG with its metadata.

    Args:
        path: ends in ``.png``.
        picture: PIL image, ``[Y, X, 3]`` uint8 array, or tensor ``[3, Y, X]`` in [0, 1].
        meta: JSON-ready facts (prompt, seed, method, ...); None writes no metadata.
        scale: whole factor to enlarge by.
    """
    info = PngInfo()
    if meta is not None:
        info.add_itxt("parameters", _text(parameters_line(meta)))
        info.add_itxt("mmattn", _comment(meta))
    encoded = io.BytesIO()
    upscale(picture, scale).save(encoded, format="PNG", pnginfo=info, optimize=True)
    return write_bytes(path, encoded.getvalue())


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The ``mmattn`` metadata of a PNG, or of the sidecar of a clip; empty where there is none."""
    path = Path(path)
    if path.suffix.lower() == ".png":
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get("mmattn")
        return dict(json.loads(text)) if text else {}
    sidecar = path.with_suffix(path.suffix + ".json")
    return dict(json.loads(sidecar.read_text(encoding="utf-8"))) if sidecar.is_file() else {}


def video_encoder() -> str | None:
    """``libx264`` where PyAV can encode H.264, else None (clips then become animated WebP)."""
    try:
        import av
    except ImportError:
        return None
    return "libx264" if "libx264" in av.codecs_available else None


def write_video(
    path: str | Path,
    frames: Sequence[Any],
    *,
    fps: int = 8,
    scale: int = 1,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write a clip as H.264 MP4 in yuv420p, which every browser plays, or as animated WebP.

    Args:
        path: ends in ``.mp4``; where no H.264 encoder is available the file is written as ``.webp``
            instead, so use the path that is returned.
        frames: pictures as for `write_image`, all of one size.
        fps: frames per second.
        scale: whole factor to enlarge by, with hard pixels.
        meta: goes into the comment and into ``<file>.json``.

    Raises:
        ValueError: when there is no frame.
    """
    if not frames:
        raise ValueError("A clip needs at least one frame; found none.")
    path = Path(path)
    if video_encoder() is None:
        return write_webp(path.with_suffix(".webp"), frames, fps=fps, scale=scale, meta=meta)
    import av

    pixels = [np.asarray(upscale(frame, scale)) for frame in frames]
    height, width = pixels[0].shape[:2]
    # 4:2:0 halves the chroma planes, so both sides must be even.
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    options = {"movflags": "+faststart"}
    with (
        atomic(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=options) as out,
    ):
        if meta is not None:
            out.metadata["comment"] = _comment(meta)
        stream = out.add_stream("libx264", rate=fps)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "preset": "medium", "bf": "0"}
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.pad(picture, pad, mode="edge"), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    _sidecar(path, meta)
    return path


def write_webp(
    path: str | Path,
    frames: Sequence[Any],
    *,
    fps: int = 8,
    scale: int = 1,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write a clip as an endless animated WebP; arguments as for `write_video`."""
    if not frames:
        raise ValueError("A clip needs at least one frame; found none.")
    path = Path(path)
    images = [upscale(frame, scale) for frame in frames]
    with atomic(path) as temporary:
        images[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
            lossless=True,
        )
    _sidecar(path, meta)
    return path


def _sidecar(path: Path, meta: Mapping[str, Any] | None) -> None:
    if meta is not None:
        write_json(
            path.with_suffix(path.suffix + ".json"), json.loads(json.dumps(meta, default=str))
        )


def difference(picture: Any, reference: Any, *, gain: float = 5.0) -> Image.Image:
    """``gain * |picture - reference|`` as pixels: black where equal, bright where they differ."""
    gap = to_pixels(picture).astype(np.float32) - to_pixels(reference).astype(np.float32)
    return Image.fromarray((np.abs(gap) * gain).clip(0, 255).astype(np.uint8))


def font(size: int) -> Any:
    """Pillow's own outline font at `size` pixels, so labels look the same on every machine."""
    return ImageFont.load_default(size)


def wrap(text: str, width: int, face: Any) -> list[str]:
    """Break `text` into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def fit(text: str, width: int, face: Any) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def grid(
    rows: Sequence[Sequence[Any]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    notes: Sequence[Sequence[str]] | None = None,
    scale: int = 4,
    smooth: bool = False,
    label_width: int = 200,
) -> Image.Image:
    """Arrange pictures in a table with all text outside the pixels.

    Args:
        rows: one row of pictures per prompt, all of one size; None leaves a place empty.
        columns: heading of every column.
        labels: text to the left of every row (the prompt).
        notes: small text below every picture, or None.
        scale: whole factor to enlarge pictures by.
        smooth: Lanczos instead of hard pixels.
        label_width: room for `labels` in pixels.

    Raises:
        ValueError: when the rows, columns and labels do not fit each other.
    """
    given = [picture for row in rows for picture in row if picture is not None]
    if len(rows) != len(labels) or any(len(row) != len(columns) for row in rows) or not given:
        raise ValueError(
            "A grid needs one label per row, one picture or None per column, and not only None; found "
            f"{len(given)} pictures, {len(rows)} rows of "
            f"{sorted({len(row) for row in rows})} places, {len(labels)} labels and "
            f"{len(columns)} columns."
        )
    first = to_image(given[0])
    wide, high = first.width * scale, first.height * scale
    gap, pad = 12, 18
    head_face, text_face, note_face = font(17), font(15), font(13)
    headings = [wrap(text, wide, head_face) for text in columns]
    lines_above = max(map(len, headings))
    top = pad + (lines_above * 21 + 10 if lines_above else 0)
    below = 22 if notes is not None else 0
    size = (
        pad + label_width + len(columns) * (wide + gap) - gap + pad,
        top + len(rows) * (high + below + gap) - gap + pad,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, lines in enumerate(headings):
        for n, line in enumerate(lines):
            y = top - 10 - (len(lines) - n) * 21
            draw.text((pad + label_width + i * (wide + gap), y), line, INK, head_face)
    for r, row in enumerate(rows):
        y = top + r * (high + below + gap)
        for n, line in enumerate(wrap(labels[r], label_width - 16, text_face)):
            draw.text((pad, y + n * 20), line, INK, text_face)
        for i, picture in enumerate(row):
            if picture is None:
                continue
            x = pad + label_width + i * (wide + gap)
            sheet.paste(upscale(picture, scale, smooth=smooth), (x, y))
            draw.rectangle((x - 1, y - 1, x + wide, y + high), outline=(214, 216, 220))
            if notes is not None:
                draw.text((x, y + high + 4), fit(notes[r][i], wide, note_face), FAINT, note_face)
    return sheet
