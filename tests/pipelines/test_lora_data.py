"""Folders of canvases, sizes they are trained at, batches, and the cache of latents."""

from __future__ import annotations

import math

import pytest
import torch
from mmattn_pipelines.lora_data import Latents, batches, bucket_sizes, read_folder
from PIL import Image

import mmattn.mini
from mmattn.errors import ConfigError


@pytest.fixture(scope="module")
def vae():
    return mmattn.mini.load("t2i").vae


def canvas(path, left="red", right="blue", size=(128, 64)):
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    picture.save(path)


def test_every_problem_of_a_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match="no picture"):
        read_folder(tmp_path)
    canvas(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("[SET]  a\nb\n")
    canvas(tmp_path / "2.jpg")
    canvas(tmp_path / "3.png")
    (tmp_path / "3.txt").write_text(" \n")
    (tmp_path / "4.png").write_bytes(b"not a picture")
    (tmp_path / "4.txt").write_text("x")
    (tmp_path / "5.txt").write_text("x")
    canvas(tmp_path / "6.png")
    (tmp_path / "6.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as error:
        read_folder(tmp_path)
    for word in (
        "2.jpg has no 2.txt",
        "3.txt is empty",
        "4.png cannot",
        "5.txt has no",
        "6.txt is not",
    ):
        assert word in str(error.value)
    for bad in ("2.jpg", "3.png", "4.png", "6.png", "3.txt", "4.txt", "5.txt", "6.txt"):
        (tmp_path / bad).unlink()
    (example,) = read_folder(tmp_path)
    assert example.caption == "[SET] a b" and example.size == (64, 128)


def test_twenty_problems_are_shown(tmp_path):
    for i in range(30):
        canvas(tmp_path / f"{i:02}.png")
    with pytest.raises(ConfigError, match="and 10 more"):
        read_folder(tmp_path)


@pytest.mark.parametrize("size", [(1536, 1024), (1363, 1080), (64, 128), (777, 2000)])
def test_sizes_keep_shape_and_area(size):
    resolutions, unit = (512, 768, 1024, 1280, 1536), (16, 32)
    made = bucket_sizes(size, resolutions, unit)
    assert len(made) == len(set(made)) <= len(resolutions)
    for (height, width), resolution in zip(made, resolutions, strict=False):
        assert height % 16 == 0 and width % 32 == 0
        assert height * width <= resolution**2 and height <= size[0] and width <= size[1]
        scale = min(1, math.sqrt(resolution**2 / math.prod(size)))
        assert size[0] * scale - height < 16.1 and size[1] * scale - width < 32.1


def test_small_pictures_are_not_enlarged():
    assert bucket_sizes((64, 128), (512, 1024), (8, 16)) == [(64, 128)]
    with pytest.raises(ConfigError, match="too small"):
        bucket_sizes((8, 200), (512,), (16, 16))


def test_batches_hold_one_size_and_every_place_once():
    keys = [(64, 128)] * 7 + [(96, 96)] * 4 + [(128, 64)]
    made = batches(keys, 3, 0, seed=5)
    assert sorted(place for batch in made for place in batch) == list(range(12))
    assert all(len({keys[place] for place in batch}) == 1 and len(batch) <= 3 for batch in made)
    assert made == batches(keys, 3, 0, seed=5)
    assert made != batches(keys, 3, 1, seed=5) and made != batches(keys, 3, 0, seed=6)


def test_a_panel_owes_nothing_to_its_neighbor(tmp_path, vae):
    for name, right in (("a", "blue"), ("b", "yellow")):
        canvas(tmp_path / f"{name}.png", right=right)
        (tmp_path / f"{name}.txt").write_text("x")
    a, b = read_folder(tmp_path)
    split, whole = Latents(vae, tmp_path / "z", (1, 2)), Latents(vae, tmp_path / "z")
    assert split(a, (64, 128)).shape == (8, 16, 32)
    assert torch.equal(split(a, (64, 128))[..., :16], split(b, (64, 128))[..., :16])
    assert not torch.equal(split(a, (64, 128))[..., 16:], split(b, (64, 128))[..., 16:])
    assert not torch.equal(whole(a, (64, 128))[..., :16], whole(b, (64, 128))[..., :16])


def test_the_cache_is_used_and_survives_damage(tmp_path, vae):
    canvas(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    (example,) = read_folder(tmp_path)
    first = Latents(vae, tmp_path / "z")
    z = first(example, (64, 128))
    again = Latents(vae, tmp_path / "z")
    assert torch.equal(again(example, (64, 128)), z) and (first.encoded, again.encoded) == (1, 0)
    again(example, (32, 64))
    assert again.encoded == 1
    for file in (tmp_path / "z").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    torn = Latents(vae, tmp_path / "z")
    assert torch.equal(torn(example, (64, 128)), z) and torn.encoded == 1
    canvas(tmp_path / "a.png", left="green")
    other = torn(example, (64, 128))
    assert torn.encoded == 2 and not torch.equal(other, z)
