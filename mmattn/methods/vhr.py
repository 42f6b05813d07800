"""VHR: amplify the attention heads whose output changes most when the image is taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods.base import Dense, Method, require
from mmattn.seams import Opaque
from mmattn.sites import Site

_STREAMS = ("delete", "two_pass", "local")


@dataclass(frozen=True)
class VHR(Method):
    """Multiplies the outputs of vision-aware heads by `alpha`, chosen once per prompt.

    Hallucinated words come from heads that follow the language prior. At the prompt's last position the
    output of every head is compared with its output when the image is not there (vision-aware head
    divergence, the distance of the two). Heads above the layer's median are reinforced, at every
    position and for the whole generation.

    Paper: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    arXiv 2412.13949; compared there with DoLa, VCD, OPERA, CODE and EAH on CHAIR and POPE.

    Deviations: none known for ``text_stream="delete"``, but the authors' code was not at hand. The
    paper does not say whether the standard deviation of the outlier rule is the sample's (used here) or
    the population's. Layer sets for shallow models are ours, see `layers`.

    Args:
        alpha: factor on reinforced heads, at least 0; the paper's 2. At 1 nothing is changed, bitwise.
        layers: decoder blocks, 0-based, negative from the end. None takes block 1 and the last 14, as
            the paper does for 32 blocks; models with fewer than 32 take the last ``round(14/32 * depth)``,
            at least 1.
        text_stream: how the run without the image is made. ``"delete"``: the prompt without its image
            tokens, as extra rows of the prefill, its heads reinforced alike, so that both streams have
            gone through the same changes. ``"two_pass"``: the same rows left alone, equal to a separate
            pass of the untouched model. ``"local"``: not the paper's; the image keys are masked in each
            layer's last query, at the cost of one query, without a second run.
        outliers: drop heads with both a divergence and a text-only output more than one standard
            deviation above the layer's mean. Their places go to the next heads, as the median is taken
            afterwards.

    Shapes: head outputs ``[B, H, Q, D]``; the choice is ``[B, H]``, per row.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts fed in chunks or onto a running cache, padded on the right, or
            whose image tokens the host cannot see.

    Cost: ``delete`` and ``two_pass`` double the rows of the prefill; decoding costs nothing. Without a
    key/value cache every step is a prompt of its own, and heads are chosen at each.
    """

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    text_stream: str = "delete"
    outliers: bool = True

    name: ClassVar[str] = "vhr"
    seams: ClassVar[tuple[str, ...]] = ("attention", "heads")
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, "
        "arXiv 2412.13949"
    )
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"alpha must be at least 0, got {self.alpha}")
        require(
            self.text_stream in _STREAMS,
            f"text_stream must be one of {_STREAMS}, got {self.text_stream!r}",
        )
        fits = self.layers is None or all(isinstance(i, int) for i in self.layers)
        require(fits, f"layers must be block numbers, got {self.layers!r}")

    @property
    def passive(self) -> bool:
        """True at ``alpha == 1``."""
        return self.alpha == 1

    @property
    def twin(self) -> bool:
        """Whether prompts run a second time without their images."""
        return not self.passive and self.text_stream != "local"

    def accepts(self, site: Site) -> str | None:
        """Decoder blocks among `layers`."""
        if "decoder" not in site.tags:
            return "it is not in a causal decoder"
        if "multimodal" not in site.tags:
            return (
                "its language model is not part of a model that puts image tokens into the prompt"
            )
        if site.index not in self.chosen(site.depth):
            return "its layer is not among `layers`"
        return None

    def chosen(self, depth: int) -> set[int]:
        """Blocks of a decoder with `depth` of them."""
        if self.layers is not None:
            return {i + depth if i < 0 else i for i in self.layers}
        last = 14 if depth >= 32 else max(1, round(14 / 32 * depth))
        return {min(1, depth - 1), *range(depth - last, depth)}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        site: Site,
        dense: Dense,
    ) -> torch.Tensor:
        """The stock attention; ``local`` also computes the last query without its image keys."""
        out = dense(q, k, v)
        if self.text_stream == "local" and not self.passive and site.layout.past == 0:
            image = _image_mask(site)
            if isinstance(mask, Opaque):
                raise UnsupportedCall(
                    f"text_stream='local' has to read the mask, and this is {mask.what}; use eager or "
                    "sdpa attention, or text_stream='delete'."
                )
            blind = without_image(q, k, v, mask, scale, image) if bool(image.any()) else None
            site.state["blind"] = blind
        return out

    def heads(self, out: torch.Tensor, *, site: Site) -> torch.Tensor:
        """Choose heads at the prompt, then scale them at every call."""
        if self.passive:
            return out
        rows = out.shape[0]
        if site.layout.past:
            factor: torch.Tensor | None = site.state.get("factor")
            if factor is None or factor.shape[0] != rows or out.shape[2] > 1:
                raise UnsupportedCall(
                    "VHR chooses its heads at a prompt that is fed whole, into an empty cache, while "
                    f"attached; this call adds {out.shape[2]} tokens of {rows} rows to a cache of "
                    f"{site.layout.past}. Feed the prompt at once, without prefill_chunk_size."
                )
            return out * factor
        image = _image_mask(site)
        twins = site.layout.twins
        own = rows - twins
        if not bool(image.any()):
            site.state["factor"] = out.new_ones(own, out.shape[1], 1, 1)
            site.note("reinforced", 0.0)
            return out
        last = out[:own, :, -1]
        blind = out[own:, :, -1] if twins else site.state.pop("blind")
        chosen = reinforced(last, blind, outliers=self.outliers)
        chosen &= image[:own].any(1, keepdim=True)
        factor = torch.where(chosen, self.alpha, 1.0).to(out.dtype)[..., None, None]
        site.state["factor"] = factor
        site.note("reinforced", chosen.float().mean())
        if not twins:
            return out * factor
        other = factor if self.text_stream == "delete" else torch.ones_like(factor)
        return out * torch.cat([factor, other])


def reinforced(seeing: torch.Tensor, blind: torch.Tensor, *, outliers: bool = True) -> torch.Tensor:
    """Heads whose divergence lies above their layer's median.

    Args:
        seeing, blind: ``[B, H, D]`` head outputs at the last position with and without the image.
        outliers: whether heads that stand out without the image are left out.

    Returns:
        ``[B, H]`` bool. `torch.median` is the lower one, so half of an even number of heads.
    """
    divergence = (seeing.float() - blind.float()).norm(dim=-1)
    if outliers and divergence.shape[1] > 1:
        alone = blind.float().square().sum(-1)
        out = (divergence > _high(divergence)) & (alone > _high(alone))
        divergence = divergence.masked_fill(out, 0.0)
    above: torch.Tensor = divergence > divergence.median(dim=1, keepdim=True).values
    return above


def without_image(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    image: torch.Tensor,
) -> torch.Tensor:
    """Attention of the last query over the keys that are not image tokens: ``[B, H, D]``.

    Args:
        q: ``[B, H, Q, D]``; k, v: ``[B, Hk, K, D]``.
        mask: ``[B, 1, Q, K]`` bool (True attends) or additive, or None.
        image: ``[B, K]`` bool.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q[:, :, -1:].float() @ k.transpose(-1, -2)) * scale
    if mask is not None:
        row = mask[:, :, -1:, : k.shape[2]]
        scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
    image = torch.nn.functional.pad(image, (0, k.shape[2] - image.shape[1]))
    scores = scores.masked_fill(image[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).squeeze(2)


def _high(x: torch.Tensor) -> torch.Tensor:
    return x.mean(1, keepdim=True) + x.std(1, keepdim=True)


def _image_mask(site: Site) -> torch.Tensor:
    image = site.layout.image_mask
    if image is None or site.layout.past is None:
        raise UnsupportedCall(
            f"VHR compares with and without the image, but {site.path} cannot tell which tokens are "
            "image tokens: pass input_ids to the vision-language model, not inputs_embeds."
        )
    return image
