"""The ladder of sparse settings: densities as announced, a record, a table, and plots that are drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmattn
from mmattn.evals.sparsity import Rung, filmstrip, interval, ladder, markdown, measure, plot
from mmattn.loading import resolve


@pytest.fixture(scope="module")
def video():
    loaded = resolve("t2v")
    loaded.target.set_progress_bar_config(disable=True)
    return loaded


def test_every_rung_has_the_density_it_claims_and_vmoba_never_more(video):
    pipe = video.target
    found = {}
    for rung in ladder(0):
        with mmattn.attach(pipe, rung.method, dry_run=True) as session:
            pipe(
                "a red circle moving left",
                height=48,
                width=48,
                num_frames=17,
                num_inference_steps=1,
                max_sequence_length=16,
                output_type="latent",
            )
            found[rung.family, rung.density] = session.stats.density
    for (family, nominal), density in found.items():
        if family in ("ProxyAttn", "FlexPrefill"):
            assert density < 1
        else:
            assert density == pytest.approx(nominal, abs=0.005), family
        if family == "VMoBA":
            assert density <= found["random blocks", nominal] + 1e-9
    assert {r.family for r in ladder(0.25)} - {r.family for r in ladder(0)} == {"SparseD"}


def test_a_short_run_writes_figures_and_pictures(video, tmp_path):
    def rungs(warmup):
        return [
            Rung(family, 0.25, method)
            for family, method in (
                ("VMoBA", mmattn.VMoBA(topk=0.25, dense_steps=warmup)),
                ("random blocks", mmattn.RandomBlocks(density=0.25, block=9, dense_steps=warmup)),
            )
        ]

    record, clips = measure(video, 2, steps=2, warmups=(0, 0.5), rungs=rungs)
    assert json.loads(json.dumps(record)) == record
    dense, *rows = record["rows"]
    assert dense["psnr"] == 100 and len(rows) == 4
    for row in rows:
        assert row["psnr"] < 60 and 0 < row["recall"] < 1
        low, high = row["psnr_95"]
        assert low <= row["psnr"] <= high
    assert rows[2]["sparse_density"] == pytest.approx(rows[0]["sparse_density"], abs=0.002)
    assert rows[2]["density"] > rows[0]["density"], "half of the steps are dense"
    table = markdown(record, 0)
    assert table.count("\n") == 5 and "| VMoBA |" in table
    for path in (
        plot(record, tmp_path / "plot.png"),
        filmstrip(clips, list(clips), tmp_path / "clips.png"),
    ):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 5 and min(pixels.shape[:2]) > 100


def test_the_interval_holds_the_mean_and_narrows():
    values = torch.arange(100.0)
    low, high = interval(values)
    assert low < 49.5 < high and 8 < high - low < 16
    few = interval(values[::10])
    assert few[1] - few[0] > high - low
