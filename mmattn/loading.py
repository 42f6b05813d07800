"""Turn what a user names (an embedded model, a folder, a hub id) into a model that can be attached to.

Only safetensors are read and no code that comes with a model is ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmattn.errors import ConfigError, MissingExtraError, ModelLoadError, suggest
from mmattn.mini.manifest import NAMES

KINDS: tuple[str, ...] = NAMES
"""What a model does: text-to-image, text-to-video, vision-language, classification."""

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class Loaded:
    """A model, ready for inference.

    Args:
        kind: one of `KINDS`.
        target: what `mmattn.attach` takes: a pipeline or a model.
        processor: image processor and tokenizer of a vision-language model, or the image processor
            of a transformers classifier; None otherwise.
        source: what the user named.
        embedded: whether it is one of the embedded models.
    """

    kind: str
    target: Any
    processor: Any = None
    source: str = ""
    embedded: bool = False


def resolve(
    source: str,
    kind: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load a model by name.

    Args:
        source: ``t2i``, ``t2v``, ``vlm`` or ``vit`` for an embedded model; a folder in the layout of
            diffusers, transformers or timm; a hub id; or ``open_clip:ARCHITECTURE`` for an untrained
            open_clip model, to look at its sites.
        kind: one of `KINDS`. A folder tells its own; a hub id needs it.
        device: where to put it.
        dtype: parameter type of models that are not embedded.

    Raises:
        ConfigError: for an unknown kind, or a hub id without one.
        ModelLoadError: when it cannot be found, is damaged, is not safetensors, or brings its own code.
        MissingExtraError: for an open_clip model without open_clip.
    """
    if source.startswith("open_clip:"):
        return _open_clip(source, device, dtype)
    if kind is not None and kind not in KINDS:
        raise ConfigError(
            f"unknown kind {kind!r}{suggest(kind, KINDS)} Choose one of {list(KINDS)}."
        )
    if source in NAMES:
        return _embedded(source, kind, device)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _folder(folder, kind, device, dtype, source)
    if folder.exists():
        raise ModelLoadError(
            f"{source} is a file; name the folder that holds the model's config and weights."
        )
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local:
        raise ModelLoadError(f"There is no model folder at {source}.")
    if "/" not in source and kind is None:
        raise ModelLoadError(
            f"{source!r} is not an embedded model{suggest(source, NAMES)} and there is no such "
            f"folder here. Embedded: {list(NAMES)}. For a hub id give --kind as well."
        )
    return _hub(source, kind, device, dtype)


def _embedded(name: str, kind: str | None, device: torch.device | str) -> Loaded:
    from mmattn import mini

    if kind not in (None, name):
        raise ConfigError(f"the embedded model {name!r} is of kind {name}, not {kind}")
    model = mini.load(name, device=device)
    if name == "vlm":
        return Loaded(name, model.model, model.processor, name, embedded=True)
    return Loaded(name, model, None, name, embedded=True)


def _open_clip(source: str, device: torch.device | str, dtype: torch.dtype) -> Loaded:
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise MissingExtraError(source, "open-clip-torch", "clip") from error
    name = source.partition(":")[2]
    known = open_clip.list_models()
    if name not in known:
        raise ModelLoadError(
            f"open_clip has no architecture {name!r}{suggest(name, known)} "
            "open_clip.list_models() names them all."
        )
    model = open_clip.create_model(name, device=device).to(dtype).eval()
    return Loaded("clip", model, None, source)


