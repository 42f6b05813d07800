"""Beam search that can go back, for ``generate(custom_generate=...)`` of transformers.

It follows transformers' own beam search step by step, and keeps what it needs to return to an earlier step:
the beams, their scores, the finished answers. Keys and values are not kept. The prompt's are those of every
beam, and those of the answer are computed again when it goes back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import HostVersionError, UnsupportedCall
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.methods.opera import Opera

_FIRST = 10
_NEVER = -1e9


@dataclass(frozen=True)
class Beams:
    """Where a search stands before a step.

    Args:
        ids: ``[B, N]`` prompt and answer of the running beams; scores ``[B]`` of them.
        done: ``(score, ids)`` of finished answers, best first.
        trust: what the method knows.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    done: tuple[tuple[float, torch.Tensor], ...] = ()
    trust: Any = None


class BeamSearch:
    """One search strategy; holds nothing from call to call.

    Args:
        trust: returns what the method knows of the running generation.
        method: its settings.
        site: where to note the number of times it went back.
    """

    def __init__(self, trust: Callable[[], Any], method: Opera, site: Site) -> None:
        self.trust, self.method, self.site = trust, method, site

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Called by ``generate`` in place of its own search; `input_ids` are expanded to beams."""
        _check(model, input_ids, generation_config)
        prompt, past, rolled = input_ids.shape[1], 0, 0
        scores = torch.zeros(len(input_ids), device=input_ids.device)
        scores[1:] = _NEVER
        now = Beams(input_ids, scores)
        before: dict[int, Beams] = {}
        picked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        banned: dict[int, list[tuple[int, int]]] = {}
        tries: dict[int, int] = {}
        while True:
            step = now.ids.shape[1] - prompt
            trust = self.trust() if step else None
            before[step] = replace(now, trust=None if trust is None else trust.kept())
            if step == 0:
                inputs = model.prepare_inputs_for_generation(
                    now.ids, is_first_iteration=True, **kwargs
                )
            else:
                inputs = model.prepare_inputs_for_generation(
                    now.ids, next_sequence_length=1, **kwargs
                )
            outputs = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            trust = self.trust()
            trust.forbidden = None
            if step == 0:
                past = trust.end
            to = self._back(trust, before, tries)
            if to is not None:
                rolled += 1
                tries[to] = tries.get(to, 0) + 1
                parents, tokens = picked[to]
                banned.setdefault(to, []).extend(
                    zip(parents.tolist(), tokens.tolist(), strict=True)
                )
                for later in [s for s in before if s > to]:
                    del before[later]
                    banned.pop(later, None)
                now = before[to]
                kwargs = _shortened(kwargs, prompt + to)
                _feed_again(model, kwargs, now, trust, prompt, past)
                vocabulary = outputs.logits.shape[-1]
                trust.forbidden = _mask(banned[to], len(now.ids), vocabulary, now.ids.device)
                continue
            now, picked[step], hits = _advance(
                now, outputs.logits, logits_processor, stopping_criteria, generation_config, prompt
            )
            kwargs[_cache(kwargs)].reorder_cache(picked[step][0])
            if not _goes_on(now, hits, generation_config, prompt):
                break
        self.site.note("rollbacks", rolled)
        return _returned(now, generation_config, prompt)

    def _back(self, trust: Any, before: dict[int, Beams], tries: dict[int, int]) -> int | None:
        """The step to go back to, or None."""
        place: int | None = trust.summary(self.method.threshold, self.method.window)
        if place is None or place < _FIRST:
            return None
        newest = max(before)
        for step in (place + 1, place):
            near = step < newest <= step + self.method.window
            if near and tries.get(step, 0) < self.method.rollbacks:
                return step
        return None


def _check(model: Any, ids: torch.Tensor, config: Any) -> None:
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    if "next_sequence_length" not in names:
        raise HostVersionError("opera_search needs a transformers like 5.24; this one is too old.")
    if len(ids) != config.num_beams:
        raise UnsupportedCall(
            f"opera_search takes one prompt at a time, and this call has {len(ids) // config.num_beams} with "
            f"{config.num_beams} beams each. Generate one after the other, or leave custom_generate out for "
            "the penalty without going back."
        )
    if config.do_sample:
        raise UnsupportedCall("opera_search does not sample; pass do_sample=False.")


def _cache(kwargs: dict[str, Any]) -> str:
    return "cache" if "cache" in kwargs else "past_key_values"


def _shortened(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Arguments as they were when ids were `length` long."""
    names = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
    given = {n: kwargs[n][..., :length] for n in names if kwargs.get(n) is not None}
    return {**kwargs, **given}


