"""A model folder from a stranger runs no code, reads nothing outside itself, and never loads half."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from mmattn._model_checks import check_safetensors
from mmattn.errors import ModelLoadError
from mmattn.loading import resolve
from mmattn.measuring import measured
from mmattn.mini import train_t2i, train_vit, vlm

FORMATS = [".bin", ".pt", ".pth", ".ckpt", ".pkl"]
PLACES = ["vae", "text_encoder", "timm", "root"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Untrained models, as their libraries save them: flux, vit, llava."""
    place = tmp_path_factory.mktemp("sound")
    train_t2i.build_pipeline().save_pretrained(place / "flux")
    (place / "vit").mkdir()
    train_vit.save(train_vit.build(), place / "vit")
    vlm.save(*vlm.build(layers=1), place / "llava")
    return place


@pytest.fixture
def copy(sound, tmp_path):
    def of(name):
        return shutil.copytree(sound / name, tmp_path / name)

    return of


class _Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def _trap(path, marker):
    path.write_bytes(pickle.dumps(_Evil(marker), protocol=2))


def _change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_trap_works(tmp_path):
    _trap(tmp_path / "model.pt", tmp_path / "marker")
    pickle.loads((tmp_path / "model.pt").read_bytes()).close()
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", FORMATS)
def test_pickles_never_run(place, ending, copy, tmp_path):
    marker = tmp_path / "marker"
    folder = copy("vit" if place == "timm" else "flux")
    part = {"timm": folder, "root": folder / "vae"}.get(place, folder / place)
    (file,) = part.glob("*.safetensors")
    file.unlink()
    stem = "diffusion_pytorch_model" if place == "vae" else "pytorch_model"
    _trap((folder if place == "root" else part) / f"{stem}{ending}", marker)
    start = time.perf_counter()
    with pytest.raises(ModelLoadError, match="safetensors") as caught:
        resolve(str(folder))
    assert f"{stem}{ending}" in str(caught.value)
    assert time.perf_counter() - start < 5 and not marker.exists()


def test_a_pickle_behind_a_decoy(copy, tmp_path):
    # timm prefers pytorch_model.bin to a safetensors file with a name of its own.
    folder = copy("vit")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    _trap(folder / "pytorch_model.bin", tmp_path / "marker")
    with pytest.raises(ModelLoadError, match="no safetensors that would be used"):
        resolve(str(folder))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["flux", "vit", "llava"])
def test_pickles_beside_safetensors_are_left_alone(name, copy, tmp_path):
    folder = copy(name)
    for place in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        for ending in FORMATS:
            for stem in ("model", "pytorch_model", "diffusion_pytorch_model"):
                _trap(place / f"{stem}{ending}", tmp_path / "marker")
    assert resolve(str(folder)).target is not None
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["../../evil", "X"],
        ["mmattn", "Session"],
        ["transformers", "logging"],
        ["diffusers", "../x"],
        ["subprocess", "Popen", "x"],
        [{}, "AutoencoderKL"],
        [None, "AutoencoderKL"],
        ["diffusers", ["AutoencoderKL"]],
    ],
)
def test_only_classes_of_the_libraries_are_named(entry, copy):
    folder = copy("flux")
    _change(folder / "model_index.json", vae=entry)
    with pytest.raises(ModelLoadError, match="no class of diffusers or transformers"):
        resolve(str(folder))


def test_pipelines_of_the_folder_are_not_imported(copy, tmp_path):
    folder = copy("flux")
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    _change(folder / "model_index.json", _class_name=["pipeline", "MyPipe"])
    with pytest.raises(ModelLoadError, match="brings its own Python code"):
        resolve(str(folder))
    assert not (tmp_path / "marker").exists()


