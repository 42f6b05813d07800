"""A caption of its own for every panel: encoded one by one, joined into one text sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import (
    Flux2KleinPipeline,
    FluxFillPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from mmattn.errors import ConfigError

_LIMITS = ("max_sequence_length", "clean_caption", "text_encoder_out_layers", "clip_skip")
_KNOWN = (
    FluxPipeline,
    FluxFillPipeline,
    Flux2KleinPipeline,
    StableDiffusion3Pipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)


def reads_panels(pipe: Any) -> bool:
    """Whether every panel of a canvas can have a caption of its own."""
    return isinstance(pipe, _KNOWN)


def joined_prompts(pipe: Any, captions: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call that give it one piece of text per panel, all equally long.

    Args:
        captions: one per panel.
        arguments: what else the pipeline is called with. Its negative prompt is encoded once and
            repeated for every panel, and taken out, as is everything that encoding uses up.

    What a model knows of the text besides its tokens (the pooled vector of Flux and SD3) exists once per
    canvas: it is the mean over the captions.

    Raises:
        ConfigError: for a pipeline whose way of encoding text is not known here.
    """
    if not reads_panels(pipe):
        raise ConfigError(
            f"a caption per panel needs to know how {type(pipe).__name__} encodes text, and only "
            f"{', '.join(kind.__name__ for kind in _KNOWN)} are known; give one SetCaption for all panels"
        )
    n, prompts = len(captions), list(captions)
    used = {name: arguments[name] for name in _LIMITS if name in arguments}
    negative = arguments.pop("negative_prompt", None)
    if isinstance(pipe, FluxPipeline | FluxFillPipeline):
        embeds, pooled, _ = pipe.encode_prompt(prompts, None, **used)
        found = {
            "prompt_embeds": _row(embeds),
            "pooled_prompt_embeds": pooled.mean(0, keepdim=True),
        }
        if negative is not None:
            embeds, pooled, _ = pipe.encode_prompt([negative], None, **used)
            found["negative_prompt_embeds"] = embeds.repeat(1, n, 1)
            found["negative_pooled_prompt_embeds"] = pooled
    elif isinstance(pipe, Flux2KleinPipeline):
        embeds, _ = pipe.encode_prompt(prompts, **used)
        empty, _ = pipe.encode_prompt([negative or ""], **used)
        found = {"prompt_embeds": _row(embeds), "negative_prompt_embeds": empty.repeat(1, n, 1)}
    elif isinstance(pipe, StableDiffusion3Pipeline):
        embeds, empty, pooled, no_pooled = pipe.encode_prompt(
            prompts, None, None, negative_prompt=[negative or ""] * n, **used
        )
        found = {
            "prompt_embeds": _row(embeds),
            "negative_prompt_embeds": _row(empty),
            "pooled_prompt_embeds": pooled.mean(0, keepdim=True),
            "negative_pooled_prompt_embeds": no_pooled[:1],
        }
    else:
        used.setdefault("clean_caption", False)
        embeds, mask, empty, no_mask = pipe.encode_prompt(
            prompts, negative_prompt=[negative or ""] * n, **used
        )
        found = {
            "prompt_embeds": _row(embeds),
            "prompt_attention_mask": mask.flatten()[None],
            "negative_prompt_embeds": _row(empty),
            "negative_prompt_attention_mask": no_mask.flatten()[None],
            "negative_prompt": None,  # the default "" would clash with its embedding
        }
    return found


def _row(embeds: Tensor) -> Tensor:
    """``[n, L, C]`` -> ``[1, n * L, C]``."""
    return embeds.flatten(0, 1)[None]
