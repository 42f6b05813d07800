"""Every way a model can fail to load gives one sentence that says what to do."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from mmattn._model_checks import check_safetensors
from mmattn.errors import ConfigError, ModelLoadError
from mmattn.loading import resolve
from mmattn.mini import load, manifest, train_vit


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of embedded weights that holds an untrained classifier."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "vit").mkdir()
    train_vit.save(train_vit.build(), folder / "vit")
    manifest.write(folder)
    return folder


@pytest.fixture
def weights(root, monkeypatch):
    monkeypatch.setenv("MMATTN_WEIGHTS", str(root))
    return root


@pytest.fixture
def vit_copy(root, tmp_path):
    import shutil

    return shutil.copytree(root / "vit", tmp_path / "vit")


def test_embedded_by_name(weights):
    loaded = resolve("vit")
    assert loaded.embedded and loaded.kind == "vit" and not loaded.target.training
    assert next(loaded.target.parameters()).dtype == torch.float32


def test_a_folder_tells_its_own_kind(vit_copy):
    loaded = resolve(str(vit_copy))
    assert loaded.kind == "vit" and not loaded.embedded
    assert loaded.target(torch.zeros(1, 3, 64, 64)).shape == (1, len(train_vit.LABELS))


def test_pipelines_and_language_models_from_folders(tmp_path):
    from mmattn.mini import train_t2i, vlm

    pipe = train_t2i.build_pipeline()
    pipe.save_pretrained(tmp_path / "flux")
    loaded = resolve(str(tmp_path / "flux"))
    assert loaded.kind == "t2i" and type(loaded.target).__name__ == "FluxPipeline"
    with pytest.raises(ConfigError, match="of kind t2i, not vlm"):
        resolve(str(tmp_path / "flux"), "vlm")
    model, processor = vlm.build(layers=1)
    vlm.save(model, processor, tmp_path / "llava")
    loaded = resolve(str(tmp_path / "llava"))
    assert loaded.kind == "vlm" and loaded.processor.tokenizer is not None


def test_unknown_names_get_suggestions(weights):
    with pytest.raises(ModelLoadError, match="did you mean 't2v'"):
        resolve("t2w")
    with pytest.raises(ConfigError, match="unknown kind 'vitt', did you mean 'vit'"):
        resolve("vit", "vitt")
    with pytest.raises(ConfigError, match="did you mean 'vlm'"):
        load("vlmm")


def test_missing_weights_say_how_to_get_them(weights):
    with pytest.raises(ModelLoadError, match="mmattn mini train vlm"):
        load("vlm")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(ModelLoadError, match="There is no model folder"):
        resolve(path)


def test_truncated_weights(vit_copy):
    file = vit_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors is truncated: its header promises"
    ):
        resolve(str(vit_copy))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc", "truncated: 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (struct.pack("<Q", 4) + b"{{{{", "damaged safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "damaged safetensors header"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "is damaged: its header promises"),
    ],
)
def test_damaged_files(tmp_path, data, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match=message):
        check_safetensors(file)


def test_a_sound_file_passes(tmp_path):
    save_file({"a": torch.arange(6.0)}, tmp_path / "a.safetensors", metadata={"k": "v"})
    check_safetensors(tmp_path / "a.safetensors")


def test_pickles_are_not_read(vit_copy):
    (vit_copy / "model.safetensors").rename(vit_copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickled weights can run code"):
        resolve(str(vit_copy))


def test_code_of_the_model_is_not_run(vit_copy):
    config = vit_copy / "config.json"
    data = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    config.write_text(json.dumps(data))
    (vit_copy / "evil.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelLoadError, match="brings its own Python code"):
        resolve(str(vit_copy))


def test_broken_config_and_missing_shard(vit_copy):
    index = vit_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))
    with pytest.raises(ModelLoadError, match=r"shard model-00002\.safetensors, which is missing"):
        resolve(str(vit_copy))
    (vit_copy / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        resolve(str(vit_copy))


def test_a_hub_id_needs_a_kind_and_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="--kind"):
        resolve("someone/some-model")
    with pytest.raises(ModelLoadError, match="could not be loaded from the Hugging Face hub"):
        resolve("someone/some-model", "vlm")


def test_a_changed_file_is_named(root, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "weights"
    shutil.copytree(root, copy)
    monkeypatch.setenv("MMATTN_WEIGHTS", str(copy))
    assert manifest.check("vit").ok
    load("vit")
    file = copy / "vit" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors has another SHA-256"):
        load("vit")
    file.unlink()
    assert manifest.check("vit").problems == ["model.safetensors is missing"]


def test_shipped_weights_are_recorded():
    shipped = manifest.read(manifest.Path(manifest.__file__).parent / "weights")
    assert set(shipped) == set(manifest.NAMES)
    for name in shipped:
        check = manifest.check(name, manifest.Path(manifest.__file__).parent / "weights")
        assert check.ok, check.problems
