"""timm: every module whose forward calls SDPA, found by behaviour and not by class name.

The seam is a class swap per attention module. Where timm leaves its SDPA branch off (Swin, DaViT,
XCiT), it is switched on for the calls in which a method acts, and only there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mmattn.folding import WINDOWS_FIRST
from mmattn.hosts.base import Handle, LogitsHook, number
from mmattn.hosts.modules import NO_TOKENS, by_hand, candidates, swaps
from mmattn.layout import Layout
from mmattn.runs import LayoutReader, Root
from mmattn.seams import Seam
from mmattn.sites import Site

_REDUCED = ("sr_ratio", "kv_stride", "query_strides", "q_stride")
_CHANNEL = ("XCA",)
_FIRST = ("patch_embed", "stem", "embeds", "conv_stem")


class TimmHost:
    """Adapter for timm models."""

    name = "timm"

    def claims(self, target: Any) -> bool:
        """True for modules whose class, or a base of it, is defined in timm."""
        return comes_from(unwrap(target), "timm")

    def roots(self, target: Any) -> list[Root]:
        """The model itself."""
        model = unwrap(target)
        return [timm_root("", model, model, self.name)]

    def schedulers(self, target: Any) -> list[Any]:
        """None: there is no denoising loop."""
        return []

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """A class swap per attention module, one per block where tokens are changed."""
        for site in sites:
            yield from swaps(site, seam)
        if "logits" in seams:
            yield LogitsHook(root, sites, seam.run)


def timm_root(name: str, module: torch.nn.Module, trunk: torch.nn.Module, host: str) -> Root:
    """Root of a timm model, or of a wrapper `module` around the timm model `trunk`."""
    inside = {id(child) for child in trunk.modules()}
    blocks = _plain_blocks(trunk)
    parents = {
        id(child): parent for parent in module.modules() for _, child in parent.named_children()
    }
    rotary = frozenset({"rotary"} if getattr(trunk, "rope", None) is not None else ())
    found = []
    for path, _, attention in candidates(module, name):
        parent = attention if attention in blocks else parents.get(id(attention))
        block = parent if parent in blocks else None
        above = [parents.get(id(attention))]
        above.append(parents.get(id(above[0])))
        found.append(
            Site(
                path=path,
                kind=_kind(attention, above) if id(attention) in inside else "cross",
                module=attention,
                heads=getattr(attention, "num_heads", getattr(attention, "heads", None)),
                host=host,
                family=type(trunk).__name__,
                token_module=block,
                tags=_tags(attention, block) | rotary,
            )
        )
    first = next((m for n in _FIRST if _callable(m := getattr(trunk, n, None))), None)
    layout = _reader(trunk) if blocks and hasattr(trunk, "patch_embed") else None
    excluded = by_hand(module, name)
    return Root(name, module, layout, begin=first, sites=number(found), excluded=excluded)


def _tags(attention: torch.nn.Module, block: torch.nn.Module | None) -> frozenset[str]:
    tags = set() if block is not None else {NO_TOKENS}
    if "LocallyGrouped" in type(attention).__name__:
        tags.add(WINDOWS_FIRST)
    return frozenset(tags)


def comes_from(target: Any, library: str) -> bool:
    """Whether `target` is a module whose class, or a base of it, is defined in `library`."""
    return isinstance(target, torch.nn.Module) and any(
        cls.__module__.partition(".")[0] == library for cls in type(target).__mro__
    )


def unwrap(target: Any) -> Any:
    """The module inside a `torch.compile` wrapper."""
    return getattr(target, "_orig_mod", target)


def _callable(module: Any) -> bool:
    containers = torch.nn.ModuleList | torch.nn.ModuleDict | torch.nn.Identity
    return isinstance(module, torch.nn.Module) and not isinstance(module, containers)


def _plain_blocks(trunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Blocks of a non-hierarchical ViT, which carry ``[B, N, C]``; empty for any other model."""
    blocks = getattr(trunk, "blocks", None)
    if not hasattr(trunk, "num_prefix_tokens"):
        return []
    flat = isinstance(blocks, torch.nn.Sequential | torch.nn.ModuleList)
    return list(blocks) if flat else []  # type: ignore[arg-type]


def _kind(module: torch.nn.Module, above: list[torch.nn.Module | None]) -> str:
    name = type(module).__name__
    if name in _CHANNEL:
        return "channel"
    if any(_over_one(getattr(module, n, 1)) for n in _REDUCED) or hasattr(module, "latent"):
        return "window" if getattr(module, "use_mask_unit_attn", False) else "cross"
    fewer = getattr(module, "pool", None) is not None or getattr(module, "sr", None) is not None
    if fewer and not name.endswith("Prr"):
        return "cross"  # PVTv2 and pooling layers: fewer keys, or fewer queries
    if ("Pool" in name and not name.endswith("Prr")) or name == "ClassAttn":
        return "cross"
    holders = [type(m).__name__ for m in above if m is not None]
    windowed = (
        "Window" in name
        or "LocallyGrouped" in name
        or getattr(module, "use_mask_unit_attn", False)
        or type(module).__module__.endswith(".nest")
        or any("Partition" in holder for holder in holders)
        or any(_over_one(getattr(m, "window_size", 0)) for m in above if m is not None)
        or (name == "SHMA" and _over_one(getattr(module, "window_size", 0)))
    )
    return "window" if windowed else "self"


def _over_one(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, int) and part > 1 for part in parts)


def _reader(trunk: torch.nn.Module) -> LayoutReader:
    """Grid from the size of the image in this call; class and register tokens come before it."""
    prefix = int(trunk.num_prefix_tokens)  # type: ignore[arg-type]
    text: Any = "before" if prefix else "none"

    def read(
        embed: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Layout | None:
        image = args[0] if args else next(iter(kwargs.values()))
        height, width = image.shape[-2:]
        sizes = getattr(embed, "dynamic_feat_size", None)
        if sizes is not None:
            y, x = sizes((height, width))
        elif (size := getattr(embed, "patch_size", None)) is not None:
            py, px = (size, size) if isinstance(size, int) else size
            y, x = height // py, width // px
        else:
            return None
        return Layout(grid=(1, y, x), text=text)

    return read
