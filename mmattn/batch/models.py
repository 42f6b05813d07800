"""The models that serve the rows of a job, their fingerprints, and their loading on first use."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmattn.batch.cells import KINDS
from mmattn.batch.items import digest, sentence
from mmattn.batch.limits import sha256_of
from mmattn.errors import ConfigError, ModelLoadError, suggest
from mmattn.mini import manifest

if TYPE_CHECKING:
    from mmattn.loading import Loaded


def kind_of_source(source: str, kind: str | None = None) -> str:
    """What a named model does, told from its name or its config; no weights are read.

    Raises:
        ConfigError: when that cannot be told, or the model makes nothing that a row can ask for.
    """
    if source in manifest.NAMES:
        found = source
    elif (folder := Path(source).expanduser()).is_dir():
        found = _kind_of_folder(folder, source)
    elif kind is None:
        raise ConfigError(
            f"{source!r} is neither an embedded model nor a folder here; for a hub id say what it is: "
            f"--kind {'|'.join(dict.fromkeys(KINDS.values()))}"
        )
    else:
        found = kind
    if found not in KINDS.values():
        hint = suggest(found, KINDS.values())
        raise ConfigError(
            f"{source} is of kind {found}; a batch is made by {sorted(set(KINDS.values()))}{hint}"
        )
    return found


def _kind_of_folder(folder: Path, source: str) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        config = folder / "config.json"
        if not config.is_file():
            raise ConfigError(f"{source} has neither model_index.json nor config.json")
        data = json.loads(config.read_text("utf-8"))
        names = data.get("architectures") or [""]
        classifier = names[0].endswith("ForImageClassification") or "architecture" in data
        return "vit" if classifier else "vlm"
    name = json.loads(index.read_text("utf-8")).get("_class_name")
    pipeline = getattr(importlib.import_module("diffusers"), str(name), None)
    if pipeline is None:
        raise ConfigError(f"{source}: diffusers here has no pipeline {name!r}")
    return "t2v" if "num_frames" in inspect.signature(pipeline.__call__).parameters else "t2i"


@dataclass(frozen=True)
class Source:
    """One model.

    Args:
        name: embedded name, folder or hub id.
        kind: what it does.
        device, dtype: where and in which type it runs; embedded models are always in float32.
    """

    name: str
    kind: str
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def embedded(self) -> bool:
        """Whether it comes with the package."""
        return self.name in manifest.NAMES

    def load(self) -> Loaded:
        """The model itself.

        Raises:
            ModelLoadError: when it cannot be loaded.
        """
        import torch

        from mmattn.loading import resolve

        return resolve(self.name, self.kind, device=self.device, dtype=getattr(torch, self.dtype))

    def files(self) -> dict[str, str]:
        """SHA-256 of its files by name. A hub id is looked up in the local cache.

        Raises:
            ConfigError: when its files are not on this machine yet.
        """
        if self.embedded:
            manifest.require(self.name)
            listed = manifest.read().get(self.name)
            if listed:
                return {path: entry["sha256"] for path, entry in listed.items()}
            folder = manifest.weights_root() / self.name
        else:
            folder = Path(self.name).expanduser()
            if not folder.is_dir():
                folder = self._snapshot()
        names = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(names)}

    def _snapshot(self) -> Path:
        hub = importlib.import_module("huggingface_hub")
        try:
            return Path(hub.snapshot_download(self.name, local_files_only=True))
        except Exception as error:
            raise ConfigError(
                f"{self.name!r} is not in the local cache of the Hugging Face hub; fetch it once with: "
                f"hf download {self.name}"
            ) from error

    def fingerprint(self, files: Mapping[str, str] | None = None) -> str:
        """Changes with any byte of the model, and with its type and kind of device."""
        dtype = "float32" if self.embedded else self.dtype
        device = self.device.partition(":")[0]
        return digest([sorted((self.files() if files is None else files).items()), dtype, device])


class Models:
    """The model for each kind of row, loaded when the first row needs it.

    Args:
        sources: by kind of row.
        load: makes a model from a source; tests replace it.

    Attributes:
        offloaded: the sources whose models wait in main memory for their turn.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        load: Callable[[Source], Loaded] = Source.load,
    ) -> None:
        self.sources = dict(sources)
        self._load = load
        self._loaded: dict[tuple[Source, bool], Loaded] = {}
        self.offloaded: set[Source] = set()

    @staticmethod
    def named(
        names: Sequence[str] | None,
        kind: str | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> Models:
        """The models a user named; the embedded ones where none was.

        Raises:
            ConfigError: when two serve the same kind, or one serves none.
        """
        sources: dict[str, Source] = {}
        for name in names or dict.fromkeys(KINDS.values()):
            found = kind_of_source(name, kind)
            for row_kind, model_kind in KINDS.items():
                if model_kind != found:
                    continue
                if row_kind in sources:
                    raise ConfigError(
                        f"{sources[row_kind].name} and {name} both make {row_kind}s; name one of them"
                    )
                sources[row_kind] = Source(name, found, device, dtype)
        return Models(sources)

    @property
    def default_kind(self) -> str:
        """What a row asks for that does not say."""
        return next(iter(self.sources), "image")

    @property
    def kinds(self) -> dict[str, bool]:
        """The kinds of rows that can be served, and whether by an embedded model."""
        return {kind: source.embedded for kind, source in self.sources.items()}

    def files(self, kinds: Sequence[str]) -> dict[str, dict[str, str]]:
        """SHA-256 of every file of the models for `kinds`, by model; every model is read once."""
        wanted = dict.fromkeys(self.sources[kind] for kind in kinds)
        return {source.name: source.files() for source in wanted}

    def fingerprints(
        self, kinds: Sequence[str], files: Mapping[str, Mapping[str, str]] | None = None
    ) -> dict[str, str]:
        """By kind of row.

        Args:
            kinds: kinds of rows.
            files: what `files` returned for them.
        """
        known = self.files(kinds) if files is None else files
        return {k: self.sources[k].fingerprint(known[self.sources[k].name]) for k in kinds}

    def get(self, kind: str, *, from_image: bool = False) -> Loaded:
        """The model for rows of a kind.

        Args:
            kind: of the rows.
            from_image: the form of a text-to-image pipeline that starts from a picture.

        Raises:
            ConfigError: when the pipeline has no such form.
            ModelLoadError: when it cannot be loaded.
        """
        source = self.sources[kind]
        loaded = self._loaded.get((source, False))
        if loaded is None:
            loaded = self._loaded[source, False] = self._fitting(kind, source)
        if not from_image:
            return loaded
        known = inspect.signature(type(loaded.target).__call__).parameters
        if "image" in known:
            return loaded
        if (source, True) not in self._loaded:
            self._loaded[source, True] = _from_image(loaded, kind)
        return self._loaded[source, True]

    def _fitting(self, kind: str, source: Source) -> Loaded:
        from mmattn.batch.guards import free_memory, is_memory

        try:
            return self._load(source)
        except Exception as error:
            if not is_memory(error):
                raise
            too_large = error.with_traceback(None)
        free_memory()
        if self.offload(kind) is not None:
            raise too_large
        return self._loaded[source, False]

    def offload(self, kind: str) -> str | None:
        """Keep the parts of a pipeline in main memory, and on its device only the one that runs.

        It stays so: to undo it takes the memory that was short. A pipeline that did not fit when it was
        loaded is loaded into main memory.

        Args:
            kind: of the rows that it serves.

        Returns:
            Why that cannot be done, or None.

        Raises:
            ModelLoadError: when the pipeline cannot be loaded.
        """
        import torch

        from mmattn.batch.guards import offload

        source = self.sources[kind]
        device = torch.device(source.device)
        if device.type == "cpu":
            return "the model runs in main memory already"
        if source.kind not in ("t2i", "t2v"):
            return "only pipelines of diffusers can be"
        loaded = self._loaded.get((source, False))
        if loaded is None:
            try:
                loaded = self._load(replace(source, device="cpu"))
            except ModelLoadError:
                raise
            except Exception as error:
                return sentence(error)
        reason = offload(loaded.target, device)
        if reason is None:
            # Another form of the pipeline shares its parts, and with them the hooks that move them.
            self._loaded[source, False] = loaded
            self.offloaded.add(source)
        return reason


def _from_image(loaded: Loaded, kind: str) -> Loaded:
    name = type(loaded.target).__name__
    if kind != "image":
        raise ConfigError(f"{name} does not start from a picture; name an image-to-video model")
    auto: Any = importlib.import_module("diffusers").AutoPipelineForImage2Image
    try:
        pipe = auto.from_pipe(loaded.target)
    except ValueError as error:
        raise ConfigError(f"diffusers has no image-to-image form of {name}") from error
    pipe.set_progress_bar_config(disable=True)
    return replace(loaded, target=pipe)
