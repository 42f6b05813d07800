"""`import mmattn.nn` is all it takes for timm to know the backbones."""

import subprocess
import sys

import pytest
import timm
import torch

import mmattn.nn  # noqa: F401

SMALLEST = (
    "agent_deit_tiny",
    "agent_pvt_tiny",
    "agent_swin_tiny",
    "biformer_tiny",
    "mavit_tiny",
    "nat_mini",
    "dinat_mini",
    "slab_deit_tiny",
    "moh_vit_tiny_patch16_224",
)


@pytest.mark.parametrize("name", SMALLEST)
def test_timm_makes_and_runs_it(name):
    model = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 224, 224))
    assert out.shape == (1, 7) and torch.isfinite(out).all()


def test_importing_mmattn_alone_registers_nothing():
    code = "import mmattn, timm; assert not timm.is_model('agent_deit_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)
