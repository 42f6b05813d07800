"""The grammar of `RulePlanner`: counts, lists and references in an English request for pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmattn_pipelines.chatdit_plan import NUMBER_WORDS, Picture, PlannerError

_CONTINUING = (
    "above against among around as at before behind below beneath beside between beyond by during from in "
    "inside into near of on over through to toward under underneath upon while with without"
)
PREPOSITIONS = frozenset(_CONTINUING.split())
"""Words that continue a clause without a comma."""

_NUMBERS = {word.lower(): value for value, word in enumerate(NUMBER_WORDS, 1)}
_PLACES = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_ORDINALS = {word: place for place, word in enumerate(_PLACES.split(), 1)}
_NUMBER = rf"(?:\d{{1,3}}|{'|'.join(_NUMBERS)}|a dozen|an?\s+pair\s+of|a\s+couple\s+of)"
_ONE = (
    r"(?:picture|image|photo|photograph|drawing|illustration|painting|sketch|panel|scene|frame|version|"
    r"variation|variant|view|poster|icon|logo|sticker|page)"
)
_MANY = rf"(?:{_ONE}s|sketches|photographies|slides|steps|stages)"
_LOOSE = (
    r"(?:new|more|other|different|small|large|matching|related|further|separate|similar|single)"
)
_MINE = r"(?:the|these|those|both|my|your|our|all|first|last)"
_COUNTED = re.compile(
    rf"(?:(?P<mine>\b{_MINE})\s+)?\b(?P<n>{_NUMBER})\s+(?:{_LOOSE}\s+){{0,2}}(?:{_MANY}|{_ONE})\b",
    re.I,
)
_VAGUE = (
    (re.compile(r"\b(?:before[ -]and[ -]after|comparison|compare|side by side)\b", re.I), 2),
    (re.compile(r"\b(?:series|progression|sequence|storyboard|comic|story|storybook)\b", re.I), 4),
    (re.compile(r"\bpicture book\b", re.I), 4),
    (re.compile(rf"\b(?:several|multiple|many|various)\s+(?:{_LOOSE}\s+)*{_MANY}\b", re.I), 3),
    (re.compile(rf"\b(?:a few)\s+(?:{_LOOSE}\s+)*{_MANY}\b", re.I), 3),
    (re.compile(rf"\bsome\s+(?:{_LOOSE}\s+)*{_MANY}\b", re.I), 2),
    (re.compile(rf"\b{_MANY}\b", re.I), 2),
)
_OWN = re.compile(rf"\b{_MINE}\s+(?:{_NUMBER}\s+)?(?:{_LOOSE}\s+)*{_MANY}\b", re.I)
_STORY = re.compile(r"\b(?:story|storyboard|comic|storybook|picture book|articles?)\b", re.I)
_ARTICLE = re.compile(r"\b(?:articles?|picture book|storybook|blog post|illustrated)\b", re.I)
_ARTICLE_PICTURES = 3
_EACH = re.compile(r"(?<!, )(?<!,)\b(?:each|every)\b", re.I)

_LAST = r"last|latest|previous|newest"
_PLACE = re.compile(
    rf"#(?P<tag>\d+)\b|\b(?P<word>{'|'.join(_ORDINALS)}|\d+(?:st|nd|rd|th)|{_LAST})\s+(?:{_ONE}|one)\b"
    rf"|\b{_ONE}\s+(?:number\s+|no\.?\s*)?(?P<plain>\d+)\b",
    re.I,
)
_SPAN = re.compile(rf"\b(?P<end>first|last)\s+(?P<n>{_NUMBER})\s+(?:{_MANY})\b", re.I)
_SINGULAR = (
    rf"(?:it|(?:this|that)(?=\s*(?:[,.;!?]|$|(?:into|to|in|on|with|again|but|and)\b))|"
    rf"the same|again|(?:the|this|that|my)\s+{_ONE}|another\s+(?:one|{_ONE}))"
)
_PLURAL = rf"(?:them|these|those|both|(?:the|my)\s+(?:{_NUMBER}\s+)?{_MANY}|each)"
_PRONOUN = re.compile(rf"\b(?:(?P<many>{_PLURAL})|(?P<one>{_SINGULAR}))\b", re.I)
_FRESH = re.compile(
    rf"\b(?:an?|{_NUMBER})\s+(?!{_LOOSE}\b|{_ONE}|story|article|illustrated)\w+", re.I
)
_POLITE = (
    r"(?:please|now|then|next|ok(?:ay)?|and|also|can you|could you|would you|i want(?: you to)?|"
    r"i(?:'d| would) like(?: you to)?|let us|let's)"
)
_EDIT_VERB = (
    rf"(?:make(?!\s+(?:me\s+)?(?:an?|some|\d+|{'|'.join(_NUMBERS)})\b)|turn|change|recolou?r|repaint|redraw|"
    r"edit|convert|transform|put|add|remove|replace|give|place|move|combine|merge|mix|continue|repeat|redo)"
)
_EDIT = re.compile(rf"^(?:{_POLITE}[,\s]+)*{_EDIT_VERB}\b", re.I)
_ENTITY = re.compile(r"<([^<>\[\]\s][^<>\[\]]*)>")


def is_article(text: str) -> bool:
    """Whether the words ask for an illustrated article or a picture book."""
    return _ARTICLE.search(text) is not None


def says_each(head: str) -> bool:
    """Whether something is wanted for each picture; ", each on a white background" is not that."""
    return _EACH.search(head) is not None


def split_list(text: str) -> tuple[str, str]:
    """What comes before a list, and the list.

    A list is numbered or dashed lines, what follows a colon, or the further sentences of a story.
    """
    if bullet := re.search(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+", text, re.M):
        return text[: bullet.start()].strip().rstrip(":"), text[bullet.start() :]
    if colon := re.search(r":\s+", text):
        return text[: colon.start()], text[colon.end() :].strip()
    first, *rest = _sentences(text)
    if len(rest) > 1 and _STORY.search(first):
        return first, ". ".join(rest) + "."
    return text, ""


def count(head: str, listed: str, article: bool) -> int:
    """How many pictures are wanted; ChatDiT's conventions for words that do not say exactly.

    "some" 2, "several", "multiple", "a few" and articles 3, stories, series and progressions 4, comparisons
    2; one otherwise. A list says it itself unless a number was written.
    """
    if (number := _written(head)) is not None:
        return number
    if len(parts := _parts(listed)) > 1:
        return len(parts)
    new = _OWN.sub("", head)
    words = (value for pattern, value in _VAGUE if pattern.search(new))
    value = next(words, _ARTICLE_PICTURES if article else 1)
    sentences = len(_sentences(listed))
    return sentences if value > 1 and sentences > 1 else value


def _written(head: str) -> int | None:
    """The number in front of a word for pictures, unless it counts pictures that are there already."""
    for found in _COUNTED.finditer(head):
        if found["mine"] is None:
            return _value(found["n"])
    return None


def _value(number: str) -> int:
    word = number.lower()
    if not word.isdigit():
        return 12 if word == "a dozen" else _NUMBERS.get(word, 2)  # a pair, a couple
    if int(word) < 1:
        raise PlannerError(f"the message asks for {word} pictures; ask for at least one")
    return int(word)


def items(listed: str, wanted: int) -> list[str]:
    """The `wanted` things that a list names, or nothing if it is one description for all.

    Raises:
        PlannerError: the list has lines or semicolons and names another number of things.
    """
    parts = _parts(listed)
    if len(parts) > 1 and len(parts) != wanted:
        raise PlannerError(
            f"the message asks for {wanted} pictures and lists {len(parts)} things: {parts}; name as many "
            "as you ask for, or leave the number out"
        )
    commas = [part.strip() for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", listed)]
    for found in (parts, _sentences(listed), [part for part in commas if part]):
        if len(found) == wanted > 1:
            return found
    return []


def _parts(listed: str) -> list[str]:
    """The list taken apart at its numbered or dashed lines, or at its semicolons."""
    for pattern in (r"\n[ \t]*(?:\d+[.)]|[-*•])[ \t]+", r"\s*;\s*(?:and\s+)?"):
        found = [_tidy(part) for part in re.split(pattern, "\n" + listed) if part.strip()]
        if len(found) > 1:
            return found
    return []


def _sentences(text: str) -> list[str]:
    return [_tidy(part) for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


def _tidy(part: str) -> str:
    return " ".join(part.split()).rstrip(".")


def sources(head: str, given: Sequence[Picture], memory: Sequence[Picture]) -> tuple[Picture, ...]:
    """The pictures that a message is about.

    Places ("the second image", "image 2", "the last picture") count among the pictures that came with the
    message, or, without any, among all of the conversation; "#2" always means the conversation. "it" is the
    last picture of the last round, "them" all that it drew. Whatever came with the message is meant too,
    unless places name some of it.

    Raises:
        PlannerError: a place where there is no picture.
    """
    everything = (*memory, *given)
    pool = list(given or memory)
    named: list[Picture] = []
    if span := _SPAN.search(head):
        size = _value(span["n"])
        _at(size, pool, span[0])
        named += pool[:size] if span["end"].lower() == "first" else pool[-size:]
    for found in _PLACE.finditer(head):
        if not pool and (_written(head) or 1) > 1:
            continue  # "two pictures, the first picture ..." speaks of pictures to be drawn
        where = list(everything) if found["tag"] else pool
        named.append(_at(_place(found), where, found[0]))
    if named:
        picked = [p for p in given if p in named] if given else []
        kept = list(given) if given and not picked else []
        return tuple(dict.fromkeys([*named, *kept]))
    if given or not memory:
        return tuple(given)
    for name in _names(head, memory):
        return (next(p for p in reversed(memory) if name in _ENTITY.findall(p.description)),)
    pronoun = _PRONOUN.search(head)
    if pronoun is None or (
        not _EDIT.match(head.strip()) and _FRESH.search(head[: pronoun.start()])
    ):
        return ()
    latest = [p for p in memory if p.round == memory[-1].round]
    latest = [p for p in latest if p.drawn] or latest
    return tuple(latest) if pronoun["many"] or says_each(head) else (latest[-1],)


def _names(head: str, memory: Sequence[Picture]) -> list[str]:
    """Names that earlier descriptions give in angle brackets and the message repeats."""
    known = {name for picture in memory for name in _ENTITY.findall(picture.description)}
    return [name for name in sorted(known) if re.search(rf"\b{re.escape(name)}\b", head)]


def _place(found: re.Match[str]) -> int:
    """Place from 1, or -1 for the last."""
    if digits := found["tag"] or found["plain"]:
        return int(digits)
    word = found["word"].lower()
    if re.fullmatch(_LAST, word):
        return -1
    return _ORDINALS[word] if word in _ORDINALS else int(word[:-2])


def _at(place: int, where: Sequence[Picture], said: str) -> Picture:
    if place == 0 or place > len(where) or not where:
        raise PlannerError(
            f"the message names {said!r} and there are {len(where)} pictures to choose from; send it "
            "along, or name one of them"
        )
    return where[place - 1 if place > 0 else -1]


_OPENING = (
    rf"{_POLITE}[,\s]+",
    r"(?:draw|paint|make|create|generate|show|give|design|sketch|illustrate|tell|write|turn|change|recolou?r|"
    r"repaint|redraw|edit|convert|transform|repeat|redo)\b\s*",
    r"(?:me|us)\b\s*",
    rf"(?:(?:{_NUMBER}|an?|the|these|those|my|some|several|multiple|many|few|another|short|illustrated|"
    rf"{_LOOSE})\s+)*(?:{_MANY}|picture book|picture|image|version|variation|story|storyboard|storybook|"
    r"comic|series|sequence|progression|article|blog post)\b"
    r"(?:\s+(?:of|about|showing|where|in which)\b)?\s*",
    rf"(?:(?:of|from|for)\s+)?(?:each|every|all|both|{_SINGULAR}|{_PLURAL})\b"
    rf"(?:\s+(?:of\s+)?(?:them|these|those|{_ONE}))?(?:\s+(?:into|to|look)\b)?\s*",
    r"(?:of|about|showing)\s+",
    r"[,.:\s]+",
)
_PLACE_PHRASE = re.compile(
    rf"(?:\bof\s+|\bfrom\s+)?(?:\bthe\s+|\bmy\s+)?(?:{_PLACE.pattern}|"
    rf"{_SPAN.pattern.replace('?P<n>', '?:')})",
    re.I,
)
_ASIDE = re.compile(
    rf"[,\s]*\b(?:in|with|as|using)\s+{_NUMBER}\s+(?:{_LOOSE}\s+)*(?:{_MANY}|{_ONE})\b", re.I
)


def subject(head: str) -> str:
    """What is left of a request without its courtesies, verbs, counts and references."""
    said = _ASIDE.sub("", _PLACE_PHRASE.sub(" it ", head)).strip()
    openings = [re.compile(pattern, re.I) for pattern in _OPENING]
    while found := next((m for p in openings if (m := p.match(said)) and m.end()), None):
        said = said[found.end() :]
    return said.strip().rstrip(".!?:").strip()
