"""Picture to class: top-1 accuracy, agreement with the untouched model, and where they part."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmattn.batch.writers import grid, to_image, write_image
from mmattn.calls import labels_of, logits
from mmattn.compare.heatmaps import site_maps
from mmattn.compare.jobs import Job, relative
from mmattn.compare.results import Column, Figure


class Classes(Job):
    """The embedded ViT names the colour and the shape of one object."""

    name: ClassVar[str] = "vit"
    title: ClassVar[str] = "Classification"
    lead: ClassVar[str] = (
        "A small timm ViT names colour and shape of one object, 64 classes. Merging or replacing "
        "attention should leave its answers alone."
    )
    samples: ClassVar[int] = 1000
    columns: ClassVar[tuple[Column, ...]] = (
        Column("top1", "top-1", "percent", "high", "pictures classified right", True),
        Column("colour", "colour", "percent", "high", "colour right"),
        Column("shape", "shape", "percent", "high", "shape right"),
        Column(
            "agreement", "agreement", "percent", "high", "same answer as the untouched model", True
        ),
    )

    def inputs(self) -> None:
        """Pictures of one object each."""
        from mmattn.mini.train_vit import draw_batch

        generator = torch.Generator().manual_seed(self.input_seed)
        self.pictures, self.truth = draw_batch(self.count, generator)
        self.names = labels_of(self.loaded)

    def warm(self) -> None:
        """One batch."""
        logits(self.loaded, self.pictures[:250] * 2 - 1)

    def run(self) -> Tensor:
        """Predicted classes ``[B]``."""
        return logits(self.loaded, self.pictures * 2 - 1).argmax(1)

    def score(self, value: Any, dense: Any | None) -> dict[str, float]:
        """Accuracy and agreement."""
        from mmattn.mini.draw import COLOURS

        n = len(COLOURS)
        quality = {
            "top1": _share(value == self.truth),
            "colour": _share(value % n == self.truth % n),
            "shape": _share(value // n == self.truth // n),
        }
        if dense is not None:
            quality["agreement"] = _share(value == dense)
        return quality

    def illustrate(self) -> list[Figure]:
        """Pictures on which columns part, or the first ones where none do."""
        labels = list(self.values)
        answers = torch.stack([self.values[label] for label in labels], 1)
        apart = (answers != answers[:, :1]).any(1).nonzero().flatten().tolist()
        chosen = (apart + [i for i in range(self.count) if i not in set(apart)])[:6]
        rows, notes = [], []
        for i in chosen:
            rows.append([to_image(self.pictures[i])] * len(labels))
            notes.append([self._note(int(self.values[label][i]), i) for label in labels])
        sheet = grid(
            rows,
            columns=labels,
            labels=[f"is a {self.names[int(self.truth[i])]}" for i in chosen],
            notes=notes,
            scale=3,
            label_width=150,
        )
        path = write_image(self.folder / "grid.png", sheet, {"model": self.name})
        text = (
            f"The columns give different answers on {len(apart)} of {self.count} pictures; "
            f"{'these come first' if apart else 'the first ones are shown'}. The answer is below each "
            "picture, with a cross where it is wrong."
        )
        return [Figure("image", "Answers", text, relative(path, self.settings))]

    def heat(self) -> list[Figure]:
        """Where the untouched model looks."""
        return site_maps(
            self,
            lambda: logits(self.loaded, self.pictures[:1] * 2 - 1),
            to_image(self.pictures[0]),
            "Where the class token of the untouched model looks, block by block, averaged over heads.",
        )

    def _note(self, guess: int, i: int) -> str:
        return f"{self.names[guess]}{'' if guess == int(self.truth[i]) else '  ×'}"


def _share(right: Tensor) -> float:
    return float(right.float().mean())
