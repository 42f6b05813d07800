"""The text-to-image trainer runs, and the shipped weights draw what the prompt says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

import mmattn.mini
from mmattn.mini.train_t2i import evaluate, sample, train

WEIGHTS = Path(mmattn.mini.__file__).parent / "weights" / "t2i"


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return DiffusionPipeline.from_pretrained(WEIGHTS)


def test_smoke_training_saves_a_loadable_pipeline(tmp_path: Path) -> None:
    messages: list[str] = []
    record = train(tmp_path, smoke=True, log=messages.append)
    assert record["autoencoder"]["steps"] == record["transformer"]["steps"] == 3
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 0
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, FluxPipeline)
    pictures = sample(loaded, ["a red circle", "a blue ring"], 0, steps=2)
    assert pictures.shape == (2, 3, 64, 64) and pictures.isfinite().all()
    resumed = train(tmp_path / "more", smoke=True, resume=tmp_path)
    assert "autoencoder" not in resumed


def test_minutes_and_steps_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Leave one out"):
        train(tmp_path, minutes=1.0, steps=(1, 1))


def test_shipped_files_are_small_and_name_no_machine() -> None:
    for file in WEIGHTS.rglob("*"):
        assert file.is_dir() or file.stat().st_size < 12_000_000
    text = (WEIGHTS / "training.json").read_text()
    assert "/work" not in text and "/tmp" not in text


def test_sampling_repeats(pipe: FluxPipeline) -> None:
    prompts = ["a red circle on a white background"]
    first, second = sample(pipe, prompts, 1, steps=4), sample(pipe, prompts, 1, steps=4)
    assert torch.equal(first, second)


def test_shipped_weights_draw_the_prompt(pipe: FluxPipeline) -> None:
    report = evaluate(pipe, 32, seed=950_000)
    assert report["one"]["colour"] >= 0.90
    assert report["one"]["shape"] >= 0.80
    assert report["one"]["position"] >= 0.85
    assert report["relation"]["all"] >= 0.65


@pytest.mark.slow
def test_shipped_weights_reach_the_bars(pipe: FluxPipeline) -> None:
    report = evaluate(pipe, 200, seed=960_000)
    assert report["one"]["colour"] >= 0.95
    assert report["one"]["shape"] >= 0.85
    assert report["one"]["position"] >= 0.90
    assert report["relation"]["all"] >= 0.75
