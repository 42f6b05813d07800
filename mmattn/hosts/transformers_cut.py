"""Tools of the language hook: removable hooks, whose images a prompt shows, cutting columns and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import UnsupportedCall
from mmattn.hosts.transformers_features import Packed
from mmattn.hosts.transformers_layout import argument
from mmattn.layout import Kept, Tile
from mmattn.runs import Run, removable_hook
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.hosts.transformers_tower import Tower

_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}


class Hooks:
    """Forward hooks on several modules as one handle; copies of the modules get inert ones."""

    def __init__(
        self,
        before: list[tuple[torch.nn.Module, Callable[..., Any]]],
        after: list[tuple[torch.nn.Module, Callable[..., Any]]] | None = None,
    ) -> None:
        self.before, self.after = before, after or []
        self._installed: list[Any] = []

    def install(self) -> None:
        """Register the hooks."""
        for module, hook in self.before:
            made = module.register_forward_pre_hook(
                removable_hook(hook, pre=True), with_kwargs=True
            )
            self._installed.append(made)
        for module, hook in self.after:
            self._installed.append(module.register_forward_hook(removable_hook(hook, pre=False)))

    def check(self) -> str | None:
        """None: nobody can replace a hook."""
        return None

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._installed:
            hook.remove()
        self._installed = []


@dataclass
class Seen:
    """The images that the vision tower saw last, and what was made of them.

    Args:
        call: arguments of the `get_image_features` call.
        images: how the prompt holds each.
        features: ``[L, C]`` of each, as the prompt holds them.
        tokens: the tower tokens, see `transformers_features`.
        raw: the projector's input, where the family's projector works token by token.
        texts: of each image's prompt, ``[L, C]``, when the tokens were chosen.
        kept: per image ``[L]``, True at tokens to keep.
        shown: per image ``[L, C]``, what to show instead of `features`; empty where nothing is new.
    """

    call: dict[str, Any]
    images: list[Packed]
    features: list[torch.Tensor]
    tokens: torch.Tensor
    raw: torch.Tensor | None
    texts: Sequence[torch.Tensor | None] | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    shown: list[torch.Tensor] = field(default_factory=list)

    def settle(
        self,
        texts: Sequence[torch.Tensor | None],
        kept: torch.Tensor,
        new: torch.Tensor | None,
    ) -> None:
        """Note what was chosen, in tower tokens: ``kept [T]``, and ``new [T, C]`` features or None."""
        self.texts, self.kept, self.shown = texts, [], []
        for image, features in zip(self.images, self.features, strict=True):
            patch, source = image.source >= 0, image.source.clamp(min=0)
            self.kept.append(~patch | kept[source])
            if new is not None:
                self.shown.append(torch.where(patch[:, None], new[source], features))

    def answers(self, texts: list[torch.Tensor]) -> bool:
        """Whether the choice was made for prompts that begin like these.

        A generation without a key/value cache runs the prompt again and again, longer every time.
        """
        return self.texts is not None and all(
            then is not None and len(now) >= len(then) and torch.equal(now[: len(then)], then)
            for now, then in zip(texts, self.texts, strict=True)
        )

    def by_row(self, mask: torch.Tensor, embeds: torch.Tensor) -> list[tuple[slice, list[int]]]:
        """Which images each row of a prompt shows; rows that share theirs (beams) come together.

        Args:
            mask: ``[B, N]`` True at image tokens.
            embeds: ``[B, N, C]``.

        Raises:
            UnsupportedCall: when the prompt's image tokens are not these images.
        """
        counts, found = mask.sum(1).tolist(), []
        copies = sum(counts) / max(1, sum(len(f) for f in self.features))
        step = max(1, int(copies))
        left = list(range(len(self.features)))
        for row in range(0, len(counts), step):
            alike, held = slice(row, row + step), list[int]()
            while left and sum(len(self.features[i]) for i in held) < counts[row]:
                held.append(left.pop(0))
            features = torch.cat([embeds[row][:0], *(self.features[i].to(embeds) for i in held)])
            same = len(features) == counts[row] and bool((mask[alike] == mask[row]).all())
            if (
                copies != int(copies)
                or not same
                or not torch.equal(embeds[row][mask[row]], features)
            ):
                raise UnsupportedCall(
                    f"The image tokens of row {row} are not the features that the vision tower computed "
                    "last, so what is chosen for those does not apply. Pass pixel_values in the call."
                )
            found.append((alike, held))
        return found


def choose(
    tower: Tower, run: Run, place: Site, seen: Seen, texts: Sequence[torch.Tensor | None]
) -> None:
    """Ask the method, tile by tile, which tokens to keep, and settle it in `seen`.

    Args:
        tower: knows the model and its vision sites.
        run: of the place.
        place: site of the features method.
        seen: the images.
        texts: for each image the text of the prompt that shows it, ``[L, C]``, or None.
    """
    fusion, family = tower.fusion, tower.family
    assert family is not None
    slot, method = place.feature_methods[0]
    place.slot, place.phase = slot, run.phases[slot]
    place.meter.tick()
    eyes = tuple(s for s in tower.vision if any(m is method for _, m in s.attention))
    for site in eyes:
        site.slot, site.call = next(i for i, m in site.attention if m is method), 0
    flat = seen.tokens.flatten(0, -2)
    raw = None if seen.raw is None else seen.raw.flatten(0, -2)
    # Without its hooks: one of them takes every output for new features.
    project = None if raw is None else family.projector(fusion).forward
    kept = torch.zeros(flat.shape[0], dtype=torch.bool, device=flat.device)
    new: torch.Tensor | None = None
    for image, text in zip(seen.images, texts, strict=True):
        for first, (y, x) in image.tiles:
            span = slice(first, first + y * x)

            def gather(values: Any, span: slice = span) -> torch.Tensor:
                return family.per_token(fusion, seen.call, seen.tokens, values)[span]

            before = None if raw is None else raw[span]
            tile = Tile(flat[span], (y, x), len(image.tiles), eyes, gather, text, before, project)
            indices: Any = method.features(tile, site=place)
            if isinstance(indices, Kept):
                new = flat.clone() if new is None else new
                new[first + indices.indices] = indices.features.to(new)
                indices = indices.indices
            kept[first + indices] = True
    seen.settle(texts, kept, new)


@dataclass
class Cut:
    """Which columns of a prompt were dropped.

    Args:
        index: ``[B, K]`` columns that are left, in order.
        pad: ``[B, K]`` True where a row has fewer than K tokens left; such columns come first.
        shift: ``[B, N]`` how many columns before each column were dropped.
    """

    index: torch.Tensor
    pad: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, keep: torch.Tensor) -> Cut:
        """From ``keep [B, N]`` bool."""
        order = torch.argsort(keep.int(), dim=1, stable=True)
        index = order[:, keep.shape[1] - int(keep.sum(1).max()) :]
        return cls(index, ~keep.gather(1, index), (~keep).int().cumsum(1))

    @property
    def length(self) -> int:
        """Columns before the cut."""
        return self.shift.shape[1]

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N]`` -> ``[B, K]``."""
        return x.expand(self.index.shape[0], -1).gather(1, self.index)

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Position ids of the columns that are left.

        ``[B, N]``, or M-RoPE's ``[3 or 4, B, N]`` where only a leading text row is renumbered.
        """
        plain = ids if ids.ndim == 2 else ids[0]
        plain = self.columns(plain) - self.columns(self.shift)
        if ids.ndim == 2:
            return plain
        rows = torch.stack([self.columns(row) for row in ids])
        return torch.cat([plain.unsqueeze(0), rows[1:]]) if ids.shape[0] == 4 else rows


def check_shapes(kwargs: dict[str, Any], mask: torch.Tensor) -> None:
    """Raise unless everything a language model is given per token can be cut or doubled.

    Raises:
        UnsupportedCall: for prepared 4-D masks, static caches, and arguments mmattn does not know.
    """
    padding = kwargs.get("attention_mask")
    if padding is not None and not (isinstance(padding, torch.Tensor) and padding.ndim == 2):
        raise UnsupportedCall(
            "The attention mask was already made for the full prompt "
            f"({type(padding).__name__}, as for a static cache); use a dynamic cache and a 2-D mask."
        )
    cache = argument((), kwargs, 0, "cache", "past_key_values")
    if getattr(cache, "is_compileable", False):
        raise UnsupportedCall("A static cache has the prompt's full length; use a dynamic cache.")
    for name, value in kwargs.items():
        if name in _KNOWN or not isinstance(value, torch.Tensor):
            continue
        if value.ndim > 1 and value.shape[:2] == mask.shape:
            raise UnsupportedCall(
                f"The language model gets {name} {list(value.shape)} per token, which mmattn does "
                "not know how to shorten."
            )


def add_twins(kwargs: dict[str, Any], mask: torch.Tensor) -> None:
    """Append to the arguments of a language model every row without its image tokens.

    Twins are padded on the left to the same length and have positions of their own, from 0.

    Args:
        kwargs: of the call; changed in place.
        mask: ``[B, N]`` True at image tokens.

    Raises:
        UnsupportedCall: for prompts padded on the right, prepared masks and static caches.
    """
    check_shapes(kwargs, mask)
    embeds, padding = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    padding = torch.ones_like(mask, dtype=torch.long) if padding is None else padding
    if not bool(padding[:, -1].all()):
        raise UnsupportedCall(
            "The prompt is padded on the right, so its last token is not in the last column. "
            "Pad on the left, as for generation."
        )
    text = padding.bool() & ~mask
    order = torch.argsort(text.int(), dim=1, stable=True)
    real = text.gather(1, order)
    index = order.unsqueeze(-1).expand_as(embeds)
    twins = embeds.gather(1, index).masked_fill(~real.unsqueeze(-1), 0)
    kwargs["inputs_embeds"] = torch.cat([embeds, twins])
    kwargs["attention_mask"] = torch.cat([padding, real.to(padding.dtype)])
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
    positions = positions.expand(*positions.shape[:-2], *mask.shape)
    alone = (real.long().cumsum(1) - 1).clamp(min=0).expand_as(positions)
    kwargs["position_ids"] = torch.cat([positions, alone], dim=-2)


def first_rows(output: Any, rows: int) -> Any:
    """A language model's output without the rows after `rows`, its cache included."""
    if isinstance(output, torch.Tensor):
        return output[:rows]
    if isinstance(output, tuple):
        return tuple(first_rows(o, rows) for o in output)
    if hasattr(output, "batch_select_indices"):
        if output.get_seq_length():
            output.batch_select_indices(torch.arange(rows))
        return output
    if isinstance(output, dict):
        for key in list(output):
            output[key] = first_rows(output[key], rows)
    return output
