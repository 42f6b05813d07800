"""Picture to words: hallucinated and missed objects, CHAIR on captions, POPE on questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import torch

from mmattn.batch.writers import to_image, upscale, write_image, write_json
from mmattn.calls import answer
from mmattn.compare.heatmaps import site_maps
from mmattn.compare.jobs import Job
from mmattn.compare.results import Column, Figure
from mmattn.evals import chair, pope

PARTNER_PROB = 0.2
"""Share of expected objects that really are there: the world that breaks the habit of training."""


@dataclass(frozen=True)
class Said:
    """Captions of all pictures, and the POPE scores."""

    captions: list[str]
    pope: dict[pope.Split, pope.PopeScore]


class Answers(Job):
    """The embedded LLaVA, which learned to expect objects that go together, describes scenes."""

    name: ClassVar[str] = "vlm"
    title: ClassVar[str] = "Vision and language"
    lead: ClassVar[str] = (
        "A small LLaVA that learned a habit: a leaf goes with an apple. Here the partners are mostly "
        "absent, so words that come from habit instead of the picture are hallucinations, and the scene "
        "says exactly which. Token pruning is shown beside random pruning at the same budget."
    )
    samples: ClassVar[int] = 40
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "chair_i", "CHAIR i", "percent", "low", "mentioned objects that are not there", True
        ),
        Column("coverage", "coverage", "percent", "high", "objects there that are mentioned", True),
        Column(
            "broken",
            "broken",
            "percent",
            "low",
            "captions that stutter, which flatters CHAIR",
            True,
        ),
        Column("chair_s", "CHAIR s", "percent", "low", "captions with such an object"),
        Column("mentions", "mentions", "number", "high", "objects per caption"),
        Column(
            "pope_random", "POPE random", "percent", "high", "questions about any absent object"
        ),
        Column(
            "pope_popular", "popular", "percent", "high", "questions about frequent absent objects"
        ),
        Column("pope_adversarial", "adversarial", "percent", "high", "about the expected partner"),
        Column(
            "yes", "yes", "percent", "low", "adversarial answers that are yes; 50 % is unbiased"
        ),
    )

    def inputs(self) -> None:
        """Scenes of the counter-world and their pictures."""
        from mmattn.mini import objects

        generator = torch.Generator().manual_seed(self.input_seed)
        self.scenes = objects.sample_scenes(self.count, generator, PARTNER_PROB)
        self.habit = objects.sample_scenes(1000, generator)
        self.images = [to_image(picture) for picture in objects.render(self.scenes)[0]]
        self.truth = [scene.names for scene in self.scenes]
        self.shuffled = [
            [names[i] for i in torch.randperm(len(names), generator=generator)]
            for names in self.truth
        ]
        self.prompt = objects.CAPTION_PROMPT

    def warm(self) -> None:
        """Two words about one batch."""
        few = self.images[:32]
        answer(self.loaded, few, [self.prompt] * len(few), max_new_tokens=2)

    def run(self) -> Said:
        """Captions and answers."""

        def reply(questions: Sequence[pope.Question]) -> list[bool | None]:
            said = answer(
                self.loaded,
                [self.images[question.picture] for question in questions],
                [question.text for question in questions],
                max_new_tokens=2,
                batch=64,
            )
            return [pope.parse_answer(text, "strict") for text in said]

        captions = answer(self.loaded, self.images, [self.prompt] * self.count)
        scores = pope.ask(
            self.shuffled,
            reply,
            seed=self.settings.seed,
            reference=[scene.names for scene in self.habit],
        )
        return Said(captions, scores)

    def score(self, value: Any, dense: Any | None) -> dict[str, float]:
        """CHAIR and POPE."""
        from mmattn.mini import objects

        told = [objects.mentioned(text) for text in value.captions]
        result = chair.score(told, self.truth)
        return {
            "chair_i": result.chair_i,
            "chair_s": result.chair_s,
            "coverage": result.coverage,
            "broken": sum(map(stutters, value.captions)) / len(value.captions),
            "mentions": result.mentions,
            **{f"pope_{split}": score.accuracy for split, score in value.pope.items()},
            "yes": value.pope["adversarial"].yes_ratio,
        }

    def illustrate(self) -> list[Figure]:
        """Answer cards in the report, all captions as JSON, the pictures as PNG."""
        from mmattn.compare.page import inline_png
        from mmattn.mini import objects

        shown = self._telling(6)
        cards = []
        for i in shown:
            picture = upscale(self.images[i], 3)
            write_image(self.folder / f"{i:02d}.png", picture, {"objects": list(self.truth[i])})
            rows = []
            for label, value in self.values.items():
                marked, missed = mark(value.captions[i], self.truth[i])
                wrong = [n for n in objects.mentioned(value.captions[i]) if n not in self.truth[i]]
                broken = stutters(value.captions[i])
                tally = f"{len(wrong)} invented" if wrong else "nothing invented"
                tally = f"broken text, {tally}" if broken else tally
                tone = " bad" if wrong or broken else ""
                rows.append(
                    f'<dt>{escape(label)} <span class="tally{tone}">{tally}</span>'
                    f"</dt><dd>{marked}{missed}</dd>"
                )
            there = ", ".join(self.truth[i])
            cards.append(
                f'<article class="card"><figure>{inline_png(picture, f"scene with {there}")}'
                f"<figcaption>there: {escape(there)}</figcaption></figure><dl>{''.join(rows)}</dl>"
                "</article>"
            )
        write_json(
            self.folder / "captions.json",
            [
                {
                    "picture": i,
                    "objects": list(self.truth[i]),
                    **{label: value.captions[i] for label, value in self.values.items()},
                }
                for i in range(self.count)
            ],
        )
        text = (
            "Objects that are there are bold, <mark>invented ones are red</mark>, and "
            '<s class="missed">what a caption leaves out</s> is struck through. Pictures where the '
            "methods differ most come first."
        )
        return [Figure("html", "What the model says", text, html="".join(cards))]

    def heat(self) -> list[Figure]:
        """Where the untouched model looks while it writes."""
        return site_maps(
            self,
            lambda: answer(self.loaded, self.images[:1], [self.prompt], max_new_tokens=24),
            self.images[0],
            "Where the untouched model looks while it writes its first 24 words, layer by layer: the "
            "attention of the newest word to the image tokens, averaged over heads and words.",
            only="language_model",
        )

    def _telling(self, count: int) -> list[int]:
        """Pictures whose captions differ most in invented objects, ties in order."""
        from mmattn.mini import objects

        def spread(i: int) -> int:
            wrong = [
                sum(n not in self.truth[i] for n in objects.mentioned(v.captions[i]))
                for v in self.values.values()
            ]
            return max(wrong) - min(wrong)

        return sorted(range(self.count), key=lambda i: (-spread(i), i))[:count]


def stutters(text: str) -> bool:
    """Whether `text` says one word three times in a row."""
    words = text.split()
    return any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))


def mark(caption: str, there: Sequence[str]) -> tuple[str, str]:
    """A caption as HTML with its objects marked, and the list of objects it misses."""
    from mmattn.mini import objects

    words = caption.split()
    parts, said = [], set()
    for i, word in enumerate(words):
        place = i >= 2 and words[i - 2] == "near" and words[i - 1] == "the"
        if word in objects.KINDS and not place:
            said.add(word)
            tag = "b" if word in there else "mark"
            parts.append(f"<{tag}>{escape(word)}</{tag}>")
        else:
            parts.append(escape(word))
    missed = [name for name in there if name not in said]
    tail = "".join(f' <s class="missed">{escape(name)}</s>' for name in missed)
    text = " ".join(parts).replace(" ,", ",").replace(" .", ".")
    return text or "<i>(silence)</i>", tail
