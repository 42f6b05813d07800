"""The Method noun: one published technique as a frozen dataclass of its knobs plus pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch

from mmattn.errors import ConfigError, suggest

if TYPE_CHECKING:
    from mmattn.layout import Kept, Tile
    from mmattn.sites import Selector, Site

Dense = Callable[..., torch.Tensor]
"""``dense(q, k, v, mask=..., scale=...) -> [B, H, Q, D]``: the original attention of this site."""

SEAMS = ("attention", "heads", "tokens", "features", "logits")


@dataclass(frozen=True)
class Method:
    """A technique that can be attached. Subclass it, decorate with ``@dataclass(frozen=True)``.

    Every function below passes its input through unchanged; override those of the seams you declare.
    A method holds no tensors and no run state: what must survive between calls lives in ``site.state``.

    Class attributes:
        name: registry key, kebab-case.
        seams: which of `SEAMS` this method uses.
        kinds: site kinds it acts on (``self``, ``joint``, ``cross``, ``window``, ``channel``, ``text``).
        hosts: hosts it claims.
        needs: facts that must be known at a call: ``grid``, ``clock``, ``image_tokens``.
        paper: title and arXiv id.
        training_free: False when the method needs trained weights of its own.
        observes: True when its `attend` never changes what the attention returns, so that it composes
            with anything at the same site.
        masks, causal, grouped: whether `attend` honours a mask tensor, `site.causal`, and key/value
            tensors with fewer heads than the query. Where False the session raises `UnsupportedCall`
            (mask, causal) or repeats the key/value heads (grouped) before calling.
        probes: whether `attend` notes ``recall`` while ``site.probing``.
        opaque: whether `attend` copes with a `seams.Opaque` in place of the mask.
    """

    name: ClassVar[str] = ""
    seams: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm", "transformers", "open_clip", "torch")
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    training_free: ClassVar[bool] = True
    observes: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    opaque: ClassVar[bool] = False
    probes: ClassVar[bool] = False

    @property
    def passive(self) -> bool:
        """True when these settings cannot change any output; hosts may then take the stock path."""
        return False

    @property
    def headwise(self) -> bool:
        """True when no head's result depends on another head.

        Under context parallelism such a method is given its process's share of the heads; others are
        given all heads of the model in every process.
        """
        return False

    def accepts(self, site: Site) -> str | None:
        """None to act at `site`, or the reason to leave it alone. Looks at static facts only."""
        return None

    def phase(self, step: int | None, total: int | None) -> int | bool | None:
        """What the step clock means to this method (``True`` = act, say).

        Called outside compiled graphs whenever the clock moves; read it as ``site.phase``. Return few
        distinct values: each one is a graph under `torch.compile`.
        """
        return None

    def role(self, site: Site) -> int | bool | None:
        """What a site's place in the model means to this method (a layer pattern, say).

        Called once, when all sites of ``site.run.sites`` are known; read it as ``site.role``. Return few
        distinct values and do not read `site.index` during a call: each distinct value is one graph under
        regional compilation.
        """
        return None

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
        """``attention`` seam. ``q [B, H, Q, D]``, ``k, v [B, H, K, D]`` -> ``[B, H, Q, D]``."""
        return dense(q, k, v)

    def heads(self, out: torch.Tensor, *, site: Site) -> torch.Tensor:
        """``heads`` seam: per-head output ``[B, H, Q, D]`` before the out-projection."""
        return out

    def enter(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """``tokens`` seam, on the way in: hidden states ``[B, N, C]`` before the block."""
        return x

    def leave(self, x: torch.Tensor, *, site: Site) -> torch.Tensor:
        """``tokens`` seam, on the way out: hidden states ``[B, N, C]`` after the block."""
        return x

    @property
    def twin(self) -> bool:
        """True to have every prompt run a second time without its image tokens.

        The twins are extra rows at the end of the prefill batch (`Layout.twins`), seen by every method
        and dropped again before the language model returns.
        """
        return False

    def features(self, tile: Tile, *, site: Site) -> torch.Tensor | Kept:
        """``features`` seam: the image tokens of one tile -> indices ``[K]`` to keep, ascending; or a
        `Kept`, with new features for them."""
        return torch.arange(tile.features.shape[0], device=tile.features.device)

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """``logits`` seam: model output ``[..., V]``."""
        return logits

    def at(self, sites: Selector) -> Placed:
        """This method at some sites only, so that several settings share one attach call.

        ``attach(pipe, [VMoBA(topk=2).at("*.blocks.[0-4].attn1"), VMoBA(topk=4).at("*.blocks.5.attn1")])``
        """
        return Placed(self, sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the registry key under ``name``."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Build from a mapping of settings.

        Raises:
            ConfigError: for an unknown key (with a suggestion) or an invalid value.
        """
        known = [f.name for f in fields(cls)]
        given = {k: v for k, v in settings.items() if k != "name"}
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"{cls.__name__}: unknown key {key!r}{suggest(key, known)} Known keys: {known}"
                )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error


class Placed(NamedTuple):
    """A method and the sites it is meant for; `Method.at` makes one."""

    method: Method
    sites: Selector

    @property
    def name(self) -> str:
        """The method's registry key."""
        return self.method.name

    def to_dict(self) -> dict[str, Any]:
        """The method's settings, with `sites`."""
        return {**self.method.to_dict(), "sites": self.sites}


AttentionMethod = Method
"""Alias for readers: a method that overrides `attend` only."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition`; for `__post_init__` checks."""
    if not condition:
        raise ConfigError(message)
