"""Damaged weights and configs: a model whose weights are the ones in the file, or a sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct

import mutator
import pytest
import torch
import trials
from safetensors.torch import load_file, save_file

from mmattn._model_checks import check_folder, check_safetensors
from mmattn.errors import ModelLoadError
from mmattn.loading import resolve
from mmattn.mini import load, manifest, train_t2i, train_vit, vlm


def _tensors():
    return {
        "a.weight": torch.arange(12.0).view(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c.steps": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    save_file(_tensors(), folder / "1", metadata={"format": "pt"})
    save_file({"x": torch.zeros(2, 2)}, folder / "2")
    return [(folder / "1").read_bytes(), (folder / "2").read_bytes()]


def _damaged(seeds, dice):
    """A safetensors file with changed bytes, or with a changed header that is packed well again."""
    data = dice.choice(seeds)
    if dice.random() < 0.5:
        size = struct.unpack("<Q", data[:8])[0]
        table = mutator.mutate_table(json.loads(data[8 : 8 + size]), dice)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    data = mutator.mutate(data, seeds, dice)
    return mutator.mended_safetensors(data) if dice.random() < 0.5 else data


def test_damaged_safetensors(seeds, tmp_path):
    path = tmp_path / "x.safetensors"

    def cases():
        for number in range(trials.share(300)):
            path.write_bytes(_damaged(seeds, random.Random(f"safetensors {number}")))
            yield f"safetensors {number}", path

    def read(path):
        header = check_safetensors(path)
        # What was checked can be read, and is what was promised.
        tensors = load_file(path)
        assert {name: shape for name, (_, shape) in header.items()} == {
            name: list(tensor.shape) for name, tensor in tensors.items()
        }

    found = trials.run(cases(), read)
    assert found.read and found.refused, found


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Untrained models, as their libraries save them: vit, llava, flux."""
    place = tmp_path_factory.mktemp("sound")
    (place / "vit").mkdir()
    train_vit.save(train_vit.build(), place / "vit")
    vlm.save(*vlm.build(layers=1), place / "llava")
    train_t2i.build_pipeline().save_pretrained(place / "flux")
    return place


def _configs(folder):
    return sorted(p for p in folder.rglob("*.json") if p.stat().st_size < 4000)


def _changed(sound, name, count, folder):
    """One damaged file per case in a copy of a model's folder, which is sound again for the next."""
    copy = shutil.copytree(sound / name, folder / name)
    files = _configs(copy)
    seeds = [path.read_bytes() for path in files]
    for number in range(count):
        dice = random.Random(f"{name} {number}")
        place = dice.randrange(len(files))
        if dice.random() < 0.8:
            table = mutator.mutate_table(json.loads(seeds[place]), dice)
            data = json.dumps(table).encode()
        else:
            data = mutator.mutate(seeds[place], seeds, dice)
        files[place].write_bytes(data)
        yield f"{name} {number} {files[place].relative_to(copy)}", copy
        files[place].write_bytes(seeds[place])


@pytest.mark.parametrize("name", ["vit", "llava", "flux"])
def test_damaged_configs_before_loading(name, sound, tmp_path):
    found = trials.run(_changed(sound, name, trials.share(60), tmp_path), check_folder)
    assert found.read and found.refused, found


@pytest.mark.parametrize(("name", "count"), [("vit", 30), ("llava", 10), ("flux", 10)])
def test_damaged_configs(name, count, sound, tmp_path):
    found = trials.run(
        _changed(sound, name, trials.share(count), tmp_path), lambda folder: resolve(str(folder))
    )
    assert found.refused, found


@pytest.fixture
def embedded(sound, tmp_path, monkeypatch):
    """A folder of embedded weights with one model, and its files; the first is the manifest."""
    root = tmp_path / "weights"
    folder = shutil.copytree(sound / "vit", root / "vit")
    manifest.write(root)
    monkeypatch.setenv("MMATTN_WEIGHTS", str(root))
    return [root / manifest.FILE, *sorted(folder.iterdir())]


def test_damaged_embedded_files(embedded):
    """Every byte counts, so whatever is changed is noticed."""
    seeds = [path.read_bytes() for path in embedded]

    def cases():
        for number in range(trials.share(60)):
            dice = random.Random(f"embedded {number}")
            place = dice.randrange(1, len(embedded))
            data = mutator.mutate(seeds[place], seeds, dice)
            if data == seeds[place]:
                continue
            embedded[place].write_bytes(data)
            yield f"embedded {number} {embedded[place].name}", None
            embedded[place].write_bytes(seeds[place])

    load("vit")
    found = trials.run(cases(), lambda _: load("vit"))
    assert found.refused and not found.read, found


def test_damaged_manifests_of_embedded_files(embedded):
    whole = embedded[0].read_bytes()

    def cases():
        for number in range(trials.share(60)):
            dice = random.Random(f"manifest {number}")
            table = json.loads(whole)
            if dice.random() < 0.7:
                table = mutator.mutate_table({"vit": table["vit"]}, dice)
                embedded[0].write_text(json.dumps(table))
            else:
                embedded[0].write_bytes(mutator.mutate(whole, [whole], dice))
            yield f"manifest {number}", None

    def verify(_):
        found = manifest.check("vit")
        if not found.ok:
            raise ModelLoadError("; ".join(found.problems))

    found = trials.run(cases(), verify)
    assert found.refused > 20, found
