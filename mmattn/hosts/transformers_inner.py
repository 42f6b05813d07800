"""Vision-language models whose `generate` leaves everything to a language model inside (InstructBLIP).

Their logits come from that inner model, which is given embeddings. `forward` of the whole model calls it
too, so the logits seam is put there, and its calls are told as calls with ids and pixels.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from mmattn.errors import NoSiteError, UnsupportedCall
from mmattn.hosts.base import LogitsHook
from mmattn.hosts.transformers_layout import ImageTokens
from mmattn.rebind import names_used
from mmattn.runs import Pictures, Root, Run
from mmattn.sites import Site

if TYPE_CHECKING:
    from mmattn.hosts.transformers_tower import Tower

_BYPASS = {"language_model", "generate"}


def inner_of(module: torch.nn.Module) -> Any:
    """The language model that `module` lets generate alone, or None."""
    inner = module._modules.get("language_model")
    generate = getattr(type(module), "generate", None)
    if inner is None or generate is None or not names_used(generate) >= _BYPASS:
        return None
    return inner if inner.can_generate() else None  # type: ignore[operator]


def logits_hook(root: Tower, sites: list[Site], run: Run) -> LogitsHook:
    """The logits seam, at the model whose call returns the logits in every way of generating."""
    language = root.language
    if root.inner is not None:
        path, inner = root.inner
        method = next(m for m in run.methods if "logits" in m.seams)
        check_decoder(inner, type(root.module).__name__, method.name)
        assert language is not None, "a causal language model has a decoder"
        return InnerLogitsHook(path, inner, sites, run, language)
    decoder = None if language is None else language.sites
    pictures = None if language is None else language.pictures
    return LogitsHook(root, sites, run, decoder=decoder, pictures=pictures)


class InnerLogitsHook(LogitsHook):
    """The logits seam at an inner language model.

    While methods look at a call, ``run.call.module`` is a `FromIds`, and its arguments are ids and, where
    the prompt shows the pictures of the last call for image features, pixels.

    Args:
        path: of the inner model.
        inner: the inner model.
        language: the tower inside of it.
    """

    def __init__(
        self, path: str, inner: torch.nn.Module, sites: list[Site], run: Run, language: Tower
    ) -> None:
        assert language.tokens is not None and language.pictures is not None
        root = Root(path, inner)
        super().__init__(root, sites, run, decoder=language.sites, pictures=language.pictures)
        self.model = FromIds(inner, language.tokens, language.pictures)

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        call = self.run.call
        if self.run.enabled and call is not None and not torch.compiler.is_compiling():
            call.module = self.model
            call.arguments = self.model.told(call.arguments)


class FromIds(torch.nn.Module):
    """An inner language model as a function of ids and pixels, which it embeds as the whole model does.

    Args:
        inner: the language model.
        tokens: where its ids are embedded.
        pictures: where the image features come from.
    """

    def __init__(self, inner: torch.nn.Module, tokens: ImageTokens, pictures: Pictures) -> None:
        super().__init__()
        self.inner, self.tokens, self.pictures = inner, tokens, pictures
        self.config = inner.config
        self.generation_config = getattr(inner, "generation_config", None)
        names = inspect.signature(type(inner).forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"

    def get_input_embeddings(self) -> Any:
        """The inner model's token embedding."""
        return self.inner.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        """The inner model's head."""
        return self.inner.get_output_embeddings()  # type: ignore[operator]

    def told(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the inner model, in ids and pixels as far as they are known."""
        embeds: Any = given.get("inputs_embeds")
        ids = None if embeds is None else self.tokens.behind(embeds)
        if ids is None:
            return given
        told = {k: v for k, v in given.items() if k != "inputs_embeds"}
        told["input_ids"] = ids
        pictures, image = self.pictures, self.tokens.among(ids)
        if pictures.arguments is None or image is None:
            return told
        features = torch.cat([f.flatten(0, -2) for f in pictures.features]).to(embeds)
        step = max(1, len(ids) // len(pictures.features))
        # Features made elsewhere were made from pixels that are not known.
        if torch.equal(embeds[::step][image[::step]], features):
            seen = {k: v for k, v in pictures.arguments.items() if v is not None}
            told.update({k: v for k, v in seen.items() if k != "return_dict"})
        return told

    def forward(
        self,
        input_ids: torch.Tensor,
        cache: Any = None,
        pixel_values: Any = None,
        logits_to_keep: int = 0,
        **rest: Any,
    ) -> Any:
        """Logits of the inner model.

        Args:
            input_ids: ``[B, N]``.
            cache: of the inner model.
            pixel_values: ``[b, ...]`` where B is a multiple of b: every picture is shown in consecutive
                rows of equal ids.
            logits_to_keep: of the last positions; 0 for all.
            rest: other arguments for image features, and of the inner model.

        Raises:
            UnsupportedCall: for image tokens without pixels.
        """
        rest["logits_to_keep"] = logits_to_keep
        if cache is not None:
            rest[self._cache] = cache
        fusion: Any = self.pictures.module
        names = inspect.signature(fusion.get_image_features).parameters
        seeing = {k: rest.pop(k) for k in list(rest) if k in names}
        image = self.tokens.among(input_ids)
        if image is None or not bool(image.any()):
            return self.inner(input_ids=input_ids, **rest)
        if pixel_values is None:
            raise UnsupportedCall(
                "The prompt has image tokens, and the pixels behind them are not known (precomputed "
                "features?). Pass pixel_values."
            )
        out = fusion.get_image_features(pixel_values=pixel_values, **seeing, return_dict=True)
        features = out.pooler_output
        copies = len(input_ids) // len(features)
        embeds = self.get_input_embeddings()(input_ids[::copies])
        embeds = embeds.masked_scatter(image[::copies].unsqueeze(-1), features.to(embeds))
        return self.inner(inputs_embeds=embeds.repeat_interleave(copies, 0), **rest)


def check_decoder(inner: Any, whole: str, method: str) -> None:
    """Raise unless the inner model is a decoder alone.

    Raises:
        NoSiteError: for an encoder and a decoder (FlanT5), whose prompt is in the encoder.
    """
    if inner.config.is_encoder_decoder:
        raise NoSiteError(
            f"{method} acts on the logits of a causal decoder that reads the prompt. The language model of "
            f"this {whole} is a {type(inner).__name__}, an encoder and a decoder, so there is no such "
            "place; use a variant with a decoder alone (Vicuna)."
        )
