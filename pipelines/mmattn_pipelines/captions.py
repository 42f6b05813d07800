"""Captions of image sets: one paragraph that names the task, what is shared, and every panel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from mmattn.errors import ConfigError
from mmattn_pipelines.panels import PanelLayout

T5_TOKENS = 512
"""Tokens that FLUX and SD3 pipelines read at most (their ``max_sequence_length``)."""

_NAME = r"[A-Z0-9]+(?:-[A-Z0-9]+)*"
_MARKER = re.compile(rf"\[({_NAME})\]")
_ENTITY = re.compile(r"<([^<>\[\]\s][^<>\[\]]*)>")
_JOINT = re.compile(r"(?:[\s;,]|(?<![\w-])and(?=[\s;,]*$))+$")
_PLACES = {
    (1, 2): ("LEFT", "RIGHT"),
    (2, 1): ("TOP", "BOTTOM"),
    (2, 2): ("TOP-LEFT", "TOP-RIGHT", "BOTTOM-LEFT", "BOTTOM-RIGHT"),
}


@dataclass(frozen=True)
class SetCaption:
    """The caption of a set of pictures, in the form that In-Context LoRAs are trained on.

    ``[TASK-TAG] what all panels share, [MARKER] the first panel; [MARKER] the second panel``, in one
    paragraph. Somebody who appears in several panels has an invented name in angle brackets, ``<Mira>``,
    in all of them. Markers are ordinary words to the model. "In-Context LoRA for Diffusion Transformers",
    arXiv 2410.23775.

    Args:
        tag: name of the task, in capitals, digits and hyphens, with or without the square brackets.
        overall: what the panels have in common and how they relate; may be empty.
        panels: a clause for every panel, in reading order; given pictures are described as well.
        markers: what stands before every clause, in capitals, digits and hyphens, with or without the
            brackets; None: ``SCENE-1``, ``SCENE-2`` and so on.

    Spaces, commas, semicolons and an "and" at the end of a clause are what joins clauses, and are taken
    off, so that ``SetCaption.parse(caption.text) == caption``.

    Raises:
        ConfigError: no panel; an empty clause; a tag or marker that is not in capitals; another number of
            markers than of panels; a marker given twice; a line break; a marker inside a clause.
    """

    tag: str
    overall: str
    panels: tuple[str, ...]
    markers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Bring all parts into their one form and check them."""
        if isinstance(self.panels, str):
            raise ConfigError(f"panels is a clause for every panel, got the text {self.panels!r}")
        panels = tuple(_clause(f"panel {i}", text) for i, text in enumerate(self.panels, 1))
        if not panels:
            raise ConfigError("a caption of a set needs a clause for at least one panel")
        for number, text in enumerate(panels, 1):
            if not text:
                raise ConfigError(
                    f"panel {number} of {len(panels)} has an empty clause; every panel is described, "
                    "given pictures too"
                )
        given = self.markers
        if given is None:
            given = tuple(f"SCENE-{i}" for i in range(1, len(panels) + 1))
        markers = tuple(_name("marker", marker) for marker in given)
        if len(markers) != len(panels):
            raise ConfigError(
                f"{len(panels)} panels need as many markers, got {len(markers)}: {list(markers)}"
            )
        if len({*markers, tag := _name("tag", self.tag)}) <= len(markers):
            raise ConfigError(
                f"every marker stands once and differs from the tag, got [{tag}] and {list(markers)}"
            )
        object.__setattr__(self, "tag", tag)
        object.__setattr__(self, "overall", _clause("overall", self.overall))
        object.__setattr__(self, "panels", panels)
        object.__setattr__(self, "markers", markers)

    @classmethod
    def for_layout(
        cls,
        layout: PanelLayout,
        tag: str,
        overall: str,
        panels: Sequence[str],
        *,
        tokenizer: Any = None,
        limit: int = T5_TOKENS,
    ) -> Self:
        """A caption whose markers say where its panels are.

        Two panels side by side are LEFT and RIGHT, two stacked ones TOP and BOTTOM, 2 x 2 panels
        TOP-LEFT to BOTTOM-RIGHT; panels of any other arrangement are SCENE-1, SCENE-2 and so on.

        Args:
            tokenizer: of the text encoder that reads the caption; given, the length is checked.
            limit: tokens that encoder reads.

        Raises:
            ConfigError: another number of clauses than of panels, a caption that is too long, or what
                `SetCaption` refuses.
        """
        if len(panels) != layout.count:
            raise ConfigError(
                f"a layout of {layout.rows} x {layout.cols} panels needs {layout.count} clauses, "
                f"got {len(panels)}"
            )
        caption = cls(tag, overall, tuple(panels), _PLACES.get((layout.rows, layout.cols)))
        if tokenizer is not None:
            caption.check_length(tokenizer, limit)
        return caption

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a caption: the tag comes first, and every later ``[MARKER]`` begins a panel.

        Raises:
            ConfigError: no tag at the beginning, no panel, or what `SetCaption` refuses.
        """
        if "\n" in text or "\r" in text:
            raise ConfigError("a caption is one paragraph without line breaks, this one has some")
        found = list(_MARKER.finditer(text))
        if not found or text[: found[0].start()].strip():
            raise ConfigError(
                "a caption begins with its tag in square brackets and capitals, such as "
                f"[MOVIE-SHOTS]; this one begins with {text[:24]!r}"
            )
        if len(found) == 1:
            raise ConfigError(
                f"the caption has the tag [{found[0][1]}] and no panel; mark panels in square brackets "
                "and capitals, such as [SCENE-1]"
            )
        ends = [mark.start() for mark in found[1:]] + [len(text)]
        parts = [text[mark.end() : end] for mark, end in zip(found, ends, strict=True)]
        return cls(found[0][1], parts[0], tuple(parts[1:]), tuple(mark[1] for mark in found[1:]))

    @property
    def text(self) -> str:
        """The caption as one paragraph."""
        assert self.markers is not None
        said = f"[{self.tag}]"
        if self.overall:
            said += f" {self.overall}" + ("" if self.overall[-1] in ".:!?" else ",")
        for number, (marker, panel) in enumerate(zip(self.markers, self.panels, strict=True)):
            joint = ";" if number and said[-1] not in ".!?" else ""
            said += f"{joint} [{marker}] {panel}"
        return said

    @property
    def entities(self) -> tuple[str, ...]:
        """Names in angle brackets, without them, in the order in which they first appear."""
        return tuple(dict.fromkeys(_ENTITY.findall(self.text)))

    def check_length(self, tokenizer: Any, limit: int = T5_TOKENS) -> int:
        """How many tokens the caption has for a tokenizer of transformers, special ones included.

        Raises:
            ConfigError: there are more than `limit`; the encoder would drop the last panels in silence.
        """
        count = len(tokenizer(self.text, truncation=False, verbose=False).input_ids)
        if count > limit:
            raise ConfigError(
                f"the caption has {count} tokens and the text encoder reads {limit}, so the last panels "
                "would be lost; shorten the clauses"
            )
        return count


def _name(what: str, text: str) -> str:
    bare = text.strip().removeprefix("[").removesuffix("]")
    if not re.fullmatch(_NAME, bare):
        raise ConfigError(
            f"a {what} is made of capitals, digits and hyphens, such as MOVIE-SHOTS, got {text!r}"
        )
    return bare


def _clause(what: str, text: str) -> str:
    if "\n" in text or "\r" in text:
        raise ConfigError(f"{what} has a line break; a caption is one paragraph")
    if found := _MARKER.search(text):
        raise ConfigError(
            f"{what} has the marker {found[0]} inside its text; a marker begins a panel, so that "
            "panel would be counted twice"
        )
    return _JOINT.sub("", text.strip())
