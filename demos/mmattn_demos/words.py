"""Where a model looks for a word: maps of one text token, or of the tokens that a word is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmattn.attaching import attach
from mmattn.errors import ConfigError, suggest
from mmattn.loading import Loaded
from mmattn.methods._heatmap import render
from mmattn.methods.attention_maps import AttentionMap, AttentionMaps
from mmattn.sites import Site
from mmattn_demos.limits import WORD_LENGTH, short_enough


@dataclass(frozen=True)
class WordMaps:
    """Attention to or from one word.

    Args:
        word: as found in the text.
        mean: ``[T, Y, X]`` over all layers, each layer normalised to sum 1.
        layers: (site path, map) from the first layer to the last.
    """

    word: str
    mean: torch.Tensor
    layers: list[tuple[str, torch.Tensor]]


def words_of(text: str) -> list[str]:
    """The different words of `text`, in order."""
    stripped = (word.strip(".,:;!?\"'()").lower() for word in text.split())
    return list(dict.fromkeys(word for word in stripped if word))


def find_word(text: str, word: str | None) -> str:
    """`word`, or the first longer word of `text` when none is given.

    Raises:
        ConfigError: when the text has no such word; names near ones.
    """
    known = words_of(text)
    word = short_enough(word, "the word", WORD_LENGTH).lower()
    if not word:
        if not known:
            raise ConfigError("there is no word to look for; the text is empty")
        return max(known, key=lambda w: len(w) > 3)
    if word not in known:
        raise ConfigError(
            f"the text has no word {word!r}{suggest(word, known)} Its words: {', '.join(known[:24])}"
        )
    return word


def token_span(tokenizer: Any, ids: Sequence[int], word: str) -> list[int]:
    """Positions in `ids` of the tokens that spell the first `word`.

    Raises:
        ConfigError: when no tokens spell it (an unknown word, say).
    """

    def text(start: int, stop: int) -> str:
        said: str = tokenizer.decode(ids[max(0, start) : stop], skip_special_tokens=True)
        return said.strip().lower()

    for start in range(len(ids)):
        for stop in range(start + 1, min(start + 9, len(ids)) + 1):
            if text(start, stop) != word:
                continue
            after = text(start, stop + 1)[len(word) :]
            before = text(start - 1, stop)[: -len(word)]
            # Part of a longer word: the tokens beside it join without a blank.
            if not (after[:1].isalnum() or before[-1:].isalnum()):
                return list(range(start, stop))
    raise ConfigError(
        f"the model's tokens do not spell {word!r}; it may not know the word. Choose another one"
    )


def in_prompt(loaded: Loaded, prompt: str, word: str | None, call: Callable[[], Any]) -> WordMaps:
    """How much the image tokens of a pipeline read a word of the prompt, over all steps.

    Args:
        loaded: a text-to-image or text-to-video pipeline of the FLUX, Wan or Stable Diffusion kind.
        prompt: what `call` draws.
        word: of the prompt; None takes one.
        call: draws once.

    Raises:
        ConfigError: for a word that is not there, or a pipeline whose text tokens are of several encoders.
    """
    word = find_word(prompt, word)
    pipe = loaded.target
    if getattr(pipe, "tokenizer_3", None) is not None:
        raise ConfigError(
            f"{type(pipe).__name__} joins the tokens of three text encoders; word maps know FLUX, Wan and "
            "Stable Diffusion up to XL"
        )
    joint = hasattr(pipe, "_unpack_latents")
    tokenizer = pipe.tokenizer_2 if joint else pipe.tokenizer
    # The T5 of FLUX and Wan has no token in front; CLIP has one, which stays in `ids`.
    ids = tokenizer(prompt)["input_ids"]
    at = token_span(tokenizer, ids, word)
    with attach(pipe, AttentionMaps(tokens=tuple(at)), sites=_reads_text) as session:
        call()
        maps = AttentionMaps.maps(session)
    last = max(one.row for one in maps)  # of a guidance batch, the row of the prompt
    return _gather(word, [one for one in maps if one.branch == 0 and one.row == last])


def _reads_text(site: Site) -> bool:
    return site.kind in ("joint", "cross") and "text" not in site.tags


def _decoder(site: Site) -> bool:
    return "decoder" in site.tags


@torch.no_grad()
def in_answer(
    loaded: Loaded, picture: Image.Image, question: str, answer: str, word: str | None
) -> WordMaps:
    """Where the untouched language model looked in the picture when it wrote a word of its answer.

    The prompt and the answer are read in one forward, in which the row before a token is the one that
    wrote it; with greedy answers this is the attention of the generation itself.

    Raises:
        ConfigError: for a word that is not there.
    """
    word = find_word(answer, word)
    model, processor = loaded.target, loaded.processor
    turn = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    tokenizer = processor.tokenizer
    said = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = inputs["input_ids"].shape[1]
    at = [start + i - 1 for i in token_span(tokenizer, said[0].tolist(), word)]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            more = torch.zeros_like(said)
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name])], 1)
    inputs = inputs.to(model.device, model.dtype)
    with attach(model, AttentionMaps(tokens=tuple(at)), sites=_decoder) as session:
        model(**inputs, use_cache=False)
        maps = AttentionMaps.maps(session)
    return _gather(word, [one for one in maps if one.row == 0])


def _gather(word: str, maps: list[AttentionMap]) -> WordMaps:
    layers: dict[str, list[torch.Tensor]] = {}
    for one in maps:
        layers.setdefault(one.path, []).append(one.values / one.values.sum().clamp_min(1e-12))
    shapes = {values[0].shape for values in layers.values()}
    largest = max(shapes, key=lambda shape: shape.numel())
    each = [(path, torch.stack(values).mean(0)) for path, values in layers.items()]
    same = [values for _, values in each if values.shape == largest]
    return WordMaps(word, torch.stack(same).mean(0), each)


def drawn(values: torch.Tensor, picture: Image.Image | Sequence[Image.Image] | None) -> Image.Image:
    """A map over a picture or the frames of a clip."""
    return render(values, picture)
