"""Text to clip: oracle accuracy, likeness to the untouched model, flicker."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mmattn.batch.writers import write_video, write_webp
from mmattn.calls import draw
from mmattn.compare.jobs import Job, relative
from mmattn.compare.pictures import comparison, likeness, slug, verdict_rates
from mmattn.compare.results import Column, Figure
from mmattn.evals.quality import flicker

FPS = 8


class Clips(Job):
    """The embedded Wan films held-out captions."""

    name: ClassVar[str] = "t2v"
    title: ClassVar[str] = "Text to video"
    lead: ClassVar[str] = (
        "A small Wan films one moving object per caption, 17 frames each. The oracle follows the object "
        "through the frames and checks colour, shape, background and direction."
    )
    samples: ClassVar[int] = 8
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "oracle",
            "oracle",
            "percent",
            "high",
            "clips with every word of the caption right",
            True,
        ),
        Column("words", "words", "percent", "high", "single words of the captions right"),
        Column("psnr", "PSNR", "db", "high", "against the untouched model, same seed", True),
        Column("ssim", "SSIM", "ratio", "high", "against the untouched model, same seed"),
        Column(
            "flicker", "change per frame", "ratio", "low", "mean absolute change between frames"
        ),
    )

    def inputs(self) -> None:
        """Captions of one moving object."""
        from mmattn.mini.scenes import make_clips

        self.clips = make_clips(self.count, self.input_seed)
        self.prompts = [clip.caption for clip in self.clips]
        self.seeds = [self.settings.seed * 100_003 + i for i in range(self.count)]

    def warm(self) -> None:
        """One step of one batch."""
        draw(self.loaded, self.prompts[:8], self.seeds[:8], steps=1)

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
        """Oracle rates, likeness to dense, flicker."""
        from mmattn.mini.oracle import judge_clips

        quality = verdict_rates(judge_clips(value, self.clips))
        if dense is not None:
            quality |= likeness(value, dense)
        return quality | {"flicker": float(flicker(value).mean())}

    def illustrate(self) -> list[Figure]:
        """One film of the whole grid, one clip per prompt and method."""
        shown = range(min(4, self.count))
        length = next(iter(self.values.values())).shape[2]
        for label, value in self.values.items():
            for i in list(shown)[:2]:
                frames = [value[i, :, t] for t in range(length)]
                target = self.folder / slug(label) / f"{i:02d}.mp4"
                write_video(target, frames, fps=FPS, scale=4, meta=self._meta(label, i))
        sheets = [
            comparison({k: v[:, :, t] for k, v in self.values.items()}, self.prompts, shown)
            for t in range(length)
        ]
        meta = {
            "model": self.name,
            "seed": self.settings.seed,
            "prompts": self.prompts[: len(shown)],
        }
        film = write_video(self.folder / "grid.mp4", sheets, fps=FPS, meta=meta)
        write_webp(self.folder / "grid.webp", sheets, fps=FPS)
        return [
            Figure(
                "video",
                "Same prompt, same seed, side by side",
                "Rows are prompts, columns are methods; the last column is the difference to dense, "
                "amplified 5 times. The number below a frame is its own PSNR.",
                relative(film, self.settings),
            )
        ]

    def _meta(self, label: str, i: int) -> dict[str, Any]:
        return {
            "prompt": self.prompts[i],
            "seed": self.seeds[i],
            "steps": self.settings.steps,
            "guidance": self.settings.guidance,
            "model": self.name,
            "method": label,
        }
