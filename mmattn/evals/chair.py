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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


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
    caption: str, synonyms: Mapping[str, str], lemma: Callable[[str], str] = _as_is
) -> list[str]:
    """List the objects that a caption mentions, in order, repeated ones included.

    Longer names win: with "hot dog" and "dog" in the vocabulary, "a hot dog" is no dog.

    Args:
        caption: Free text.
        synonyms: Lower-case word or phrase to the object name it stands for.
        lemma: Reduces a lower-case word to the form used in `synonyms`, for example plural to
            singular.
    """
    words = [
        lemma(word) for word in "".join(c if c.isalnum() else " " for c in caption.lower()).split()
    ]
    longest = max((len(phrase.split()) for phrase in synonyms), default=0)
    found, start = [], 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            phrase = " ".join(words[start : start + length])
            if phrase in synonyms:
                found.append(synonyms[phrase])
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
