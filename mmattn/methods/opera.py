"""OPERA: beam search that distrusts tokens which lean on one summary token, and can go back."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.methods import _decoder_keys as decoder
from mmattn.methods._opera_search import BeamSearch
from mmattn.methods._streams import cache_name, checked, follow_beams
from mmattn.methods.base import Dense, Method, require
from mmattn.methods.dola import memory_of
from mmattn.runs import ModelCall
from mmattn.sites import Site

_FACTOR = math.log(1e-7)
_FLOOR = 999.0
_EARLY = 10


@dataclass(frozen=True, kw_only=True)
class Opera(Method):
    """Penalises candidates whose attention hangs on one of the generated tokens (over-trust).

    Hallucinations tend to follow a summary token, such as a full stop, on which all later tokens of the
    answer put their attention while the image fades. For every beam, the likeliest tokens are tried out: each
    is fed, and the last layer says where it looks. With ``w_ij`` the attention of answer token i to answer
    token j (largest over heads, normalised over the row), the score of j is ``1e-7 prod_{i >= j} (scale *
    w_ij)``. The largest score is the candidate's penalty, taken off its logit. In the first ten tokens, where
    no such pattern can exist, attention to the image is the reward instead. Only candidates can be chosen.

    Retrospection goes with `opera_search`: when the same token j had the largest score again and again, the
    search goes back to right after j and chooses something else there. ``model.generate`` cannot go back,
    so without that search there is the penalty alone.

    Paper: "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation", arXiv 2311.17911, and the authors' code; compared with the definition on the
    attention matrices that eager attention returns. Beam search is the paper's (``num_beams=5``); greedy
    search works.

    Deviations: tokens that are no candidates fall 999 below the worst candidate, where the code sets them to
    -999, above candidates with a large penalty. A beam's penalties are counted from its smallest, which a
    softmax does not see, and end at 10,000. Where the largest scores have been follows the beams when they
    are reordered; the code's history does not. After going back, the candidates are the likeliest tokens
    that were not chosen there, with their penalties; the code takes the plain logits for that one step. Only
    the prompt's last position is changed.

    Args:
        candidates: tokens tried per beam, at least 1; the paper's 5, at least 2 in the code.
        scale: factor on attention, above 0; the paper's 50.
        penalty: factor on the penalty, at least 0; the paper's 1. At 0 nothing is changed, bitwise.
        threshold: `opera_search` goes back when a token had the largest score in more steps than this, in
            every beam; the paper's 15.
        rollbacks: how often it goes back to one place, and then as often to the place before it; the
            code's 5.
        window: steps that it remembers, at least 1; the code's 512.

    Shapes: per beam one number for every answer token, ``[B, R]``; rows ``[B, R]`` of attention, never R x R.
    In the report, ``overruled`` is the share of rows whose likeliest token changed, ``rollbacks`` the mean
    per search.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: beside other methods that act in the decoder or on its logits, without a growing
            key/value cache, for prompts in chunks or padded on the right, and where image tokens are not
            known.

    Cost: `candidates` more decoding steps for every step.
    """

    candidates: int = 5
    scale: float = 50.0
    penalty: float = 1.0
    threshold: int = 15
    rollbacks: int = 5
    window: int = 512

    name: ClassVar[str] = "opera"
    seams: ClassVar[tuple[str, ...]] = ("attention", "logits")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and "
        "Retrospection-Allocation, arXiv 2311.17911"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for knob, least in (("candidates", 1), ("threshold", 1), ("rollbacks", 0), ("window", 1)):
            value = getattr(self, knob)
            fits = type(value) is int and value >= least
            require(fits, f"{knob} must be a whole number of at least {least}, got {value!r}")
        require(self.scale > 0, f"scale must be above 0, got {self.scale}")
        require(self.penalty >= 0, f"penalty must be at least 0, got {self.penalty}")

    @property
    def passive(self) -> bool:
        """True at ``penalty == 0``."""
        return self.penalty == 0

    def accepts(self, site: Site) -> str | None:
        """The last decoder block."""
        return decoder.refusal(site, {site.depth - 1}, image=True)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        """The stock attention; where the newest token looks is kept for `logits`."""
        if not self.passive:
            keys = decoder.read(q, k, mask, site)
            row = keys.rows(keys.queries - 1)
            scores = decoder.hide(decoder.row_scores(q[:, :, -1:], k, scale), row)
            looks = scores.softmax(-1)[:, :, 0].amax(1)
            looks = looks / looks.sum(-1, keepdim=True)
            site.state["looks"] = (looks, (looks * keys.image).sum(-1))
        return dense(q, k, v)

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """The penalty, for the position from which new tokens are drawn."""
        if self.passive:
            return logits
        call = checked(site)
        self._check(call, site)
        looks, _ = self._looks(call, site)
        trust = self._trust(call, site, looks)
        if trust.quiet:
            return logits
        newest = logits[:, -1].float()
        likely = (
            newest if trust.forbidden is None else newest.masked_fill(trust.forbidden, -math.inf)
        )
        scores, tokens = likely.topk(min(self.candidates, likely.shape[-1]))
        tried = [self._tried(call, site, tokens[:, c : c + 1]) for c in range(tokens.shape[1])]
        local = torch.stack([looks[:, trust.start :] for looks, _ in tried], 1)
        sums = torch.nn.functional.pad(trust.sums, (0, 1))[:, None] + (self.scale * local).log()
        best, place = sums.max(-1)
        trust.places = torch.cat([trust.places, _modes(place)[:, None]], 1)
        if local.shape[-1] <= _EARLY:
            penalty = -torch.stack([image for _, image in tried], 1)
        else:
            penalty = (best.double() + _FACTOR).clamp(max=600).exp()
        apart = (penalty - penalty.amin(-1, keepdim=True)).clamp(max=1e4).float()
        ruled = scores - self.penalty * apart
        out = (ruled.amin(-1, keepdim=True) - _FLOOR).expand_as(newest).scatter(-1, tokens, ruled)
        site.note("overruled", (out.argmax(-1) != newest.argmax(-1)).float())
        return torch.cat([logits[:, :-1], out[:, None].to(logits.dtype)], 1)

    def _check(self, call: ModelCall, site: Site) -> None:
        run = site.run
        assert run is not None
        acting = [m for m in run.methods if "logits" in m.seams]
        for block in call.decoder:
            acting += [m for _, m in (*block.attention, *block.head_methods, *block.token_methods)]
        others = sorted({m.name for m in acting if m is not self})
        if others:
            raise UnsupportedCall(
                f"OPERA feeds every candidate to the model, so {others} would act, and remember, several "
                "times per token. Attach them one at a time; pruning before the language model is fine."
            )
        if call.cache is None:
            raise UnsupportedCall("OPERA tries candidates on the running cache; use_cache=True.")

    def _trust(self, call: ModelCall, site: Site, looks: torch.Tensor) -> Trust:
        """What is known of the answer so far, with the token that was fed."""
        ids, end = call.arguments["input_ids"], call.cache.get_seq_length()
        if call.past == 0:
            trust = Trust(
                weakref.ref(call.cache), end, end, looks[:, :0], ids.new_zeros(len(ids), 0)
            )
            site.state["trust"] = trust
            follow_beams(call.cache, trust)
            return trust
        found: Trust | None = site.state.get("trust")
        if found is None or found.cache() is not call.cache or len(found.sums) != len(ids):
            raise UnsupportedCall(
                "This call continues a cache whose prompt OPERA has not seen. Feed the prompt while "
                "attached, into an empty cache, and generate one prompt after the other."
            )
        if not found.quiet and (call.past != found.end or ids.shape[1] > 1):
            raise UnsupportedCall(
                f"OPERA has followed a cache of {found.end} tokens, and this call adds {ids.shape[1]} to "
                f"{call.past}. An answer has to come one token at a time, and the prompt at once."
            )
        if not found.quiet:
            found.sums = torch.nn.functional.pad(found.sums, (0, 1))
            found.sums = found.sums + (self.scale * looks[:, found.start :]).log()
        found.end = end
        return found

    def _tried(
        self, call: ModelCall, site: Site, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where ``token [B, 1]`` would look, and how much at the image; the cache is as it was after."""
        run, given = site.run, call.arguments
        assert run is not None
        arguments = {"input_ids": token, cache_name(call.module): call.cache}
        if given.get("attention_mask") is not None:
            arguments["attention_mask"] = torch.nn.functional.pad(
                given["attention_mask"], (0, 1), value=1
            )
        if given.get("position_ids") is not None:
            arguments["position_ids"] = given["position_ids"][..., -1:] + 1
        run.enabled = False
        try:
            with torch.no_grad():
                call.module(**arguments, use_cache=True, return_dict=True)
        finally:
            run.enabled = True
        call.cache.crop(-1)
        return self._looks(call, site)

    def _looks(self, call: ModelCall, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        found: Any = memory_of(call, len(call.decoder) - 1, site).pop("looks", None)
        if found is None:
            raise UnsupportedCall(
                "OPERA did not see the last decoder block run in this call; leave it among the sites."
            )
        return found  # type: ignore[no-any-return]


@dataclass(eq=False)
class Trust:
    """What OPERA knows of the answer of every beam.

    Args:
        cache: of the generation.
        end: tokens in it.
        start: how many of them are the prompt's.
        sums: ``[B, R]``, for every answer token that was fed the logarithms of scaled attention that it got.
        places: ``[B, S]``, the answer token with the largest score in every step.
        quiet: while tokens are fed again that are known.
        forbidden: ``[B, V]`` True at tokens that are no candidates in the next step.
    """

    cache: weakref.ref[Any]
    end: int
    start: int
    sums: torch.Tensor
    places: torch.Tensor
    quiet: bool = False
    forbidden: torch.Tensor | None = None

    def reorder(self, beams: torch.Tensor) -> None:
        """Follow the beams."""
        beams = beams.to(self.sums.device)
        self.sums, self.places = self.sums[beams], self.places[beams]

    def kept(self) -> Trust:
        """A copy to come back to."""
        return copy.copy(self)

    def back(self, then: Trust) -> None:
        """Be as `then` again."""
        self.sums, self.places, self.end = then.sums, then.places, then.end

    def summary(self, threshold: int, window: int) -> int | None:
        """The answer token with the largest score in more than `threshold` steps of every beam, or None."""
        recent = self.places[:, -window:]
        place = int(_modes(_modes(recent[:, -1:])[None])[0])
        return place if bool(((recent == place).sum(1) > threshold).all()) else None


def _modes(x: torch.Tensor) -> torch.Tensor:
    """The most frequent number of each row, ``[..., N]`` -> ``[...]``; of equals the smallest."""
    counts = (x.unsqueeze(-1) == x.unsqueeze(-2)).sum(-1)
    most = counts == counts.amax(-1, keepdim=True)
    found: torch.Tensor = x.masked_fill(~most, torch.iinfo(x.dtype).max).amin(-1)
    return found


def opera_search(session: Any) -> Callable[..., Any]:
    """Beam search with retrospection: ``model.generate(..., custom_generate=opera_search(session))``.

    Without going back it finds what ``generate`` finds. It takes one prompt at a time, as the authors'
    code does, because prompts of a batch would have to go back at different moments.

    Args:
        session: what `attach` returned for a model and `Opera`.

    Raises:
        ConfigError: when `Opera` is not attached in `session`, or passive.
        UnsupportedCall: in ``generate``, for several prompts and for sampling.
    """
    for run in session.runs:
        for slot, method in enumerate(run.methods):
            site = next((s for s in run.sites if s.kind == "logits"), None)
            if isinstance(method, Opera) and site is not None and not method.passive:

                def trust(site: Site = site, slot: int = slot, run: Any = run) -> Any:
                    return run.states_of(site, slot).get((0, 0), {}).get("trust")

                return BeamSearch(trust, method, site)
    raise ConfigError(
        "opera_search needs a session with Opera attached, and a penalty above 0: "
        "session = mmattn.attach(model, mmattn.Opera())"
    )