def test_component_names_are_no_paths(copy):
    folder = copy("flux")
    _change(folder / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ModelLoadError, match="no class of diffusers"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "file", "changes", "says"),
    [
        ("flux", "transformer/config.json", {"num_layers": 10**9}, "num_layers = 1000000000"),
        ("flux", "text_encoder/config.json", {"hidden_size": -1}, "hidden_size = -1"),
        ("flux", "text_encoder/config.json", {"hidden_size": 10**7}, "hidden_size"),
        ("flux", "vae/config.json", {"block_out_channels": [64, 10**9]}, "block_out_channels"),
        ("flux", "transformer/config.json", {"attention_head_dim": 2**13}, "far more than"),
        ("flux", "transformer/config.json", {"attention_head_dim": 2**19}, "attention_head_dim"),
        ("flux", "vae/config.json", {"block_out_channels": [2**14]}, "far more than"),
        ("flux", "vae/config.json", {"layers_per_block": 10**4}, "layers_per_block"),
        ("flux", "vae/config.json", {"dim_mult": [1, 10**6]}, "dim_mult"),
        ("flux", "transformer/config.json", {"rope_max_seq_len": 10**6}, "rope_max_seq_len"),
        ("flux", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**7}, "timesteps"),
        ("flux", "scheduler/scheduler_config.json", {"solver_order": 10**6}, "solver_order"),
        ("flux", "tokenizer_2/tokenizer_config.json", {"extra_ids": 10**6}, "extra_ids"),
        ("vit", "config.json", {"model_args": {"depth": 10**9}}, "depth"),
        ("vit", "config.json", {"model_args": {"depth": 200, "embed_dim": 30_000}}, "far more"),
        ("vit", "config.json", {"model_args": {"mlp_ratio": 1e9}}, "mlp_ratio"),
        ("vit", "config.json", {"model_args": {"patch_size": 2**15}}, "patch_size"),
        ("llava", "config.json", {"text_config": {"num_hidden_layers": 1e300}}, "num_hidden"),
        ("llava", "config.json", {"vocab_size": float("nan")}, "vocab_size = nan"),
        ("vit", "config.json", {"labels": "x" * 50_000_000}, "reads at most"),
        ("vit", "config.json", {"transformers_weights": "adapter_model.bin"}, "no safetensors"),
    ],
)
def test_config_bombs(name, file, changes, says, copy):
    folder = copy(name)
    _change(folder / file, **changes)

    def work():
        with pytest.raises(ModelLoadError, match=says):
            resolve(str(folder))

    start = time.process_time()
    assert measured(work, torch.device("cpu")).memory_mb < 200
    assert time.process_time() - start < 1


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize("key", ["x", "depths"])
def test_deep_configs(depth, key, copy):
    folder = copy("vit")
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{text}, "{key}": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(ModelLoadError, match="nested too deeply"):
        resolve(str(folder))


@pytest.mark.parametrize(
    "shard",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "a/../x.safetensors",
        "..\\x.safetensors",
        "x.bin",
    ],
)
def test_shards_lie_beside_their_index(shard, copy):
    folder = copy("llava")
    index = {"metadata": {}, "weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="beside the index"):
        resolve(str(folder))


@pytest.mark.parametrize("what", ["config.json", "model.safetensors", "tokenizer.json", "sub"])
def test_links_out_of_the_folder(what, copy, tmp_path):
    folder = copy("llava")
    outside = tmp_path / "outside"
    if what == "sub":
        outside.mkdir()
    else:
        shutil.move(folder / what, outside)
    os.symlink(outside, folder / what)
    with pytest.raises(ModelLoadError, match="link out of the model's folder"):
        resolve(str(folder))


def test_the_cache_of_the_hub_is_a_folder_of_links(sound, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((sound / "vit").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert resolve(str(snapshot)).kind == "vit"


def test_adapters_do_not_fetch_their_model(copy):
    folder = copy("llava")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}')
    with pytest.raises(ModelLoadError, match="adapter of another model"):
        resolve(str(folder))


FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}


def _drop(tensors):
    del tensors[max(tensors)]


def _add(tensors):
    tensors["decoder.extra.weight"] = torch.zeros(2)


def _reshape(tensors):
    tensors[max(tensors)] = torch.zeros(7)


@pytest.mark.parametrize("change", [_drop, _add, _reshape])
@pytest.mark.parametrize("place", ["vae", "text_encoder", "llava", "vit"])
def test_keys_that_do_not_fit(place, change, copy):
    folder = copy(place if place in ("llava", "vit") else "flux")
    file = folder / place / FILES[place] if place in FILES else folder / "model.safetensors"
    _weights(file, change)
    with pytest.raises(ModelLoadError):
        resolve(str(folder))


def test_a_random_classifier_is_noticed(copy):
    folder = copy("vit")
    data = json.loads((folder / "config.json").read_text())
    data["model_args"] = {**data.get("model_args", {}), "num_classes": 3}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ModelLoadError, match="model_args ask for 3"):
        resolve(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["vae", "text_encoder", "llava", "vit"])
def test_weights_are_finite(place, value, copy):
    folder = copy(place if place in ("llava", "vit") else "flux")
    file = folder / place / FILES[place] if place in FILES else folder / "model.safetensors"

    def poison(tensors):
        tensors[max(tensors)].view(-1)[-1] = value

    _weights(file, poison)
    with pytest.raises(ModelLoadError, match=r"has 1 weights in .* that are NaN or infinite"):
        resolve(str(folder))


def test_large_weights_are_not_infinite(copy):
    # Their fp32 sum overflows, which is no reason to refuse them.
    folder = copy("vit")

    def enlarge(tensors):
        tensors[max(tensors)] = torch.full_like(tensors[max(tensors)], 3e38, dtype=torch.float32)

    _weights(folder / "model.safetensors", enlarge)
    assert resolve(str(folder)).kind == "vit"
    with pytest.raises(ModelLoadError, match=r"torch\.float16"):
        resolve(str(folder), dtype=torch.float16)


def test_half_precision_and_shards_and_ties_load(tmp_path):
    pipe = train_t2i.build_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", max_shard_size="100KB")
    assert list((tmp_path / "half").rglob("*.safetensors.index.json"))
    loaded = resolve(str(tmp_path / "half"))
    before, after = pipe.transformer.state_dict(), loaded.target.transformer.state_dict()
    assert all(torch.equal(before[key].float(), after[key]) for key in before)
    # T5 shares its embedding between two names and stores one.
    shared = loaded.target.text_encoder_2
    assert shared.shared.weight is shared.encoder.embed_tokens.weight


