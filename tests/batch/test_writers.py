"""Files are whole or absent, carry their metadata, and hold exactly the pixels they were given."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mmattn.batch import writers

META = {"prompt": "a red circle — größer", "seed": 7, "steps": 4, "model": "t2i", "method": "vmoba"}


def picture(seed: int = 0, size: tuple[int, int] = (16, 20)) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    writers.write_text(target, "old")
    with pytest.raises(RuntimeError), writers.atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_written_file_can_be_read_by_others(tmp_path):
    target = writers.write_text(tmp_path / "deep" / "a.txt", "text")
    assert target.stat().st_mode & 0o444 == 0o444


def test_png_keeps_pixels_and_metadata(tmp_path):
    tensor = picture()
    path = writers.write_image(tmp_path / "p.png", tensor, META)
    with Image.open(path) as image:
        assert image.text["parameters"].startswith(META["prompt"] + "\n")
        assert "Seed: 7" in image.text["parameters"]
        pixels = np.asarray(image)
    assert pixels.shape == (16, 20, 3)
    assert np.array_equal(pixels, (tensor.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
    assert writers.read_metadata(path) == META


def test_png_without_metadata_has_none(tmp_path):
    assert writers.read_metadata(writers.write_image(tmp_path / "p.png", picture())) == {}


def test_upscaling_repeats_pixels_exactly():
    small = writers.to_pixels(picture())
    large = np.asarray(writers.upscale(picture(), 3))
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


@pytest.mark.skipif(writers.video_encoder() is None, reason="PyAV here has no H.264 encoder")
def test_mp4_plays_in_browsers_and_carries_its_comment(tmp_path):
    # Odd sides must be padded to even ones. Grey frames, because the format halves the colour planes.
    frames = [picture(i, (17, 21)).mean(0, keepdim=True).expand(3, -1, -1) for i in range(4)]
    frames.append(torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1).expand(3, 17, 21))
    path = writers.write_video(tmp_path / "c.mp4", frames, fps=8, scale=3, meta=META)
    with av.open(str(path)) as clip:
        stream = clip.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (64, 52)
        assert json.loads(clip.metadata["comment"]) == META
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert len(decoded) == 5
    assert writers.read_metadata(path) == META
    for frame, got in zip(frames, decoded, strict=True):
        want = np.asarray(writers.upscale(frame, 3), dtype=float)
        assert abs(got[:51, :63].astype(float) - want).mean() < 4


def test_without_an_encoder_the_clip_is_animated_webp(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "video_encoder", lambda: None)
    path = writers.write_video(tmp_path / "c.mp4", [picture(i) for i in range(4)], meta=META)
    assert path.name == "c.webp"
    with Image.open(path) as clip:
        assert clip.n_frames == 4
        assert np.array_equal(np.asarray(clip.convert("RGB")), writers.to_pixels(picture(0)))
    assert writers.read_metadata(path) == META


def test_an_empty_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        writers.write_video(tmp_path / "c.mp4", [])
    assert not list(tmp_path.iterdir())


def test_difference_is_black_where_equal_and_amplified_elsewhere():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[1, 2] = (10, 0, 60)
    shown = np.asarray(writers.difference(b, a, gain=5))
    assert tuple(shown[1, 2]) == (50, 0, 255)
    assert shown.sum() == 305


def test_grid_keeps_text_outside_the_pixels():
    rows = [[picture(0), picture(1)], [picture(2), picture(3)]]
    plain = {"columns": ["", ""], "labels": ["", ""], "scale": 2, "label_width": 100}
    sheet = np.asarray(writers.grid(rows, **plain))
    labelled = np.asarray(
        writers.grid(rows, **{**plain, "columns": ["dense", "vmoba"], "labels": ["a prompt"] * 2})
    )
    cell = np.asarray(writers.upscale(rows[1][1], 2))

    def places(canvas):
        height, width = cell.shape[:2]
        return [
            (y, x)
            for y in range(canvas.shape[0] - height)
            for x in range(100, canvas.shape[1] - width)
            if np.array_equal(canvas[y : y + height, x : x + width], cell)
        ]

    assert len(places(sheet)) == len(places(labelled)) == 1
    assert labelled.shape[0] > sheet.shape[0]


def test_grid_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="one label per row"):
        writers.grid([[picture()]], columns=["a", "b"], labels=["x"])


def test_long_labels_wrap_and_long_notes_are_cut():
    face = writers.font(13)
    lines = writers.wrap("a small yellow circle on a gray background", 90, face)
    assert len(lines) > 2 and max(map(face.getlength, lines)) <= 90
    assert writers.fit("short", 90, face) == "short"
    cut = writers.fit("model.language_model.layers.0", 90, face)
    assert cut.endswith("…") and face.getlength(cut) <= 90
