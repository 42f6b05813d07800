"""An illustrated article: Markdown and the pictures in it, exported to a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mmattn.batch.writers import atomic, write_text
from mmattn_pipelines.chatdit_contracts import check_markdown
from mmattn_pipelines.chatdit_plan import Described


@dataclass(frozen=True)
class Article:
    """Markdown around pictures.

    Raw HTML is not part of it: every ``<`` of the text is written as an entity, so that a page made of the
    article runs no code that a user or a language model wrote.

    Args:
        markdown: the text; shows pictures as ``![text](<name>.png)``.
        pictures: every picture by name, in the order in which they were planned.

    Raises:
        ContractError: the text shows a picture that is not there, does not show one that is, or links to
            something other than a web page.
    """

    markdown: str
    pictures: Mapping[str, Image.Image] = field(repr=False)

    def __post_init__(self) -> None:
        """Check that every picture is shown and nothing else, and take raw HTML out."""
        text = check_markdown(self.markdown, list(self.pictures))
        object.__setattr__(self, "markdown", text.replace("<", "&lt;"))

    def export(self, folder: str | Path, name: str = "article") -> Path:
        """Write ``<name>.md`` and the pictures as PNG beside it; returns the path of the Markdown.

        The Markdown is written last, so that an article that is there is whole.

        Args:
            folder: made if it is not there; one for each article, as names of pictures repeat.
            name: stem of the file; what is not a letter, a digit, a hyphen or a dot becomes a hyphen.
        """
        stem = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "article"
        for picture, image in self.pictures.items():
            with atomic(Path(folder) / f"{picture}.png") as temporary:
                image.save(temporary, "PNG")
        return write_text(Path(folder) / f"{stem}.md", self.markdown)


def plain_article(title: str, pictures: Sequence[Described]) -> str:
    """A heading, and every picture above its description; texts are shown as they are written."""
    parts = [f"# {escape(title)}"]
    for item in pictures:
        text = escape(item.description)
        parts.append(f"![{text}]({item.image_id}.png)\n\n{text}")
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """A text in one line whose characters mean nothing in Markdown or HTML."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~:])", r"\\\1", line)
