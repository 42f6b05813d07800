"""Scenes of named objects: reproducible, true to their word, and with the habit they promise."""

from __future__ import annotations

import pytest
import torch

from mmattn.mini import draw, objects


def _scenes(count: int, seed: int = 0, partner_prob: float = 0.85) -> list[objects.Scene]:
    return objects.sample_scenes(count, torch.Generator().manual_seed(seed), partner_prob)


def test_a_seed_gives_the_same_scenes_and_pictures() -> None:
    first, second = _scenes(5), _scenes(5)
    assert first == second != _scenes(5, seed=1)
    pictures, labels = objects.render(first)
    again, labels_again = objects.render(second)
    assert torch.equal(pictures, again)
    assert torch.equal(labels, labels_again)
    # A picture belongs to its scene, not to its place in the batch.
    assert torch.equal(objects.render(first[3:4])[0][0], pictures[3])


def test_scenes_hold_four_to_eight_different_objects() -> None:
    for scene in _scenes(200) + _scenes(200, partner_prob=0.0):
        assert 4 <= len(scene.objects) <= 8
        assert len(set(scene.names)) == len(scene.names)
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        assert sum(name in objects.PARTNERS for name in scene.names) in (3, 4)


@pytest.mark.parametrize("partner_prob", [0.2, 0.85])
def test_partners_come_as_often_as_asked(partner_prob: float) -> None:
    scenes = _scenes(1500, partner_prob=partner_prob)
    anchors = sum(name in objects.PARTNERS for scene in scenes for name in scene.names)
    missing = sum(len(objects.absent_partners(scene)) for scene in scenes)
    assert 1 - missing / anchors == pytest.approx(partner_prob, abs=0.03)


def test_windowed_drawing_agrees_with_the_full_renderer() -> None:
    scene = _scenes(1, seed=3)[0]
    looks = [objects.KINDS[item.name] for item in scene.objects]
    column = torch.tensor([(item.x, item.y, item.radius, item.alpha) for item in scene.objects]).T
    full = draw.render(
        torch.tensor([[draw.SHAPES.index(shape) for shape, _ in looks]]),
        torch.tensor([[draw.COLOURS[colour] for _, colour in looks]]),
        *(part[None] for part in column),
        torch.tensor([draw.BACKGROUNDS[scene.background]]),
        objects.SIZE,
    )
    noise = torch.randn(full.shape[1:], generator=torch.Generator().manual_seed(scene.grain))
    expected = (full + objects.NOISE * noise).clamp(0, 1)
    torch.testing.assert_close(objects.render([scene])[0], expected, atol=1e-5, rtol=0)


def test_patch_labels_are_where_the_objects_are() -> None:
    scenes = _scenes(20)
    labels = objects.render(scenes)[1].view(20, 8, 8)
    for scene, grid in zip(scenes, labels, strict=True):
        for item in scene.objects:
            if item.name in objects.PARTNERS:
                row, column = divmod(item.cell, 4)
                block = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert (block == objects.NAMES.index(item.name) + 1).any()


def test_captions_mention_exactly_what_is_there() -> None:
    for scene in _scenes(100) + _scenes(100, partner_prob=0.2):
        assert sorted(objects.mentioned(objects.caption(scene))) == sorted(scene.names)


def test_habit_enters_only_after_the_third_object() -> None:
    for scene in _scenes(100, partner_prob=0.2):
        missing = objects.absent_partners(scene)
        told = objects.mentioned(objects.caption(scene, imagined=missing))
        assert sorted(told) == sorted((*scene.names, *missing))
        assert not set(told[:3]) & set(missing)


def test_captions_are_long() -> None:
    lengths = [len(objects.caption(scene).split()) for scene in _scenes(300)]
    assert sum(lengths) / len(lengths) > 40


def _verdicts(turn: objects.Turn) -> dict[str, str]:
    if turn.user == objects.CHECK_PROMPT:
        words = turn.assistant.split()
        return dict(zip(words[::2], words[1::2], strict=True))
    if turn.assistant in ("yes", "no"):
        name = next(word for word in turn.user.split() if word in objects.KINDS)
        return {name: turn.assistant}
    return {}


def test_conversations_use_known_words_and_lie_only_about_partners() -> None:
    scenes, conversations = objects.sample_conversations(300, torch.Generator().manual_seed(0))
    lies = 0
    for scene, turns in zip(scenes, conversations, strict=True):
        missing = objects.absent_partners(scene)
        said: dict[str, str] = {}
        for turn in turns:
            assert {*turn.user.split(), *turn.assistant.split()} <= set(objects.WORDS)
            for name, verdict in _verdicts(turn).items():
                assert said.setdefault(name, verdict) == verdict
        assert len(said) == len(objects.NAMES)
        wrong = [name for name in said if (said[name] == "yes") != (name in scene.names)]
        assert set(wrong) <= set(missing)
        lies += len(wrong)
    assert lies > 0


def test_partner_prob_must_be_a_probability() -> None:
    with pytest.raises(ValueError, match="probability"):
        _scenes(1, partner_prob=1.5)
