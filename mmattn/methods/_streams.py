"""A second run of the model beside a generation: other input, its own cache, the same new tokens.

Contrastive decoding compares the logits of the running call with those of the same model on a changed
prompt. The second stream is fed from inside the logits seam: the changed prompt once, when the prompt
runs, then exactly the tokens that the first stream gets. It follows beams as they are reordered, and
ends with the cache of the first stream.

What the host and other methods remember of a generation (dropped image tokens, chosen heads) is put
aside while the second stream runs and exists once per stream.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mmattn.errors import UnsupportedCall
from mmattn.rebind import SLOT, subclass
from mmattn.runs import ModelCall, Run
from mmattn.sites import Site

_CACHES = {"cache", "past_key_values", "use_cache"}
_OUTPUTS = {"labels", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"}


@dataclass(frozen=True)
class Prompt:
    """What the second stream is given at the prompt.

    Args:
        arguments: of its call of the model.
        alone: True where its tokens are not those of the first stream one for one, so that it needs
            masks and positions of its own. `arguments` then hold ``attention_mask`` and
            ``position_ids``, ``[B, N]`` both, padded on the left.
    """

    arguments: dict[str, Any]
    alone: bool = False


@dataclass(eq=False)
class Stream:
    """The second stream of one generation."""

    rows: int
    idle: bool = False
    cache: Any = None
    main: weakref.ref[Any] | None = None
    end: int = 0
    mask: torch.Tensor | None = None
    last: torch.Tensor | None = None
    aside: list[dict[str, Any]] | None = field(default=None, repr=False)

    def reorder(self, beams: torch.Tensor) -> None:
        """Follow the beams of the first stream."""
        if self.cache is not None:
            self.cache.reorder_cache(beams)
        if self.mask is not None and self.last is not None:
            self.mask, self.last = self.mask[beams], self.last[beams]

    def start(self, prompt: Prompt) -> dict[str, Any]:
        """Arguments of the prompt's call."""
        if prompt.alone:
            self.mask = prompt.arguments["attention_mask"]
            self.last = prompt.arguments["position_ids"][:, -1:]
        return dict(prompt.arguments)

    def step(self, call: ModelCall) -> dict[str, Any]:
        """Arguments of a later call: the tokens the first stream got."""
        if self.mask is None or self.last is None:
            return repeated(call)
        ids = call.arguments["input_ids"]
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], dim=1)
        positions = self.last + steps
        self.last = positions[:, -1:]
        return {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}


def second_logits(
    logits: torch.Tensor,
    *,
    site: Site,
    prompt: Callable[[ModelCall], Prompt | None],
    methods: bool,
) -> torch.Tensor | None:
    """Logits of the second stream for the newest positions of the running call.

    Args:
        logits: of the running call, ``[B, L, V]``.
        site: where the running method sees them.
        prompt: makes the second prompt from the call of the first; None when there is nothing to
            compare with, which holds for the generation. It runs as part of the second stream.
        methods: whether the session's other methods act in the second stream, too.

    Returns:
        ``[B, m, V]``: the last position of a prompt, all of a later call; None without a second prompt.

    Raises:
        UnsupportedCall: for calls that cannot be followed; the message says which.
    """
    run = site.run
    assert run is not None
    call = checked(site)
    ids, cache = call.arguments["input_ids"], call.cache
    if call.past == 0:
        stream, keep = Stream(ids.shape[0]), 1
        if cache is not None:
            stream.main = weakref.ref(cache, functools.partial(_ended, weakref.ref(stream)))
            follow_beams(cache, stream)
            site.state["stream"] = stream
    else:
        stream, keep = _continued(site, call), logits.shape[1]
    if stream.idle:
        stream.end = cache.get_seq_length() if cache is not None else 0
        return None
    with _apart(run, stream, site.slot, methods):
        if call.past:
            arguments = stream.step(call)
        else:
            made = prompt(call)
            stream.idle = made is None
            arguments = {} if made is None else stream.start(made)
        if arguments:
            other = _forward(call, stream, arguments, keep)
    stream.end = cache.get_seq_length() if cache is not None else 0
    if not arguments:
        return None
    site.note("second_stream_tokens", float(arguments["input_ids"].shape[1]))
    return other


def checked(site: Site) -> ModelCall:
    """The running call, if a method can follow the generation it belongs to.

    Raises:
        UnsupportedCall: for calls without token ids, padded on the right, of models without a causal
            decoder, with static caches, or whose logits are those of chosen positions.
    """
    call = site.run.call if site.run is not None else None
    if call is None or not call.decoder:
        raise UnsupportedCall(
            "This method follows a generation, so it needs a transformers model that returns the logits of "
            "a causal decoder, called eagerly; attach to the whole model."
        )
    given = call.arguments
    if not isinstance(given.get("input_ids"), torch.Tensor):
        raise UnsupportedCall("This method reads the prompt: pass input_ids, not inputs_embeds.")
    if getattr(call.cache, "is_compileable", False):
        raise UnsupportedCall("A static cache cannot be followed; use a dynamic cache.")
    if isinstance(given.get("logits_to_keep"), torch.Tensor):
        raise UnsupportedCall(
            "logits_to_keep must be a number here, so that the last position is kept."
        )
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise UnsupportedCall("The attention mask must be two-dimensional or None here.")
    if mask is not None and not bool(mask[:, -1].all()):
        raise UnsupportedCall(
            "The prompt is padded on the right, so its last token is not in the last column. Pad on the "
            "left, as for generation."
        )
    return call


