"""What a model folder must satisfy before anything in it is instantiated, and a model once it is loaded.

A folder is data from a stranger. The host libraries catch part of what can be wrong with it: diffusers
only warns about weights that are missing and leaves them random, none of the libraries looks at the
numbers in a config or at NaN in the weights, and timm prefers a pickle to a safetensors file with an
unusual name.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmattn.errors import ModelLoadError

Header = dict[str, tuple[str, list[int]]]
"""What a safetensors file says of its tensors: name -> (dtype, shape)."""

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
HEADER_BYTES = 2**24
"""Largest header of a safetensors file; one of 100,000 tensors has about 12 MB. The format allows 100 MB,
which take more than a gigabyte when they are parsed."""
CONFIG_BYTES = 4 * 2**20
"""Largest config; the one of a classifier with 21,841 named classes has about 1.5 MB."""
DATA_BYTES = 128 * 2**20
"""Largest vocabulary or shard index; the largest published tokenizers have about 35 MB."""
NESTING = 40
LAYERS = 256
"""Layers that a config may always ask for; above, each needs a tensor of its own in the files."""
WIDTH, ENTRIES = 2**15, 2**20
"""Channels, and entries of a vocabulary, that a config may always ask for; above, a tensor has that side."""
FACTOR, LENGTH = 256, 2**16
"""Patch sizes, ratios and extra words, and entries of a table that is computed when a model is built."""
SLACK = 2**26
"""Weights that a config may always ask for, since the defaults of an unused part count as well."""

_COUNTED = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?(layers?|blocks?)|(\w+_)?depths?|\w+coder_layers|layers_per_\w+"
)
_FACTORS = re.compile(r"(\w+_)?(order|mult|ratio|multiplier|patch_size)|extra_ids")
_LISTED = re.compile(r"(\w+_)?(timesteps|seq_len)")
_ENTRIES = re.compile(r"(\w+_)?(vocab_size|num_classes)")
_SIZED = re.compile(
    r"(\w+_)?(hidden_size|intermediate_size|image_size|img_size|channels"
    r"|chans|heads|head|dim|dims|width|d_model|d_ff|d_kv|n_embd)"
)
_WIDE = (
    *("hidden_size", "embed_dim", "d_model", "dim", "width", "hidden_dim", "inner_dim", "n_embd"),
    *("block_out_channels", "latent_channels", "base_dim", "decoder_base_dim", "z_dim"),
)


def read_json(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file, after its size was looked at.

    Raises:
        ModelLoadError: when it is larger than `limit` bytes, nested deeply, or not a JSON object.
    """
    size = path.stat().st_size
    if size > limit:
        raise ModelLoadError(
            f"{path} has {size} bytes; mmattn reads at most {limit} of such a file. "
            "Look at what it holds, or download it again."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelLoadError(f"{path} is nested too deeply to be a config.") from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, found {type(data).__name__}.")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def check_safetensors(path: Path) -> Header:
    """Read the header of a safetensors file and compare it with the file; no weights are read.

    Raises:
        ModelLoadError: when the file is truncated, damaged, or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise ModelLoadError(
                f"{path} is truncated: {size} bytes cannot hold a header. Download it again."
            )
        length = struct.unpack("<Q", head)[0]
        if length > size - 8:
            pointer = head.startswith(b"version ")
            hint = " It is a Git LFS pointer: run 'git lfs pull'." if pointer else ""
            raise ModelLoadError(
                f"{path} is truncated or not a safetensors file: its header claims {length} bytes "
                f"and the file has {size}.{hint or ' Download it again.'}"
            )
        if length > HEADER_BYTES:
            raise ModelLoadError(
                f"{path} claims a header of {length} bytes; mmattn reads at most {HEADER_BYTES}."
            )
        try:
            table = json.loads(stream.read(length), object_pairs_hook=_unique)
            table.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in table.values()]
            header = {
                name: (str(entry["dtype"]), list(entry["shape"])) for name, entry in table.items()
            }
            promised = 8 + length + max(ends, default=0)
            if any(side >= 2**63 for _, shape in header.values() for side in shape):
                # Beside a zero it takes no bytes, and torch has no such number.
                raise ValueError("a side of a tensor has no end")
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ModelLoadError(
                f"{path} has a damaged safetensors header ({error}). Download it again."
            ) from error
    if promised != size:
        raise ModelLoadError(
            f"{path} is {'truncated' if size < promised else 'damaged'}: its header promises "
            f"{promised} bytes and the file has {size}. Download it again."
        )
    try:
        # Offsets that overlap or leave holes, unknown dtypes, shapes that do not fit the bytes.
        with safe_open(str(path), "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} has a damaged safetensors header ({error}). Download it again."
        ) from error
    return header


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, after its links were looked at."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        # The cache of the Hugging Face hub keeps the files of a model beside its snapshots.
        allowed.append(root.parent.parent / "blobs")
    found = []
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            target = path.resolve() if path.is_symlink() else path
            if not any(target.is_relative_to(part) for part in allowed):
                raise ModelLoadError(
                    f"{path} is a link out of the model's folder, to {target}; mmattn does not "
                    "follow it. Copy the file into the folder."
                )
        # A pipe or a device would be read without end.
        found += [Path(place, name) for name in files if Path(place, name).is_file()]
    return sorted(found)


def check_folder(folder: Path) -> Header:
    """Look at every file of a model's folder before anything is instantiated.

    Returns:
        what the safetensors files of the folder hold, keyed by ``folder/name``.

    Raises:
        ModelLoadError: for links and shards outside the folder, damaged weights, pickles that the
            host library would read, and configs that cannot belong to these weights.
    """
    files = _files(folder)
    # All sizes before any file is parsed.
    parsed = {path: read_json(path, _limit(path)) for path in files if _is_config(path)}
    for path in files:
        if path.name.endswith(".safetensors.index.json"):
            _check_shards(path, parsed[path])
        if path.name == "adapter_config.json":
            raise ModelLoadError(
                f"{path} makes this an adapter of another model, which mmattn does not fetch. "
                "Merge it into its model and save that."
            )
    explicit = parsed.get(folder.resolve() / "config.json", {}).get("transformers_weights")
    if explicit is not None and not str(explicit).endswith((".safetensors", ".index.json")):
        raise ModelLoadError(f"{folder}/config.json asks for {explicit}, which is no safetensors.")
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        _refuse_pickles(folder, [path for path in files if path.suffix in UNSAFE])
        raise ModelLoadError(f"{folder} holds no *.safetensors file.")
    tensors: Header = {}
    for path in weights:
        for name, entry in check_safetensors(path).items():
            tensors[f"{path.parent}/{name}"] = entry
    for path, data in parsed.items():
        if not path.name.endswith(".index.json"):
            _check_numbers(path, data, tensors)
    return tensors


def within(tensors: Header, folder: Path) -> Header:
    """The part of `check_folder`'s answer that lies directly in a folder, by the names in the files."""
    prefix = f"{folder.resolve()}/"
    return {key[len(prefix) :]: entry for key, entry in tensors.items() if key.startswith(prefix)}


def _is_config(path: Path) -> bool:
    return path.name.endswith(("config.json", "index.json"))


def _limit(path: Path) -> int:
    return DATA_BYTES if path.name.endswith(".safetensors.index.json") else CONFIG_BYTES


def _check_shards(index: Path, data: dict[str, Any]) -> None:
    table = data.get("weight_map")
    if not isinstance(table, dict):
        raise ModelLoadError(f"{index} has no 'weight_map' that names the shards.")
    for shard in sorted(set(map(str, table.values()))):
        plain = re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain:
            raise ModelLoadError(
                f"{index} names the shard {shard[:200]!r}; a shard is a safetensors file beside "
                "the index."
            )
        if not (index.parent / shard).is_file():
            raise ModelLoadError(f"{index} lists the shard {shard}, which is missing.")


def _refuse_pickles(folder: Path, found: Iterable[Path]) -> None:
    for path in found:
        raise ModelLoadError(
            f"{folder} holds {path.name} but no safetensors that would be used in its place; pickled "
            "weights can run code, so mmattn does not read them. Convert them: load the model in its "
            "own library and call save_pretrained(..., safe_serialization=True)."
        )


def check_pickles(folder: Path, safe: str) -> None:
    """Refuse a folder with pickles and without safetensors files that its library would prefer.

    Args:
        folder: of one model.
        safe: glob of the safetensors files that the library looks for.
    """
    if not any(folder.glob(safe)):
        _refuse_pickles(folder, sorted(p for p in folder.glob("*") if p.suffix in UNSAFE))


def _walk(value: Any, path: Path, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Every object in a parsed JSON value."""
    if depth > NESTING:
        raise ModelLoadError(f"{path} is nested too deeply to be a config.")
    if isinstance(value, dict):
        yield value
    parts = value.values() if isinstance(value, dict) else value
    for part in parts:
        if isinstance(part, (dict, list)):
            yield from _walk(part, path, depth + 1)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [value] if plain else []


def _check_numbers(path: Path, data: dict[str, Any], tensors: Header) -> None:
    """Counts and sizes in a config against the weights that lie beside it."""
    layers = max(LAYERS, len(tensors))
    sizes = [prod(shape) for _, shape in tensors.values()]
    side = max((max(shape, default=1) for _, shape in tensors.values()), default=1)
    limits = (
        *((_COUNTED, layers), (_FACTORS, FACTOR), (_LISTED, LENGTH)),
        *((_ENTRIES, max(ENTRIES, side)), (_SIZED, max(WIDTH, side))),
    )
    for table in list(_walk(data, path)):
        deepest = 1.0
        for key, value in table.items():
            known, most = next((pair for pair in limits if pair[0].fullmatch(key)), (None, 0))
            if known is None:
                continue
            low, high = min(_numbers(value), default=0), max(_numbers(value), default=0)
            if not high <= most or (low < 0 and known is not _FACTORS):
                asked = high if low >= 0 or not high <= most else low
                raise ModelLoadError(
                    f"{path} asks for {key} = {asked}, which no model has that these weights fit "
                    f"({len(tensors)} tensors, {sum(sizes)} weights in all)."
                )
            if known is _COUNTED:
                deepest = max(deepest, high)
        widest = max(max(_numbers(table.get(key)), default=0) for key in _WIDE)
        heads, each = table.get("num_attention_heads"), table.get("attention_head_dim")
        if isinstance(heads, int) and isinstance(each, int):
            widest = max(widest, heads * each)
        # A layer of attention has four matrices of width x width; more than that is the file's part.
        if deepest * widest**2 > SLACK + 16 * sum(sizes):
            raise ModelLoadError(
                f"{path} asks for {deepest:.0f} layers of width {widest}, far more than the "
                f"{sum(sizes)} weights that lie beside it."
            )


def components(folder: Path, index: Mapping[str, Any]) -> dict[str, type]:
    """The classes of a pipeline's models by component, and only those of diffusers and transformers.

    Raises:
        ModelLoadError: when model_index.json names another module, or a component's weights are
            pickles.
    """
    diffusers = importlib.import_module("diffusers")
    transformers = importlib.import_module("transformers")
    pipelines = importlib.import_module("diffusers.pipelines")
    inside = {module.name for module in pkgutil.iter_modules(pipelines.__path__)}
    models: dict[str, type] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not entry or not any(isinstance(e, str) for e in entry):
            continue
        library, kind = entry if len(entry) == 2 else (None, None)
        words = all(isinstance(word, str) and word.isidentifier() for word in (name, library, kind))
        found: Any = None
        if words and (library in ("diffusers", "transformers") or library in inside):
            home = (
                library
                if library in ("diffusers", "transformers")
                else f"{pipelines.__name__}.{library}"
            )
            found = getattr(importlib.import_module(home), str(kind), None)
        known = isinstance(found, type) and found.__module__.split(".")[0] in (
            "diffusers",
            "transformers",
        )
        if not known:
            raise ModelLoadError(
                f"{folder / 'model_index.json'} names {entry!r} for {name!r}, which is no class of "
                "diffusers or transformers; mmattn imports nothing else. Load the pipeline yourself "
                "and pass the object to mmattn.attach."
            )
        if issubclass(found, (diffusers.ModelMixin, transformers.PreTrainedModel)):
            part, ours = folder / name, issubclass(found, diffusers.ModelMixin)
            check_pickles(part, f"{'diffusion_pytorch_model' if ours else 'model'}*.safetensors")
            if not any(part.glob("*.safetensors")):
                check_pickles(folder, "model.safetensors")
                raise ModelLoadError(f"{part} holds no *.safetensors file.")
            models[name] = found
    return models


def check_weights(source: str, model: torch.nn.Module, tensors: Header | None = None) -> None:
    """Refuse a loaded model with NaN or infinite weights, or numbers stored as another kind.

    Args:
        source: named in the error.
        model: as loaded; each weight is read once.
        tensors: header of its files, by the names of the model's own weights.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    real = {name for name, tensor in state.items() if tensor.is_floating_point()}
    # transformers renames some weights on the way; their last word and shape stay.
    alike = {(name.rpartition(".")[2], *state[name].shape) for name in real}
    for name, (kind, shape) in (tensors or {}).items():
        fits = name in real or (name.rpartition(".")[2], *shape) in alike
        if fits and not kind.startswith(("F", "BF")):
            raise ModelLoadError(
                f"{source} stores {name} as {kind}, and the model has real numbers there. "
                "Download it again."
            )
    for name in sorted(real):
        tensor = state[name]
        # A sum in fp32 is one quick pass; only what it doubts is looked at in full. A mask kept as
        # a buffer may hold -inf.
        if torch.isfinite(tensor.sum(dtype=torch.float32)):
            continue
        bad = ~torch.isfinite(tensor.float()) if name in parameters else torch.isnan(tensor)
        if bad.any():
            raise ModelLoadError(
                f"{source} has {int(bad.sum())} weights in {name} that are NaN or infinite as "
                f"{tensor.dtype}. Download it again, or ask for another dtype."
            )
