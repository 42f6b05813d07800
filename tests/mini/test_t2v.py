"""The text-to-video trainer runs, and the shipped weights draw and move what the prompt says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, WanPipeline

import mmattn.mini
from mmattn.mini.train_t2v import evaluate, sample, train

WEIGHTS = Path(mmattn.mini.__file__).parent / "weights" / "t2v"


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return DiffusionPipeline.from_pretrained(WEIGHTS)


def test_smoke_training_saves_a_loadable_pipeline(tmp_path: Path) -> None:
    record = train(tmp_path, smoke=True)
    assert record["autoencoder_1"]["steps"] == record["transformer"]["steps"] == 3
    assert json.loads((tmp_path / "training.json").read_text())["frames"] == 17
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, WanPipeline)
    clips = sample(loaded, ["a red circle moving up"], 0, steps=2)
    assert clips.shape == (1, 3, 17, 48, 48) and clips.isfinite().all()


def test_shipped_files_are_small_and_name_no_machine() -> None:
    for file in WEIGHTS.rglob("*"):
        assert file.is_dir() or file.stat().st_size < 12_000_000
    text = (WEIGHTS / "training.json").read_text()
    assert "/work" not in text and "/tmp" not in text


def test_shipped_weights_draw_and_move_the_prompt(pipe: WanPipeline) -> None:
    report = evaluate(pipe, 32, seed=950_000)
    assert report["colour"] >= 0.85
    assert report["shape"] >= 0.70
    assert report["motion"] >= 0.80


@pytest.mark.slow
def test_shipped_weights_reach_the_bars(pipe: WanPipeline) -> None:
    report = evaluate(pipe, 200, seed=960_000)
    assert report["colour"] >= 0.90
    assert report["shape"] >= 0.75
    assert report["motion"] >= 0.85
