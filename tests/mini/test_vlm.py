"""The small vision-language model: its recipe runs, and the shipped weights hallucinate as promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmattn.mini
from mmattn.mini import objects, train_vlm, vlm

WEIGHTS = Path(next(iter(mmattn.mini.__path__))) / "weights" / "vlm"


@pytest.fixture(scope="module")
def shipped() -> tuple[torch.nn.Module, object]:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(WEIGHTS)


def test_smoke_training_saves_a_model_that_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    record = train_vlm.train(tmp_path, smoke=True, layers=2, seed=1, log=lines.append)
    assert [stage["stage"] for stage in record["stages"]] == ["tower", "joint", "rest"]
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 1
    assert lines
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = vlm.to_images(torch.rand(1, 3, 64, 64))
    assert len(vlm.reply(model, processor, image, ["describe the picture ."])) == 1
    again = train_vlm.train(tmp_path / "more", smoke=True, resume=tmp_path)
    assert again["resumed"]
    assert [stage["stage"] for stage in again["stages"]] == ["tower", "joint", "rest", "rest"]


def test_training_rows_are_what_the_processor_makes() -> None:
    _, processor = train_vlm.build(layers=1)
    turn = objects.Turn(objects.question("apple"), "yes")
    tokens, labels, _ = train_vlm._Text(processor).rows([[turn]])
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Is there an apple in the image?"},
            ],
        },
        {"role": "assistant", "content": "yes"},
    ]
    text = processor.apply_chat_template(messages)
    image = vlm.to_images(torch.rand(1, 3, 64, 64))
    made = processor(images=image, text=text, return_tensors="pt")
    assert tokens.tolist() == made["input_ids"].tolist()
    assert (tokens == vlm.IMAGE).sum() == vlm.IMAGE_TOKENS
    spoken = [processor.tokenizer.decode([i]) for i in labels[0].tolist() if i != -100]
    assert spoken == ["yes", "</s>"]


def test_training_pixels_are_what_the_processor_makes() -> None:
    _, processor = train_vlm.build(layers=1)
    pictures, _ = objects.render(objects.sample_scenes(3, torch.Generator().manual_seed(0)))
    made = processor.image_processor(vlm.to_images(pictures), return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], train_vlm._pixels(pictures), atol=1e-5, rtol=0)


def test_evaluation_seeds_are_kept_out_of_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluation"):
        train_vlm.train(tmp_path, seed=train_vlm.HELD_OUT_SEED, smoke=True)


def test_shipped_files_are_small() -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.iterdir()]
    assert sizes
    assert max(sizes) < 12e6


def test_shipped_model_reaches_the_bars_on_a_small_sample(shipped) -> None:  # type: ignore[no-untyped-def]
    usual = train_vlm.evaluate(*shipped, n=60, seed=20_000, partner_prob=0.85)
    assert usual["pope"]["random"]["accuracy"] >= 0.87
    rare = train_vlm.evaluate(*shipped, n=60, seed=20_001, partner_prob=0.2)
    assert rare["pope"]["random"]["f1"] - rare["pope"]["adversarial"]["f1"] >= 0.03
    assert 0.05 <= rare["chair"]["chair_i"] <= 0.35
    assert rare["chair"]["coverage"] >= 0.8


@pytest.mark.slow
def test_shipped_model_reaches_the_bars(shipped) -> None:  # type: ignore[no-untyped-def]
    usual = train_vlm.evaluate(*shipped, n=500, seed=30_000, partner_prob=0.85)
    assert usual["pope"]["random"]["accuracy"] >= 0.90
    rare = train_vlm.evaluate(*shipped, n=500, seed=30_001, partner_prob=0.2)
    assert rare["pope"]["random"]["f1"] - rare["pope"]["adversarial"]["f1"] >= 0.06
    assert 0.08 <= rare["chair"]["chair_i"] <= 0.30
    drift = rare["chair"]["by_rank"]
    assert max(drift[:3]) < 0.05 < max(drift[3:6])
