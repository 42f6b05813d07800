"""Scenes are reproducible, leave global random state alone, and say in words what they contain."""

from __future__ import annotations

import pytest
import torch

from mmattn.mini.draw import COLOURS, SHAPES, coverage, render
from mmattn.mini.scenes import COUNTS, MOTIONS, draw_clips, draw_scenes, make_clips, make_scenes
from mmattn.mini.text import WORDS, clip_tokenizer, t5_tokenizer, tie_cases, unknown_words


def test_same_seed_same_scenes() -> None:
    before = torch.get_rng_state()
    assert make_scenes(50, 3) == make_scenes(50, 3)
    assert make_scenes(50, 3) != make_scenes(50, 4)
    assert make_clips(50, 3) == make_clips(50, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_prefix_of_a_seed_is_the_same_scenes() -> None:
    assert make_scenes(50, 3)[:20] == make_scenes(20, 3)


@pytest.mark.parametrize("kind", ["one", "relation", "count"])
def test_captions_name_what_is_there(kind: str) -> None:
    for scene in make_scenes(100, 5, mix=[(kind, 1.0)]):
        words = scene.caption.split()
        assert scene.kind == kind
        assert scene.background in words
        for thing in scene.things:
            assert thing.colour in words
            assert thing.shape in scene.caption
            assert thing.radius <= thing.cx <= 64 - thing.radius
            assert thing.radius <= thing.cy <= 64 - thing.radius
        if kind == "count":
            assert COUNTS[words[0]] == len(scene.things)
        if kind == "relation":
            assert scene.relation is not None and scene.relation in scene.caption


def test_every_word_of_a_caption_is_known() -> None:
    captions = [scene.caption for scene in make_scenes(300, 6)] + [
        clip.caption for clip in make_clips(100, 6)
    ]
    assert not [word for caption in captions for word in unknown_words(caption)]
    assert unknown_words("a Red dog") == ["dog"]


def test_pictures_scale_with_size() -> None:
    scenes = make_scenes(4, 7)
    small, large = draw_scenes(scenes, 32), draw_scenes(scenes, 128)
    assert small.shape == (4, 3, 32, 32)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 0.01


def test_clips_start_and_end_where_they_say() -> None:
    clips = make_clips(8, 8)
    frames = draw_clips(clips, 48, 17)
    assert frames.shape == (8, 3, 17, 48, 48)
    for clip, motion in ((clip, MOTIONS[clip.motion]) for clip in clips):
        way = clip.end[0] - clip.start[0], clip.end[1] - clip.start[1]
        assert way[0] * motion[0] + way[1] * motion[1] > 0.35


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_radius_and_no_more(shape: str) -> None:
    ids = torch.tensor([[SHAPES.index(shape)]])
    middle = torch.full((1, 1), 32.0)
    filled = coverage(ids, middle, middle, torch.full((1, 1), 20.0), 64)[0, 0]
    rows, columns = (filled > 0.5).nonzero().unbind(1)
    for low, high in ((rows.min(), rows.max()), (columns.min(), columns.max())):
        assert low >= 8 and high <= 55
    assert 0.6 < (rows.max() - rows.min()).item() / 40 < 1.2


def test_later_objects_cover_earlier_ones_and_alpha_zero_is_empty() -> None:
    ids = torch.full((1, 3), SHAPES.index("square"))
    rgb = torch.tensor([[COLOURS["red"], COLOURS["blue"], COLOURS["green"]]])
    middle, radius = torch.full((1, 3), 8.0), torch.full((1, 3), 6.0)
    picture = render(
        ids, rgb, middle, middle, radius, torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3), 16
    )
    torch.testing.assert_close(picture[0, :, 8, 8], torch.tensor(COLOURS["blue"]))
    torch.testing.assert_close(picture[0, :, 0, 0], torch.ones(3))


def test_words_are_one_token_and_survive_a_reload(tmp_path) -> None:
    t5, clip = t5_tokenizer(16), clip_tokenizer(24)
    t5.save_pretrained(tmp_path / "t5")
    clip.save_pretrained(tmp_path / "clip")
    for tokenizer, extra in (
        (t5, 1),
        (type(t5).from_pretrained(tmp_path / "t5"), 1),
        (clip, 2),
        (type(clip).from_pretrained(tmp_path / "clip"), 2),
    ):
        for word in WORDS:
            assert len(tokenizer(word).input_ids) == 1 + extra, word


def test_case_does_not_matter() -> None:
    tokenizer, embedding = t5_tokenizer(16), torch.nn.Embedding(256, 8)
    tie_cases(tokenizer, embedding)
    lower, title, upper = (
        embedding(torch.tensor(tokenizer(text).input_ids))
        for text in ("a red ring", "A Red Ring", "A RED RING")
    )
    torch.testing.assert_close(lower, title)
    torch.testing.assert_close(lower, upper)
