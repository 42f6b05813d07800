"""transformers: language, vision and vision-language models.

Attention modules ask the table `ALL_ATTENTION_FUNCTIONS` for the function that their
`attn_implementation` names. Each site's class gets a subclass whose forward, the stock code, sees a
table that hands out the same functions with the seam around them. The config stays as it is, so masks
are still made by the model for its own implementation and padding cannot get lost.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from mmattn.errors import ConflictError, NoSiteError
from mmattn.hosts.base import ClassSwap, Handle, named_sites, number
from mmattn.hosts.transformers_cut import Hooks
from mmattn.hosts.transformers_features import family_of
from mmattn.hosts.transformers_inner import inner_of, logits_hook
from mmattn.hosts.transformers_language import LanguageHook
from mmattn.hosts.transformers_layout import (
    ImageTokens,
    embedding_of,
    heads_of,
    is_tower,
    kind_of,
    own_softmax,
    placeholders,
    role_of,
    seamable,
    tag_of,
    takes_tokens,
    vision_layout,
)
from mmattn.hosts.transformers_qformer import before_qformer
from mmattn.hosts.transformers_tower import Tower
from mmattn.rebind import SLOT, subclass
from mmattn.runs import Pictures, Root
from mmattn.seams import Seam
from mmattn.sites import Site


class TransformersHost:
    """Adapter for `PreTrainedModel` objects, PEFT wrappers and transformers pipelines.

    Sites are tagged ``vision``, ``decoder`` (causal, with a cache), ``text`` (encoders) or ``qformer``;
    decoders whose prompts hold image tokens also ``multimodal``.
    Vision sites carry more: ``output`` at the block whose output the language model gets, ``windowed``
    and ``packed`` in Qwen towers, ``prunable`` where the features seam exists (LLaVA, LLaVA-NeXT,
    Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM, InstructBLIP).

    Decoder sites see the padding mask as the model made it, key and value heads not repeated, and
    `Layout.image_mask` of the prompt, during decoding too. Their tokens seam is the whole block, before
    its first norm; elsewhere it is the attention module.

    With a features method the language model gets fewer tokens than `input_ids` has. `generate` returns
    what it always returns; the logits and hidden states of a bare forward have the shorter length, so
    a loss over `labels` cannot be computed while such a method is attached. InstructBLIP's language model
    gets as many tokens as ever; its Q-Former gets fewer patches.
    """

    name = "transformers"

    def claims(self, target: Any) -> bool:
        """True for models, their compiled or PEFT wrappers, and pipelines."""
        from transformers import PreTrainedModel

        model = _model(target)
        if not isinstance(model, torch.nn.Module):
            return False
        wrapped = type(model).__module__.startswith("peft.")
        return isinstance(model, PreTrainedModel) or (
            wrapped and any(isinstance(m, PreTrainedModel) for m in model.modules())
        )

    def schedulers(self, target: Any) -> list[Any]:
        """None: there is no denoising loop."""
        return []

    def roots(self, target: Any) -> list[Root]:
        """One root per tower that contains attention."""
        target = _model(target)
        modules = dict(named_sites(target))
        towers: dict[str, Tower] = {}
        for path, module in modules.items():
            known, alone = seamable(module), own_softmax(module)
            if not known and not alone:
                continue
            home = _owner(modules, path)
            if home not in towers:
                towers[home] = Tower(home, modules[home], role=role_of(modules[home]))
            if known:
                block = modules.get(path.rpartition(".")[0])
                towers[home].sites.append(self._site(path, module, towers[home], block))
            else:
                towers[home].excluded[path] = (
                    f"{type(module).__name__} computes its softmax itself instead of asking "
                    "transformers' table of attention functions"
                )
        for tower in towers.values():
            number(tower.sites)
            tower.layout = vision_layout if tower.role == "vision" else None
        self._connect(modules, towers)
        if "" not in towers:  # the whole model has no sites of its own, but it returns the logits
            prunable = any(tower.prunable for tower in towers.values())
            towers[""] = Tower("", target, role="whole", prunable=prunable)
        whole = towers[""]
        whole.language = next((t for t in towers.values() if t.tokens is not None), None)
        inner = next((found for m in modules.values() if (found := inner_of(m)) is not None), None)
        if inner is not None:
            whole.inner = next((path, m) for path, m in modules.items() if m is inner)
        return list(towers.values())

    def _site(
        self, path: str, module: torch.nn.Module, tower: Tower, block: torch.nn.Module | None
    ) -> Site:
        tag, kind = tag_of(tower.role, module), kind_of(path, module)
        whole = tag == "decoder" and kind == "self" and takes_tokens(block)
        return Site(
            path=path,
            kind=kind,
            module=module,
            heads=heads_of(module),
            host=self.name,
            family=type(tower.module).__name__,
            token_module=block if whole else None,
            tags=frozenset({tag}),
        )

    def _connect(self, modules: dict[str, torch.nn.Module], towers: dict[str, Tower]) -> None:
        """Give language towers their image positions, and vision towers the tags that depend on use."""
        for name, tower in towers.items():
            if not any("decoder" in site.tags for site in tower.sites):
                continue
            fusion = _fusion(modules, name)
            ids = placeholders(getattr(fusion, "config", None))
            # Ids outside the vocabulary are replaced before they are embedded (PaliGemma).
            size = getattr(embedding_of(tower.module), "num_embeddings", 0) if ids else 0
            tower.tokens = ImageTokens(ids if all(i < size for i in ids) else ())
            if tower.tokens.ids:
                for site in tower.sites:
                    site.tags |= {"multimodal"}
            tower.layout = tower.tokens.layout
            tower.fusion = fusion
            tower.pictures = Pictures(tower.tokens.ids, fusion)
            family = family_of(fusion)
            if family is None:
                continue
            eyes = family.tower(fusion)
            vision = next((t for t in towers.values() if t.module is eyes), None)
            before = tower
            if family.queried:
                before = next(t for t in towers.values() if t.role == "qformer")
            before.family, before.fusion = family, fusion
            before.vision = vision.sites if vision is not None else []
        prunable = any(tower.family is not None for tower in towers.values())
        for tower in towers.values():
            tower.prunable = prunable
            if tower.role == "vision":
                _tag_vision(tower, [t for t in towers.values() if t.vision is tower.sites])

    def handles(
        self, root: Root, sites: list[Site], seam: Seam, seams: set[str]
    ) -> Iterable[Handle]:
        """A class swap per site, and hooks around the language model of a vision-language model."""
        assert isinstance(root, Tower)
        made: list[Handle] = []
        for site in list(sites):
            rebound = seam.rebound(type(site.module).forward)
            assert rebound is not None, "only seamable modules become sites"
            tokens, block = bool(site.token_methods), site.token_module
            own = tokens and block is None
            cls = seam.attention_class(type(site.module), "forward", rebound, tokens=own)
            made.append(ClassSwap(site.module, cls, site, site.path))
            if tokens and block is not None:
                cls = seam.block_class(type(block))
                made.append(ClassSwap(block, cls, site, f"{site.path} (its block)"))
        features = [(i, m) for i, m in enumerate(seam.run.methods) if "features" in m.seams]
        if features and not root.prunable:
            raise NoSiteError(
                f"{features[0][1].name} prunes image tokens between the vision tower and the language "
                "model, which mmattn knows for LLaVA, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM "
                "and (before its Q-Former) InstructBLIP. This target has no such place; attach to the whole "
                "vision-language model."
            )
        if len(features) > 1:
            names = " and ".join(m.name for _, m in features)
            raise ConflictError(f"{names} both prune the image tokens; attach one of them.")
        if "logits" in seams and root.name == "":
            made.append(logits_hook(root, sites, seam.run))
        if root.role == "qformer" and root.family is not None and features:
            return [*made, *before_qformer(root, sites, seam.run, features[0])]
        if root.tokens is None:
            return made
        seam.run.carried += [root.tokens, root.pictures]
        watched = _watched(root, seam)
        twin = any(m.twin for site in sites for _, m in (*site.attention, *site.head_methods))
        if root.tokens.ids:
            made.append(Hooks(before=[(embedding_of(root.module), root.tokens.see)]))
        if root.family is not None and root.fusion is not None and features:
            if SLOT in root.fusion.__dict__:
                raise ConflictError(
                    f"Another mmattn session already prunes the image tokens of {root.name}; detach it "
                    "first."
                )
            slot, method = features[0]
            place = Site(
                path=f"{root.name}.image_tokens" if root.name else "image_tokens",
                kind="features",
                module=root.module,
                host=self.name,
                family=type(root.fusion).__name__,
                run=seam.run,
                slot=slot,
                feature_methods=((slot, method),),
            )
            sites.append(place)
            hook = LanguageHook(root, seam.run, root.tokens, place, twin=twin)
            seam.run.carried.append(hook)
            recording = hook.recording(watched or type(root.fusion))
            made += [hook, ClassSwap(root.fusion, recording, place, place.path)]
            return made
        if twin:
            hook = LanguageHook(root, seam.run, root.tokens, None, twin=True)
            seam.run.carried.append(hook)
            made.append(hook)
        if watched is not None and root.fusion is not None:
            place = Site("image_features", "features", root.fusion, run=seam.run)
            made.append(ClassSwap(root.fusion, watched, place, f"{root.name} (image features)"))
        return made


def _model(target: Any) -> Any:
    """The model behind a pipeline or a compiled wrapper."""
    from transformers import Pipeline

    target = target.model if isinstance(target, Pipeline) else target
    return getattr(target, "_orig_mod", target)


def _owner(modules: dict[str, torch.nn.Module], path: str) -> str:
    """Path of the innermost tower around `path`."""
    while path:
        path = path.rpartition(".")[0]
        if path in modules and is_tower(modules[path]):
            return path
    return ""


def _fusion(modules: dict[str, torch.nn.Module], name: str) -> torch.nn.Module | None:
    """The innermost model around a language tower whose config knows image placeholders."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(modules.get(name), "config", None)
        if config is not None and placeholders(config):
            return modules[name]
    return None


