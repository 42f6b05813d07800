"""Every Triton kernel compiled for sm_90 without a GPU: what the compiler made of it is a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

BENCH = Path(__file__).parents[2] / "kernels" / "bench" / "aot.py"
TABLE = BENCH.parent / "results" / "aot_sm90.json"


def report(*arguments: str) -> dict:
    # The suite runs kernels in the interpreter; what is compiled must not be.
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCH), "--json", *arguments],
        capture_output=True,
        text=True,
        env=plain,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(found: dict) -> None:
    assert found["problems"] == []
    assert found["kernels"]
    for name, row in found["kernels"].items():
        assert row["spills"] == 0 and row["shared"] <= 227 * 1024, name
    # The heavy kernels use the tensor cores of the target and its loads of whole boxes.
    heavy = [row for row in found["kernels"].values() if row["wgmma"]]
    assert len(heavy) >= 6 and all(row["tma"] for row in heavy)


def test_one_case_of_every_op():
    found = report("--quick")
    check(found)
    ops = {name.split("/")[0] for name in found["kernels"]}
    assert ops == {"block_sparse", "column_mass", "grouped", "linear", "neighborhood", "routed"}
    assert set(found["kernels"]) <= set(json.loads(TABLE.read_text("utf-8"))["kernels"])


@pytest.mark.slow
def test_every_case():
    check(report())