def _feed_again(
    model: Any, kwargs: dict[str, Any], now: Beams, trust: Any, prompt: int, past: int
) -> None:
    """Make the cache that of the beams `now`, without their last token, and `trust` what it was."""
    cache = kwargs[_cache(kwargs)]
    cache.crop(past - cache.get_seq_length())
    earlier = _shortened(kwargs, now.ids.shape[1] - 1)
    count = now.ids.shape[1] - 1 - prompt
    inputs = model.prepare_inputs_for_generation(
        now.ids[:, :-1], next_sequence_length=count, **earlier
    )
    trust.quiet = True
    try:
        model(**inputs, return_dict=True)
    finally:
        trust.quiet = False
    trust.back(now.trust)


def _mask(
    pairs: list[tuple[int, int]], beams: int, vocabulary: int, device: torch.device
) -> torch.Tensor:
    mask = torch.zeros(beams, vocabulary, dtype=torch.bool, device=device)
    for beam, token in pairs:
        mask[beam, token] = True
    return mask


def _advance(
    now: Beams, logits: torch.Tensor, processor: Any, stopping: Any, config: Any, prompt: int
) -> tuple[Beams, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One step: the next beams, their parents and tokens, and which continuations were ends."""
    beams, size = now.scores.shape[0], logits.shape[-1]
    ends = config.eos_token_id
    ends = 0 if ends is None else len(ends) if isinstance(ends, list) else 1
    spread = processor(now.ids, logits[:, -1].float().log_softmax(-1))
    totals = (spread + now.scores[:, None]).flatten()
    best, index = totals.topk(max(2, 1 + ends) * beams)
    parent, token = index // size, index % size
    grown = torch.cat([now.ids[parent], token[:, None]], 1)
    hits = stopping(grown, None)
    running = best + hits.float() * _NEVER
    order = running.topk(beams).indices
    done = list(now.done)
    full = len(done) == beams and config.early_stopping is True
    if not full:
        length = (grown.shape[1] - prompt) ** config.length_penalty
        done += [(float(best[i] / length), grown[i]) for i in range(beams) if hits[i]]
    done = sorted(done, key=lambda one: -one[0])[:beams]
    new = Beams(grown[order], running[order], tuple(done))
    return new, (parent[order], token[order]), hits


def _goes_on(now: Beams, hits: torch.Tensor, config: Any, prompt: int) -> bool:
    """Whether a better answer may still come."""
    beams, length = len(now.scores), now.ids.shape[1] - prompt
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_length - prompt
    hoped = float(now.scores[0] / length**config.length_penalty)
    worst = now.done[-1][0] if len(now.done) == beams else _NEVER
    full = len(now.done) == beams and config.early_stopping is True
    return hoped > worst and not full and not bool(hits.all())


def _returned(now: Beams, config: Any, prompt: int) -> Any:
    from transformers.generation import GenerateBeamDecoderOnlyOutput

    best = now.done[: config.num_return_sequences]
    width = max(len(ids) for _, ids in best)
    ends = config.eos_token_id
    # As transformers does it: a padding id of 0 gives way to the end's.
    fill = config.pad_token_id or (ends[0] if isinstance(ends, list) else ends) or 0
    rows = [torch.nn.functional.pad(ids, (0, width - len(ids)), value=fill) for _, ids in best]
    sequences = torch.stack(rows)
    if not config.return_dict_in_generate:
        return sequences
    scores = sequences.new_tensor([s for s, _ in best], dtype=torch.float)
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences, sequences_scores=scores if config.output_scores else None
    )
