"""Plan a message about pictures by rules: no language model, no network, the same plan every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from mmattn_pipelines import chatdit_reading as reading
from mmattn_pipelines.chatdit_article import plain_article
from mmattn_pipelines.chatdit_contracts import one_line
from mmattn_pipelines.chatdit_plan import (
    ChatRequest,
    Described,
    Picture,
    Plan,
    PlannerError,
    Step,
    groups,
    image_id,
)


@dataclass(frozen=True)
class RulePlanner:
    """Plan with a small grammar of English requests in place of a language model.

    It reads how many pictures are wanted ("three pictures", "some", "a story", "for each"), lists behind a
    colon ("Two pictures: a red circle; a blue square"), which earlier pictures are meant ("the second
    image", "#3", "the last picture", "it", "them", a name in angle brackets such as ``<Mira>``), and
    whether an article is wanted. Descriptions are built from the user's own words alone: what the
    conversation knows of the given picture, the subject of the message, and the item of the list. Who is
    shared by all panels is therefore repeated in every panel, as ChatDiT (arXiv 2412.12571) asks for.

    Limits: it sees no pictures, so an uploaded one is "picture 1" unless `describe` or the caller says what
    it shows; it invents no scenes, so a story without a list repeats its subject; an edit is appended to
    the description of the picture it edits ("a red circle, blue"), not merged into it; English only.

    Args:
        describe: says what a picture shows, for pictures that nobody described.
    """

    describe: Callable[[Image.Image], str] | None = None

    def plan(self, request: ChatRequest, memory: Sequence[Picture]) -> Plan:
        """Decide what to draw; see `Planner.plan`.

        Raises:
            PlannerError: the message says nothing to draw, names a picture that is not there, or lists
                another number of things than it counts.
        """
        text, article = request.text.strip(), request.article or reading.is_article(request.text)
        head, listed = reading.split_list(text)
        sources = reading.sources(head, request.given, memory)
        each = bool(sources) and reading.says_each(head)
        wanted = reading.count(head, listed, article)
        items = reading.items(listed, wanted)
        outputs = wanted * len(sources) if each else wanted
        subject = one_line(reading.subject(head))
        if listed and not items:
            subject = one_line(f"{subject}, {listed}" if subject else listed)
        inputs = tuple(
            Described(image_id("input", n, said), said)
            for n, said in enumerate(map(self._said, sources), 1)
        )
        plans = groups(len(inputs), outputs, each=each)
        drawn: list[Described] = []
        for number, group in enumerate((g for g in plans for _ in g.outputs), 1):
            seen = [inputs[i].description for i in group.references if i < len(inputs)]
            words = (subject, items[(number - 1) % len(items)]) if items else (subject,)
            text = _joined(" and ".join(seen), *words)
            if not text:
                raise PlannerError(
                    f"the message {request.text!r} does not say what to draw; name it, as in 'draw two "
                    "pictures of a red circle'"
                )
            name = image_id("output", number, words[-1] or text)
            drawn.append(Described(name, text))
        described = (*inputs, *drawn)
        steps = []
        for group in plans:
            panels = tuple(described[i].description for i in (*group.references, *group.outputs))
            steps.append(Step(group, subject if len(panels) > 1 else "", panels))
        numbers = tuple(picture.number for picture in sources)
        return Plan(request.text, numbers, inputs, tuple(drawn), tuple(steps), article)

    def write(self, plan: Plan) -> str:
        """A heading, and every picture above its description; see `Planner.write`."""
        title = one_line(reading.subject(reading.split_list(plan.instruction)[0]))
        title = title or plan.instruction
        return plain_article(title[0].upper() + title[1:], plan.outputs)

    def _said(self, picture: Picture) -> str:
        said = picture.description or (self.describe(picture.image) if self.describe else "")
        return one_line(said) or f"picture {picture.number}"


def _joined(*parts: str) -> str:
    """Clauses in a row: with a comma, or with a space before "on the left" and its like."""
    said = ""
    for part in filter(None, parts):
        joint = " " if part.split()[0].lower() in reading.PREPOSITIONS else ", "
        said = f"{said}{joint}{part}" if said else part
    return said
