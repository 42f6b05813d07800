"""What a wheel contains, and the layout rules the folders must keep."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling (dev extra)")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_top_level_packages(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names if ".dist-info" not in name}
    assert tops == {"mmattn", "mmattn_kernels", "mmattn_pipelines", "mmattn_demos"}


def test_wheel_carries_types_licence_and_no_oversized_file(wheel_names):
    assert "mmattn/py.typed" in wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert max(wheel_names.values()) <= 12 * 2**20


def test_wheel_carries_the_embedded_models(wheel_names):
    weights = {n: s for n, s in wheel_names.items() if n.startswith("mmattn/mini/weights/")}
    for name in ("t2i", "t2v", "vlm", "vit"):
        assert any(n.split("/")[3] == name and n.endswith(".safetensors") for n in weights), name
    assert sum(weights.values()) <= 40 * 2**20


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "demos"])
def test_container_folders_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_layering_goes_one_way():
    """kernels know nothing of mmattn; the library knows nothing of cli, compare and batch."""
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) mmattn\b", path.read_text(), re.M), path
    upper = r"^\s*(from|import) mmattn\.(cli|compare|batch)\b|^\s*(from|import) mmattn_(pipelines|demos)"
    below = [p for p in (ROOT / "mmattn").glob("*.py") if p.name != "__main__.py"]
    for room in ("hosts", "methods", "nn", "evals", "tuning"):
        below += (ROOT / "mmattn" / room).rglob("*.py")
    for path in below:
        assert not re.search(upper, path.read_text(), re.M), path


def test_hosts_know_no_method_and_methods_know_no_host():
    for path in (ROOT / "mmattn" / "hosts").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"mmattn\.methods\.(?!base\b)", text), path
    for path in (ROOT / "mmattn" / "methods").glob("*.py"):
        assert "mmattn.hosts" not in path.read_text(), path
