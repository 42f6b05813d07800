"""Text to picture: oracle accuracy, and PSNR and SSIM against the untouched model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mmattn.batch.writers import difference, grid, to_image, write_image
from mmattn.calls import draw
from mmattn.compare.jobs import Job, relative
from mmattn.compare.results import Column, Figure
from mmattn.evals.quality import decibels, psnr, ssim
from mmattn.variants import DENSE

GAIN = 5.0
"""How much the difference column is amplified."""


class Pictures(Job):
    """The embedded Flux draws held-out captions."""

    name: ClassVar[str] = "t2i"
    title: ClassVar[str] = "Text to image"
    lead: ClassVar[str] = (
        "A small Flux trained in this repository draws captions it has never seen. Every column starts "
        "from the same noise; the oracle measures the pixels and checks each word of the caption."
    )
    samples: ClassVar[int] = 24
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "oracle",
            "oracle",
            "percent",
            "high",
            "pictures with every word of the caption right",
            True,
        ),
        Column("words", "words", "percent", "high", "single words of the captions right"),
        Column("psnr", "PSNR", "db", "high", "against the untouched model, same seed", True),
        Column("ssim", "SSIM", "ratio", "high", "against the untouched model, same seed"),
    )

    def inputs(self) -> None:
        """Captions of all three kinds, in turn."""
        from mmattn.mini.scenes import Kind, make_scenes

        kinds: tuple[Kind, ...] = ("one", "relation", "count")
        each = -(-self.count // len(kinds))
        made = [
            make_scenes(each, self.input_seed + i, mix=[(kind, 1.0)])
            for i, kind in enumerate(kinds)
        ]
        self.scenes = [scene for group in zip(*made, strict=True) for scene in group][: self.count]
        self.prompts = [scene.caption for scene in self.scenes]
        self.seeds = [self.settings.seed * 100_003 + i for i in range(self.count)]

    def warm(self) -> None:
        """Two steps of one batch."""
        draw(self.loaded, self.prompts[:8], self.seeds[:8], steps=2)

    def run(self) -> Tensor:
        """All prompts."""
        return draw(
            self.loaded,
            self.prompts,
            self.seeds,
            steps=self.settings.steps,
            guidance=self.settings.guidance,
        )

    def score(self, value: Any, dense: Any | None) -> dict[str, float]:
        """Oracle rates, and likeness to dense where it is another run."""
        from mmattn.mini.oracle import judge_scenes

        quality = verdict_rates(judge_scenes(value, self.scenes))
        if dense is not None:
            quality |= likeness(value, dense)
        return quality

    def illustrate(self) -> list[Figure]:
        """The grid, and every picture by itself."""
        shown = min(6, self.count)
        for label, value in self.values.items():
            for i in range(shown):
                meta = self.meta(label, i)
                write_image(self.folder / slug(label) / f"{i:02d}.png", value[i], meta, scale=4)
        sheet = comparison(self.values, self.prompts, range(shown))
        path = write_image(
            self.folder / "grid.png", sheet, {"model": self.name, "seed": self.settings.seed}
        )
        return [
            Figure(
                "image",
                "Same prompt, same seed",
                "Rows are prompts, columns are methods, and the last column is the difference to dense, "
                f"amplified {GAIN:g} times: black means equal. Below a picture is its PSNR.",
                relative(path, self.settings),
            )
        ]

    def heat(self) -> list[Figure]:
        """Which word the untouched model reads where, for a prompt with two objects."""
        from mmattn.compare.heatmaps import word_maps

        i = next((i for i, scene in enumerate(self.scenes) if scene.relation), 0)
        dense = self.values.get(DENSE.label)
        if dense is None:
            return []
        dull = {"a", "an", "on", "of", "in", "the", "background"}
        words = self.prompts[i].split()
        tokens = [(word, n) for n, word in enumerate(words) if word not in dull][:7]

        def again() -> Tensor:
            return draw(
                self.loaded,
                self.prompts[i : i + 1],
                self.seeds[i : i + 1],
                steps=self.settings.steps,
                guidance=self.settings.guidance,
            )

        return word_maps(self, again, to_image(dense[i]), self.prompts[i], tokens)

    def meta(self, label: str, i: int) -> dict[str, Any]:
        """What a file says about itself."""
        return {
            "prompt": self.prompts[i],
            "seed": self.seeds[i],
            "steps": self.settings.steps,
            "guidance": self.settings.guidance,
            "model": self.name,
            "method": label,
        }


def verdict_rates(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Share of samples with everything right, and share of single questions right."""
    questions = [right for v in verdicts for key, right in v.items() if key != "all"]
    return {
        "oracle": sum(v["all"] for v in verdicts) / len(verdicts),
        "words": sum(questions) / len(questions),
    }


def likeness(value: Tensor, dense: Tensor) -> dict[str, float]:
    """Mean PSNR in dB and mean SSIM over samples."""
    return {
        "psnr": float(psnr(value, dense).mean()),
        "ssim": float(ssim(value, dense).mean()),
    }


def slug(label: str) -> str:
    """A label as a folder name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label).strip("-")


def comparison(values: dict[str, Tensor], prompts: list[str], rows: range) -> Any:
    """The grid: dense first, the methods, then the amplified difference of the last method."""
    labels = list(values)
    dense = values.get(DENSE.label)
    chosen = next((label for label in labels if label != DENSE.label), None)
    pair = dense is not None and chosen is not None
    table, notes = [], []
    for i in rows:
        row = [to_image(values[label][i]) for label in labels]
        note = ["" if label == DENSE.label else _note(values[label], dense, i) for label in labels]
        if pair:
            assert dense is not None and chosen is not None
            row.append(
                difference(row[labels.index(chosen)], row[labels.index(DENSE.label)], gain=GAIN)
            )
            note.append(f"|{chosen} - dense| x {GAIN:g}")
        table.append(row)
        notes.append(note)
    heads = [
        *labels,
        *(["difference" if len(labels) == 2 else f"difference of {chosen}"] if pair else []),
    ]
    return grid(table, columns=heads, labels=[prompts[i] for i in rows], notes=notes, scale=4)


def _note(value: Tensor, dense: Tensor | None, i: int) -> str:
    if dense is None:
        return ""
    return decibels(float(psnr(value[i : i + 1], dense[i : i + 1])))
