"""The small classifier: its recipe runs, and the shipped weights name colour and shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoModelForImageClassification

import mmattn.mini
from mmattn.mini import train_vit
from mmattn.mini.vlm import to_images

WEIGHTS = Path(next(iter(mmattn.mini.__path__))) / "weights" / "vit"


def test_pictures_are_reproducible() -> None:
    first = train_vit.draw_batch(4, torch.Generator().manual_seed(0))
    second = train_vit.draw_batch(4, torch.Generator().manual_seed(0))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_smoke_training_saves_a_model_that_loads(tmp_path: Path) -> None:
    record = train_vit.train(tmp_path, smoke=True, seed=1)
    assert record["stages"]["classifier"]["steps"] == 3
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 1
    again = train_vit.train(tmp_path / "more", smoke=True, resume=tmp_path)
    assert again["resumed"]
    with pytest.raises(ValueError, match="evaluation"):
        train_vit.train(tmp_path, smoke=True, seed=train_vit.HELD_OUT_SEED)


def test_shipped_folder_loads_in_timm_and_transformers_alike() -> None:
    ours = timm.create_model(f"local-dir:{WEIGHTS}", pretrained=True).eval()
    theirs = AutoModelForImageClassification.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    pictures, _ = train_vit.draw_batch(8, torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures), theirs(pixel_values=pictures).logits)
    assert theirs.config.id2label[0] == "red circle"
    assert ours.pretrained_cfg["label_names"][0] == "red circle"
    assert max(path.stat().st_size for path in WEIGHTS.iterdir()) < 12e6


def test_shipped_preprocessing_is_the_one_used_in_training() -> None:
    model = train_vit.load(WEIGHTS)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    pictures, labels = train_vit.draw_batch(16, torch.Generator().manual_seed(6))
    batch = torch.stack([transform(image) for image in to_images(pictures)])
    torch.testing.assert_close(batch, pictures * 2 - 1, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (model(batch).argmax(1) == labels).float().mean() >= 0.8


def test_shipped_model_reaches_the_bar() -> None:
    assert train_vit.evaluate(train_vit.load(WEIGHTS), n=1000, seed=910_000)["accuracy"] >= 0.97
