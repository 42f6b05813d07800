"""Tokenizers for the embedded text-to-image and text-to-video models, built from a closed word
list.

The models read a small language: the captions of `mmattn.mini.scenes`. Every word of it is one
token. Other words fall back to letters, so no prompt is an error, but a model has not learned what
they mean; `unknown_words` names them.
"""

from __future__ import annotations

import json
import re

import torch
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from mmattn.mini.draw import BACKGROUNDS, COLOURS, SHAPES, plural

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.?:'-"

WORDS: tuple[str, ...] = (
    *("a", "an", "the", "on", "in", "of", "and", "with", "background"),
    *("big", "small", "left", "right", "top", "bottom", "center", "above", "below"),
    *("two", "three", "moving", "up", "down", "growing", "shrinking", "rotating"),
    *SHAPES,
    *(plural(shape) for shape in SHAPES),
    *COLOURS,
    *BACKGROUNDS,
)
"""The words the models know."""


def unknown_words(prompt: str) -> list[str]:
    """Words of `prompt` that the embedded models have not learned, in order."""
    return [word for word in re.findall(r"[a-z0-9']+", prompt.lower()) if word not in WORDS]


def t5_tokenizer(max_length: int) -> T5Tokenizer:
    """Return a T5 tokenizer with one piece per word of `WORDS` (pad 0, end of sequence 1, unknown
    2).

    Words also have capitalised and upper-case pieces: a normalizer that lower-cases the prompt
    would be the usual way, but `T5Tokenizer` rebuilds its own normalizer when it is loaded.
    `tie_cases` makes the pieces mean the same.
    """
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spellings = [spell for word in WORDS for spell in (word, word.capitalize(), word.upper())]
    vocab += [("▁" + word, -2.0) for word in dict.fromkeys(spellings)]
    letters = dict.fromkeys("▁" + _LETTERS + _LETTERS.upper())
    vocab += [(letter, -12.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def tie_cases(tokenizer: T5Tokenizer, embedding: torch.nn.Embedding) -> None:
    """Copy the embedding of every lower-case piece to its capitalised and upper-case spellings.

    Training captions are lower-case, so the other rows are only ever set by this copy.
    """
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        for piece, row in ids.items():
            lower = piece.lower()
            if piece != lower and lower in ids:
                embedding.weight[row] = embedding.weight[ids[lower]]


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer that has one token per word of `WORDS` (begin 0, end and pad 1)."""
    like = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer, bpe.pre_tokenizer = like.normalizer, like.pre_tokenizer
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 20,
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=1,
            end_of_word_suffix="</w>",
            initial_alphabet=list(_LETTERS),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for letter in _LETTERS:
        for piece in (letter, letter + "</w>"):
            vocab.setdefault(piece, len(vocab))
    merges = [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" "))
        for pair in model["merges"]
    ]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
