"""How a step of a plan reaches a model: what draws, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.chatdit_plan import NUMBER_WORDS
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout

Caption = SetCaption | str | Sequence[str]
"""What is drawn: one caption for all panels, or one for each, or the text of the only panel."""

CaptionStyle = Callable[[PanelLayout, str, tuple[str, ...]], Caption]
"""What a generator is told, from the layout, what the panels share, and a clause for every panel."""


class SetGenerator(Protocol):
    """What draws sets of pictures; `InContextPipeline` and `GroupGenerator` do."""

    def __call__(
        self,
        caption: Any,
        *,
        layout: PanelLayout,
        references: Sequence[Image.Image],
        generator: torch.Generator,
        **options: Any,
    ) -> Any:
        """Draw a set whose first pictures are `references`; ``.images`` are all of them, in order."""
        ...


def set_captions(layout: PanelLayout, overall: str, panels: tuple[str, ...]) -> Caption:
    """One caption that marks its panels, as In-Context LoRAs read it; a single panel is its clause alone."""
    if len(panels) == 1:
        return panels[0]
    tag = f"{NUMBER_WORDS[len(panels) - 1]}-PANEL"
    return SetCaption.for_layout(layout, tag, overall, panels)


@dataclass(frozen=True)
class GroupGenerator:
    """Draws the pictures of a step as a group, rows of one batch, in place of panels of one canvas.

    For models that know one size only, and for those that were trained on groups ("Group Diffusion
    Transformers are Unsupervised Multitask Learners", arXiv 2410.15027). The caption style must give a
    caption for every picture.

    Args:
        pipe: draws the groups.
        visibility: ``group``: pictures see each other; ``isolated``: they do not, so that what is given
            reaches what is drawn through its description alone. Other values as `PanelAttention` has them.
    """

    pipe: InContextPipeline
    visibility: str = "group"

    def __call__(
        self,
        caption: Sequence[str],
        *,
        layout: PanelLayout,
        references: Sequence[Image.Image],
        generator: torch.Generator,
        **options: Any,
    ) -> Any:
        """Draw a group; `layout` says how large its pictures are."""
        if layout.count == 1:
            return self.pipe(caption[0], layout=layout, generator=generator, **options)
        return self.pipe.group(
            caption,
            size=(layout.panel_height, layout.panel_width),
            references=references,
            visibility=self.visibility,
            generator=generator,
            **options,
        )