def _watched(root: Tower, seam: Seam) -> type | None:
    """Subclass of the fusion model that remembers its calls for image features, where a method asks.

    `generate` computes features once, ahead of the prefill, and does not pass on the pixels.
    """
    base: Any = type(root.fusion)
    pictures, run, stock = root.pictures, seam.run, getattr(base, "get_image_features", None)
    if stock is None or not any("pixels" in method.needs for method in run.methods):
        return None
    assert root.fusion is not None and pictures is not None
    if SLOT in root.fusion.__dict__:
        raise ConflictError(
            f"Another mmattn session already takes part in the image features of {root.name}; detach it "
            "first."
        )
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        if run.enabled and not torch.compiler.is_compiling():
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            given.update(given.pop("kwargs", {}))
            del given["self"]
            pictures.arguments = given
            pictures.features = list(getattr(out, "pooler_output", ()))
        return out

    return subclass(base, get_image_features=get_image_features)


def _tag_vision(tower: Tower, languages: list[Tower]) -> None:
    depth = len(tower.sites)
    full = getattr(tower.module, "fullatt_block_indexes", None)
    output, extra = depth - 1, set()
    for language in languages:
        assert language.family is not None and language.fusion is not None
        output = language.family.output(language.fusion, depth)
        extra.add("prunable")
    for i, site in enumerate(tower.sites):
        tags = set(site.tags) | extra
        if i == output:
            tags.add("output")
        if hasattr(tower.module, "spatial_merge_size"):
            tags.add("packed")
        if full is not None and i not in full:
            tags.add("windowed")
        site.tags = frozenset(tags)
