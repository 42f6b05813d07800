"""Is tuning worth it: against one setting for all layers, with every warm-up, at no more pairs."""

import pytest
import torch

import mmattn
from mmattn import VMoBA
from mmattn.calls import draw
from mmattn.evals.quality import psnr
from mmattn.loading import resolve
from mmattn.mini.scenes import make_clips
from mmattn.tuning import tune

OWN = [clip.caption for clip in make_clips(8, 910_000)]
OTHER = [clip.caption for clip in make_clips(24, 920_000)]
CHUNKS = (0.25, (1, 1), (1, 3, 3))
SHARES = (0.5, 0.35, 0.25, 0.15)


@pytest.mark.slow
@torch.no_grad()
def test_tuned_settings_beat_uniform_ones_on_prompts_they_never_saw(tmp_path):
    loaded = resolve("t2v")
    loaded.target.set_progress_bar_config(disable=True)

    def film():
        seeds = [500 + i for i in range(len(OTHER))]
        return draw(loaded, OTHER, seeds, steps=10, batch=24)

    dense = film()

    def likeness(method):
        with mmattn.attach(loaded.target, method) as session:
            value = float(psnr(film(), dense).mean())
            return session.stats.density, value

    uniform = [
        likeness(VMoBA(topk=share, chunks=CHUNKS, dense_steps=first))
        for share in SHARES
        for first in range(5)
    ]
    candidates = [VMoBA(topk=share, chunks=CHUNKS) for share in SHARES]
    out = tmp_path / "tuned.toml"
    for budget in (27, 22):
        tuned = tune(loaded, OWN, candidates, out, min_psnr=budget, steps=10)
        _, value = likeness(tuned.recipe)
        best = max(v for density, v in uniform if density <= tuned.density + 0.01)
        print(
            f"budget {budget} dB: density {tuned.density:.3f}, own prompts {tuned.psnr:.2f} dB, other "
            f"prompts {value:.2f} dB, best uniform setting {best:.2f} dB"
        )
        assert tuned.psnr >= budget
        assert value > best + 0.5
