"""open_clip: the image tower and the text tower are roots of their own, since users call them apart.

Blocks use `nn.MultiheadAttention` (see mha.py) or open_clip's own SDPA module; image towers taken from
timm are handled like any timm model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mmattn.hosts.base import Handle, LogitsHook, number
from mmattn.hosts.modules import NO_TOKENS, by_hand, candidates, swaps
from mmattn.hosts.timm import comes_from, timm_root, unwrap
from mmattn.layout import Layout
from mmattn.runs import LayoutReader, Root
from mmattn.seams import Seam
from mmattn.sites import Site

_TEXT = ("transformer", "text", "text_decoder")


class OpenClipHost:
    """Adapter for `CLIP`, `CustomTextCLIP`, `CoCa` and their single towers."""

    name = "open_clip"

    def claims(self, target: Any) -> bool:
        """True for modules whose class is defined in open_clip."""
        return comes_from(unwrap(target), "open_clip")

    def roots(self, target: Any) -> list[Root]:
        """One root per tower, or the tower itself when that is the target.

        Sites of the text tower have the kind ``text``: it is causal through a mask of minus
        infinities, so only methods that honour masks can act there.
        """
        model = unwrap(target)
        visual = getattr(model, "visual", None)
        if not isinstance(visual, torch.nn.Module):
            is_text = not hasattr(model, "conv1") and not hasattr(model, "trunk")
            return [self._text("", model) if is_text else self._visual("", model)]
        towers = {n: getattr(model, n, None) for n in _TEXT}
        return [
            self._visual("visual", visual),
            *(self._text(n, m) for n, m in towers.items() if isinstance(m, torch.nn.Module)),
        ]

    def schedulers(self, target: Any) -> list[Any]:
        """None: there is no denoising loop."""
        return []

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """A class swap per attention module, one per block where tokens are changed.

        The ``logits`` seam sees what each tower returns: its embedding, before normalisation.
        """
        for site in sites:
            yield from swaps(site, seam)
        if "logits" in seams:
            yield LogitsHook(root, sites, seam.run)

    def _visual(self, name: str, tower: torch.nn.Module) -> Root:
        trunk = getattr(tower, "trunk", None)
        if isinstance(trunk, torch.nn.Module):
            return timm_root(name, tower, trunk, self.name)
        root = Root(name, tower, excluded=by_hand(tower, name))
        root.sites = self._sites(name, tower, "self")
        if hasattr(tower, "class_embedding"):
            root.layout, root.begin = _grid(tower), getattr(tower, "conv1", None)
        return root

    def _text(self, name: str, tower: torch.nn.Module) -> Root:
        sites = self._sites(name, tower, "text")
        return Root(name, tower, sites=sites, excluded=by_hand(tower, name))

    def _sites(self, name: str, tower: torch.nn.Module, kind: str) -> list[Site]:
        parents = {id(c): p for p in tower.modules() for c in p.children()}
        sites = []
        for path, _, module in candidates(tower, name):
            block = parents.get(id(module))
            pool = "Pool" in type(module).__name__ + type(block).__name__
            cross = pool or hasattr(block, "ln_1_kv")
            own = "ResidualAttentionBlock" in type(block).__name__ and not cross
            tokens = own and getattr(module, "batch_first", True)
            sites.append(
                Site(
                    path=path,
                    kind="cross" if cross else kind,
                    module=module,
                    heads=getattr(module, "num_heads", None),
                    host=self.name,
                    family=type(tower).__name__,
                    token_module=block if tokens else None,
                    tags=frozenset() if tokens else frozenset({NO_TOKENS}),
                )
            )
        return number(sites)


def _grid(tower: torch.nn.Module) -> LayoutReader:
    """Grid from the image of this call; the class token comes before it."""
    py, px = tower.patch_size  # type: ignore[misc]

    def read(conv: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
        height, width = args[0].shape[-2:]
        return Layout(grid=(1, height // int(py), width // int(px)), text="before")

    return read
