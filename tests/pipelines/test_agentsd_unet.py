"""The AgentSD benchmark on a tiny UNet, without and with a stand-in for tomesd."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "pipelines" / "bench" / "agentsd_unet.py"
spec = importlib.util.spec_from_file_location("agentsd_unet", SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def fake(change=0.0):
    """Scales the output of the last convolution while it is on; ratio 0 does nothing."""
    log = []

    def apply_patch(model, ratio):
        log.append(ratio)
        factor = 1 + change * (ratio > 0)
        model.hook = model.conv_out.register_forward_hook(lambda m, a, out: out * factor)

    def remove_patch(model):
        model.hook.remove()
        log.append("off")

    return SimpleNamespace(apply_patch=apply_patch, remove_patch=remove_patch, log=log)


def test_rows_and_errors():
    tomesd = fake(0.25)
    found = bench.measure(16, 16, 0.4, 1, tomesd, layers=1)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["dense"]["error"] == 0 and rows["tomesd"]["error"] == pytest.approx(0.25)
    assert rows["ToMe"]["error"] > 0 and rows["AgentSD, a step with agents"]["error"] > 0
    # A later step only merges, as ToMe does.
    assert rows["AgentSD, a later step"]["error"] == pytest.approx(rows["ToMe"]["error"], rel=0.5)
    assert tomesd.log == [0.0, "off", 0.4, "off"]
    assert "| tomesd |" in bench.table(found)


def test_no_times_when_merging_nothing_changes_the_output():
    broken = fake()
    broken.apply_patch = lambda model, ratio: model.__setattr__(
        "hook", model.conv_out.register_forward_hook(lambda m, a, out: out + 1)
    )
    with pytest.raises(RuntimeError, match="tomesd merged nothing and changed the output"):
        bench.measure(16, 16, 0.4, 1, broken, layers=1)


def test_without_tomesd_it_is_left_out(tmp_path):
    model = bench.build(16, 1)
    assert "tomesd" not in bench.contestants(model, 0.4)
    with pytest.raises(ImportError):
        bench.load_tomesd(tmp_path)
    halves = bench.inputs(16)["sample"]
    assert torch.equal(halves[0], halves[1])
