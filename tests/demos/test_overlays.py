"""What is drawn about tokens: kept ones, merged ones, density, and words; and nothing changes by watching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmattn_demos import answering, drawing, overlays, pictures, words
from mmattn_demos.numbers import as_html, measures, remarks
from mmattn_demos.presets import chosen, presets

import mmattn
from mmattn.calls import answer, draw, logits, preprocess
from mmattn.errors import ConfigError

QUESTION = "describe the picture ."


@pytest.mark.parametrize(
    ("text", "count"),
    [("hiprune:keep=32", 32), ("merge-prune:keep=21", 21), ("fastv:keep=0.5", 32)],
)
def test_kept_tokens(text, count, models):
    loaded, column = models.get("vlm"), chosen(text, "vlm")
    picture, _ = pictures.scene(3)
    with mmattn.attach(loaded.target, list(column.methods)):
        plain = answer(loaded, [picture], [QUESTION])
    with mmattn.attach(
        loaded.target, [overlays.watched(method) for method in column.methods]
    ) as session:
        assert answer(loaded, [picture], [QUESTION]) == plain
        grid, kept = overlays.kept_of(session)
    assert grid == (8, 8) and len(kept) == count == len(kept.unique())
    view = np.asarray(overlays.kept_overlay(picture, grid, kept)).astype(int)
    y = x = 8
    cells = view.reshape(y, view.shape[0] // y, x, -1, 3).mean((1, 3, 4)).reshape(-1)
    whole = np.asarray(overlays.kept_overlay(picture, grid, torch.arange(64))).astype(int)
    bright = whole.reshape(y, whole.shape[0] // y, x, -1, 3).mean((1, 3, 4)).reshape(-1)
    stays = np.zeros(64, bool)
    stays[kept.numpy()] = True
    assert (cells[stays] == bright[stays]).all()
    assert (view.reshape(y, 48, x, 48, 3) != whole.reshape(y, 48, x, 48, 3)).any(
        (1, 3, 4)
    ).sum() == 64 - count


def test_kept_tokens_are_as_many_as_the_report_says(models):
    loaded = models.get("vlm")
    picture, _ = pictures.scene(3)
    method = overlays.watched(mmattn.RandomPrune(keep=16))
    with mmattn.attach(loaded.target, [method], seed=4) as session:
        answer(loaded, [picture], [QUESTION], max_new_tokens=1)
        _, kept = overlays.kept_of(session)
        stats = session.stats
    assert (
        answering.numbers([answering.Said("x", "", {}, 0.1, None, stats, None)])[0]["tokens"]
        == f"{len(kept)} of 64"
    )


def test_nothing_is_kept_or_merged_by_others(models):
    loaded = models.get("vlm")
    picture, _ = pictures.scene(3)
    with mmattn.attach(loaded.target, [overlays.watched(mmattn.VCD())]) as session:
        answer(loaded, [picture], [QUESTION], max_new_tokens=2)
        assert overlays.kept_of(session) is None and overlays.groups_of(session) is None


def test_merged_tokens(models):
    loaded = models.get("vit")
    picture = pictures.single(3)
    pixels = preprocess(loaded, [picture])
    with mmattn.attach(loaded.target, mmattn.ToMe(r=8)):
        plain = logits(loaded, pixels)
    with mmattn.attach(loaded.target, overlays.watched(mmattn.ToMe(r=8))) as session:
        assert torch.equal(logits(loaded, pixels), plain)
        groups = overlays.groups_of(session)
        fewest = min(site.tokens_kept for site in session.stats.sites)
    assert groups.shape == (64,)
    assert len(groups.unique()) == fewest - 1  # the class token is no image token
    view = np.asarray(overlays.merged_overlay(picture, (8, 8), groups))
    middles = view[20::48, 20::48].reshape(64, 3)
    for group in groups.unique():
        assert len({tuple(colour) for colour in middles[groups == group].tolist()}) == 1


def test_density_picture(models):
    loaded = models.get("t2i")
    with mmattn.attach(loaded.target, mmattn.VMoBA(topk=0.25)) as session:
        draw(loaded, ["a red circle"], [0], steps=8)
        picture = overlays.density_picture(session.stats)
        notes = remarks([session.stats, None])
    wide = min(40, 480 // 8)
    colours = [picture.getpixel((250 + wide * step + 6, 28 + 10)) for step in range(8)]
    assert colours[0] == colours[1] != colours[3] == colours[7]  # the first quarter is dense
    assert "dense_steps" in notes
    with mmattn.attach(loaded.target, "identity") as session:
        draw(loaded, ["a red circle"], [0], steps=1)
        assert overlays.density_picture(session.stats) is None


def test_words_of_a_prompt_point_at_the_object_or_away_from_it(models):
    loaded, prompt = models.get("t2i"), "a big red circle on the left on a white background"
    made = []

    def lean(word):
        """Attention per cell on the object over attention per cell beside it."""
        maps = words.in_prompt(
            loaded, prompt, word, lambda: made.append(draw(loaded, [prompt], [7], steps=4)[0])
        )
        assert maps.mean.shape == (1, 8, 8) and len(maps.layers) == 6
        ink = ((made[-1] - made[-1][:, :1, :1]).abs().sum(0) > 0.5).float()
        share = torch.nn.functional.avg_pool2d(ink[None], 8)
        on, off = (maps.mean * share).sum() / share.sum(), (maps.mean * (1 - share)).sum()
        return float(on / off * (1 - share).sum())

    assert lean("red") > 3 and lean("background") < 0.7
    assert torch.equal(made[0], made[1])


def test_words_of_clips_follow_the_object(models):
    loaded, prompt = models.get("t2v"), "a red circle moving right on a white background"
    maps = words.in_prompt(loaded, prompt, "circle", lambda: draw(loaded, [prompt], [7], steps=3))
    assert maps.mean.shape[0] == 5
    columns = torch.arange(maps.mean.shape[2], dtype=torch.float)
    middle = [(frame.sum(0) * columns).sum() / frame.sum() for frame in maps.mean]
    assert middle[-1] > middle[0] + 0.5


def test_words_of_an_answer(models):
    loaded = models.get("vlm")
    picture, names = pictures.scene(3)
    text = answer(loaded, [picture], [QUESTION])[0]
    right = [name for name in names if name in text.split()]
    maps = [words.in_answer(loaded, picture, QUESTION, text, name) for name in right[:2]]
    assert maps[0].mean.shape == (1, 8, 8) and len(maps[0].layers) == 8
    assert not torch.allclose(maps[0].mean, maps[1].mean, rtol=0.05)
    with pytest.raises(ConfigError, match="no word 'zebra'"):
        words.in_answer(loaded, picture, QUESTION, text, "zebra")


def test_words_are_spelled_by_whole_tokens(models):
    pipe = models.get("t2i").target
    prompt = "a banana and a red ring on the right"
    ids = pipe.tokenizer_2(prompt)["input_ids"]
    for word in ("red", "ring", "right"):
        at = words.token_span(pipe.tokenizer_2, ids, word)
        assert pipe.tokenizer_2.decode([ids[i] for i in at]).strip() == word
    with pytest.raises(ConfigError, match="do not spell"):
        words.token_span(pipe.tokenizer_2, ids, "ed")


def test_numbers_table_escapes_and_leaves_out_empty_lines():
    rows = [
        measures("dense", 0.5, None, None),
        measures("<script>", 0.25, None, None, psnr_db=31.25, ssim=0.9),
    ]
    page = as_html(rows)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "31.2" in page and "peak memory" not in page and page.count("<td>") == 7


def test_previews_look_like_the_end(models):
    for kind, prompt in (
        ("t2i", "a big red circle on the left on a white background"),
        ("t2v", "a red circle moving right on a white background"),
    ):
        loaded = models.get(kind)
        ask = drawing.Ask(prompt, presets(kind)[0].column, 7, 6, 3.0)
        told = []
        run = drawing.single(loaded, ask, told.append, methods=True)
        seen = [update.preview for update in told if update.preview is not None]
        assert len(seen) == 5
        last = torch.from_numpy(np.asarray(seen[-1]).copy()).float() / 255
        end = run.value if kind == "t2i" else run.value[:, run.value.shape[1] // 2]
        first = torch.from_numpy(np.asarray(seen[0]).copy()).float() / 255
        gap = [(view.permute(2, 0, 1) - end).abs().mean() for view in (first, last)]
        assert gap[1] < 0.2 and gap[1] < gap[0]
        assert any("density 0." in update.text for update in told)
