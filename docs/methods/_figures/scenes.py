"""Scenes that the language figures share, and captions of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from methods._figures.probe import model
from PIL import Image
from torch import Tensor

import mmattn
from mmattn.batch.writers import to_image
from mmattn.calls import answer
from mmattn.mini import objects

COUNT, SEED, ABSENT = 24, 11, 0.2
SHOWN = 16
"""The scene in docs/methods/scene.png; most of its expected partners are absent."""


@functools.cache
def scenes() -> tuple[Any, ...]:
    """24 scenes in which most expected partners are absent."""
    return tuple(
        objects.sample_scenes(COUNT, torch.Generator().manual_seed(SEED), partner_prob=ABSENT)
    )


@functools.cache
def images() -> tuple[Image.Image, ...]:
    """Their pictures."""
    return tuple(to_image(picture) for picture in objects.render(list(scenes()))[0])


def captions() -> list[str]:
    """Greedy captions of all scenes by whatever is attached now."""
    return answer(model("vlm"), list(images()), [objects.CAPTION_PROMPT] * COUNT)


@functools.cache
def untouched() -> tuple[str, ...]:
    """Captions of the untouched model."""
    return tuple(captions())


def invented(text: str, scene: int) -> list[str]:
    """Objects in a caption that are not in the scene."""
    return [name for name in objects.mentioned(text) if name not in scenes()[scene].names]


def inputs(scene: int) -> Any:
    """Processed prompt for one scene."""
    vlm = model("vlm")
    content = [{"type": "image"}, {"type": "text", "text": objects.CAPTION_PROMPT}]
    text = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return vlm.processor(images=[images()[scene]], text=[text], return_tensors="pt")


@torch.no_grad()
def next_words(scene: int, said: list[int], method: Any) -> Tensor:
    """Probabilities of the token after `said`, ``[V]``; forced, with a cache, as in generation."""
    vlm, ids = model("vlm"), inputs(scene)
    prompt, every = ids["input_ids"].shape[1], range(vlm.target.config.text_config.vocab_size)

    def allowed(_: int, tokens: Tensor) -> list[int]:
        at = len(tokens) - prompt
        return [said[at]] if at < len(said) else list(every)

    def run() -> Tensor:
        out = vlm.target.generate(
            **ids,
            do_sample=False,
            max_new_tokens=len(said) + 1,
            min_new_tokens=len(said) + 1,
            return_dict_in_generate=True,
            output_logits=True,
            prefix_allowed_tokens_fn=allowed,
        )
        return out.logits[-1][0].float().softmax(-1)

    if method is None:
        return run()
    with mmattn.attach(vlm.target, method):
        return run()
