"""How much the small vision-language model hallucinates: POPE and CHAIR on fresh scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmattn.evals import chair, pope
from mmattn.mini import objects
from mmattn.mini.vlm import reply, to_images

HELD_OUT_SEED = 10_000
"""Seeds from here on are for judging; training uses smaller ones."""


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    n: int = 300,
    seed: int = HELD_OUT_SEED,
    partner_prob: float = 0.2,
    **generate: Any,
) -> dict[str, Any]:
    """Measure hallucination on `n` fresh scenes: POPE on three splits and CHAIR on the captions.

    Popularity and co-occurrence are counted on scenes of the training world, so that adversarial
    questions are about the partners that habit expects.

    Args:
        model: The model; it is put into evaluation mode.
        processor: Its processor.
        n: Number of scenes.
        seed: Seed of the scenes; training uses seeds below 10 000.
        partner_prob: Chance that an anchor's partner is there. 0.85 is the training world, 0.2 the
            counter-world.
        generate: Passed to `model.generate` for captions and answers.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    scenes = objects.sample_scenes(n, generator, partner_prob)
    habit = objects.sample_scenes(2000, generator)
    images = to_images(objects.render(scenes)[0])
    shuffled = [
        [scene.names[i] for i in torch.randperm(len(scene.names), generator=generator)]
        for scene in scenes
    ]

    def answer(questions: Sequence[pope.Question]) -> list[bool | None]:
        said = reply(
            model,
            processor,
            [images[question.picture] for question in questions],
            [question.text for question in questions],
            **{"max_new_tokens": 2, **generate},
        )
        return [pope.parse_answer(text, "strict") for text in said]

    splits = pope.ask(shuffled, answer, seed=seed, reference=[scene.names for scene in habit])
    captions = reply(model, processor, images, [objects.CAPTION_PROMPT] * n, **generate)
    told = [objects.mentioned(text) for text in captions]
    return {
        "n": n,
        "seed": seed,
        "partner_prob": partner_prob,
        "pope": {split: asdict(result) for split, result in splits.items()},
        "chair": asdict(chair.score(told, [scene.names for scene in scenes])),
    }
