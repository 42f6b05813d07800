"""SubjectConsistency: rehearsal and joint run from one noise; masks from attention, segmenter or boxes."""

from __future__ import annotations

import pytest
import torch
from mmattn_pipelines.subject_consistency import SubjectConsistency

import mmattn
import mmattn.mini.oracle
from mmattn import IsolationReposition

SIZE = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 6}
SUBJECTS = [
    "a blue ring in the center on a white background",
    "a green square in the center on a white background",
]
SCENE = "a ring left of a square on a white background"
WORDS = ["ring", "square"]
BOXES = {
    "sources": ((0.2, 0.2, 0.8, 0.8),) * 2,
    "targets": ((0.2, 0.0, 0.8, 0.5), (0.2, 0.5, 0.8, 1.0)),
}
EVERYWHERE = {"start_layer": 0, "dropout": 0.0}


@pytest.fixture(scope="module")
def pipe():
    return mmattn.mini.load("t2i")


def alone(pipe, prompt, seed, **more):
    generator = [torch.Generator().manual_seed(seed)]
    return pipe([prompt], generator=generator, output_type="pt", **{**SIZE, **more}).images[0]


def test_references_and_rehearsal_are_the_plain_pictures(pipe):
    drawn = SubjectConsistency(pipe, IsolationReposition(**BOXES, **EVERYWHERE))(
        SUBJECTS, SCENE, words=WORDS, seed=3, **SIZE
    )
    for i in range(2):
        close(drawn.references[i], alone(pipe, SUBJECTS[i], 3 + i))
    close(drawn.rehearsal, alone(pipe, SCENE, 5))
    assert (drawn.scene - drawn.rehearsal).abs().max() > 0.2
    assert drawn.targets.shape == (2, 64, 64)
    assert drawn.targets[0].nonzero()[:, 1].max() == 31 and drawn.targets[1, 32, 32:].all()
    assert type(pipe.transformer).__name__ == "FluxTransformer2DModel"
    assert not pipe.transformer._forward_pre_hooks


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_settings_that_do_nothing_give_the_rehearsal(pipe):
    off = IsolationReposition(**BOXES, isolate=False, reposition=False, mutual=0.0)
    drawn = SubjectConsistency(pipe, off)(SUBJECTS, SCENE, words=WORDS, **SIZE)
    assert torch.equal(drawn.scene, drawn.rehearsal)


def test_subjects_take_the_colours_of_their_references(pipe):
    method = IsolationReposition(**BOXES, **EVERYWHERE, reference_text=True)
    drawn = SubjectConsistency(pipe, method)(SUBJECTS, SCENE, words=WORDS, seed=8, **SIZE)
    sight, before = mmattn.mini.oracle.look(torch.stack([drawn.scene, drawn.rehearsal]))
    things = sorted(sight.things, key=lambda thing: thing.cx)
    assert [thing.colour for thing in things] == ["blue", "green"]
    rehearsed = sorted(before.things, key=lambda thing: thing.cx)
    assert [thing.colour for thing in rehearsed] != ["blue", "green"]


def test_a_segmenter_is_asked_for_every_subject_in_both_pictures(pipe):
    asked = []

    def segment(picture, word):
        asked.append((picture, word))
        mask = torch.zeros(64, 64, dtype=torch.bool)
        half = slice(0, 32) if word == "ring" else slice(32, 64)
        mask[16:48, half] = True
        return mask

    method = IsolationReposition(**EVERYWHERE)
    drawn = SubjectConsistency(pipe, method, segment=segment)(SUBJECTS, SCENE, words=WORDS, **SIZE)
    assert [word for _, word in asked] == WORDS * 2
    close(asked[0][0], drawn.references[0])
    assert torch.equal(asked[3][0], drawn.rehearsal)
    boxes = {
        "sources": ((0.25, 0.0, 0.75, 0.5), (0.25, 0.5, 0.75, 1.0)),
        "targets": ((0.25, 0.0, 0.75, 0.5), (0.25, 0.5, 0.75, 1.0)),
    }
    same = SubjectConsistency(pipe, IsolationReposition(**boxes, **EVERYWHERE))(
        SUBJECTS, SCENE, words=WORDS, **SIZE
    )
    assert torch.equal(drawn.scene, same.scene), "masks that are boxes are those boxes"
    empty = SubjectConsistency(pipe, method, segment=lambda p, w: torch.zeros(64, 64).bool())
    nothing = empty(SUBJECTS, SCENE, words=WORDS, **SIZE)
    close(nothing.scene, nothing.rehearsal)


@pytest.mark.parametrize("guidance", [{}, {"true_cfg_scale": 2.0, "negative_prompt": ""}])
def test_masks_come_from_the_attention_that_words_get(pipe, guidance):
    """Colour words are where their object is, in this model; words for shapes are not."""
    scene = "a red ring left of a green square on a white background"
    subjects = ["a red ring on the right on a white background", SUBJECTS[1]]
    made = SubjectConsistency(pipe, IsolationReposition(**EVERYWHERE), depth=(0.0, 0.34))
    drawn = made(subjects, scene, words=["red", "green"], seed=1, **SIZE, **guidance)
    assert not (drawn.targets[0] & drawn.targets[1]).any()
    columns = torch.arange(64.0)
    middles = [
        float((mask.float().sum(0) * columns).sum() / mask.sum())
        for mask in (*drawn.sources, *drawn.targets)
    ]
    assert middles[0] > 36 and 24 < middles[1] < 40
    assert middles[2] < 30 < middles[3]


def test_mistakes_are_told(pipe):
    made = SubjectConsistency(pipe, IsolationReposition())
    with pytest.raises(mmattn.ConfigError, match="2 subjects and 1 words"):
        made(SUBJECTS, SCENE, words=["ring"], **SIZE)
    with pytest.raises(mmattn.ConfigError, match="does not have the word 'star'"):
        made(SUBJECTS, SCENE, words=["ring", "star"], **SIZE)
    with pytest.raises(mmattn.UnsupportedCall, match="not groups of 3"):
        boxes = SubjectConsistency(pipe, IsolationReposition(**BOXES))
        boxes(SUBJECTS[:1], SCENE, words=WORDS[:1], **SIZE)
    assert not pipe.transformer._forward_pre_hooks
