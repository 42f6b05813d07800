"""Chat about pictures: a planner decides what to draw, a model of image sets draws it, all is remembered.

```python
from mmattn_pipelines.chatdit import ChatDiT
from mmattn_pipelines.chatdit_planners import OpenAIPlanner
from mmattn_pipelines.in_context import InContextPipeline

chat = ChatDiT(InContextPipeline(flux), OpenAIPlanner("name of a model"))
fox, hen = chat.chat("Two ink drawings: a fox; a hen").images
(snow,) = chat.chat("Draw the second one in snow").images
chat.article("Write a picture book about both of them").export("out")
```
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageOps

from mmattn.errors import ConfigError
from mmattn_pipelines import chatdit_storage as storage
from mmattn_pipelines.chatdit_article import Article
from mmattn_pipelines.chatdit_contracts import check_markdown, one_line
from mmattn_pipelines.chatdit_drawing import CaptionStyle, SetGenerator, set_captions
from mmattn_pipelines.chatdit_plan import (
    ChatRequest,
    Picture,
    Plan,
    Planner,
    Step,
    median_aspect,
    panel_size,
    slug,
)
from mmattn_pipelines.chatdit_storage import Conversation, Round
from mmattn_pipelines.panels import PanelLayout


@dataclass(frozen=True)
class Reply:
    """What a message was answered with.

    Args:
        images: the pictures that were drawn, in order.
        text: a sentence on them, or the Markdown of the article.
        plan: what was decided before the first of them.
        article: the illustrated article, where one was asked for.
    """

    images: list[Image.Image] = field(repr=False)
    text: str
    plan: Plan
    article: Article | None = None


class ChatDiT:
    """A conversation about pictures with an unmodified text-to-image model.

    A message and the pictures that come with it are planned into canvases of several panels; given pictures
    are panels that are kept, the others are drawn and cut out. "ChatDiT: A Training-Free Baseline for
    Task-Agnostic Free-Form Chatting with Diffusion Transformers", arXiv 2412.12571. Which pictures share a
    canvas, and how large its panels are, is compared in the tests with the published tables. Deviations:

    - The conversation is remembered: later messages can be about any picture of it. The published code
      starts anew with every message.
    - Every canvas has noise of its own, named by seed, round and step; the published code seeds all
      canvases alike, so that those of one size get the same composition.
    - One wanted picture without given ones is drawn from its description; the published code fails there.
    - An article pairs names and pictures in order; the published code pairs them by way of a set.

    A round that fails keeps everything drawn until then; `resume` goes on with its plan.

    Args:
        generator: draws the canvases.
        planner: decides what to draw, and writes articles.
        caption_style: words a canvas for the generator. The default, `set_captions`, is for models that read
            English; `chatdit_scenes.scene_style` is for the embedded one, which has a closed vocabulary.
        panel: height and width of every panel in pixels; None: by number of panels and shape of the given
            pictures, one megapixel for a panel alone and two for a canvas.
        seed: of the conversation.
        folder: where the conversation is saved after every canvas; None saves only on `save`.
        options: further arguments of every call of the generator, such as ``num_inference_steps``.
    """

    def __init__(
        self,
        generator: SetGenerator,
        planner: Planner,
        *,
        caption_style: CaptionStyle = set_captions,
        panel: tuple[int, int] | None = None,
        seed: int = 2024,
        folder: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.generator, self.planner, self.caption_style = generator, planner, caption_style
        self.options = dict(options or {})
        self.folder = None if folder is None else Path(folder)
        self._talk = Conversation(seed=seed, panel=panel)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures of the conversation, given and drawn, in order."""
        return tuple(self._talk.pictures)

    @property
    def rounds(self) -> tuple[Round, ...]:
        """What was asked, planned and drawn, message by message; failed ones have an ``error``."""
        return tuple(self._talk.rounds)

    def chat(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        captions: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a message.

        Args:
            text: what is wanted.
            images: pictures that come with it; turned upright by their EXIF data, transparent ones on white.
            captions: what each of them shows; None leaves it to the planner.
            seed: of this round; None: that of the conversation.

        Raises:
            ConfigError: an empty text, or another number of captions than of pictures; nothing is recorded.
            PlannerError: the planner cannot make a plan of the message.
            Exception: whatever the generator raises. What was drawn until then is kept.
        """
        return self._begin(text, images, captions, seed, article=False)

    def article(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        captions: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Article:
        """Draw what a message asks for and write an illustrated article around it; as `chat` otherwise.

        Raises:
            ContractError: the planner wrote Markdown that does not show the pictures; they are kept.
        """
        article = self._begin(text, images, captions, seed, article=True).article
        assert article is not None
        return article

    def resume(self) -> Reply:
        """Go on with the last round after it failed: with its plan and seed, from the canvas that failed.

        Raises:
            ConfigError: the last round is complete, or there is none.
        """
        if not self._talk.rounds or self._talk.rounds[-1].complete:
            raise ConfigError("there is no unfinished round to resume; send a message with chat()")
        return self._run()

    def reply(self, number: int) -> Reply:
        """The answer to message `number`, from 1.

        Raises:
            ConfigError: there is no such message, or its round is not complete.
        """
        if not 1 <= number <= len(self._talk.rounds) or not self._talk.rounds[number - 1].complete:
            raise ConfigError(
                f"round {number} has no answer; the conversation has {len(self._talk.rounds)} rounds, "
                f"complete are {[r.number for r in self._talk.rounds if r.complete]}"
            )
        return self._reply(self._talk.rounds[number - 1])

    def save(self, folder: str | Path) -> Path:
        """Write the conversation to a folder: ``conversation.json`` and a PNG for every picture.

        Raises:
            ConfigError: the folder holds another conversation.
        """
        return storage.save(self._talk, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        generator: SetGenerator,
        planner: Planner,
        *,
        caption_style: CaptionStyle = set_captions,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Go on with the conversation that `save` wrote; it is saved there again after every canvas.

        Seed and size of panels are those of the conversation. A round that had failed can be resumed, and
        draws what it would have drawn if style and options are those it began with.

        Raises:
            ConfigError: there is no conversation, or it is damaged.
        """
        made = cls(generator, planner, caption_style=caption_style, folder=folder, options=options)
        made._talk = storage.load(Path(folder))
        return made

    def _begin(
        self,
        text: str,
        images: Sequence[Image.Image],
        captions: Sequence[str] | None,
        seed: int | None,
        *,
        article: bool,
    ) -> Reply:
        ChatRequest(text)  # refuses an empty text before anything is recorded
        said = [""] * len(images) if captions is None else list(captions)
        if len(said) != len(images):
            raise ConfigError(
                f"{len(images)} pictures came with {len(said)} captions; give one for each, or none"
            )
        pictures = [_upright(image) for image in images]
        talk, number = self._talk, len(self._talk.rounds) + 1
        given = tuple(
            self._remember(image, one_line(caption), number, drawn=False)
            for image, caption in zip(pictures, said, strict=True)
        )
        seed = talk.seed if seed is None else seed
        talk.rounds.append(Round(number, text, given, seed, article))
        return self._run()

    def _run(self) -> Reply:
        """Bring the last round to its end; whatever stops it is written into it."""
        try:
            self._update(error=None)
            self._plan()
            self._draw()
            self._write()
        except BaseException as error:
            self._update(error=f"{type(error).__name__}: {error}")
            raise
        self._update(complete=True)
        return self._reply(self._talk.rounds[-1])

    def _plan(self) -> None:
        current, talk = self._talk.rounds[-1], self._talk
        if current.plan is not None:
            return
        memory = [picture for picture in talk.pictures if picture.round < current.number]
        given = tuple(talk.pictures[number - 1] for number in current.given)
        plan = self.planner.plan(ChatRequest(current.text, given, current.article), memory)
        for number, item in zip(plan.sources, plan.inputs, strict=True):
            if not talk.pictures[number - 1].description:
                picture = talk.pictures[number - 1]
                talk.pictures[number - 1] = replace(picture, description=item.description)
        self._update(plan=plan)

    def _draw(self) -> None:
        current = self._talk.rounds[-1]
        assert current.plan is not None
        done = len(current.drawn) + len(current.plan.inputs)
        for place, step in enumerate(current.plan.steps, 1):
            if step.group.outputs[0] < done:
                continue
            images = self._canvas(current, current.plan, step, place)
            descriptions = step.panels[len(step.group.references) :]
            drawn = (
                self._remember(image, description, current.number, drawn=True)
                for image, description in zip(images, descriptions, strict=True)
            )
            current = self._update(drawn=(*current.drawn, *drawn))

    def _canvas(self, current: Round, plan: Plan, step: Step, place: int) -> list[Image.Image]:
        """The pictures that one step draws."""
        numbers, pictures = (*plan.sources, *current.drawn), self._talk.pictures
        references = [pictures[numbers[i] - 1].image for i in step.group.references]
        size = self._talk.panel or panel_size(
            len(step.panels), median_aspect([pictures[n - 1].image for n in plan.sources])
        )
        layout = PanelLayout.auto(len(step.panels), *size)
        noise = zlib.crc32(f"{current.seed} {current.number} {place}".encode())
        result = self.generator(
            self.caption_style(layout, step.overall, step.panels),
            layout=layout,
            references=[layout.fit(image) for image in references],
            generator=torch.Generator().manual_seed(noise),
            **self.options,
        )
        return list(result.images)[-len(step.group.outputs) :]

    def _write(self) -> None:
        current = self._talk.rounds[-1]
        assert current.plan is not None
        if current.plan.article and current.markdown is None:
            names = (
                [i.image_id for i in items] for items in (current.plan.outputs, current.plan.inputs)
            )
            self._update(markdown=check_markdown(self.planner.write(current.plan), *names))

    def _remember(self, image: Image.Image, description: str, round_: int, *, drawn: bool) -> int:
        number = len(self._talk.pictures) + 1
        name = f"picture_{number:04d}_{slug(description) if description else 'given'}"
        self._talk.pictures.append(Picture(number, name, description, drawn, round_, image))
        return number

    def _update(self, **changes: Any) -> Round:
        """Change the last round, and save if the conversation has a folder."""
        self._talk.rounds[-1] = current = replace(self._talk.rounds[-1], **changes)
        if self.folder is not None:
            self.save(self.folder)
        return current

    def _reply(self, current: Round) -> Reply:
        plan, pictures = current.plan, self._talk.pictures
        assert plan is not None
        images = [pictures[number - 1].image for number in current.drawn]
        if current.markdown is None:
            said = "; ".join(item.description for item in plan.outputs)
            count = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
            return Reply(images, f"Drew {count}: {said}.", plan)
        shown = [
            (item.image_id, pictures[number - 1].image)
            for item, number in zip(plan.inputs, plan.sources, strict=True)
            if f"({item.image_id}.png)" in current.markdown
        ]
        named = zip((item.image_id for item in plan.outputs), images, strict=True)
        article = Article(current.markdown, dict([*shown, *named]))
        return Reply(images, article.markdown, plan, article)


def _upright(image: Image.Image) -> Image.Image:
    """A copy in RGB, turned as its EXIF data say, with white behind what is transparent."""
    turned = ImageOps.exif_transpose(image)
    if turned.has_transparency_data:
        clear = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return turned.convert("RGB")
