"""What happens around the language model of a vision-language model: dropped tokens and twin rows.

Image tokens are dropped in a hook right before the language model, where the prompt is already
embeddings. `generate` keeps counting in full-length ids, masks and positions, so while decoding the same
hook takes the dropped columns out of what it passes.

Positions follow the family: one-dimensional ids are renumbered without gaps (LLaVA), Qwen's three
M-RoPE rows keep the coordinates of the full image, and its text row has no gaps, because a gap there
would be read as the border of a packed sequence.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import UnsupportedCall
from mmattn.hosts.transformers_cut import (
    Cut,
    Hooks,
    Seen,
    add_twins,
    check_shapes,
    choose,
    first_rows,
)
from mmattn.hosts.transformers_layout import ImageTokens, argument, past_length
from mmattn.rebind import subclass
from mmattn.runs import Run
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.hosts.transformers_tower import Tower


class LanguageHook(Hooks):
    """Drops image tokens before the language model, and adds twin rows, where methods ask for it.

    Args:
        tower: the language tower.
        run: its run.
        tokens: where the image tokens are.
        place: site of the features method, or None when none is attached.
        twin: whether a method wants twins.
    """

    def __init__(
        self, tower: Tower, run: Run, tokens: ImageTokens, place: Site | None, *, twin: bool
    ) -> None:
        self.tower, self.run, self.tokens = tower, run, tokens
        self.place, self.twin = place, twin
        self.cut: Cut | None = None
        self._cache: weakref.ref[Any] | None = None
        self._call: dict[str, Any] = {}
        self._tokens: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._seen: Seen | None = None
        self._refused = False
        before: list[tuple[torch.nn.Module, Callable[..., Any]]] = [(tower.module, self._enter)]
        after: list[tuple[torch.nn.Module, Callable[..., Any]]] = [(tower.module, self._leave)]
        if place is not None:
            assert tower.fusion is not None and tower.family is not None
            before.append((tower.fusion, self._fuse))
            after.append((tower.family.projector(tower.fusion), self._project))
        super().__init__(before, after)

    def _fuse(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = kwargs

    def _project(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        family = self.tower.family
        if family is not None and not torch.compiler.is_compiling():
            tokens = family.tokens(self.tower.fusion, output)
            self._tokens = (tokens, args[0] if family.tokenwise and args else None)

    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.run.enabled:
            self.cut = None
            return None
        if torch.compiler.is_compiling():
            raise UnsupportedCall(
                "Dropping image tokens and running prompts twice change the shape of the prompt and "
                "cannot be traced. Compile the decoder layers or the vision tower, not the whole model."
            )
        if self.place is not None:
            self.place.meter.reached = True
        self.tokens.twins = 0
        past, kwargs = past_length(kwargs), dict(kwargs)
        if past:
            return args, self._decode(kwargs, past)
        self.cut = self._cache = None
        mask = self.tokens.take(args, kwargs)
        self.tokens.put(mask)
        if mask is None or kwargs.get("inputs_embeds") is None or not bool(mask.any()):
            return None
        if self.place is not None:
            mask = self._prune(kwargs, mask)
        if self.twin:
            add_twins(kwargs, mask)
            self.tokens.put(torch.cat([mask, torch.zeros_like(mask)]), twins=mask.shape[0])
        return args, kwargs

    # -- dropping -----------------------------------------------------------------------------

    def _prune(self, kwargs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        assert self.place is not None
        try:
            check_shapes(kwargs, mask)
            keep = self._columns(kwargs, mask)
        except UnsupportedCall as error:
            if self.run.unsupported != "dense":
                raise
            self.place.meter.fell_back(str(error))
            return mask
        self.place.note("of", int(mask.sum()) / mask.shape[0])
        self.place.note("kept", int((keep & mask).sum()) / mask.shape[0])
        if bool(keep.all()):
            return mask
        cut = self.cut = Cut.of(keep)
        embeds = kwargs["inputs_embeds"]
        index = cut.index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
        kwargs["inputs_embeds"] = embeds.gather(1, index).masked_fill(cut.pad.unsqueeze(-1), 0)
        padding = kwargs.get("attention_mask")
        if padding is None and bool(cut.pad.any()):
            padding = mask.new_ones(mask.shape, dtype=torch.long)
        if padding is not None:
            kwargs["attention_mask"] = cut.columns(padding).masked_fill(cut.pad, 0)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = cut.positions(kwargs["position_ids"])
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"][: cut.index.shape[1]]
        left = cut.columns(mask) & ~cut.pad
        self.tokens.put(left)
        return left

    def recording(self, base: type) -> type:
        """Subclass of the fusion model that tells this hook about image features.

        `generate` computes them once, ahead of the prefill and of the expansion to beams. The tokens are
        chosen at the prefill, where the text is known too.
        """
        stock: Any = base.get_image_features  # type: ignore[attr-defined]
        signature, hook = inspect.signature(stock), self

        @functools.wraps(stock)
        def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = stock(self, *args, **kwargs)
            if hook.run.enabled:
                hook.record(signature.bind(self, *args, **kwargs).arguments, out)
            return out

        return subclass(base, get_image_features=get_image_features)

    def record(self, call: dict[str, Any], out: Any) -> None:
        """Remember the images of `call` until a prompt shows them."""
        assert self.place is not None and self.tower.family is not None
        self._seen, self._refused = None, False
        projected, self._tokens = self._tokens, None
        packed = getattr(out, "pooler_output", None)
        try:
            if packed is None or projected is None:
                raise UnsupportedCall(
                    f"get_image_features returned a {type(out).__name__} without pooler_output; call it "
                    "with return_dict=True."
                )
            call = {**call, **call.get("kwargs", {})}
            tokens, raw = projected
            images = self.tower.family.images(self.tower.fusion, call, tokens)
            features = torch.cat(list(packed)).split([len(p.source) for p in images])
            self._seen = Seen(call, images, list(features), tokens, raw)
        except UnsupportedCall as error:
            if self.run.unsupported != "dense":
                raise
            self.place.meter.fell_back(str(error))
            self._refused = True

    def _columns(self, kwargs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """Columns of the prompt to keep, ``[B, N]``; replaced features are put into the embeddings.

        Raises:
            UnsupportedCall: when the prompt's image tokens are not the features chosen from.
        """
        keep, seen, embeds = torch.ones_like(mask), self._seen, kwargs["inputs_embeds"]
        if self._refused:
            return keep
        if seen is None:
            raise UnsupportedCall(
                "The prompt has image tokens, but the model computed no image features since mmattn was "
                "attached (precomputed ones?). Pass pixel_values so that the tokens can be chosen."
            )
        rows = seen.by_row(mask, embeds)
        words = (
            ~mask
            if kwargs.get("attention_mask") is None
            else ~mask & (kwargs["attention_mask"] > 0)
        )
        texts = [embeds[0][:0]] * len(seen.images)
        for alike, held in rows:
            for i in held:
                texts[i] = embeds[alike.start][words[alike.start]]
        if not seen.answers(texts):
            assert self.place is not None
            choose(self.tower, self.run, self.place, seen, texts)
        for alike, held in rows:
            if not held:
                continue
            where = mask[alike.start]
            keep[alike, where] = torch.cat([seen.kept[i] for i in held]).to(mask.device)
            if seen.shown:
                embeds = kwargs["inputs_embeds"] = embeds.clone()
                embeds[alike, where] = torch.cat([seen.shown[i] for i in held]).to(embeds)
        return keep

    def _decode(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        cut, embeds = self.cut, kwargs.get("inputs_embeds")
        if cut is None or embeds is None:
            return kwargs
        rows, steps = embeds.shape[:2]
        if self._cache is not None and _cache_of(kwargs) is not self._cache():
            raise UnsupportedCall(
                "This step continues a cache other than that of the last prompt, and which image tokens "
                "were dropped is known for the last prompt only. Generate one prompt after the other."
            )
        if rows != cut.index.shape[0]:
            raise UnsupportedCall(
                f"The prompt had {cut.index.shape[0]} rows and this step has {rows}; image tokens were "
                "dropped row by row, so the batch must stay as it was."
            )
        extra = cut.length - cut.index.shape[1]
        padding = kwargs.get("attention_mask")
        if padding is None and bool(cut.pad.any()):
            padding = cut.index.new_ones(rows, past + extra + steps)
        if padding is not None and (
            not isinstance(padding, torch.Tensor) or padding.shape != (rows, past + extra + steps)
        ):
            raise UnsupportedCall(
                "Image tokens were dropped, so a step needs the attention mask of the full prompt, "
                f"[{rows}, {past + extra + steps}] or None; found "
                f"{getattr(padding, 'shape', type(padding).__name__)}. Use a dynamic cache."
            )
        if padding is not None:
            prompt = cut.columns(padding[:, : cut.length]).masked_fill(cut.pad, 0)
            kwargs["attention_mask"] = torch.cat([prompt, padding[:, cut.length :]], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.ndim == 2:
            kwargs["position_ids"] = positions - cut.shift[:, -1:]
        elif positions is not None and positions.shape[0] == 4:
            kwargs["position_ids"] = torch.cat([positions[:1] - cut.shift[:, -1:], positions[1:]])
        elif positions is not None and _derived(self._call):
            # Qwen derived them from the length of the cache, which is short by what was dropped.
            kwargs["position_ids"] = positions + extra
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"] - extra
        return kwargs

    # -- twins --------------------------------------------------------------------------------

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        rows = self.tokens.twins
        if self.cut is not None and self._cache is None:
            cache = _cache_of(output) if isinstance(output, dict) else None
            self._cache = None if cache is None else weakref.ref(cache)
        if not rows or not self.run.enabled:
            return None
        self.tokens.twins = 0
        assert self.tokens.mask is not None
        self.tokens.mask = self.tokens.mask[:rows]
        return first_rows(output, rows)


def _cache_of(values: dict[str, Any]) -> Any:
    return argument((), values, 0, "cache", "past_key_values")


def _derived(call: dict[str, Any]) -> bool:
    return call.get("position_ids") is None and call.get("attention_mask") is None
