"""Where words of a prompt sit in the text a denoiser attends to, and maps of the attention they get."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.layout import Grid
from mmattn.methods._weights import column_weights
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.methods.base import Method
    from mmattn.session import Session

Places = tuple[tuple[int, ...], ...]
"""Text positions of every concept of one prompt."""


def word_places(pipe: Any, prompt: str, words: Sequence[str]) -> Places:
    """Text positions of every word or phrase in `words`, in the text that `pipe`'s denoiser attends to.

    Known texts: CLIP tokens (Stable Diffusion, SDXL), T5 tokens (FLUX, PixArt, Wan, ...), and Stable
    Diffusion 3's CLIP tokens with T5 tokens after them, where a word has places in both.

    Raises:
        ConfigError: for a word that the prompt does not have, and for other tokenizers.
    """
    found: list[tuple[int, ...]] = []
    streams = _streams(pipe)
    for word in words:
        spot = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        if spot is None:
            raise ConfigError(
                f"the prompt {prompt!r} does not have the word {word!r}; name words as the prompt does"
            )
        places: list[int] = []
        for tokenizer, offset, length in streams:
            told = tokenizer(
                prompt, return_offsets_mapping=True, truncation=True, max_length=length
            )
            places += [
                offset + i
                for i, (start, stop) in enumerate(told["offset_mapping"])
                if start < spot.end() and stop > spot.start() and prompt[start:stop].strip()
            ]
        if not places:
            raise ConfigError(
                f"the word {word!r} lies beyond the {streams[0][2]} tokens that the model reads of "
                f"{prompt!r}; shorten the prompt"
            )
        found.append(tuple(places))
    return tuple(found)


def _streams(pipe: Any) -> list[tuple[Any, int, int]]:
    """Tokenizers whose tokens are attended to, with their first position and their length."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    streams: list[Any] = [getattr(pipe, name, None) for name in names]
    first, second, third = streams
    if third is not None:
        clip = first.model_max_length
        return [(first, 0, clip), (third, clip, third.model_max_length)]
    chosen = second if "T5" in type(second).__name__ else first
    if not re.search(r"CLIP|T5", type(chosen).__name__) or not getattr(chosen, "is_fast", False):
        raise ConfigError(
            f"words cannot be found in the text of a {type(chosen).__name__} (the fast CLIP and T5 "
            "tokenizers are known); give text positions with tokens="
        )
    return [(chosen, 0, chosen.model_max_length)]


@dataclass
class Watch:
    """What the sites of one forward are to record, and what they recorded.

    Args:
        places: per row, the text positions of every concept; as many concepts in every row.
        rows: the rows of the batch that they belong to.
        over: ``"text"``: shares among the text keys; ``"keys"``: among all keys of the call.
    """

    places: Sequence[Places]
    rows: slice
    over: str
    found: list[tuple[Grid, torch.Tensor]] = field(default_factory=list)

    def record(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
    ) -> None:
        """Keep the maps ``[rows, concepts, N]`` of one attention call, with their gradient."""
        layout, keys = site.layout, k.shape[2]
        grid, image = layout.grid_for(q.shape[2]), layout.image_slice(q.shape[2])
        text = list(range(keys))
        if site.kind == "joint":
            pixels = layout.image_slice(keys)
            text = text[: pixels.start] + text[pixels.stop :]
        used = sorted({place for row in self.places for concept in row for place in concept})
        if used[-1] >= len(text):
            raise UnsupportedCall(
                f"There is no text token {used[-1]} at {site.path}; this call has {len(text)}."
            )
        q, k = q[self.rows], k[self.rows]
        if mask is not None and mask.shape[0] > 1:
            mask = mask[self.rows]
        columns = [text[place] for place in used]
        if self.over == "text" and len(text) < keys:
            k, columns = k[:, :, text], used
            mask = None if mask is None else mask[..., text]
        weights: torch.Tensor = checkpoint(
            column_weights,
            q,
            k,
            image,
            columns,
            use_reentrant=False,
            preserve_rng_state=False,
            mask=mask,
            causal=False,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            per_head=False,
        )[:, 0]
        index = {place: i for i, place in enumerate(used)}
        rows = [
            torch.stack([row[[index[place] for place in concept]].mean(0) for concept in concepts])
            for row, concepts in zip(weights, self.places, strict=True)
        ]
        self.found.append((grid, torch.stack(rows)))

    def maps(self, resolution: int, *, pyramid: bool) -> torch.Tensor:
        """The mean of what was recorded, ``[rows, concepts, T, Y, X]``.

        Args:
            resolution: most tokens a side. Of a pyramid's maps, those of the largest grid that fits are
                averaged; maps of a single larger grid are averaged down to it.
            pyramid: whether the model is a UNet.

        Raises:
            UnsupportedCall: when no map of a pyramid is that small.
        """
        found, self.found = self.found, []
        grids = {grid for grid, _ in found}
        if pyramid:
            small = [grid for grid in grids if max(grid[1:]) <= resolution]
            if not small:
                sides = sorted(max(grid[1:]) for grid in grids)
                raise UnsupportedCall(
                    f"No cross-attention map has at most resolution={resolution} tokens a side; the "
                    f"sides here are {sides}. Raise resolution to one of them."
                )
            best = max(small, key=lambda grid: grid[1] * grid[2])
            found = [(grid, maps) for grid, maps in found if grid == best]
        grid = found[0][0]
        stacked = torch.stack([maps for _, maps in found])
        mean: torch.Tensor = stacked.mean(0).unflatten(-1, grid)
        side = max(grid[1:])
        if side <= resolution:
            return mean
        size = tuple(max(1, round(n * resolution / side)) for n in grid[1:])
        pooled = F.interpolate(mean.flatten(0, 2)[:, None], size, mode="area")
        return pooled.reshape(*mean.shape[:3], *size)


def memories(session: Session, cls: type[Method]) -> list[dict[str, Any]]:
    """What the sites of a method share in the running model call, one mapping per root that has any."""
    slot = next(i for i, method in enumerate(session.plan.methods) if isinstance(method, cls))
    found = []
    for run in session.runs:
        site = next((s for s in run.sites if any(n == slot for n, _ in s.attention)), None)
        if site is not None:
            site.slot = slot
            found.append(run.shared_of(site))
    return found
