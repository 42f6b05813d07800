"""Files are whole or absent, carry their metadata, and hold exactly the pixels they were given."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

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


def test_a_file_is_visible_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    target, seen = tmp_path / "a.txt", []
    real = os.fsync

    def fsync(descriptor):
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), target.exists()))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with writers.atomic(target) as temporary:
        assert temporary.parent == tmp_path, "another file system could not rename it"
        assert re.fullmatch(rf"\.a\.txt\.{os.getpid()}\.[0-9a-f]{{8}}\.tmp", temporary.name)
        temporary.write_text("text")
        assert not target.exists()
    assert target.read_text() == "text"
    assert seen == [(temporary, False), (tmp_path, True)]


def test_new_folders_are_synced_into_those_above(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    writers.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert seen == [str(tmp_path), str(tmp_path / "a")]
    writers.make_folder(tmp_path / "a" / "b")
    assert len(seen) == 2, "what is there was synced by whoever made it"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        writers.make_folder(tmp_path / "file")


def test_a_folder_that_another_process_makes_meanwhile_is_fine(tmp_path, monkeypatch):
    real, answers = Path.is_dir, [False]
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "is_dir", lambda self: answers.pop() if answers else real(self))
    writers.make_folder(tmp_path / "a")


def test_only_folders_may_refuse_to_be_synced(tmp_path, monkeypatch):
    """As some network mounts do, and folders that may not be read. Other errors, and files, count."""
    file = tmp_path / "a"
    file.write_text("")
    descriptors = len(os.listdir("/proc/self/fd"))
    for call, number in (("fsync", errno.EINVAL), ("open", errno.EACCES), ("fsync", errno.EIO)):

        def fail(*given, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match=os.strerror(number)):
                writers.sync(file)
            if number == errno.EIO:
                with pytest.raises(OSError, match=os.strerror(number)):
                    writers.sync(tmp_path)
            else:
                writers.sync(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_long_names_leave_room_for_the_temporary_one(tmp_path):
    name = "a" + "ö" * 120 + ".json"  # 246 of at most 255 bytes
    with writers.atomic(tmp_path / name) as temporary:
        stem = temporary.name.removeprefix(".").split(".")[0]
        assert stem == "a" + "ö" * 89, "180 bytes, less half a letter"
    assert (tmp_path / name).exists()


def test_writes_go_on_where_the_system_stopped(tmp_path, monkeypatch):
    real, sizes = os.write, []

    def write(descriptor, data):
        sizes.append(len(data))
        return real(descriptor, bytes(data[:3]))

    monkeypatch.setattr(os, "write", write)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert writers.write_bytes(str(tmp_path / "a"), b"12345678") == tmp_path / "a"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "a").read_bytes() == b"12345678"
    assert sizes == [8, 5, 2]
    writers.write_bytes(tmp_path / "b", b"")
    assert (tmp_path / "b").read_bytes() == b"" and len(sizes) == 3


def test_json_is_for_people_too(tmp_path):
    path = writers.write_json(tmp_path / "a.json", {"b": ["größer"], "a": 1})
    assert path.read_text("utf-8") == '{\n  "b": [\n    "größer"\n  ],\n  "a": 1\n}\n'


def test_names_that_are_no_text_can_be_written(tmp_path):
    """A folder may have any bytes for a name, and files say which pictures they were made from."""
    odd = os.fsdecode(b"caf\xe9/photo.png")
    meta = {"prompt": "a", "model": odd, "init_image": odd}
    written = [
        writers.write_image(tmp_path / "p.png", picture(), meta),
        writers.write_video(tmp_path / "c.mp4", [picture()], meta=meta),
    ]
    read = {"prompt": "a", "model": "caf?/photo.png", "init_image": "caf?/photo.png"}
    assert [writers.read_metadata(path) for path in written] == [read, read]
    with Image.open(written[0]) as image:
        assert "Model: caf?/photo.png" in image.text["parameters"]
    with av.open(str(written[1])) as clip:
        assert json.loads(clip.metadata["comment"]) == read
    path = writers.write_json(tmp_path / "a.json", meta)
    assert json.loads(path.read_text("utf-8")) == read
    assert writers.write_text(tmp_path / "t", odd).read_bytes() == b"caf?/photo.png"


def test_facts_that_json_does_not_know_become_text(tmp_path):
    meta = {"prompt": "a", "folder": Path("b")}
    written = [
        writers.write_image(tmp_path / "p.png", picture(), meta),
        writers.write_video(tmp_path / "c.mp4", [picture()], meta=meta),
        writers.write_webp(tmp_path / "c.webp", [picture()], meta=meta),
    ]
    assert [writers.read_metadata(path)["folder"] for path in written] == ["b"] * 3
    with Image.open(written[2]) as clip:
        assert clip.size == (20, 16)


def test_the_line_that_image_viewers_show():
    meta = {**META, "guidance": 0.0, "size": "8x8", "width": 8}
    assert writers.parameters_line(meta) == (
        "a red circle — größer\nSteps: 4, CFG scale: 0.0, Seed: 7, Size: 8x8, Model: t2i, Method: vmoba"
    )
    assert writers.parameters_line({"model": "", "method": None, "steps": None}) == "\n"


def test_what_counts_as_a_picture():
    tensor = torch.tensor([[[-1.0, 0.2]], [[0.5, 2.0]], [[0.0, 1.0]]])
    pixels = writers.to_pixels(tensor.requires_grad_())
    assert pixels.tolist() == [[[0, 128, 0], [51, 255, 255]]] and pixels.dtype == np.uint8
    assert writers.to_pixels(tensor.half()).tolist() == pixels.tolist()
    assert writers.to_pixels(Image.fromarray(pixels).convert("RGBA")).tolist() == pixels.tolist()
    assert writers.to_pixels(pixels[:, ::-1]).flags["C_CONTIGUOUS"]
    assert writers.to_image(pixels).getpixel((1, 0)) == (51, 255, 255)


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
    smooth = np.asarray(writers.upscale(picture(), 3, smooth=True))
    assert smooth.shape == large.shape and not np.array_equal(smooth, large)
    assert np.array_equal(np.asarray(writers.upscale(picture(), 1, smooth=True)), small)


def test_large_pngs_are_scaled_like_that(tmp_path):
    path = writers.write_image(tmp_path / "p.png", picture(), scale=2)
    with Image.open(path) as image:
        assert image.size == (40, 32)
        assert np.array_equal(np.asarray(image), np.asarray(writers.upscale(picture(), 2)))
        assert image.text == {}


def test_metadata_where_there_is_none(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "P.PNG")
    assert writers.read_metadata(tmp_path / "P.PNG") == {}
    assert writers.read_metadata(str(tmp_path / "c.mp4")) == {}


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
    frames = [picture(i) for i in range(4)]
    path = writers.write_video(tmp_path / "c.mp4", frames, fps=5, meta=META)
    assert path.name == "c.webp"
    with Image.open(path) as clip:
        assert clip.n_frames == 4
        assert clip.info["loop"] == 0, "for ever"
        clip.seek(3)
        clip.load()
        assert clip.info["duration"] == 200, "five a second"
        assert np.array_equal(np.asarray(clip.convert("RGB")), writers.to_pixels(picture(3)))
        clip.seek(0)
        assert np.array_equal(np.asarray(clip.convert("RGB")), writers.to_pixels(picture(0)))
    assert writers.read_metadata(path) == META


@pytest.mark.parametrize("write", [writers.write_video, writers.write_webp])
def test_an_empty_clip_is_refused(tmp_path, write):
    with pytest.raises(ValueError, match="at least one frame"):
        write(tmp_path / "c.mp4", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [writers.write_video, writers.write_webp])
def test_a_clip_without_metadata_has_no_file_beside_it(tmp_path, write):
    path = write(str(tmp_path / "c.webp"), [picture()] * 2, fps=10, scale=2)
    assert [p.name for p in tmp_path.iterdir()] == ["c.webp"] and path == tmp_path / "c.webp"
    assert writers.read_metadata(path) == {}


def test_a_clip_of_sixteen_frames_a_second_is_that_fast(tmp_path):
    path = writers.write_video(tmp_path / "c.mp4", [picture(i) for i in range(6)], fps=16)
    with av.open(str(path)) as clip:
        stream = clip.streams.video[0]
        assert stream.average_rate == 16 and stream.frames == 6
        assert (stream.width, stream.height) == (20, 16)
        assert "comment" not in clip.metadata
    raw = path.read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat"), "a browser can start before it has all of it"


def test_no_encoder_without_pyav_or_without_h264(monkeypatch):
    assert writers.video_encoder() in ("libx264", None)
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    assert writers.video_encoder() is None
    monkeypatch.setitem(sys.modules, "av", None)
    assert writers.video_encoder() is None


def test_difference_is_black_where_equal_and_amplified_elsewhere():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[1, 2] = (10, 0, 60)
    shown = np.asarray(writers.difference(b, a, gain=5))
    assert tuple(shown[1, 2]) == (50, 0, 255)
    assert shown.sum() == 305
    assert np.array_equal(np.asarray(writers.difference(a, b)), shown), "either way round"


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


def test_grid_leaves_places_empty_and_writes_notes_below():
    black = np.zeros((10, 10, 3), np.uint8)
    plain = {"columns": ["one", "two"], "labels": ["a", "b"], "scale": 2, "label_width": 50}
    rows = [[black, None], [black, black]]
    bare = np.asarray(writers.grid(rows, **plain))
    noted = np.asarray(writers.grid(rows, notes=[["1", ""], ["", "4"]], **plain))
    assert bare.shape[1] == noted.shape[1] == 18 + 50 + 2 * 20 + 12 + 18
    assert noted.shape[0] - bare.shape[0] == 2 * 22, "room for the notes"
    dark = (bare < 5).all(2)
    ys, xs = np.nonzero(dark)
    assert dark.sum() == 3 * 20 * 20 and xs.min() == 18 + 50 and ys.max() == bare.shape[0] - 19
    assert not dark[: ys.min() + 20, 68 + 20 :].any(), "the place of None"
    first = ys.min()
    frame = (bare == (214, 216, 220)).all(2)
    assert frame[first - 1, 67] and frame[first + 20, 88] and frame[first - 1, 88]
    ink = (noted == writers.FAINT).all(2)
    assert ink[first + 20 : first + 42, 68:88].any() and not ink[:first].any()
    assert (bare[:first] == writers.INK).all(2).any(), "headings above"


def test_grid_refuses_rows_that_do_not_fit():
    for rows, columns, labels, found in (
        ([[picture()]], "ab", "x", "1 pictures, 1 rows of [1] places, 1 labels and 2 columns."),
        ([[picture()]], "a", "xy", "1 pictures, 1 rows of [1] places, 2 labels and 1 columns."),
        ([[None], [None]], "a", "xy", "0 pictures, 2 rows of [1] places, 2 labels and 1 columns."),
        ([], "a", "", "0 pictures, 0 rows of [] places, 0 labels and 1 columns."),
    ):
        with pytest.raises(ValueError, match="one label per row") as caught:
            writers.grid(rows, columns=columns, labels=labels)
        assert str(caught.value).endswith(f"; found {found}")


def test_grid_may_begin_with_an_empty_place():
    black = np.zeros((10, 10, 3), np.uint8)
    sheet = writers.grid([[None, black]], columns=["", ""], labels=["a"], scale=1)
    assert (np.asarray(sheet) < 5).all(2).sum() == 100


def test_long_labels_wrap_and_long_notes_are_cut():
    face = writers.font(13)
    lines = writers.wrap("a small yellow circle on a gray background", 90, face)
    assert len(lines) > 2 and max(map(face.getlength, lines)) <= 90
    assert writers.fit("short", 90, face) == "short"
    name = "model.language_model.layers.0"
    cut = writers.fit(name, 90, face)
    kept = len(cut) - 1
    assert cut == name[:kept] + "…" and face.getlength(cut) <= 90
    assert face.getlength(name[: kept + 1] + "…") > 90, "no more than needed"
    exact = "exactly as wide"
    assert writers.fit(exact, face.getlength(exact), face) == exact
    assert writers.fit("abc", 0, face) == "…"
    assert writers.wrap("a b", face.getlength("a b"), face) == ["a b"]
    assert writers.wrap("a b", face.getlength("a b") - 1, face) == ["a", "b"]
    assert writers.wrap("", 90, face) == []
