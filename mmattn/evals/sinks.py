"""Where a vision-language model's attention rests while it answers: first token, image, sinks, drift.

    python -m mmattn.evals.sinks --model vlm --scenes 48

Methods that move attention away from sinks, or back to the image, need a model that has sinks or that
drifts. This says whether it does, before anything is attached.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

STRETCH = 8
"""Words of the answer that make one point of the drift curve."""

OUT = 4.0
"""From how many root mean squares on an image token stands out; a Gaussian state of size 128 does by chance
in one token of 120."""


@dataclass(frozen=True)
class Sinks:
    """What one model does on a set of pictures; all shares are means over the words of its answers.

    Args:
        first: ``[L][H]``, share of attention on the first token of the prompt.
        image: ``[L][H]``, share on the image tokens.
        image_sinks: ``[L][H]``, the part of that on image tokens that stand out by more than `OUT`.
        drift: ``[L][S]``, share on the image, mean over heads, for words 0 to 7, 8 to 15, ...
        massive: ``[L]``, largest activation of any token over the median activation, in the states that
            enter each block.
        standing_out: ``[L]``, largest activation of the first token in root mean squares of its own state;
            at most the square root of the hidden size. A Gaussian state of size 128 has 3.
        image_standing_out: ``[L]``, share of image tokens that stand out so.
        words: mean length of the answers.
    """

    first: list[list[float]]
    image: list[list[float]]
    image_sinks: list[list[float]]
    drift: list[list[float]]
    massive: list[float]
    standing_out: list[float]
    image_standing_out: list[float]
    words: float

    def sink_heads(self, share: float = 0.3) -> float:
        """Share of heads with at least `share` of their attention on the first token and image sinks."""
        resting = [
            first + image
            for a, b in zip(self.first, self.image_sinks, strict=True)
            for first, image in zip(a, b, strict=True)
        ]
        return _mean([float(head >= share) for head in resting])

    def fall(self) -> float:
        """Share on the image at the end of the answers over the share at their beginning, all layers."""
        return _mean([layer[-1] for layer in self.drift]) / _mean([x[0] for x in self.drift])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def probe(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    *,
    max_new_tokens: int = 96,
) -> Sinks:
    """Let the model answer greedily, and look at the attention of every word that it wrote.

    Attention is read with the ``eager`` implementation, ``[B, H, N, N]`` per layer: for small models. The
    model is put back to the implementation it had.

    Args:
        model: a LLaVA-like model of transformers, one image per prompt, image tokens in `input_ids`.
        processor: its processor with a chat template.
        images: pictures, one answer each, in one batch.
        prompt: what is asked about every picture.
        max_new_tokens: longest answer.
    """
    message = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
    ]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(images=list(images), text=[text] * len(images), return_tensors="pt")
    inputs = inputs.to(model.device)
    start = inputs["input_ids"].shape[1]
    training = model.training
    before = model.config.get_text_config()._attn_implementation
    model.eval()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    model.set_attn_implementation("eager")
    try:
        out = model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"],
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    shown = ids[0] == model.config.image_token_id
    # The query before a word is the one that chose it.
    spoken = (ids[:, start:] != model.generation_config.pad_token_id).double()
    first, image, resting, drift, massive, outstanding, image_outstanding = ([] for _ in range(7))
    for attention, state in zip(out.attentions, out.hidden_states, strict=False):
        rows = attention[:, :, start - 1 : -1].double()
        on_image = rows[..., shown].sum(-1)
        first.append(_share(rows[..., 0], spoken))
        image.append(_share(on_image, spoken))
        drift.append(_curve(on_image.mean(1), spoken))
        sizes = state.abs()
        massive.append((sizes.amax() / sizes.median()).item())
        own = sizes / state.square().mean(-1, keepdim=True).sqrt()
        outstanding.append(own[:, 0].amax().item())
        sinks = (own.amax(-1) > OUT) & shown
        image_outstanding.append(sinks[:, shown].double().mean().item())
        resting.append(_share((rows * sinks[:, None, None]).sum(-1), spoken))
    return Sinks(
        first=first,
        image=image,
        image_sinks=resting,
        drift=drift,
        massive=massive,
        standing_out=outstanding,
        image_standing_out=image_outstanding,
        words=spoken.sum(1).mean().item(),
    )


def _share(mass: torch.Tensor, spoken: torch.Tensor) -> list[float]:
    """Mean of ``[B, H, T]`` over the words that were spoken ``[B, T]``, per head."""
    total = (mass * spoken[:, None]).sum((0, 2)) / spoken.sum()
    shares: list[float] = total.tolist()
    return shares


def _curve(mass: torch.Tensor, spoken: torch.Tensor) -> list[float]:
    """Mean of ``[B, T]`` in stretches of the answer that at least half of the answers reach."""
    points = []
    for at in range(0, spoken.shape[1], STRETCH):
        own = spoken[:, at : at + STRETCH]
        if at and own.mean() < 0.5:
            break
        points.append(((mass[:, at : at + STRETCH] * own).sum() / own.sum()).item())
    return points


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    from mmattn.evals._protocol import world
    from mmattn.loading import resolve
    from mmattn.mini.objects import CAPTION_PROMPT

    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--model", default="vlm", help="vlm, or a folder")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything here")
    given = parser.parse_args(arguments)
    loaded = resolve(given.model)
    drawn = world(given.scenes, given.seed)
    found = probe(loaded.target, loaded.processor, drawn.images, CAPTION_PROMPT)
    lines = ["layer: first token, per head | image, per head | its sinks | image over the answer"]
    columns = (found.first, found.image, found.image_sinks, found.drift)
    for layer, rows in enumerate(zip(*columns, strict=True)):
        shares = [" ".join(f"{x:.2f}" for x in row) for row in rows]
        lines.append(f"{layer:5}: " + " | ".join(shares))
    lines += [
        f"{found.words:.1f} words; {100 * found.sink_heads():.0f} % of heads have 30 % or more on sinks",
        f"share on the image at the end over the beginning: {found.fall():.2f}",
        "largest over median activation: " + "  ".join(f"{x:.0f}" for x in found.massive),
        "first token stands out by:      " + "  ".join(f"{x:.1f}" for x in found.standing_out),
        "image tokens that stand out:    "
        + "  ".join(f"{100 * x:.0f} %" for x in found.image_standing_out),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if given.json:
        given.json.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