@pytest.mark.parametrize("place", ["vae", "text_encoder", "llava", "vit"])
def test_integers_are_no_weights(place, copy):
    folder = copy(place if place in ("llava", "vit") else "flux")
    file = folder / place / FILES[place] if place in FILES else folder / "model.safetensors"
    table, body, _ = _header(file)
    name = max(name for name in table if name != "__metadata__")
    table[name]["dtype"] = table[name]["dtype"].replace("F", "I")
    file.write_bytes(_pack(json.dumps(table).encode(), body))
    with pytest.raises(ModelLoadError):
        resolve(str(folder))


def _header(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :], data


def _pack(text, body):
    return struct.pack("<Q", len(text)) + text + body


def _damaged(file, kind, number):
    """The bytes of a sound file with one kind of damage; `number` says where."""
    table, body, data = _header(file)
    names = [name for name in table if name != "__metadata__"]
    name = names[number % len(names)]
    if kind == "truncated":
        return data[: len(data) * (0, 1, 8, 50, 99)[number % 5] // 100]
    if kind == "length":
        return struct.pack("<Q", (2**60, 2**64 - 1, 2**31, len(data) - 7)[number % 4]) + data[8:]
    if kind == "flipped":
        place = 8 + number % (len(data) - len(body) - 8)
        return data[:place] + bytes([data[place] ^ (1 << number % 8)]) + data[place + 1 :]
    if kind == "overlap":
        first, last = table[name]["data_offsets"]
        table[name]["data_offsets"] = [first - 4, last - 4] if first else [first + 4, last + 4]
    if kind == "dtype":
        table[name]["dtype"] = ("I16", "U16", "F64", "F32", "X9", 7)[number % 6]
    text = json.dumps(table).encode()
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(table[name])}}}".encode()
    return _pack(text, body)


DAMAGE = st.tuples(
    st.sampled_from(["truncated", "length", "flipped", "overlap", "dtype", "twice"]),
    st.integers(0, 2**16),
)
COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def _damage(sound, damage):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(sound / "vit", Path(place, "vit")))
        file = folder / "model.safetensors"
        file.write_bytes(_damaged(file, *damage))
        if damage[0] == "flipped":
            # Some bits of a header mean nothing; then all weights must be the sound ones.
            try:
                loaded = resolve(str(folder)).target.state_dict()
            except ModelLoadError:
                return
            intact = load_file(sound / "vit" / "model.safetensors")
            assert all(torch.equal(loaded[key], intact[key]) for key in intact)
            return
        with pytest.raises(ModelLoadError):
            resolve(str(folder))


@given(damage=DAMAGE)
@settings(max_examples=60, **COMMON)
def test_damaged_files_are_refused(sound, damage):
    _damage(sound, damage)


@pytest.mark.slow
@given(damage=DAMAGE)
@settings(max_examples=200, **COMMON)
def test_many_damaged_files_are_refused(sound, damage):
    _damage(sound, damage)


@pytest.mark.parametrize("kind", ["truncated", "length", "overlap", "dtype", "twice", "endless"])
def test_damaged_files_take_no_memory(kind, tmp_path):
    """A header can promise any number; what is read of a file of 24 MB is the header."""
    file = tmp_path / "a.safetensors"
    save_file({str(i): torch.zeros(2**20) for i in range(6)}, file)
    table, body, data = _header(file)
    if kind == "endless":
        # No byte of it is in the file, and torch cannot count so far.
        table["0"]["shape"], table["0"]["data_offsets"] = [0, 2**63], [0, 0]
        table = {"0": table["0"]} | {k: v for k, v in table.items() if k != "0"}
        first = body[2**22 :]
        for name in table:
            if name != "0":
                table[name]["data_offsets"] = [end - 2**22 for end in table[name]["data_offsets"]]
        file.write_bytes(_pack(json.dumps(table).encode(), first))
    else:
        file.write_bytes(_damaged(file, kind, 4))

    def work():
        with pytest.raises(ModelLoadError):
            check_safetensors(file)

    assert measured(work, torch.device("cpu")).memory_mb < 2 * len(data) / 2**20


def test_headers_are_not_parsed_at_any_length(tmp_path):
    file = tmp_path / "a.safetensors"
    text = b'{"__metadata__": {' + b",".join(b'"%d": "x"' % i for i in range(1_200_000)) + b"}}"
    file.write_bytes(_pack(text, b""))

    def work():
        with pytest.raises(ModelLoadError, match="claims a header of"):
            check_safetensors(file)

    assert measured(work, torch.device("cpu")).memory_mb < 50


def test_headers_give_names_and_shapes(sound):
    header = check_safetensors(sound / "vit" / "model.safetensors")
    tensors = load_file(sound / "vit" / "model.safetensors")
    assert {name: shape for name, (_, shape) in header.items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