def check_safetensors(path: Path) -> None:
    """Read the header of a safetensors file and compare it with the file's size.

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
        try:
            table = json.loads(stream.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path} has a damaged safetensors header ({error}). Download it again."
            ) from error
    promised = 8 + length + max(ends, default=0)
    if promised != size:
        raise ModelLoadError(
            f"{path} is {'truncated' if size < promised else 'damaged'}: its header promises "
            f"{promised} bytes and the file has {size}. Download it again."
        )


def _check_folder(folder: Path) -> None:
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        unsafe = sorted(p.name for p in folder.rglob("*") if p.suffix in _UNSAFE)
        if unsafe:
            raise ModelLoadError(
                f"{folder} holds {unsafe[0]} but no safetensors; pickled weights can run code, so "
                "mmattn does not read them. Convert them: load the model in its own library and call "
                "save_pretrained(..., safe_serialization=True)."
            )
        raise ModelLoadError(f"{folder} holds no *.safetensors file.")
    for path in weights:
        check_safetensors(path)
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        for shard in sorted(set(_json(index).get("weight_map", {}).values())):
            if not (index.parent / shard).is_file():
                raise ModelLoadError(f"{index} lists the shard {shard}, which is missing.")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, found {type(data).__name__}.")
    return data


def _folder(
    folder: Path,
    kind: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    source: str,
) -> Loaded:
    index, config = folder / "model_index.json", folder / "config.json"
    if index.is_file():
        data = _json(index)
        own_code = isinstance(data.get("_class_name"), list)
        reader = _pipeline
    elif config.is_file():
        data = _json(config)
        own_code = "auto_map" in data
        reader = _timm if "architecture" in data and "model_type" not in data else _transformers
    else:
        raise ModelLoadError(
            f"{folder} has neither model_index.json (diffusers) nor config.json (transformers, timm)."
        )
    if own_code:
        raise ModelLoadError(
            f"{folder} brings its own Python code, which mmattn does not run. Load it yourself and "
            "pass the object to mmattn.attach."
        )
    _check_folder(folder)
    loaded = reader(str(folder), kind, device, dtype, local=True)
    if kind not in (None, loaded.kind):
        raise ConfigError(f"{source} is a model of kind {loaded.kind}, not {kind}")
    return Loaded(loaded.kind, loaded.target, loaded.processor, source)


def _hub(source: str, kind: str | None, device: torch.device | str, dtype: torch.dtype) -> Loaded:
    if kind is None:
        raise ConfigError(
            f"{source!r} is not a folder here; to load it from the hub say what it is: "
            f"--kind {'|'.join(KINDS)}"
        )
    if kind in ("t2i", "t2v"):
        loaded = _pipeline(source, kind, device, dtype, local=False)
    elif kind == "vlm":
        loaded = _transformers(source, kind, device, dtype, local=False)
    else:
        timm = importlib.import_module("timm")
        named = source.startswith(("timm/", "hf_hub:", "hf-hub:")) or timm.is_model(source)
        reader = _timm if named else _transformers
        loaded = reader(source, kind, device, dtype, local=False)
    return Loaded(loaded.kind, loaded.target, loaded.processor, source)


@contextlib.contextmanager
def _plain_errors(source: str, local: bool) -> Iterator[None]:
    """Library errors while loading, as one sentence each."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise ModelLoadError(f"{source} could not be loaded: {first}") from error
        raise ModelLoadError(
            f"{source!r} could not be loaded from the Hugging Face hub; without a network it must be "
            f"in the local cache, or be a folder with safetensors. The hub client said: {first}"
        ) from error


def _pipeline(
    source: str,
    kind: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    local: bool,
) -> Loaded:
    diffusers = importlib.import_module("diffusers")
    with _plain_errors(source, local):
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source,
            torch_dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
        )
    pipe.set_progress_bar_config(disable=True)
    films = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    return Loaded("t2v" if films else "t2i", pipe.to(device), None, source)


def _transformers(
    source: str,
    kind: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    local: bool,
) -> Loaded:
    transformers = importlib.import_module("transformers")
    common = {"local_files_only": local, "trust_remote_code": False}
    with _plain_errors(source, local):
        if kind is None:
            config = transformers.AutoConfig.from_pretrained(source, **common)
            classes = getattr(config, "architectures", None) or [""]
            kind = "vit" if classes[0].endswith("ForImageClassification") else "vlm"
        if kind == "vit":
            model = transformers.AutoModelForImageClassification.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **common
            )
            processor = transformers.AutoImageProcessor.from_pretrained(source, **common)
        else:
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **common
            )
            processor = transformers.AutoProcessor.from_pretrained(source, **common)
    return Loaded(kind, model.eval().to(device), processor, source)


def _timm(
    source: str,
    kind: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    local: bool,
) -> Loaded:
    timm = importlib.import_module("timm")
    name = source
    if local:
        name = f"local-dir:{source}"
    elif source.startswith("timm/"):
        name = f"hf-hub:{source}"
    with _plain_errors(source, local):
        model = timm.create_model(name, pretrained=True)
    return Loaded("vit", model.to(dtype).eval().to(device), None, source)
