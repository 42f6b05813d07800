"""Shared by every test: no network, few threads, seeded and restored global RNG."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("MMATTN_CONFIG", None)
# Before anything imports Triton: without a GPU its kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def demo_models():
    """The embedded models as the demos hold them."""
    from mmattn_demos.models import Models

    return Models()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The private folder of the demo server: one per process, as Gradio has it."""
    place = tmp_path_factory.mktemp("private")
    place.chmod(0o700)
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(place)
    yield place
    if before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="session")
def demo_server(demo_models, demo_folder):
    """All demos on loopback; yields the address without a slash at the end."""
    from mmattn_demos import app, serving

    blocks = app.build(demo_models)
    yield serving.serve(blocks, wait=False).rstrip("/")
    blocks.close()
