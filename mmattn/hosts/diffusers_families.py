"""Facts about diffusers model families that a call alone does not tell: text order, site kinds, grids.

Each reader looks at the arguments of the running model call. Families that are missing here still
work: their site kinds come from the attention modules, and their sites just have no token grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmattn.layout import Grid, Layout
from mmattn.runs import LayoutReader

_Shape = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], Grid | None]


@dataclass(frozen=True)
class Family:
    """One row of the table: how to read the layout and which paths are joint or text-only."""

    layout: LayoutReader
    joint: str = r"$^"
    text: str = r"$^"
    tags: frozenset[str] = frozenset()


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """A model-call argument whether it was passed by position or by name."""
    return kwargs[name] if name in kwargs else args[position] if len(args) > position else None


def _grid_from_ids(name: str) -> _Shape:
    """Grid from position ids ``[N, A]`` or ``[B, N, A]``; axes 1 and 2 are row and column.

    Several images of one size (Kontext, Flux2 references) stack along T. Ids that do not spell out a
    raster, and ids inside a traced call, whose values cannot be read, give no grid.
    """

    def read(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
        ids = kwargs.get(name)
        if ids is None or torch.compiler.is_compiling() or ids.is_meta:
            return None
        ids = (ids[0] if ids.ndim == 3 else ids)[:, 1:3].detach().cpu().long()
        low, high = ids.amin(0), ids.amax(0)
        y, x = (int(n) for n in high - low + 1)
        if ids.shape[0] % (y * x):
            return None
        t = ids.shape[0] // (y * x)
        raster = torch.cartesian_prod(torch.arange(y), torch.arange(x)).reshape(-1, 2) + low
        return (t, y, x) if torch.equal(ids, raster.repeat(t, 1)) else None

    return read


def _grid_from_video(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid:
    """``hidden_states [B, C, T, H, W]`` and the patch size of the config."""
    hidden = argument(args, kwargs, 0, "hidden_states")
    config: Any = model.config
    patch = config.patch_size
    if isinstance(patch, int):
        pt, py, px = getattr(config, "patch_size_t", None) or 1, patch, patch
    else:
        pt, py, px = patch
    t, y, x = hidden.shape[-3:]
    return t // pt, y // py, x // px


def _grid_from_frames_first(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid:
    """CogVideoX: ``hidden_states [B, T, C, H, W]``."""
    hidden = argument(args, kwargs, 0, "hidden_states")
    config: Any = model.config
    p, pt = config.patch_size, getattr(config, "patch_size_t", None) or 1
    return hidden.shape[1] // pt, hidden.shape[3] // p, hidden.shape[4] // p


def _grid_from_image(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid | None:
    """``hidden_states [B, C, H, W]``; None for calls that pass packed patches ``[B, N, C]``."""
    hidden = argument(args, kwargs, 0, "hidden_states")
    if hidden.ndim != 4:
        return None
    patch = getattr(model.config, "patch_size", None) or 1
    py, px = (patch, patch) if isinstance(patch, int) else patch[-2:]
    return 1, hidden.shape[-2] // py, hidden.shape[-1] // px


def _grid_from_even_captions(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid | None:
    """Lumina2 packs each row's valid text before its image: one grid only when all rows have equal text."""
    mask = argument(args, kwargs, 3, "encoder_attention_mask")
    if torch.compiler.is_compiling() or mask.is_meta:
        return None
    return _grid_from_image(model, args, kwargs) if mask.sum(1).unique().numel() == 1 else None


