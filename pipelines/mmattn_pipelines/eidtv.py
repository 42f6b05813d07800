"""EIDT-V: text to video from a text-to-image pipeline, through its step callback alone.

```python
video = EIDTV(pipe, ClipSeg(model, processor))
out = video(
    ["a red ball on the left of a lawn", "a red ball on the right of a lawn"],
    changes=[["red ball"]],
    num_inference_steps=20,
)
out.frames  # [T, 3, Y, X] in [0, 1]
```
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

import mmattn

Detector = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""A picture ``[3, Y, X]`` in [0, 1] and n texts -> n maps ``[n, h, w]``, high where a text applies.

The scale of a map does not matter, only which of its places are higher.
"""


@dataclass(frozen=True)
class EIDTVOutput:
    """Frames, and how free each was to leave its anchor.

    Args:
        frames: ``[T, 3, Y, X]`` in [0, 1].
        latents: ``[T, ...]`` final latents of every frame.
        changes: ``[T - 1, h, w]`` change maps in [0, 1] on the latent grid; 1 changes from the start.
        free: ``[T - 1, steps]`` share of the latents that each step left free.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    changes: torch.Tensor
    free: torch.Tensor


class EIDTV:
    """Draws frames with any text-to-image pipeline, so that only what changes between prompts changes.

    A frame follows the trajectory of the frame before it, its anchor, until a switch time of its own at
    every place, and then the trajectory of its own prompt. The switch time comes from a *change map* M in
    [0, 1]: the texts of what changes are looked up in the anchor picture, each map is scaled to [0, 1]
    and raised to `falloff`, and the strongest counts. After the step at time t of T, latents where
    ``t > T M`` are replaced by the anchor's final latents at the noise level of the next step. "EIDT-V:
    Exploiting Intersections in Diffusion Trajectories for Model-Agnostic, Zero-Shot, Training-Free
    Text-to-Video Generation", arXiv 2504.06861.

    The paper has a language model write frame prompts and their differences, and CLIPSeg find them. Here
    the caller gives prompts (or a function that writes them) and differences (by default the words that the
    prompt before does not have), and any detector finds them (`ClipSeg` wraps the published one).
    Deviations from the published code: a map is scaled by its own range and not column by column; a constant
    map is 0 instead of NaN; the last replacement is without noise for every scheduler; latents may be
    packed (FLUX). Compared in the tests with the formula in a loop over places, and measured against
    independent frames and against equal seeds in docs/attention-guidance.md.

    Args:
        pipe: a text-to-image pipeline with ``callback_on_step_end``.
        detector: finds the texts of a change in a picture.
        falloff: exponent of the scaled maps, above 0; higher keeps more of the anchor.
        batch_size: frames drawn from one anchor; the next anchor is the last of them.
        anchor: ``"previous"``: the last frame of the batch before; ``"first"``: frame 0 for all.
        same_noise: every frame starts from the same noise; otherwise from noise of its own.

    Raises:
        ConfigError: settings out of range, or a pipeline without ``callback_on_step_end``.
    """

    def __init__(
        self,
        pipe: Any,
        detector: Detector,
        *,
        falloff: float = 2.0,
        batch_size: int = 2,
        anchor: str = "previous",
        same_noise: bool = False,
    ) -> None:
        if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
            raise mmattn.ConfigError(
                f"{type(pipe).__name__} has no callback_on_step_end, through which EIDT-V works; "
                "choose a pipeline that has it"
            )
        if falloff <= 0 or batch_size < 1:
            raise mmattn.ConfigError(
                f"falloff must be above 0 and batch_size at least 1, got {falloff} and {batch_size}"
            )
        if anchor not in ("previous", "first"):
            raise mmattn.ConfigError(f"anchor must be 'previous' or 'first', got {anchor!r}")
        self.pipe, self.detector = pipe, detector
        self.falloff, self.batch_size, self.anchor = falloff, batch_size, anchor
        self.same_noise = same_noise

    def __call__(
        self,
        prompts: Sequence[str] | str,
        *,
        changes: Sequence[Sequence[str]] | None = None,
        frames: int | None = None,
        writer: Callable[[str, int], Sequence[str]] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> EIDTVOutput:
        """Draw a clip.

        Args:
            prompts: one prompt per frame; or one prompt, of which `writer` makes `frames` prompts.
            changes: for every frame but the first, what changes from the frame before. None: the words
                that the prompt before does not have.
            frames: how many frames `writer` is asked for.
            writer: a function (a language model, say) of a prompt and a number of frames.
            seed: of all noise; the global generator is not touched.
            kwargs: for the pipeline, except prompt, generator, output_type and the callback.

        Raises:
            ConfigError: one prompt without `writer`, a wrong number of prompts or changes, or an argument
                that EIDT-V sets itself.
            UnsupportedCall: latents that are neither pictures nor packed pictures.
        """
        written = _written(prompts, frames, writer)
        if changes is None:
            changes = [new_words(a, b) for a, b in pairwise(written)]
        if len(changes) != len(written) - 1:
            raise mmattn.ConfigError(
                f"{len(written)} frames have {len(written) - 1} changes between them, got {len(changes)}"
            )
        for name in ("prompt", "generator", "output_type", "return_dict", "callback_on_step_end"):
            if name in kwargs:
                raise mmattn.ConfigError(f"EIDT-V sets {name} itself; leave it out")
        noise = torch.Generator().manual_seed(seed + 1_000_003)
        pictures, latents, maps, free = [], [], [], []
        first = self._draw(written[:1], [seed], None, kwargs)
        pictures.append(first[0])
        latents.append(first[1])
        for start in range(1, len(written), self.batch_size):
            stop = min(start + self.batch_size, len(written))
            at = -1 if self.anchor == "previous" else 0
            picture, held = pictures[at][-1:], latents[at][-1:]
            found = torch.stack(
                [self.change_map(picture[0], texts) for texts in changes[start - 1 : stop - 1]]
            )
            blend = _Blend(self.pipe.scheduler, found, held, noise)
            seeds = [seed if self.same_noise else seed + i for i in range(start, stop)]
            drawn, final = self._draw(written[start:stop], seeds, blend, kwargs)
            pictures.append(drawn)
            latents.append(final)
            maps.append(blend.changes.cpu())
            free.append(torch.stack(blend.free, 1))
        none = first[1].new_zeros(0, 1, 1)
        return EIDTVOutput(
            torch.cat(pictures),
            torch.cat(latents),
            torch.cat(maps) if maps else none,
            torch.cat(free) if free else none[..., 0],
        )

    def change_map(self, picture: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """``M [h, w]`` in [0, 1] at the detector's size; 0 everywhere without texts."""
        if not texts:
            return picture.new_zeros(picture.shape[1:])
        scores = self.detector(picture, texts).float()
        flat = scores.flatten(1)
        low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
        scaled = (scores - low) / torch.where(high > low, high - low, torch.ones_like(high))
        return (scaled**self.falloff).amax(0)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        blend: _Blend | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures and final latents of some frames."""
        final: list[torch.Tensor] = []

        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last = i == len(pipe.scheduler.timesteps) - 1
            if blend is not None:
                tensors["latents"] = blend(tensors["latents"], i, t, last=last)
            if last:
                final.append(tensors["latents"].clone())
            return tensors

        listed = {
            name: [value] * len(prompts)
            for name, value in kwargs.items()
            if "negative_prompt" in name and isinstance(value, str)
        }
        pictures = self.pipe(
            list(prompts),
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="pt",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
            **{**kwargs, **listed},
        ).images
        return pictures.float().cpu(), final[0]


class _Blend:
    """The replacement after every step: own latents where they are free, the anchor's elsewhere."""

    def __init__(
        self, scheduler: Any, maps: torch.Tensor, anchor: torch.Tensor, generator: torch.Generator
    ) -> None:
        self.scheduler, self.anchor, self.generator = scheduler, anchor, generator
        self.total = scheduler.config.num_train_timesteps
        grid = latent_grid(anchor, maps.shape[-2] / maps.shape[-1])
        resized = F.interpolate(maps[:, None], grid, mode="bilinear", antialias=True)
        self.changes = resized[:, 0].clamp(0, 1)
        placed = self.changes[:, None].to(anchor.device)
        self.maps = placed if anchor.ndim == 4 else placed.flatten(2).transpose(1, 2)
        self.free: list[torch.Tensor] = []

    def __call__(self, latents: torch.Tensor, i: int, t: Any, *, last: bool) -> torch.Tensor:
        own = float(t) <= self.total * self.maps
        self.free.append(own.float().flatten(1).mean(1).cpu())
        # Drawn in every step, so that the noise of a step does not depend on the number of steps left.
        noise = torch.randn(self.anchor.shape, generator=self.generator).to(self.anchor)
        held = self.anchor if last else self._noised(noise, self.scheduler.timesteps[i + 1])
        return torch.where(own, latents, held.to(latents.dtype))

    def _noised(self, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The anchor at time `t`."""
        if hasattr(self.scheduler, "scale_noise"):
            flow: torch.Tensor = self.scheduler.scale_noise(self.anchor, t[None], noise)
            return flow
        added: torch.Tensor = self.scheduler.add_noise(self.anchor, noise, t[None])
        return added


class ClipSeg:
    """The published detector: logits of a `CLIPSegForImageSegmentation` for every text.

    Args:
        model: the model, in evaluation mode.
        processor: its `CLIPSegProcessor`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, picture: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """``[3, Y, X]`` in [0, 1] -> ``[n, h, w]``."""
        inputs = self.processor(
            text=list(texts),
            images=[picture] * len(texts),
            padding=True,
            return_tensors="pt",
            do_rescale=False,
        )
        logits: torch.Tensor = self.model(**inputs.to(self.model.device)).logits
        return logits.reshape(len(texts), *logits.shape[-2:]).cpu()


def new_words(before: str, after: str) -> list[str]:
    """Words of `after` that `before` does not have, in order."""
    known = set(re.findall(r"\w+", before.lower()))
    return [w for w in dict.fromkeys(re.findall(r"\w+", after.lower())) if w not in known]


def latent_grid(latents: torch.Tensor, aspect: float) -> tuple[int, int]:
    """Rows and columns of latents ``[B, C, Y, X]``, or packed ``[B, N, C]`` of pictures `aspect` high.

    Args:
        aspect: height over width of the pictures.

    Raises:
        UnsupportedCall: for other shapes, and packed latents that are no such rectangle.
    """
    if latents.ndim == 4:
        return latents.shape[2], latents.shape[3]
    if latents.ndim == 3:
        rows = round(sqrt(latents.shape[1] * aspect))
        if rows and latents.shape[1] % rows == 0:
            return rows, latents.shape[1] // rows
    raise mmattn.UnsupportedCall(
        f"EIDT-V needs latents [B, C, Y, X] or packed ones [B, N, C] of pictures {aspect:.2f} times as "
        f"high as wide, got {list(latents.shape)}."
    )


def _written(
    prompts: Sequence[str] | str,
    frames: int | None,
    writer: Callable[[str, int], Sequence[str]] | None,
) -> list[str]:
    if not isinstance(prompts, str):
        if not prompts:
            raise mmattn.ConfigError("prompts is empty; give one prompt per frame")
        return list(prompts)
    if writer is None or frames is None:
        raise mmattn.ConfigError(
            "one prompt makes no clip by itself; give a prompt per frame, or frames= and writer="
        )
    made = list(writer(prompts, frames))
    if len(made) != frames:
        raise mmattn.ConfigError(f"writer was asked for {frames} prompts and returned {len(made)}")
    return made
