"""AMBER: what a model says about a picture on its own, and how it answers questions about it.

Generative items are descriptions. Their nouns that belong to the vocabulary are compared with what is there
(``truth``) and with what people tend to imagine there (``hallu``):

- ``chair``: hallucinated nouns per noun, every mention counts;
- ``cover``: objects there that are mentioned;
- ``hal``: descriptions with at least one hallucinated noun;
- ``cog``: imagined objects that were mentioned, of all that could be.

Discriminative items are yes-or-no questions. *No is the positive class*: ``precision`` is the share of "No"
answers that are right, ``recall`` the share of true "No" that were found, and an answer that is not exactly
"Yes" or "No" scores nothing. ``amber`` is the mean of ``1 - chair`` and ``f1``.

Paper: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
arXiv 2311.07397. Follows the authors' code (junyangwang0410/AMBER @534babf), including its habits: every
denominator starts at 0.001, a noun that is safe everywhere counts as mentioned and never as wrong, and a noun
that two objects share covers the first only. Checked on hand-worked examples.

Deviations: nouns are the words of the vocabulary instead of what nltk tags as nouns; two words are alike only
when they are equal, where the original asks spaCy vectors for a similarity above 0.8 (pass `similar`); F1 is
computed before rounding, with 0.0001 in the denominator for every dimension. On procedural scenes there are
descriptions and existence questions; ``hallu`` are the absent objects that habit expects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmattn.errors import ConfigError
from mmattn.evals import chair, pope
from mmattn.evals._protocol import (
    Item,
    Picture,
    Protocol,
    Rate,
    World,
    opener,
    picture_file,
    put,
    records,
)

Similar = Callable[[str, str], bool]

RATES = (
    Rate("amber", "AMBER", "percent", "high"),
    Rate("chair", "CHAIR", "percent", "low"),
    Rate("cover", "cover", "percent", "high"),
    Rate("hal", "Hal", "percent", "low"),
    Rate("cog", "Cog", "percent", "low"),
    Rate("f1", "F1 (no)", "percent", "high"),
    Rate("accuracy", "accuracy", "percent", "high"),
    Rate("words", "words", "number"),
    Rate("no_ratio", "no", "percent"),
    Rate("unparsed", "unparsed", "percent", "low"),
)
"""What a table shows, where it is there."""

START = 0.001
DIMENSIONS = ("existence", "attribute", "relation")


def dimension(kind: str) -> str:
    """The dimension of a discriminative ``type``. Relations come under two names in the annotations."""
    if "hallucination" in kind:
        return "existence"
    return "attribute" if "attribute" in kind else "relation"


def nouns(text: str, vocabulary: Collection[str], lemma: Callable[[str], str]) -> list[str]:
    """Words of `text` that are in the vocabulary, in order, repeated ones included."""
    words = [lemma(word) for word in re.findall(r"[^\W_]+", text.lower())]
    return [word for word in words if word in vocabulary]


def grade(
    said: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    *,
    association: Mapping[str, Sequence[str]] | None = None,
    safe: Collection[str] = (),
    similar: Similar | None = None,
) -> dict[str, float]:
    """Counts of one description.

    Args:
        said: its nouns, see `nouns`.
        truth, hallu: objects that are there, and that people imagine there.
        association: other words for an object.
        safe: words that are never wrong.
        similar: whether two words are alike; None compares them.
    """
    words = association or {}
    alike = similar or (lambda a, b: a == b)

    def order(names: Sequence[str]) -> list[tuple[int, str]]:
        """Words that lead to an object, other words for all of them first."""
        others = [(i, other) for i, name in enumerate(names) for other in words.get(name, ())]
        return [*others, *enumerate(names)]

    def first(names: Sequence[str], noun: str, match: Similar) -> int | None:
        return next((i for i, word in order(names) if match(noun, word)), None)

    covered: set[int] = set()
    fell: set[int] = set()
    wrong = 0
    for noun in said:
        if noun in safe:
            continue
        home = first(truth, noun, str.__eq__)
        if home is None:
            fell |= {i for m in (str.__eq__, alike) if (i := first(hallu, noun, m)) is not None}
            home = first(truth, noun, alike)
        if home is None:
            wrong += 1
        else:
            covered.add(home)
    return {
        "g.mentioned": len(said),
        "g.wrong": wrong,
        "g.truth": len(truth),
        "g.covered": len(covered),
        "g.hallu": len(hallu),
        "g.fell": len(fell),
        "g.clean": wrong == 0,
        "g.responses": 1,
    }


def judge(response: str, truth: str, kind: str) -> dict[str, float]:
    """Counts of one answer to a question; exactly "Yes" or "No", anything else scores nothing."""
    is_no, said_no = truth != "yes", response == "No"
    counts = {
        "asked": 1,
        "right": said_no if is_no else response == "Yes",
        "true_no": is_no,
        "said_no": said_no,
        "right_no": is_no and said_no,
        "unparsed": response not in ("Yes", "No"),
    }
    return {f"{d}.{k}": float(v) for d in ("d", dimension(kind)) for k, v in counts.items()}


def rates(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shares from summed counts."""
    found: dict[str, torch.Tensor] = {}

    def share(a: str, b: str) -> torch.Tensor:
        return totals[a] / (totals[b] + START)

    if "g.responses" in totals:
        found["chair"] = share("g.wrong", "g.mentioned")
        found["cover"] = share("g.covered", "g.truth")
        found["hal"] = 1 - share("g.clean", "g.responses")
        found["cog"] = share("g.fell", "g.hallu")
        found["words"] = totals["g.words"] / totals["g.responses"].clamp_min(1)
    for name in ("d", *DIMENSIONS):
        if f"{name}.asked" not in totals:
            continue
        tail = "" if name == "d" else f"_{name}"
        precision = share(f"{name}.right_no", f"{name}.said_no")
        recall = share(f"{name}.right_no", f"{name}.true_no")
        found[f"accuracy{tail}"] = share(f"{name}.right", f"{name}.asked")
        found[f"precision{tail}"], found[f"recall{tail}"] = precision, recall
        found[f"f1{tail}"] = 2 * precision * recall / (precision + recall + 0.0001)
        found[f"no_ratio{tail}"] = share(f"{name}.said_no", f"{name}.asked")
        found[f"unparsed{tail}"] = share(f"{name}.unparsed", f"{name}.asked")
    if "chair" in found and "f1" in found:
        found["amber"] = (1 - found["chair"] + found["f1"]) / 2
    return found


