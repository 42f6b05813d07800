"""Load an embedded model through the stock class of its library."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from mmattn.errors import ConfigError, suggest
from mmattn.mini import manifest


class Vlm(NamedTuple):
    """A vision-language model and the processor that feeds it."""

    model: Any
    processor: Any


def load(name: str, *, device: torch.device | str = "cpu") -> Any:
    """Load one of the embedded models in fp32, ready for inference.

    Args:
        name: ``t2i`` (a `FluxPipeline`), ``t2v`` (a `WanPipeline`), ``vlm`` (a `Vlm` of
            `LlavaForConditionalGeneration` and its processor) or ``vit`` (a timm model).
        device: where to put it.

    Raises:
        ConfigError: for another name.
        ModelLoadError: when the weights are missing or damaged.
    """
    if name not in manifest.NAMES:
        raise ConfigError(
            f"unknown embedded model {name!r}{suggest(name, manifest.NAMES)} "
            f"Choose one of {list(manifest.NAMES)}."
        )
    folder = manifest.require(name)
    if name in ("t2i", "t2v"):
        diffusers = importlib.import_module("diffusers")
        cls = diffusers.FluxPipeline if name == "t2i" else diffusers.WanPipeline
        pipe = cls.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)
    if name == "vlm":
        transformers = importlib.import_module("transformers")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        processor = transformers.LlavaProcessor.from_pretrained(folder, local_files_only=True)
        return Vlm(model.eval().to(device), processor)
    timm = importlib.import_module("timm")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval().to(device)
