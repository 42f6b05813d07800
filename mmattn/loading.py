"""Turn what a user names (an embedded model, a folder, a hub id) into a model that can be attached to.

Only safetensors are read and no code that comes with a model is ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmattn import _model_checks as checks
from mmattn.errors import ConfigError, MissingExtraError, ModelLoadError, suggest
from mmattn.mini.manifest import NAMES

KINDS: tuple[str, ...] = NAMES
"""What a model does: text-to-image, text-to-video, vision-language, classification."""


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


def _folder(
    folder: Path,
    kind: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    source: str,
) -> Loaded:
    index, config = folder / "model_index.json", folder / "config.json"
    pipeline = index.is_file()
    if not pipeline and not config.is_file():
        raise ModelLoadError(
            f"{folder} has neither model_index.json (diffusers) nor config.json (transformers, timm)."
        )
    tensors = checks.check_folder(folder)
    data = checks.read_json(index if pipeline else config)
    if isinstance(data.get("_class_name"), list) or "auto_map" in data:
        raise ModelLoadError(
            f"{folder} brings its own Python code, which mmattn does not run. Load it yourself and "
            "pass the object to mmattn.attach."
        )
    if pipeline:
        loaded = _pipeline(folder, data, device, dtype, tensors)
    else:
        # What each library prefers to a pickle: timm this one name, transformers also shards.
        timm = "architecture" in data and "model_type" not in data
        checks.check_pickles(folder, "model.safetensors" if timm else "model*.safetensors")
        reader = _timm if timm else _transformers
        loaded = reader(str(folder), kind, device, dtype, local=True)
        own = checks.within(tensors, folder)
        checks.check_weights(source, loaded.target, own)
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
        diffusers = importlib.import_module("diffusers")
        with _plain_errors(source, local=False):
            fetched = diffusers.DiffusionPipeline.download(
                source, use_safetensors=True, trust_remote_code=False
            )
        return _folder(Path(fetched), kind, device, dtype, source)
    if kind == "vlm":
        loaded = _transformers(source, kind, device, dtype, local=False)
    else:
        timm = importlib.import_module("timm")
        named = source.startswith(("timm/", "hf_hub:", "hf-hub:")) or timm.is_model(source)
        reader = _timm if named else _transformers
        loaded = reader(source, kind, device, dtype, local=False)
    checks.check_weights(source, loaded.target)
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


def _check_keys(source: str, model: torch.nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model that was not filled by its weights, or not by all of them.

    Args:
        source: named in the error.
        model: as loaded.
        info: what ``from_pretrained(..., output_loading_info=True)`` returned beside it.
    """
    state = model.state_dict(keep_vars=True)
    absent = set(info["missing_keys"])
    filled = {id(tensor) for key, tensor in state.items() if key not in absent}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    problems = {
        # A tied weight is missing by one of its names only.
        "missing": [
            key
            for key in sorted(absent)
            if id(state.get(key)) not in filled and not any(re.search(p, key) for p in optional)
        ],
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "unreadable": [str(message) for message in info["error_msgs"]],
    }
    for what, keys in problems.items():
        if keys:
            raise ModelLoadError(
                f"{source} does not fit its config: {len(keys)} {what} weights, first {keys[0]}. "
                f"A {type(model).__name__} without them would be partly random. Use the config and "
                "the weights of the same model."
            )


def _pipeline(
    folder: Path,
    index: dict[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    tensors: checks.Header,
) -> Loaded:
    diffusers = importlib.import_module("diffusers")
    common = {"use_safetensors": True, "local_files_only": True}
    models = {}
    # Each model by itself, since a pipeline does not say which weights were missing.
    for name, cls in checks.components(folder, index).items():
        part = folder / name
        ours = issubclass(cls, diffusers.ModelMixin)
        named = {"torch_dtype" if ours else "dtype": dtype}
        with _plain_errors(str(part), local=True):
            model, info = cls.from_pretrained(  # type: ignore[attr-defined]
                part, output_loading_info=True, **named, **common
            )
        _check_keys(str(part), model, info)
        checks.check_weights(str(part), model, checks.within(tensors, part))
        models[name] = model
    with _plain_errors(str(folder), local=True):
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, trust_remote_code=False, **models, **common
        )
    pipe.set_progress_bar_config(disable=True)
    films = "num_frames" in inspect.signature(type(pipe).__call__).parameters
    return Loaded("t2v" if films else "t2i", pipe.to(device), None, str(folder))


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
            model, info = transformers.AutoModelForImageClassification.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **common,
            )
            processor = transformers.AutoImageProcessor.from_pretrained(source, **common)
        else:
            model, info = transformers.AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **common,
            )
            processor = transformers.AutoProcessor.from_pretrained(source, **common)
    _check_keys(source, model, info)
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
    if model.num_classes != model.pretrained_cfg["num_classes"]:
        # timm then leaves the classifier random and says nothing.
        raise ModelLoadError(
            f"{source} does not fit its config: its weights have "
            f"{model.pretrained_cfg['num_classes']} classes and its model_args ask for "
            f"{model.num_classes}."
        )
    return Loaded("vit", model.to(dtype).eval().to(device), None, source)
