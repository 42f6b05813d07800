"""The models of a running demo: loaded at start-up, and used by one visitor at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from mmattn.errors import ConfigError
from mmattn.loading import KINDS, Loaded, resolve


class Models:
    """One model per kind: the embedded ones, or those that the owner of the demo named.

    All are loaded here: mistakes show at start-up, and no library is imported by two visitors at once,
    which lazy modules do not survive.

    Args:
        folders: model folders (safetensors, local); each takes the place of the embedded model of its
            kind.
        device: where models go.

    Attributes:
        lock: held while a model is in use. The queue of the page already runs one job at a time; this
            covers the end of a job whose visitor left.

    Raises:
        ConfigError: for two folders of one kind.
        ModelLoadError: for a folder without a model that can be read.
    """

    def __init__(self, folders: Sequence[str | Path] = (), device: str = "cpu") -> None:
        self.lock = threading.Lock()
        self._loaded: dict[str, Loaded] = {}
        for folder in folders:
            path = Path(folder).expanduser()
            if not path.is_dir():
                raise ConfigError(
                    f"--model takes a folder with a model in it; {folder} is none. The embedded models "
                    "need no option."
                )
            found = resolve(str(path), device=device)
            if found.kind in self._loaded:
                raise ConfigError(f"two models of kind {found.kind}; give --model one of each kind")
            # Visitors see the folder's name in the code of a result, never where it lies.
            shown = Loaded(found.kind, found.target, found.processor, path.resolve().name)
            self._loaded[found.kind] = shown
        for kind in KINDS:
            if kind not in self._loaded:
                self._loaded[kind] = resolve(kind, device=device)

    def get(self, kind: str) -> Loaded:
        """The model of `kind`."""
        return self._loaded[kind]

    def embedded(self, kind: str) -> bool:
        """Whether the model of `kind` is an embedded one."""
        return self._loaded[kind].embedded


def parameters_on(loaded: Loaded) -> torch.device:
    """Where a model lives."""
    target = loaded.target
    if isinstance(target, torch.nn.Module):
        return next(target.parameters()).device
    modules = [part for part in target.components.values() if isinstance(part, torch.nn.Module)]
    return next(modules[0].parameters()).device
