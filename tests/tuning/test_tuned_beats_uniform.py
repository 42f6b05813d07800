"""Is tuning worth it: against one setting for all layers, with every warm-up, at no more pairs."""

import pytest
import torch

import mmattn
from mmattn import VMoBA
from mmattn.calls import draw
from mmattn.evals.quality import psnr
from mmattn.loading import resolve
from mmattn.tuning import tune

PROMPTS = [
    "a red circle moving left on a white background",
    "a blue square moving up on a black background",
]
CHUNKS = (0.25, (1, 1), (1, 3, 3))
SHARES = (0.5, 0.35, 0.25, 0.15)


@pytest.mark.slow
@torch.no_grad()
def test_tuned_settings_beat_uniform_ones_at_equal_density(tmp_path):
    loaded = resolve("t2v")
    loaded.target.set_progress_bar_config(disable=True)

    def film():
        return draw(loaded, PROMPTS, [0, 1], steps=10, batch=1)

    dense, uniform = film(), []
    for share in SHARES:
        for first in range(5):
            method = VMoBA(topk=share, chunks=CHUNKS, dense_steps=first)
            with mmattn.attach(loaded.target, method) as session:
                likeness = float(psnr(film(), dense).mean())
                uniform.append((session.stats.density, likeness))
    candidates = [VMoBA(topk=share, chunks=CHUNKS) for share in SHARES]
    for budget in (25, 22):
        tuned = tune(
            loaded, PROMPTS, candidates, tmp_path / f"{budget}.toml", min_psnr=budget, steps=10
        )
        rivals = [likeness for density, likeness in uniform if density <= tuned.density + 0.02]
        print(f"tuned {tuned.density:.3f} {tuned.psnr:.2f} dB, best uniform {max(rivals):.2f} dB")
        assert tuned.psnr > max(rivals) + 0.3
