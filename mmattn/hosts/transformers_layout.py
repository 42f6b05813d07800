"""Facts about transformers models: which modules are attention, what they attend to, token layouts."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from mmattn.layout import Layout
from mmattn.rebind import names_used

_SEAMED = frozenset({"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"})
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_query_heads")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def seamable(module: torch.nn.Module) -> bool:
    """Whether the module's forward asks transformers' table for its attention, or calls SDPA itself."""
    return bool(_SEAMED & names_used(type(module).forward))


def own_softmax(module: torch.nn.Module) -> bool:
    """An attention module that computes its softmax by itself, so that no seam fits."""
    name = type(module).__name__
    if not name.endswith("Attention") or seamable(module):
        return False
    below = [m for m in module.modules() if m is not module]
    return not any(seamable(m) or type(m).__name__.endswith("Attention") for m in below)


def is_tower(module: torch.nn.Module) -> bool:
    """Models, and the few vision towers that are plain modules (Idefics)."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) or type(module).__name__.endswith(
        "VisionTransformer"
    )


def role_of(tower: torch.nn.Module) -> str:
    """``vision``, ``qformer`` or ``language``, from the class name and the declared input."""
    name = type(tower).__name__
    if "QFormer" in name or "Qformer" in name:
        return "qformer"
    modalities = getattr(tower, "input_modalities", ())
    pixels = getattr(tower, "main_input_name", "") == "pixel_values"
    if "Vision" in name or pixels or ("image" in modalities and "text" not in modalities):
        return "vision"
    return "language"


def tag_of(role: str, module: torch.nn.Module) -> str:
    """Tag of one site: language towers split into causal decoders with a cache, and text encoders."""
    if role != "language":
        return role
    causal = getattr(module, "is_causal", False) or getattr(module, "is_decoder", False)
    return "decoder" if causal and hasattr(module, "layer_idx") else "text"


def takes_tokens(block: torch.nn.Module | None) -> bool:
    """Whether a module around an attention module is called with hidden states first."""
    if block is None or isinstance(block, torch.nn.ModuleList):
        return False
    return list(inspect.signature(type(block).forward).parameters)[1:2] == ["hidden_states"]


def kind_of(path: str, module: torch.nn.Module) -> str:
    """``cross`` or ``self``."""
    if getattr(module, "is_cross_attention", False) is True:
        return "cross"
    local = ".".join(path.split(".")[-2:])
    return "cross" if _CROSS.search(local) or _CROSS.search(type(module).__name__) else "self"


def heads_of(module: torch.nn.Module) -> int | None:
    """Number of query heads, from the module or its config."""
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None


def placeholders(config: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for image or video features in a prompt."""
    found = [getattr(config, name, None) for name in _PLACEHOLDERS]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def embedding_of(tower: torch.nn.Module) -> torch.nn.Module:
    """The token embedding of a language tower."""
    return tower.get_input_embeddings()  # type: ignore[operator, no-any-return]


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, *names: str) -> Any:
    """A call's argument by any of its names, or by position."""
    for name in names:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return args[position] if len(args) > position else None


def past_length(kwargs: dict[str, Any]) -> int:
    """How many tokens the key/value cache of this call holds."""
    cache = argument((), kwargs, 0, "cache", "past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def vision_layout(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Layout | None:
    """Patch grid from ``pixel_values [B, C, H, W]``; class and register tokens come first.

    Towers that take packed patches (Qwen) have no grid here: they keep 2x2 blocks, and windows,
    together, so row-and-column arithmetic on their sequence would be wrong.
    """
    pixels = argument(args, kwargs, 0, "pixel_values")
    patch: Any = getattr(getattr(module, "config", None), "patch_size", None)
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or patch is None:
        return None
    py, px = (patch, patch) if isinstance(patch, int) else patch
    return Layout(grid=(1, pixels.shape[-2] // py, pixels.shape[-1] // px), text="before")


class ImageTokens:
    """Where the image tokens of the running generation are, read where the ids are embedded.

    A language model inside a vision-language model gets embeddings only. Every path to it, `generate`
    of InstructBLIP included, embeds the ids first, so a hook on the embedding sees them.

    Attributes:
        mask: ``[B, N]`` of the prompt, kept while decoding.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.mask: torch.Tensor | None = None
        self.twins = 0
        self._next: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook on the token embedding: remember the ids until the language model runs."""
        ids = argument(args, kwargs, 0, "input")
        if not torch.compiler.is_compiling() and isinstance(ids, torch.Tensor) and ids.ndim == 2:
            self._next, self._seen = self.among(ids), ids

    def behind(self, embeds: torch.Tensor) -> torch.Tensor | None:
        """The ids that became ``embeds [B, N, C]``, ``[B, N]``; None when they were never seen.

        Call it before the language model runs.
        """
        return _repeated(self._seen, embeds)

    def among(self, ids: torch.Tensor) -> torch.Tensor | None:
        """``[B, N]`` bool, True at placeholder ids; None where there are no such ids."""
        if not self.ids:
            return None
        return torch.isin(ids, torch.tensor(self.ids, dtype=ids.dtype, device=ids.device))

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Image positions of the call that starts, or None when its ids were never seen."""
        ids = argument(args, kwargs, 0, "input_ids")
        embeds = kwargs.get("inputs_embeds")
        seen, self._next, self._seen = self._next, None, None
        if isinstance(ids, torch.Tensor):
            return self.among(ids)
        return None if embeds is None else _repeated(seen, embeds)

    def put(self, mask: torch.Tensor | None, twins: int = 0) -> None:
        """Replace what the next `take` returns, after tokens were dropped or rows added."""
        self._next, self.twins = mask, twins

    def layout(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Layout | None:
        """Layout reader of the language model."""
        if torch.compiler.is_compiling():
            return None
        past, new = past_length(kwargs), self.take(args, kwargs)
        if past == 0:
            self.mask = new
        elif new is not None and self.mask is not None and new.shape[1] > 1 and bool(new.any()):
            gap = past - self.mask.shape[1]
            self.mask = torch.cat([torch.nn.functional.pad(self.mask, (0, gap)), new], dim=1)
        return Layout(image_mask=self.mask, past=past, twins=self.twins)


def _repeated(seen: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor | None:
    """``seen [b, N]`` with each row as often as `embeds` has it; InstructBLIP expands to beams later."""
    if seen is None or seen.shape[1] != embeds.shape[1]:
        return None
    copies, rest = divmod(embeds.shape[0], seen.shape[0])
    return None if rest or not copies else seen.repeat_interleave(copies, dim=0)
