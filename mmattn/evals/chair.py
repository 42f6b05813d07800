"""CHAIR: how many of the objects a caption mentions are not in the picture.

The idea: look up every object a caption names and compare with what is known to be there.

- `chair_i` is the share of mentions that are hallucinated; every mention counts, repeated ones
  included;
- `chair_s` is the share of captions with at least one hallucinated mention;
- `coverage` is the share of the objects that are there which the captions name. Silence
  hallucinates nothing, so the first two numbers mean little without this one.

All three are ratios over the whole corpus, not means over captions.

Paper: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
Follows the authors' code (LisaAnne/Hallucination) and is checked on hand-worked examples.
Deviations: the vocabulary and its synonyms are an argument, where the original fixes 80 COCO
classes and lemmatises with nltk; pass a `lemma` function for free text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmattn.errors import ConfigError
from mmattn.evals._protocol import (
    Item,
    Protocol,
    Rate,
    World,
    opener,
    picture_file,
    put_lines,
    ratio,
    records,
)

RATES = (
    Rate("chair_i", "CHAIR i", "percent", "low"),
    Rate("chair_s", "CHAIR s", "percent", "low"),
    Rate("coverage", "recall", "percent", "high"),
    Rate("words", "words", "number"),
    Rate("mentions", "mentions", "number"),
    Rate("broken", "broken", "percent", "low"),
)
"""What a table shows: length and recall always stand beside CHAIR, as silence scores 0."""

PROMPT = "Please describe this image in detail."
LIMIT, MINI_LIMIT = 512, 96
"""Most tokens of a caption, for other models and for the embedded one. Numbers at 64 and at 512 differ by a
factor of two, so they cannot be compared."""


@dataclass(frozen=True)
class ChairScore:
    """Hallucination rates of a list of captions.

    Args:
        chair_i: Hallucinated mentions per mention; 0 if nothing is mentioned.
        chair_s: Captions with a hallucinated mention per caption.
        coverage: Distinct objects rightly mentioned per object that is there.
        mentions: Mean number of mentions per caption.
        by_rank: Share of hallucinated mentions among all first, second, third, ... mentions; it
            rises where a model drifts from the picture as its caption grows.
        count: Number of captions.
    """

    chair_i: float
    chair_s: float
    coverage: float
    mentions: float
    by_rank: tuple[float, ...]
    count: int


def _as_is(word: str) -> str:
    return word


def find_objects(
    caption: str,
    synonyms: Mapping[str, str],
    lemma: Callable[[str], str] = _as_is,
    unless: Mapping[str, str] | None = None,
) -> list[str]:
    """List the objects that a caption mentions, in order, repeated ones included.

    Longer names win: with "hot dog" and "dog" in the vocabulary, "a hot dog" is no dog.

    Args:
        caption: Free text.
        synonyms: Lower-case word or phrase to the object name it stands for; to "" where it stands for
            none ("train track" is no train).
        lemma: Reduces a lower-case word to the form used in `synonyms`, for example plural to
            singular.
        unless: A word is left out of captions that also have the word it maps to; the original drops
            "seat" where there is a "toilet".
    """
    words = [
        lemma(word) for word in "".join(c if c.isalnum() else " " for c in caption.lower()).split()
    ]
    if unless:
        present = set(words)
        words = [word for word in words if unless.get(word) not in present]
    longest = max((len(phrase.split()) for phrase in synonyms), default=0)
    found, start = [], 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            phrase = " ".join(words[start : start + length])
            if phrase in synonyms:
                found += [synonyms[phrase]] if synonyms[phrase] else []
                start += length
                break
        else:
            start += 1
    return found


def score(mentions: Sequence[Sequence[str]], truth: Sequence[Collection[str]]) -> ChairScore:
    """Grade captions by the objects they mention.

    Args:
        mentions: Object names per caption, one entry per mention, in order; see `find_objects`.
        truth: Object names that are in the picture, in the same order.

    Raises:
        ValueError: Different lengths, or no captions at all.
    """
    if len(mentions) != len(truth):
        raise ValueError(
            f"Found {len(mentions)} captions for {len(truth)} pictures; "
            "pass one caption per picture."
        )
    if not truth:
        raise ValueError("There are no captions to grade; pass at least one.")
    wrong = [
        [name not in there for name in said] for said, there in zip(mentions, truth, strict=True)
    ]
    total = sum(map(len, wrong))
    right = sum(len(set(said) & set(there)) for said, there in zip(mentions, truth, strict=True))
    objects = sum(len(set(there)) for there in truth)
    ranks = [
        [row[rank] for row in wrong if rank < len(row)] for rank in range(max(map(len, wrong)))
    ]
    return ChairScore(
        chair_i=sum(map(sum, wrong)) / total if total else 0.0,
        chair_s=sum(map(any, wrong)) / len(wrong),
        coverage=right / objects if objects else 0.0,
        mentions=total / len(wrong),
        by_rank=tuple(sum(column) / len(column) for column in ranks),
        count=len(wrong),
    )


def rates(totals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The corpus-level ratios from counts summed over captions, and the mean lengths."""
    captions = totals["captions"]
    return {
        "chair_i": ratio(totals["wrong"], totals["mentions"]),
        "chair_s": ratio(totals["flawed"], captions),
        "coverage": ratio(totals["right"], totals["objects"]),
        "words": ratio(totals["words"], captions),
        "mentions": ratio(totals["mentions"], captions),
        "broken": ratio(totals["broken"], captions),
    }


