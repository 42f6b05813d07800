"""Schedules, averaging and saving that the trainers share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmattn.mini.recipe import Ema, MuonAdamW, Plan, Progress, cosine, psnr, save_half
from mmattn.mini.train_t2v import build_pipeline


def test_cosine_rises_then_falls() -> None:
    values = [cosine(i / 100) for i in range(101)]
    assert values[0] < 0.01 and max(values) == pytest.approx(1.0, abs=0.01)
    assert values[3:] == sorted(values[3:], reverse=True)
    assert values[-1] == pytest.approx(0.02)


def test_plan_splits_minutes_or_takes_steps() -> None:
    assert Plan.make(10.0, None, (0.2, 0.8), 50.0).minutes == (2.0, 8.0)
    assert Plan.make(None, None, (0.2, 0.8), 50.0).minutes == (10.0, 40.0)
    assert Plan.make(None, (3, 4), (0.2, 0.8), 50.0).stage(1).steps == 4
    with pytest.raises(ValueError, match="one per stage"):
        Plan.make(None, (3,), (0.2, 0.8), 50.0)


def test_progress_by_steps() -> None:
    progress = Progress(steps=4)
    for _ in range(4):
        assert not progress.done
        progress.step += 1
    assert progress.done and progress.record()["steps"] == 4


def test_ema_swaps_there_and_back() -> None:
    layer = nn.Linear(2, 2)
    start = layer.weight.detach().clone()
    ema = Ema([layer], 0.9)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update()
    ema.swap()
    assert (start < layer.weight).all() and (layer.weight < start + 1).all()
    ema.swap()
    torch.testing.assert_close(layer.weight.detach(), start + 1)


def test_muon_adamw_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = MuonAdamW([net], hidden=lambda name: True, muon_lr=0.02, adamw_lr=0.01)
    x = torch.randn(64, 8)
    losses = []
    for step in range(150):
        loss = (net(x) - x.flip(1)).square().mean()
        losses.append(loss.item())
        optimizer.step(loss, cosine(step / 150))
    assert losses[-1] < 0.2 * losses[0]


def test_saved_weights_are_half_where_safe_and_name_no_folder(tmp_path: Path) -> None:
    pipe = build_pipeline()
    before = pipe.transformer.proj_out.weight.dtype
    save_half(pipe, tmp_path)
    assert pipe.transformer.proj_out.weight.dtype == before == torch.float32
    dtypes = {}
    for part in ("vae", "transformer", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            dtypes[part] = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert "_name_or_path" not in (tmp_path / part / "config.json").read_text()
    assert dtypes["vae"] == {"BF16"} and dtypes["text_encoder"] == {"F32"}
    assert dtypes["transformer"] == {"BF16", "F32"}


def test_psnr_of_known_error() -> None:
    want = torch.zeros(1, 3, 4, 4)
    assert psnr(want + 0.2, want) == pytest.approx(20.0, abs=1e-4)