def _grid_from_arguments(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid | None:
    """LTX: ``num_frames``, ``height``, ``width`` are arguments of the call."""
    names = ("num_frames", "height", "width")
    values = [kwargs.get(n) for n in names]
    return None if None in values else (int(values[0]), int(values[1]), int(values[2]))  # type: ignore[arg-type]


def _grid_from_img_shapes(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid | None:
    """Qwen-Image: ``img_shapes``, a list per row of ``(T, Y, X)`` or a list of those."""
    shapes = kwargs.get("img_shapes")
    if not shapes:
        return None
    first = shapes[0]
    if isinstance(first, list):
        if len(first) != 1:
            return None  # an edit call: several images share the sequence
        first = first[0]
    return int(first[0]), int(first[1]), int(first[2])


def _grid_from_list(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid | None:
    """Z-Image: a list of ``[C, T, H, W]`` images; a grid only when all have one size."""
    images = argument(args, kwargs, 0, "x")
    if isinstance(images[0], list) or len({tuple(i.shape) for i in images}) != 1:
        return None
    p, pt = kwargs.get("patch_size", 2), kwargs.get("f_patch_size", 1)
    _, t, y, x = images[0].shape
    return t // pt, y // p, x // p


_TRACED = (
    "Position ids and masks cannot be read while a graph is traced: compile first, then attach, so "
    "that mmattn stands outside the graph."
)
_MIXED = "This call mixes images of several sizes, or rows with text of different lengths."


def _reader(shape: _Shape, text: str, *, pyramid: bool = False) -> LayoutReader:
    def read(
        model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Layout | None:
        grid = shape(model, args, kwargs)
        why = "" if grid is not None else _TRACED if torch.compiler.is_compiling() else _MIXED
        return Layout(grid=grid, text=text, pyramid=pyramid, why=why)  # type: ignore[arg-type]

    return read


def _unet_grid(model: torch.nn.Module, args: Any, kwargs: Any) -> Grid:
    sample = argument(args, kwargs, 0, "sample")
    return 1, sample.shape[-2], sample.shape[-1]


def _no_grid(model: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """Sequences that mix history, references or several sizes."""
    return None


_ROTARY = frozenset({"rotary"})
_ALL = r"."
_IDS = Family(_reader(_grid_from_ids("img_ids"), "before"), _ALL, tags=_ROTARY)
_VIDEO = Family(_reader(_grid_from_video, "none"), tags=_ROTARY)
_IMAGE = Family(_reader(_grid_from_image, "none"))
_UNET = Family(_reader(_unet_grid, "none", pyramid=True))
_HUNYUAN_BLOCKS = r"^(single_)?transformer_blocks\."
_HUNYUAN_TEXT = r"^(context_embedder|txt_in|byt5_in|context_refiner)"

_FAMILIES: dict[str, Family] = {
    # Position ids in the call; [text, image].
    "FluxTransformer2DModel": _IDS,
    "Flux2Transformer2DModel": _IDS,
    "ChromaTransformer2DModel": _IDS,
    "BriaTransformer2DModel": _IDS,
    "BriaFiboTransformer2DModel": _IDS,
    "OvisImageTransformer2DModel": _IDS,
    "LongCatImageTransformer2DModel": _IDS,
    # Images.
    "SD3Transformer2DModel": Family(_reader(_grid_from_image, "after"), r"\.attn$"),
    "AuraFlowTransformer2DModel": Family(_reader(_grid_from_image, "before"), _ALL),
    "CogView3PlusTransformer2DModel": Family(_reader(_grid_from_image, "before"), _ALL),
    "CogView4Transformer2DModel": Family(_reader(_grid_from_image, "before"), _ALL, tags=_ROTARY),
    "PRXTransformer2DModel": Family(_reader(_grid_from_image, "before"), _ALL, tags=_ROTARY),
    "HiDreamImageTransformer2DModel": Family(
        _reader(_grid_from_image, "after"), _ALL, tags=_ROTARY
    ),
    "OmniGenTransformer2DModel": Family(_reader(_grid_from_image, "before"), _ALL, tags=_ROTARY),
    "Lumina2Transformer2DModel": Family(
        _reader(_grid_from_even_captions, "before"), r"^layers\.", r"^context_refiner\.", _ROTARY
    ),
    "QwenImageTransformer2DModel": Family(
        _reader(_grid_from_img_shapes, "before"), _ALL, tags=_ROTARY
    ),
    "ZImageTransformer2DModel": Family(
        _reader(_grid_from_list, "after"), r"^layers\.", r"^context_refiner\.", _ROTARY
    ),
    "HunyuanImageTransformer2DModel": Family(
        _reader(_grid_from_image, "after"), _HUNYUAN_BLOCKS, _HUNYUAN_TEXT, _ROTARY
    ),
    "PixArtTransformer2DModel": _IMAGE,
    "SanaTransformer2DModel": _IMAGE,
    "DiTTransformer2DModel": _IMAGE,
    "HunyuanDiT2DModel": Family(_reader(_grid_from_image, "none"), tags=_ROTARY),
    # Video.
    "WanTransformer3DModel": _VIDEO,
    "WanVACETransformer3DModel": _VIDEO,
    "WanAnimateTransformer3DModel": _VIDEO,
    "SkyReelsV2Transformer3DModel": _VIDEO,
    "ChronoEditTransformer3DModel": _VIDEO,
    "CosmosTransformer3DModel": _VIDEO,
    "AllegroTransformer3DModel": _VIDEO,
    "SanaVideoTransformer3DModel": _VIDEO,
    "LTXVideoTransformer3DModel": Family(_reader(_grid_from_arguments, "none"), tags=_ROTARY),
    "MochiTransformer3DModel": Family(_reader(_grid_from_video, "after"), _ALL, tags=_ROTARY),
    "HunyuanVideoTransformer3DModel": Family(
        _reader(_grid_from_video, "after"), _HUNYUAN_BLOCKS, _HUNYUAN_TEXT, _ROTARY
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        _reader(_grid_from_video, "after"), _HUNYUAN_BLOCKS, _HUNYUAN_TEXT, _ROTARY
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        _reader(_no_grid, "after"), _HUNYUAN_BLOCKS, _HUNYUAN_TEXT, _ROTARY
    ),
    "CogVideoXTransformer3DModel": Family(
        _reader(_grid_from_frames_first, "before"), r"attn1$", tags=_ROTARY
    ),
    "ConsisIDTransformer3DModel": Family(
        _reader(_grid_from_frames_first, "before"), r"attn1$", tags=_ROTARY
    ),
    # UNets.
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
}


def family_of(model: torch.nn.Module) -> Family | None:
    """The table row of a model, subclasses included."""
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    return None


def kind_of(family: Family | None, path: str, module: torch.nn.Module) -> str:
    """``self``, ``cross``, ``joint`` or ``text`` for the attention module at `path`."""
    if family is not None and re.search(family.text, path):
        return "text"
    if family is not None and re.search(family.joint, path):
        return "joint"
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        crosses = re.search(r"attn2$|cross_attn", path) is not None
    if crosses:
        return "cross"
    return "joint" if getattr(module, "add_q_proj", None) is not None else "self"


def tags_of(family: Family | None, path: str) -> frozenset[str]:
    """Tags of the family, and ``temporal`` for attention over frames alone (motion modules)."""
    tags = frozenset() if family is None else family.tags
    return tags | {"temporal"} if re.search(r"motion_modules|temp(oral)?_", path) else tags
