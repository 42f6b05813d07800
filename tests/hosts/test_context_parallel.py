"""Methods on a diffusers model that two processes run together: what one process gives, or a refusal.

The processes are real (gloo, on the CPU) and started once, by context_parallel_ranks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmattn
from mmattn import Identity, VMoBA
from mmattn.errors import UnsupportedCall

SCRIPT = Path(__file__).with_name("context_parallel_ranks.py")
VIDEO = ["identity", "vmoba", "neighborhood", "random-blocks", "centred", "centred-heads"]
VIDEO += ["vmoba-headwise", "neighborhood-headwise", "scaled-head"]
IMAGE = ["neighborhood", "neighborhood-headwise", "random-blocks", "centred-heads"]
PADDED = ["neighborhood", "neighborhood-headwise", "centred", "centred-heads"]
CASES = [
    f"{kind} {name}"
    for kind, names in (("t2v", VIDEO), ("t2i", IMAGE), ("padded", PADDED))
    for name in ["dense", *names]
]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found, and how far each method moves the result of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read = [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)]
    return read, json.loads((folder / "moved.json").read_text())


def of(ranks, case):
    return [found[case] for found in ranks[0]]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(ranks, case):
    assert max(found["error"] for found in of(ranks, case)) <= 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if not c.endswith(("dense", "identity"))])
def test_the_method_did_something(ranks, case):
    assert ranks[1][case] > 1e-3  # far more than the bound above


@pytest.mark.parametrize(("case", "heads"), [("t2v centred", 4), ("t2v centred-heads", 2)])
def test_all_tokens_and_the_heads_that_a_method_needs(ranks, case, heads):
    for found in of(ranks, case):
        assert found["kinds"] == ["cross", "self"] and found["sites"] == 12
        assert found["tokens"] == 2 * 6 * 6  # of the whole clip
        assert found["heads"] == heads  # the model has 4


def test_sparse(ranks):
    for case in ("t2v vmoba", "t2v vmoba-headwise", "t2v neighborhood", "t2i neighborhood"):
        assert all(0 < found["density"] < 0.6 for found in of(ranks, case)), case


def test_detach_restores(ranks):
    for case in ("t2v detached", "t2i detached"):
        assert of(ranks, case) == [{"bitwise": True, "processors": True}] * 2


def test_enabled_after_attaching(ranks):
    for found in of(ranks, "enabled late"):
        assert found["error"] <= 1e-5 and found["detached"] <= 1e-5
        assert found["kept"]  # the stock processor still knows that the model is cut


def test_gradients_add_up_over_the_processes(ranks):
    for found in of(ranks, "gradient"):
        assert found["size"] > 0.1 and found["error"] <= 1e-5


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("ring", "vmoba at transformer.blocks.0.attn1: the model runs under ring attention"),
        ("anything", "ulysses_anything=True"),
        ("tokens seam", "swapped at transformer.blocks.0.attn1: the model runs under context"),
    ],
)
def test_refused_before_anything_is_touched(ranks, case, said):
    for found in of(ranks, case):
        assert said in found["error"] and found["untouched"]


def test_unsupported_dense_is_dense_and_counted(ranks):
    for found in of(ranks, "anything dense"):
        assert found["error"] <= 1e-5
        assert len(found["reasons"]) == 1 and "ulysses_anything" in found["reasons"][0]


def test_tensor_parallel_is_refused():
    model = tiny()
    model._parallel_config = SimpleNamespace(context_parallel_config=None)
    with pytest.raises(UnsupportedCall, match="tensor parallelism, where a process sees a part"):
        mmattn.attach(model, VMoBA(threshold=0.25, kind="overall", dense_steps=0))
    for alone in (Identity(), VMoBA(topk=2, dense_steps=0)):  # right for any share of the heads
        with mmattn.attach(model, alone) as session:
            assert session.runs[0].sites


def test_a_model_whose_tokens_have_no_known_order_is_refused():
    model = tiny()
    with mmattn.attach(model, Identity()) as session:
        session.runs[0].root.layout = None
        model._parallel_config = SimpleNamespace(
            context_parallel_config=SimpleNamespace(
                ring_degree=1,
                ulysses_degree=2,
                ulysses_anything=False,
                _ulysses_local_rank=0,
                _ulysses_mesh=SimpleNamespace(get_group=lambda: None),
            )
        )
        for block in model.blocks:
            block.attn1.processor._parallel_config = model._parallel_config
        with pytest.raises(UnsupportedCall, match="how WanTransformer3DModel orders its tokens"):
            model(torch.randn(1, 4, 1, 4, 4), torch.tensor([1]), torch.randn(1, 3, 16))


def tiny():
    import diffusers

    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    ).eval()


@pytest.mark.slow
def test_the_example_under_torchrun(tmp_path):
    root = Path(__file__).parents[2]
    script = str(root / "pipelines" / "examples" / "parallel_video.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    made = []
    for count, start in ((1, [sys.executable]), (2, [*torchrun, "--nproc-per-node", "2"])):
        out = tmp_path / f"{count}.mp4"
        command = [*start, script, "--out", str(out), "--steps", "2", "--num-frames", "5"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("6 of 6 planned sites executed") == 1  # one process reports
        made.append(next(tmp_path.glob(f"{count}.*")).read_bytes())
    assert made[0] == made[1]
