"""ChatDiT's chain of questions to a language model, whichever model that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from mmattn_pipelines import chatdit_contracts as contracts, chatdit_prompts as prompts
from mmattn_pipelines.chatdit_plan import (
    ChatRequest,
    ContractError,
    Described,
    Picture,
    Plan,
    PlannerError,
    Step,
    groups,
    image_id,
)
from mmattn_pipelines.chatdit_reading import is_article

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue with a language model: its role, what is said, and pictures with it."""

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


class LanguagePlanner:
    """Plan by asking a language model one question after another, and checking every reply.

    Description, counting and prompting, then the rules of `groups`, then one question per canvas, as in
    "ChatDiT", arXiv 2412.12571. A reply that breaks its contract is handed back with the sentence that says
    why, where ChatDiT asks the same question anew. Two things are added: a question about which earlier
    pictures are meant, and that pictures which were drawn or described before keep that description. A
    canvas of one panel uses its description as it is.

    Subclasses say how to `complete` a dialogue and whether the model `sees` pictures.

    Args:
        attempts: replies to one question before giving up, at least 1.
        describe: says what a picture shows, where the model does not see and the caller did not say.
    """

    sees: bool
    attempts: int
    describe: Callable[[Image.Image], str] | None

    def complete(self, turns: Sequence[Turn], *, as_json: bool) -> str:
        """The model's reply to a dialogue that begins with a system turn."""
        raise NotImplementedError

    def plan(self, request: ChatRequest, memory: Sequence[Picture]) -> Plan:
        """Decide what to draw; see `Planner.plan`.

        Raises:
            PlannerError: the model gave no valid reply in `attempts` attempts, cannot be reached, or cannot
                know what a given picture shows.
        """
        sources = (*self._selected(request, memory), *request.given)
        inputs, overview = self._described(request.text, sources)
        facts = {"instruction": request.text, "input_image_count": len(inputs)}
        outputs = self._ask(
            prompts.COUNTING, facts, lambda reply: contracts.check_counting(reply, len(inputs))
        )
        facts["output_image_count"] = outputs
        drawn = self._prompted(facts, overview, inputs, [picture.image for picture in sources])
        described = (*inputs, *drawn)
        steps = []
        for group in groups(len(inputs), outputs):
            items = [described[i] for i in (*group.references, *group.outputs)]
            if len(items) > 1:
                overall, panels = self._panels(facts, described, items)
            else:
                overall, panels = "", (items[0].description,)
            steps.append(Step(group, overall, panels))
        numbers = tuple(picture.number for picture in sources)
        article = request.article or is_article(request.text)
        return Plan(request.text, numbers, inputs, drawn, tuple(steps), article)

    def write(self, plan: Plan) -> str:
        """The article that the model writes; see `Planner.write`."""
        facts = {
            "instruction": plan.instruction,
            "input_image_count": len(plan.inputs),
            "output_image_count": len(plan.outputs),
            "descriptions": [vars(item) for item in plan.inputs + plan.outputs],
        }
        drawn, given = ([i.image_id for i in items] for items in (plan.outputs, plan.inputs))

        def check(reply: str) -> str:
            return contracts.check_markdown(reply, drawn, given)

        return self._asked(prompts.ARTICLE, facts, check)

    def _selected(self, request: ChatRequest, memory: Sequence[Picture]) -> tuple[Picture, ...]:
        if not memory:
            return ()
        known = {picture.name: picture for picture in memory}
        facts = {
            "instruction": request.text,
            "input_image_count": len(request.given),
            "memory": [
                {"image_id": picture.name, "description": picture.description} for picture in memory
            ],
        }
        numbers = {name: picture.number for name, picture in known.items()}
        chosen = self._ask(
            prompts.SELECTION, facts, lambda reply: contracts.check_selection(reply, numbers)
        )
        return tuple(next(p for p in memory if p.number == number) for number in chosen)

    def _described(
        self, text: str, sources: Sequence[Picture]
    ) -> tuple[tuple[Described, ...], str | None]:
        """What every input shows: as it is known, as the model sees it, or as `describe` says."""
        unknown = [picture for picture in sources if not picture.description]
        said: dict[int, str] = {picture.number: picture.description for picture in sources}
        overview = None
        if unknown and self.sees:
            facts = {"instruction": text, "input_image_count": len(unknown)}
            overview, items = self._ask(
                prompts.DESCRIPTION,
                facts,
                lambda reply: contracts.check_description(reply, len(unknown)),
                [picture.image for picture in unknown],
            )
            said |= {p.number: item.description for p, item in zip(unknown, items, strict=True)}
        elif unknown and self.describe is None:
            raise PlannerError(
                f"the language model sees no pictures and nobody said what picture {unknown[0].number} "
                "shows; give captions with the pictures, or a planner with `describe`"
            )
        elif self.describe is not None:
            said |= {picture.number: self.describe(picture.image) for picture in unknown}
        lines = [contracts.one_line(said[picture.number]) for picture in sources]
        found = (Described(image_id("input", n, line), line) for n, line in enumerate(lines, 1))
        return tuple(found), overview

    def _prompted(
        self,
        facts: Mapping[str, Any],
        overview: str | None,
        inputs: Sequence[Described],
        images: Sequence[Image.Image],
    ) -> tuple[Described, ...]:
        outputs = facts["output_image_count"]
        system, asked = prompts.PROMPTING, dict(facts)
        if inputs:
            given = [vars(item) for item in inputs]
            asked["descriptions"] = {"input_images_overview": overview, "input_images": given}
        elif outputs == 1:
            system = prompts.PROMPTING_ONE
        return self._ask(
            system,
            asked,
            lambda reply: contracts.check_prompting(reply, len(inputs), outputs)[1],
            images if self.sees else (),
        )

    def _panels(
        self, facts: Mapping[str, Any], described: Sequence[Described], items: Sequence[Described]
    ) -> tuple[str, tuple[str, ...]]:
        asked = {
            **facts,
            "descriptions": [vars(item) for item in described],
            "panels": {f"panel_{i}": vars(item) for i, item in enumerate(items, 1)},
        }
        return self._ask(
            prompts.PANELIZING, asked, lambda reply: contracts.check_panelizing(reply, len(items))
        )

    def _ask(
        self,
        system: str,
        facts: Mapping[str, Any],
        check: Callable[[Any], Checked],
        images: Sequence[Image.Image] = (),
    ) -> Checked:
        def parsed(reply: str) -> Checked:
            return check(contracts.parse_object(reply))

        return self._asked(system, facts, parsed, images, as_json=True)

    def _asked(
        self,
        system: str,
        facts: Mapping[str, Any],
        check: Callable[[str], Checked],
        images: Sequence[Image.Image] = (),
        *,
        as_json: bool = False,
    ) -> Checked:
        """Ask until a reply passes its check; what was wrong with one is said before the next."""
        question = json.dumps(facts, indent=4, ensure_ascii=False)
        turns = [Turn("system", system), Turn("user", question, tuple(images))]
        wrong = ""
        for _ in range(self.attempts):
            reply = self.complete(turns, as_json=as_json)
            try:
                return check(reply)
            except ContractError as error:
                wrong = str(error)
                again = f"That reply cannot be used: {wrong}. Reply again, following the rules."
                turns = [*turns[:2], Turn("assistant", reply), Turn("user", again)]
        raise PlannerError(
            f"the language model gave no usable reply in {self.attempts} attempts; of the last one: "
            f"{wrong}. Try a more capable model, or RulePlanner, which needs none"
        )
