"""One call of a model by kind: draw, film, answer, classify. Seeds belong to items, not to batches."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmattn.errors import ConfigError, MmattnError
from mmattn.loading import Loaded

T2I_SIZE, T2V_SIZE, T2V_FRAMES, TEXT_LENGTH = 64, 48, 17, 16
"""What the embedded models were trained on."""


def _limits(loaded: Loaded) -> dict[str, Any]:
    """Arguments that the embedded pipelines need and others do not."""
    if not loaded.embedded:
        return {}
    if loaded.kind == "t2i":
        return {"height": T2I_SIZE, "width": T2I_SIZE, "max_sequence_length": TEXT_LENGTH}
    return {
        "height": T2V_SIZE,
        "width": T2V_SIZE,
        "num_frames": T2V_FRAMES,
        "max_sequence_length": TEXT_LENGTH,
    }


def guiding(loaded: Loaded, guidance: float | None, negative: str = "") -> dict[str, Any]:
    """How a pipeline is told its guidance scale and what to steer away from.

    FLUX, HunyuanVideo, Qwen-Image and their kin have two scales. ``true_cfg_scale`` is classifier-free
    guidance, and does nothing without a negative prompt, be it an empty one. ``guidance_scale`` is an
    input of models that were distilled with it, such as FLUX.1-dev (``guidance_embeds`` in their config);
    those take a scale that way, unless there is something to steer away from.

    Args:
        loaded: a text-to-image or text-to-video pipeline.
        guidance: the scale; None takes the pipeline's default (3 for the embedded models).
        negative: prompt to steer away from.
    """
    pipe = loaded.target
    known = inspect.signature(type(pipe).__call__).parameters
    scale = 3.0 if guidance is None and loaded.embedded else guidance
    found: dict[str, Any] = {}
    distilled = getattr(
        getattr(getattr(pipe, "transformer", None), "config", None), "guidance_embeds", False
    )
    true = "true_cfg_scale" in known and (bool(negative) or not distilled)
    if scale is not None:
        found["true_cfg_scale" if true else "guidance_scale"] = scale
    if negative or loaded.embedded or "true_cfg_scale" in found:
        found["negative_prompt"] = negative
    return found


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What a pipeline says about values it was given, as ours; its faults pass as they are."""
    try:
        yield
    except MmattnError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name} refuses the call: {error}") from error


@torch.no_grad()
def draw(
    loaded: Loaded,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float | None = None,
    negative: str = "",
    batch: int = 8,
    **extra: Any,
) -> Tensor:
    """Pictures ``[B, 3, Y, X]`` or clips ``[B, 3, T, Y, X]`` in [0, 1], one per prompt.

    Args:
        loaded: a text-to-image or text-to-video pipeline.
        prompts: what to draw.
        seeds: one per prompt; the noise of an item does not depend on its neighbours.
        steps: denoising steps.
        guidance: guidance scale, see `guiding`; None takes the pipeline's default.
        negative: prompt to steer away from.
        batch: items per call.
        extra: further arguments of the pipeline (height, width, num_frames, ...); None is left out.

    Raises:
        ConfigError: when the pipeline does not take an argument, or refuses its value.
    """
    pipe = loaded.target
    known = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in known:
        raise ConfigError(f"{type(pipe).__name__} takes no prompt; name a pipeline that does")
    steering = guiding(loaded, guidance, negative)
    arguments = {
        **_limits(loaded),
        **steering,
        **{k: v for k, v in extra.items() if v is not None},
    }
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{type(pipe).__name__} takes no argument {name!r}; leave it out")
    parts = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
        if "negative_prompt" in steering:
            arguments["negative_prompt"] = [negative] * len(texts)
        # By name: pipelines that also edit pictures have the picture as their first argument.
        with _refusals(type(pipe).__name__):
            result = pipe(
                prompt=texts,
                num_inference_steps=steps,
                generator=generators,
                output_type="pt",
                **arguments,
            )
        films = getattr(result, "frames", None)
        part = result.images if films is None else films.transpose(1, 2)
        parts.append(part.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def answer(
    loaded: Loaded,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 96,
    batch: int = 32,
) -> list[str]:
    """Greedy answers of a vision-language model, one per image and prompt."""
    model, processor = loaded.target, loaded.processor
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        content = [
            [{"type": "image"}, {"type": "text", "text": prompt}] for prompt in prompts[part]
        ]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True
            )
            for turn in content
        ]
        pictures = [image.convert("RGB") for image in images[part]]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [
            text.strip() for text in processor.batch_decode(fresh, skip_special_tokens=True)
        ]
    return answers


def labels_of(loaded: Loaded) -> list[str]:
    """Class names of a classifier; ``class 7`` where the model does not say."""
    model = loaded.target
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names:
        return [names[i] for i in sorted(names)]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    listed = cfg.get("label_names")
    if listed is None and (loaded.embedded or Path(loaded.source).is_dir()):
        from mmattn.mini.manifest import weights_root

        folder = weights_root() / loaded.source if loaded.embedded else Path(loaded.source)
        listed = json.loads((folder / "config.json").read_text("utf-8")).get("label_names")
    if listed:
        return list(listed)
    return [f"class {i}" for i in range(int(getattr(model, "num_classes", 1000)))]


@torch.no_grad()
def logits(loaded: Loaded, pixels: Tensor, *, batch: int = 250) -> Tensor:
    """Class scores ``[B, classes]`` of preprocessed pictures ``[B, 3, Y, X]``."""
    parts = []
    for part in pixels.split(batch):
        out = loaded.target(part.to(next(loaded.target.parameters()).device))
        parts.append(getattr(out, "logits", out).float().cpu())
    return torch.cat(parts)


def preprocess(loaded: Loaded, images: Sequence[Image.Image]) -> Tensor:
    """Pictures as a classifier wants them, ``[B, 3, Y, X]``."""
    pictures = [image.convert("RGB") for image in images]
    if loaded.processor is not None:
        pixels: Tensor = loaded.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(loaded.target), is_training=False)
    return torch.stack([transform(picture) for picture in pictures])