def stutters(text: str) -> bool:
    """Whether `text` says one word three times in a row: broken captions flatter CHAIR."""
    words = text.split()
    return any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))


def singular(known: Collection[str]) -> Callable[[str], str]:
    """A lemma function that takes plural endings off where what is left is one of the `known` words."""
    words = {word for phrase in known for word in phrase.split()}

    def lemma(word: str) -> str:
        forms = (
            word,
            word.removesuffix("s"),
            word.removesuffix("es"),
            word.removesuffix("ies") + "y",
        )
        return next((form for form in forms if form in words), word)

    return lemma


_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)
UNLESS = {"seat": "toilet"}


def read_synonyms(path: Path) -> dict[str, str]:
    """Words of a file with one class per line, ``person, girl, boy``: the class first, then its synonyms.

    The pairs of words that the original merges are added: young and grown animals ("baby bird" is a
    bird and no person), "passenger jet", "bow tie", "toilet seat", and two that name no object.

    Raises:
        ConfigError: For a missing or empty file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file at {path}")
    synonyms: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        synonyms.update(dict.fromkeys(names, names[0]))
    if not synonyms:
        raise ConfigError(f"{path} is empty; it needs one class per line: person, girl, boy")
    pairs = {f"{age} {name}": name for age in ("baby", "adult") for name in _ANIMALS}
    pairs |= {f"passenger {name}": name for name in ("jet", "train")}
    pairs |= {"bow tie": "tie", "toilet seat": "toilet"}
    synonyms |= {pair: synonyms.get(name, "") for pair, name in pairs.items()}
    return {"home plate": "", "train track": "", **synonyms}


class Chair(Protocol):
    """Captions of pictures whose objects are known.

    Args:
        items: Requests; ``doc["gt_object"]`` lists what is there.
        picture: Opens pictures.
        origin: Where they come from.
        find: Objects that a caption mentions.
    """

    name: ClassVar[str] = "chair"

    def __init__(
        self,
        items: Sequence[Item],
        picture: Callable[[str], Any] | None,
        origin: Mapping[str, Any],
        find: Callable[[str], list[str]],
    ) -> None:
        super().__init__(items, picture, origin)
        self.find = find

    @classmethod
    def from_world(
        cls,
        world: World,
        *,
        embedded: bool = True,
        prompt: str | None = None,
        limit: int | None = None,
    ) -> Chair:
        """One caption per procedural scene."""
        from mmattn.mini import objects

        prompt = prompt or (objects.CAPTION_PROMPT if embedded else PROMPT)
        items = [
            Item(
                str(n),
                str(n),
                prompt,
                ", ".join(scene.names),
                {"image_id": n, "image": str(n), "gt_object": list(scene.names)},
                limit or (MINI_LIMIT if embedded else LIMIT),
            )
            for n, scene in enumerate(world.scenes)
        ]
        lemma = singular(objects.NAMES)

        def find(text: str) -> list[str]:
            words = re.findall(r"[a-z]+|[,.]", text.lower())
            return objects.mentioned(" ".join(map(lemma, words)))

        return cls(items, world.picture, world.origin, find)

    @classmethod
    def from_files(
        cls,
        truth: Path,
        *,
        images: Path | None = None,
        synonyms: Path | None = None,
        captioned: Collection[str] | None = None,
        prompt: str = PROMPT,
        limit: int | None = None,
    ) -> Chair:
        """Pictures with ground truth.

        Args:
            truth: JSON list or JSONL of ``{"image_id", "gt_object": [...]}``; ``objects`` for ``gt_object``
                works too. ``captions``, a list of reference captions, adds the objects they mention, and
                ``image`` names the file where it does not end in the id.
            images: Folder of pictures; None when finished captions are graded.
            synonyms: See `read_synonyms`. None takes the object names as they are.
            captioned: Ids to keep, all of them with ground truth; None keeps all.
            prompt, limit: The request, and most tokens of a caption.

        Raises:
            ConfigError: For a line without ground truth, a picture that is not there, an id twice, or one
                of `captioned` without ground truth.
        """
        rows = list(records(truth, "image_id"))
        for place, row in rows:
            listed = row.get("gt_object", row.get("objects"))
            if not isinstance(listed, list) and not isinstance(row.get("captions"), list):
                raise ConfigError(f"{place} has no list 'gt_object' of the objects that are there")
            row["gt_object"] = [str(name).lower() for name in listed or ()]
        if synonyms is None:
            names = {name: name for _, row in rows for name in row["gt_object"]}
        else:
            names = read_synonyms(synonyms)
        known = {str(row["image_id"]) for _, row in rows}
        unknown = [key for key in captioned or () if key not in known]
        if unknown:
            raise ConfigError(
                f"{truth} says nothing about image_id {unknown[0]}, which has a caption"
            )
        lemma = singular(names)

        def find(text: str) -> list[str]:
            return find_objects(text, names, lemma, None if synonyms is None else UNLESS)

        by_id = _by_id(images)
        items: dict[str, Item] = {}
        for place, row in rows:
            key = str(row["image_id"])
            if key in items:
                raise ConfigError(f"{place}: image_id {key} is there twice")
            if captioned is not None and key not in captioned:
                continue
            file = str(row.get("image") or by_id.get(key, f"a picture whose name ends in {key}"))
            there = {names.get(name, name) for name in row["gt_object"]}
            there |= {name for text in row.get("captions", ()) for name in find(text)}
            doc = {"image_id": row["image_id"], "image": file, "gt_object": sorted(there)}
            file = picture_file(images, file, place)
            items[key] = Item(key, file, prompt, ", ".join(sorted(there)), doc, limit or LIMIT)
        origin = {"truth": truth.name, "images": None if images is None else images.name}
        return cls(list(items.values()), opener(images), origin, find)

    def tally(self, items: Sequence[Item], responses: Sequence[str]) -> dict[str, float]:
        """Mentions, wrong ones, and lengths of one picture's caption."""
        counts: dict[str, float] = dict.fromkeys(
            ("captions", "mentions", "wrong", "flawed", "right", "objects", "words", "broken"), 0
        )
        for item, text in zip(items, responses, strict=True):
            there, said = set(item.doc["gt_object"]), self.find(text)
            wrong = sum(name not in there for name in said)
            counts["captions"] += 1
            counts["mentions"] += len(said)
            counts["wrong"] += wrong
            counts["flawed"] += wrong > 0
            counts["right"] += len(there & set(said))
            counts["objects"] += len(there)
            counts["words"] += len(re.findall(r"\w+", text))
            counts["broken"] += stutters(text)
        return counts

    def payload(self, item: Item, response: str) -> dict[str, Any]:
        """The mentions and which of them are not there."""
        said, there = self.find(response), set(item.doc["gt_object"])
        wrong = [name for name in said if name not in there]
        entry = {"image_id": item.doc["image_id"], "caption": response}
        entry |= {"mentioned": said, "hallucinated": wrong}
        return {"coco_cap_chair_i": entry, "coco_cap_chair_s": entry}

    def write(self, folder: Path, responses: Sequence[str]) -> None:
        """``captions.jsonl``, which the original's scorer reads."""
        pairs = zip(self.items, responses, strict=True)
        rows = [{"image_id": item.doc["image_id"], "caption": text} for item, text in pairs]
        put_lines(folder / "captions.jsonl", rows)


def read_captions(path: Path) -> dict[str, str]:
    """Captions by image id, from a JSON list or JSONL of ``{"image_id", "caption"}``.

    Raises:
        ConfigError: For a line of another form, or an id twice.
    """
    found: dict[str, str] = {}
    for place, row in records(path, "image_id", "caption"):
        key = str(row["image_id"])
        if key in found:
            raise ConfigError(f"{place}: image_id {key} is there twice")
        found[key] = str(row["caption"])
    return found


def _by_id(images: Path | None) -> dict[str, str]:
    """File names by the number they end in: COCO_val2014_000000000042.jpg has the id 42."""
    files: Iterable[Path] = (
        [] if images is None or not images.is_dir() else sorted(images.iterdir())
    )
    ends = {file.name: re.search(r"(\d+)$", file.stem) for file in files}
    return {str(int(end.group())): name for name, end in ends.items() if end is not None}
