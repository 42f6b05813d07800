"""Any `torch.nn.Module`: attention modules of your own that call SDPA, and `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mmattn.errors import NoSiteError, SelectorError
from mmattn.hosts import mha
from mmattn.hosts.base import Handle, LogitsHook, named_sites, number
from mmattn.hosts.modules import NO_TOKENS, by_hand, candidates, swaps
from mmattn.runs import Root
from mmattn.seams import Seam
from mmattn.sites import Selector, Site, select


class PlainHost:
    """Adapter of last resort. Knows no model, so its sites have no token grid."""

    name = "torch"

    def claims(self, target: Any) -> bool:
        """True for every module."""
        return isinstance(target, torch.nn.Module)

    def roots(self, target: Any) -> list[Root]:
        """The module itself with every attention module inside it that mmattn can reach."""
        model = _unwrap(target)
        layers = {id(m.self_attn): m for m in model.modules() if isinstance(m, _ENCODER_LAYER)}
        sites = []
        for path, local, module in candidates(model):
            layer = layers.get(id(module))
            if layer is not None and type(layer).forward is not _ENCODER_LAYER.forward:
                layer = None
            block = layer is not None and layer.self_attn.batch_first
            name = local.rpartition(".")[2]
            cross = "cross" in name or name == "multihead_attn"
            cross = cross or not getattr(module, "_qkv_same_embed_dim", True)
            sites.append(
                Site(
                    path=path,
                    kind="cross" if cross else "self",
                    module=module,
                    heads=getattr(module, "num_heads", getattr(module, "heads", None)),
                    host=self.name,
                    family=type(model).__name__,
                    token_module=layer,
                    tags=frozenset() if block else frozenset({NO_TOKENS}),
                )
            )
        return [Root("", model, sites=number(sites), excluded=by_hand(model))]

    def roots_for(self, target: Any, sites: Selector) -> list[Root]:
        """The root with only the sites that a user named, by glob, regex or predicate.

        Raises:
            SelectorError: when a selector matches no module at all.
            NoSiteError: when it matches only modules whose attention cannot be reached.
        """
        root = self.roots(target)[0]
        single = not isinstance(sites, list | tuple)
        chosen: set[int] = set()
        for part in [sites] if single else sites:  # type: ignore[union-attr]
            try:
                chosen.update(id(site) for site in select(root.sites, part))
            except SelectorError as error:
                raise self._why_not(root, part) or error from None
        root.sites = [site for site in root.sites if id(site) in chosen]
        return [root]

    def schedulers(self, target: Any) -> list[Any]:
        """None: a loop of your own moves the clock with ``session.step``."""
        return []

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """A class swap per attention module; encoder layers of torch lose their fused path."""
        for site in sites:
            yield from swaps(site, seam)
        yield from mha.encoders(root, [s for s in sites if not mha.passive(s)], seam)
        if "logits" in seams:
            yield LogitsHook(root, sites, seam.run)

    def _why_not(self, root: Root, part: Any) -> NoSiteError | None:
        everything = [
            Site(path=path, kind="self", module=module, host=self.name)
            for path, module in named_sites(root.module)
            if path
        ]
        try:
            named = select(everything, part)
        except SelectorError:
            return None
        shown = ", ".join(f"{s.path} ({type(s.module).__name__})" for s in named[:4])
        reachable = [site.path for site in root.sites]
        return NoSiteError(
            f"The selector {part!r} names {shown}, and no forward there calls "
            "F.scaled_dot_product_attention or is nn.MultiheadAttention's, so there is no attention call "
            "to take over. "
            + (f"Sites here: {reachable[:4]}." if reachable else "This model has no such module.")
        )


_ENCODER_LAYER = torch.nn.TransformerEncoderLayer


def _unwrap(target: Any) -> Any:
    return getattr(target, "_orig_mod", target)