class Amber(Protocol):
    """Descriptions and questions with AMBER's annotations.

    Args:
        items: Requests; ``doc`` is the annotation (``id``, ``type``, ``truth``, ``hallu``).
        picture: Opens pictures.
        origin: Where they come from.
        association: Other words for an object; its words are the vocabulary, with those of the annotations.
        safe: Words that are never wrong.
        parse: How an answer becomes "Yes" or "No": ``official`` takes it as it is, ``strict`` and ``xor`` as
            `pope.parse_answer` does. It can be changed without asking again.
        similar: Whether two words are alike.
    """

    name: ClassVar[str] = "amber"

    def __init__(
        self,
        items: Sequence[Item],
        picture: Picture | None,
        origin: Mapping[str, Any],
        *,
        association: Mapping[str, Sequence[str]] | None = None,
        safe: Collection[str] = (),
        parse: pope.Parse = "strict",
        similar: Similar | None = None,
    ) -> None:
        super().__init__(items, picture, origin)
        pope.parse_answer("", parse)
        self.association, self.safe = association or {}, frozenset(safe)
        self.parse, self.similar = parse, similar
        words = {word for key, others in self.association.items() for word in (key, *others)}
        for item in items:
            if item.doc["type"] == "generative":
                words.update((*item.doc["truth"], *item.doc["hallu"]))
        self.vocabulary = frozenset(words)
        self._lemma = chair.singular(self.vocabulary)

    @classmethod
    def from_world(
        cls,
        world: World,
        *,
        embedded: bool = True,
        parse: pope.Parse = "strict",
        limit: int | None = None,
    ) -> Amber:
        """One description and four existence questions per procedural scene: two objects that are there and
        two that are not, those that habit expects first. `limit` is about descriptions."""
        from mmattn.mini import objects

        generator = torch.Generator().manual_seed(world.seed)
        prompt = objects.CAPTION_PROMPT if embedded else "Describe this image."
        length = limit or (chair.MINI_LIMIT if embedded else chair.LIMIT)
        short = pope.MINI_LIMIT if embedded else pope.LIMIT
        items, number = [], 0
        for n, scene in enumerate(world.scenes):
            there, expected = list(scene.names), list(objects.absent_partners(scene))
            number += 1
            doc: dict[str, Any] = {"id": number, "type": "generative", "truth": there}
            doc |= {"hallu": expected, "image": str(n), "query": prompt}
            items.append(Item(str(number), str(n), prompt, ", ".join(there), doc, length))
            rest = [name for name in objects.NAMES if name not in there and name not in expected]
            others = [rest[i] for i in torch.randperm(len(rest), generator=generator)]
            present = [there[i] for i in torch.randperm(len(there), generator=generator)]
            pairs = [(name, True) for name in present[:2]]
            pairs += [(name, False) for name in [*expected, *others][:2]]
            for name, truth in pairs:
                number += 1
                text, label = pope.Question(n, name, truth).text, "yes" if truth else "no"
                doc = {"id": number, "type": "discriminative-hallucination", "truth": label}
                doc |= {"image": str(n), "query": text}
                items.append(Item(str(number), str(n), text, label, doc, short))
        association: dict[str, list[str]] = {name: [] for name in objects.NAMES}
        return cls(items, world.picture, world.origin, association=association, parse=parse)

    @classmethod
    def from_files(
        cls,
        annotations: Path,
        *,
        queries: Path | None = None,
        images: Path | None = None,
        relation: Path | None = None,
        safe_words: Path | None = None,
        answered: Collection[str] | None = None,
        parse: pope.Parse = "strict",
        limit: int | None = None,
    ) -> Amber:
        """The published files.

        Args:
            annotations: JSON list of ``{"id", "type", "truth", "hallu"}``.
            queries: JSON list of ``{"id", "image", "query"}``, which picks the items that are asked; None
                when finished answers are graded.
            images: Folder of pictures.
            relation: JSON object of other words per word.
            safe_words: One word per line.
            answered: Ids to keep, all of them asked; None keeps all.
            parse: See the class.
            limit: Most tokens of a description.

        Raises:
            ConfigError: For a line of another form, a truth that is neither yes nor no, an id without
                annotation, or a picture that is not there.
        """
        notes: dict[str, dict[str, Any]] = {}
        for place, row in records(annotations, "id", "type", "truth"):
            if row["type"] == "generative":
                if not isinstance(row["truth"], list):
                    raise ConfigError(f"{place}: truth must be a list of objects")
                row["hallu"] = row.get("hallu") or []
            elif row["truth"] not in ("yes", "no"):
                raise ConfigError(f"{place}: truth must be yes or no, found {row['truth']!r}")
            notes[str(row["id"])] = row
        asked: list[tuple[str, dict[str, Any]]]
        if queries is not None:
            asked = list(records(queries, "id", "image", "query"))
        else:
            asked = [(f"id {key}", {"id": key, "image": key, "query": ""}) for key in notes]
        known = {str(row["id"]) for _, row in asked}
        unknown = [key for key in answered or () if key not in known]
        if unknown:
            raise ConfigError(
                f"id {unknown[0]} is answered, but {queries or annotations} has no such id"
            )
        items = []
        for place, row in asked:
            key = str(row["id"])
            if key not in notes:
                raise ConfigError(f"{place}: {annotations} has no annotation for id {key}")
            if answered is not None and key not in answered:
                continue
            note = notes[key]
            words = isinstance(note["truth"], list)
            target = ", ".join(note["truth"]) if words else str(note["truth"])
            file = picture_file(images, str(row["image"]), place)
            most = (limit or chair.LIMIT) if words else pope.LIMIT
            doc = {**note, "image": file, "query": row["query"]}
            items.append(Item(key, file, str(row["query"]), target, doc, most))
        return cls(
            items,
            opener(images),
            {"annotations": annotations.name},
            association=None if relation is None else _relation(relation),
            safe=() if safe_words is None else _words(safe_words),
            parse=parse,
        )

    def filtered(self, item: Item, response: str) -> str:
        """A description as it is, an answer as "Yes", "No", or as it is."""
        if item.doc["type"] == "generative" or self.parse == "official":
            return response
        said = pope.parse_answer(response, self.parse)
        return response if said is None else "Yes" if said else "No"

    def tally(self, items: Sequence[Item], responses: Sequence[str]) -> dict[str, float]:
        """Counts of one picture."""
        counts: dict[str, float] = {}
        for item, text in zip(items, responses, strict=True):
            doc = item.doc
            if doc["type"] == "generative":
                said = nouns(text, self.vocabulary, self._lemma)
                part = grade(
                    said,
                    doc["truth"],
                    doc["hallu"],
                    association=self.association,
                    safe=self.safe,
                    similar=self.similar,
                )
                part["g.words"] = len(re.findall(r"\w+", text))
            else:
                part = judge(self.filtered(item, text), doc["truth"], doc["type"])
            for name, value in part.items():
                counts[name] = counts.get(name, 0) + value
        return counts

    def payload(self, item: Item, response: str) -> dict[str, Any]:
        """The item's own counts."""
        kind = "amber_g" if item.doc["type"] == "generative" else "amber_d"
        return {kind: {"id": item.doc["id"], **self.tally([item], [response])}}

    def write(self, folder: Path, responses: Sequence[str]) -> None:
        """``responses.json``, which the original's scorer reads."""
        pairs = zip(self.items, responses, strict=True)
        rows = [{"id": item.doc["id"], "response": self.filtered(item, t)} for item, t in pairs]
        put(folder / "responses.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def read_responses(path: Path) -> dict[str, str]:
    """Finished answers by id, from a JSON list of ``{"id", "response"}``.

    Raises:
        ConfigError: For an entry of another form, or an id twice.
    """
    found: dict[str, str] = {}
    for place, row in records(path, "id", "response"):
        key = str(row["id"])
        if key in found:
            raise ConfigError(f"{place}: id {key} is there twice")
        found[key] = str(row["response"])
    return found


def _relation(path: Path) -> dict[str, list[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {str(word): [str(other) for other in others] for word, others in data.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} must be a JSON object of lists of words: {error}") from error


def _words(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
