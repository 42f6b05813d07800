"""Pruning in front of a Q-Former: patches that are dropped are no keys of its cross-attention.

The prompt of InstructBLIP holds as many tokens as the Q-Former has queries, whatever the picture, so
pruning does not shorten it. The Q-Former sees fewer patches instead. A class token stays, uncounted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import ConflictError, UnsupportedCall
from mmattn.hosts.base import ClassSwap, Handle
from mmattn.hosts.transformers_cut import Cut, Hooks, Seen, choose
from mmattn.hosts.transformers_layout import argument
from mmattn.rebind import SLOT, subclass
from mmattn.runs import Run
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.hosts.transformers_tower import Tower


class QFormerHook(Hooks):
    """Drops patches between the vision tower and the Q-Former.

    Args:
        tower: the Q-Former.
        run: its run.
        place: site of the features method.
    """

    def __init__(self, tower: Tower, run: Run, place: Site) -> None:
        assert tower.family is not None
        eyes = tower.family.tower(tower.fusion)
        assert eyes is not None, "a family with queries has a tower"
        self.tower, self.run, self.place = tower, run, place
        self._pixels: Any = None
        super().__init__([(eyes, self._look), (tower.module, self._enter)])

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pixels = argument(args, kwargs, 0, "pixel_values")

    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.run.enabled:
            return None
        if torch.compiler.is_compiling():
            raise UnsupportedCall(
                "Dropping patches changes the shape of what the Q-Former gets and cannot be traced. Compile "
                "the language model, not the whole model."
            )
        self.place.meter.reached = True
        states, pixels = kwargs.get("encoder_hidden_states"), self._pixels
        self._pixels = None
        try:
            seen = self._seen(states, pixels)
            choose(self.tower, self.run, self.place, seen, [None] * len(seen.images))
        except UnsupportedCall as error:
            if self.run.unsupported != "dense":
                raise
            self.place.meter.fell_back(str(error))
            return None
        assert states is not None
        kept = torch.stack(seen.kept)
        self.place.note("of", kept.shape[1])
        self.place.note("kept", kept.sum(1).float())
        if bool(kept.all()) and not seen.shown:
            return None
        first = states.shape[1] - kept.shape[1]
        if seen.shown:
            states = torch.cat([states[:, :first], torch.stack(seen.shown).to(states)], 1)
        cut = Cut.of(torch.nn.functional.pad(kept, (first, 0), value=True))
        padding = kwargs.get("encoder_attention_mask")
        left = torch.ones_like(cut.pad) if padding is None else cut.columns(padding)
        index = cut.index.unsqueeze(-1).expand(-1, -1, states.shape[-1])
        states = states.gather(1, index)
        mask = left.long().masked_fill(cut.pad, 0)
        return args, {**kwargs, "encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _seen(self, states: Any, pixels: Any) -> Seen:
        if states is None or pixels is None or len(pixels) != len(states):
            raise UnsupportedCall(
                "The Q-Former was not called with what the vision tower made of a picture, so there are no "
                "patches to choose from. Call the whole model, or its get_image_features."
            )
        family, call = self.tower.family, {"pixel_values": pixels}
        assert family is not None
        tokens = family.tokens(self.tower.fusion, states)
        images = family.images(self.tower.fusion, call, tokens)
        return Seen(call, images, list(tokens), tokens, None)


def before_qformer(
    root: Tower, sites: list[Site], run: Run, pruning: tuple[int, Any]
) -> list[Handle]:
    """Hooks that drop patches before a Q-Former, and a class of its own that marks it as taken."""
    if SLOT in root.module.__dict__:
        raise ConflictError(
            f"Another mmattn session already prunes the image tokens of {root.name}; detach it first."
        )
    place = Site(
        path=f"{root.name}.image_tokens",
        kind="features",
        module=root.module,
        host="transformers",
        family=type(root.fusion).__name__,
        run=run,
        slot=pruning[0],
        feature_methods=(pruning,),
    )
    sites.append(place)
    taken = ClassSwap(root.module, subclass(type(root.module)), place, place.path)
    return [QFormerHook(root, run, place), taken]