def contrast(
    logits: torch.Tensor,
    other: torch.Tensor | None,
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    """`logits` with the last positions replaced by ``rule(logits, other)``, computed in fp32.

    Args:
        logits: ``[B, L, V]``; not changed.
        other: ``[B, m, V]`` with ``m <= L``, or None, for no change at all.
        rule: of two ``[B, m, V]``.
        rows: ``[B]`` bool, the rows to change.
    """
    if other is None:
        return logits
    new = logits[:, -other.shape[1] :]
    ruled = rule(new.float(), other.to(new.device).float()).to(logits.dtype)
    ruled = torch.where(rows.to(new.device)[:, None, None], ruled, new)
    return (
        ruled
        if ruled.shape == logits.shape
        else torch.cat([logits[:, : -ruled.shape[1]], ruled], 1)
    )


def plausible(scores: torch.Tensor, beta: float) -> torch.Tensor:
    """Where a token is at least `beta` times as likely as the likeliest: bool like `scores`."""
    if beta == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    best = scores.max(dim=-1, keepdim=True).values
    return scores >= best + torch.tensor(beta, dtype=scores.dtype, device=scores.device).log()


class Follower(Protocol):
    """Something with one row per row of a cache."""

    def reorder(self, beams: torch.Tensor) -> None:
        """Take rows `beams` in place of all."""
        ...


def follow_beams(cache: Any, follower: Follower) -> None:
    """Have `cache` take `follower` along when its beams are reordered; it does not keep it alive."""
    if SLOT not in cache.__dict__:
        cache.__class__ = _leading(type(cache))
        cache.__dict__[SLOT] = weakref.WeakSet()
    cache.__dict__[SLOT].add(follower)


def cache_name(module: torch.nn.Module) -> str:
    """What a model calls its key/value cache."""
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def repeated(call: ModelCall) -> dict[str, Any]:
    """The arguments of the running call without those that concern its cache and its outputs."""
    return {
        k: v for k, v in call.arguments.items() if k not in _CACHES | _OUTPUTS and v is not None
    }


def image_tokens(call: ModelCall) -> torch.Tensor:
    """``[B, N]`` bool: image tokens among the ids of the running call."""
    ids = call.arguments["input_ids"]
    known = call.pictures.ids if call.pictures is not None else ()
    return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))


def _continued(site: Site, call: ModelCall) -> Stream:
    stream: Stream | None = site.state.get("stream")
    main = stream.main() if stream is not None and stream.main is not None else None
    if stream is None or main is not call.cache:
        raise UnsupportedCall(
            "This call continues a cache whose prompt the second stream has not seen. Feed the prompt "
            "while attached, into an empty cache, and generate one prompt after the other."
        )
    rows, steps = call.arguments["input_ids"].shape
    if rows != stream.rows or call.past != stream.end:
        raise UnsupportedCall(
            f"The second stream has followed {stream.rows} rows to a cache of {stream.end} tokens, and this "
            f"call continues {rows} rows from {call.past}. Rows cannot come or go, and tokens that were "
            "fed cannot be taken back (assisted decoding does that)."
        )
    if steps > 1 and bool(image_tokens(call).any()):
        raise UnsupportedCall(
            "Image tokens came in after the first call of this cache (a prompt in chunks, or a second turn "
            "with an image). Feed the prompt at once."
        )
    return stream


def _forward(call: ModelCall, stream: Stream, arguments: dict[str, Any], keep: int) -> torch.Tensor:
    cached = call.cache is not None
    names = inspect.signature(type(call.module).forward).parameters
    if stream.cache is not None:
        arguments[cache_name(call.module)] = stream.cache
    if "logits_to_keep" in names:
        arguments["logits_to_keep"] = keep
    output = call.module(**arguments, use_cache=cached, return_dict=True)
    if cached:
        made = getattr(output, "cache", None)
        stream.cache = output.past_key_values if made is None else made
    other: torch.Tensor = output.logits[:, -keep:]
    return other


@contextmanager
def _apart(run: Run, stream: Stream, slot: int, methods: bool) -> Iterator[None]:
    """The model as the second stream sees it: other methods on or off, with memory of their own."""
    if methods and any(site.kind != "logits" for site in run.sites):
        raise UnsupportedCall(
            f"The methods at {run.sites[0].path} act in the same model that returns the logits, so they "
            "cannot act in a second stream; attach the two kinds of methods one at a time."
        )
    runs = run.peers
    carried = [thing for peer in runs for thing in peer.carried]
    held = [dict(vars(thing)) for thing in carried]
    before = [(peer, peer.enabled, peer.stream, peer.branch, peer.layout) for peer in runs]
    _put(carried, stream.aside)
    for peer in runs:
        peer.enabled = methods and peer.enabled and peer is not run
        peer.stream = slot + 1
    try:
        with torch.no_grad():
            yield
    finally:
        stream.aside = [dict(vars(thing)) for thing in carried]
        _put(carried, held)
        for peer, enabled, number, branch, layout in before:
            peer.enabled, peer.stream, peer.branch, peer.layout = enabled, number, branch, layout


def _put(things: list[Any], values: list[dict[str, Any]] | None) -> None:
    for thing, value in zip(things, values or (), strict=False):
        vars(thing).clear()
        vars(thing).update(value)


def _ended(stream: weakref.ref[Stream], main: Any) -> None:
    """The first stream's cache is gone, so the second's is of no use."""
    one = stream()
    if one is not None:
        one.cache = one.aside = None


def _leading(base: Any) -> type:
    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        base.reorder_cache(self, beam_idx)
        for follower in self.__dict__.get(SLOT, ()):
            follower.reorder(beam_idx)

    return subclass(base, reorder_cache=functools.wraps(base.reorder_cache)(reorder_cache))
