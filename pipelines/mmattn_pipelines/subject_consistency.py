"""IR-Diffusion on whole diffusers pipelines: rehearse subjects and scene, then draw them together.

```python
drawn = SubjectConsistency(pipe, IsolationReposition())(
    ["a red circle", "a blue square"], "a circle left of a square", words=["circle", "square"]
)
drawn.scene, drawn.references
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

import mmattn
from mmattn.methods._regions import boxed
from mmattn.methods._word_maps import memories, word_places
from mmattn.methods.isolation_reposition import IsolationReposition

Segmenter = Callable[[torch.Tensor, str], torch.Tensor]
"""A picture ``[3, Y, X]`` in [0, 1] and the words of a subject -> its mask ``[Y, X]``, bool."""


@dataclass(frozen=True)
class ConsistentScene:
    """What `SubjectConsistency` draws; pictures are ``[3, Y, X]`` in [0, 1].

    Args:
        scene: the scene, with the subjects of the references.
        references: ``[n, 3, Y, X]``.
        rehearsal: the scene as drawn alone.
        sources, targets: ``[n, Y, X]`` bool: where subjects are in their reference and in the rehearsal.
    """

    scene: torch.Tensor
    references: torch.Tensor
    rehearsal: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor


class SubjectConsistency:
    """Draws a scene whose subjects look as they do in pictures of their own.

    All pictures are drawn once without any change (the rehearsal: rows of a batch do not depend on each
    other), subjects are found in them, and then all are drawn again from the same noise with
    `mmattn.IsolationReposition`. "Improving Multi-Subject Consistency in Open-Domain Image Generation with
    Isolation and Reposition Attention", arXiv 2411.19261. Not done as published: the bottom sixth of a
    source mask is kept, and a scene in which a subject is not found is not drawn again.

    Args:
        pipe: a text-to-image pipeline.
        method: what to do in the joint run; its boxes, where it has some, take the place of masks.
        segment: finds a subject in a picture. None: the attention its words get in the rehearsal, the mean
            over steps and over sites of `depth`, scaled to [0, 1]; a reference's subject is where that is
            above one half, and a scene's where, besides, no other subject's is higher.
        depth: joint attention only: shares of the depth between which attention is read.
    """

    def __init__(
        self,
        pipe: Any,
        method: IsolationReposition,
        *,
        segment: Segmenter | None = None,
        depth: tuple[float, float] = (0.25, 0.75),
    ) -> None:
        self.pipe, self.method, self.segment, self.depth = pipe, method, segment, depth

    def __call__(
        self,
        subjects: Sequence[str],
        scene: str,
        *,
        words: Sequence[str],
        seed: int = 0,
        **kwargs: Any,
    ) -> ConsistentScene:
        """Draw n references and the scene.

        Args:
            subjects: one prompt per subject.
            scene: the prompt of the scene.
            words: the words of each subject, in its prompt and in the scene's.
            seed: of the noise; reference i starts from seed + i, the scene from seed + n.
            kwargs: for the pipeline, except prompt, generator and output_type.

        Raises:
            ConfigError: not one word per subject, or a word that a prompt does not have.
            NoSiteError, UnsupportedCall: as `mmattn.IsolationReposition`.
        """
        n = len(subjects)
        if n == 0 or len(words) != n:
            raise mmattn.ConfigError(
                f"every subject needs its words: got {n} subjects and {len(words)} words"
            )
        prompts = [*subjects, scene]
        arguments = dict(kwargs)
        for name, value in kwargs.items():
            if "negative_prompt" in name and isinstance(value, str):
                arguments[name] = [value] * (n + 1)
        if self.method.sources:
            pictures, found = self._draw(prompts, seed, arguments), None
        elif self.segment is not None:
            pictures = self._draw(prompts, seed, arguments)
            found = (
                torch.stack([self.segment(pictures[i], words[i]) for i in range(n)]),
                torch.stack([self.segment(pictures[n], word) for word in words]),
            )
        else:
            pictures, found = self._rehearse(prompts, words, seed, arguments)
        with mmattn.attach(self.pipe, self.method) as session:
            give = functools.partial(_hand_out, session, found)
            hooks = [run.root.module.register_forward_pre_hook(give) for run in session.runs]
            try:
                drawn = self._draw(prompts, seed, arguments)
            finally:
                for hook in hooks:
                    hook.remove()
        size = pictures.shape[-2:]
        sources, targets = self._boxes(size) if found is None else found
        return ConsistentScene(drawn[n], drawn[:n], pictures[n], sources, targets)

    def _draw(self, prompts: Sequence[str], seed: int, arguments: dict[str, Any]) -> torch.Tensor:
        pictures: torch.Tensor = self.pipe(
            list(prompts),
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            output_type="pt",
            **arguments,
        ).images
        return pictures.float().cpu()

    def _boxes(self, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        grid = (int(size[0]), int(size[1]))
        return boxed(self.method.sources, grid), boxed(self.method.targets, grid)

    def _rehearse(
        self, prompts: Sequence[str], words: Sequence[str], seed: int, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Pictures, and masks from the attention that words get."""
        n = len(words)
        own = [word_places(self.pipe, prompts[i], [words[i]])[0] for i in range(n)]
        shared = word_places(self.pipe, prompts[n], words)
        tokens = tuple(sorted({t for places in (*own, *shared) for t in places}))
        maps = mmattn.AttentionMaps(tokens=tokens)
        chosen = [
            row.site.path
            for row in mmattn.plan(self.pipe, maps).rows
            if row.methods and _reads_text(row.site, self.depth)
        ]
        with mmattn.attach(self.pipe, maps, sites=chosen) as session:
            pictures = self._draw(prompts, seed, arguments)
            found = maps.maps(session)
        size = (pictures.shape[-2], pictures.shape[-1])
        rows = max(one.row for one in found) + 1
        first = rows - n - 1  # guidance in one batch: the second half is the prompts'

        def mean(row: int, places: Sequence[int]) -> torch.Tensor:
            parts = [
                one.values
                for one in found
                if one.row == first + row and one.token in places and one.branch == 0
            ]
            grid = max(tuple(part.shape[1:]) for part in parts)
            total = sum(_scaled_to(part[0], grid) for part in parts)
            assert isinstance(total, torch.Tensor)
            soft = _scaled_to(total, size)
            return (soft - soft.min()) / (soft.max() - soft.min()).clamp_min(1e-12)

        sources = torch.stack([mean(i, own[i]) > 0.5 for i in range(n)])
        soft = torch.stack([mean(n, places) for places in shared])
        targets = (soft > 0.5) & (soft >= soft.amax(0))
        return pictures, (sources, targets)


def _reads_text(site: mmattn.Site, depth: tuple[float, float]) -> bool:
    if site.kind == "cross":
        return True
    return site.kind == "joint" and depth[0] <= (site.index + 0.5) / site.depth < depth[1]


def _scaled_to(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0]


def _hand_out(
    session: mmattn.Session, found: tuple[torch.Tensor, torch.Tensor] | None, *call: Any
) -> None:
    """Masks for the model call that begins; boxes are in the method's settings."""
    if found is not None:
        for memory in memories(session, IsolationReposition):
            memory["masks"] = found
