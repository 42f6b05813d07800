"""Figures of the methods' pages, drawn on embedded models by the methods themselves."""

from pathlib import Path

from methods._figures import language, own, pictures, scenes

KINDS = {
    "drawn": pictures.drawn,
    "canvas": pictures.canvas,
    "kept": language.kept,
    "stages": language.stages,
    "shares": language.shares,
    "words": language.words,
    "heads": language.heads,
    "trust": language.trust,
    "merged": own.merged,
    "identity": own.identity,
    "maps": own.maps,
    "bias": own.bias,
    "agents": own.agents,
    "segregation": own.segregation,
    "subjects": own.subjects,
}
"""By the `figure` key of a note; each takes the method as written and the file to write."""


def inputs(folder: Path) -> None:
    """The two pictures that examples are about: ``scene.png`` and ``shape.png``."""
    scenes.images()[scenes.SHOWN].save(folder / "scene.png", optimize=True)
    own.shape().save(folder / "shape.png", optimize=True)
