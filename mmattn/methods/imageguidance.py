"""Image guidance: classifier-free guidance for words, away from the prompt without its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmattn.methods._streams import (
    Prompt,
    checked,
    contrast,
    image_tokens,
    plausible,
    second_logits,
)
from mmattn.methods.base import Method, require
from mmattn.runs import ModelCall
from mmattn.sites import Site


@dataclass(frozen=True, kw_only=True)
class ImageGuidance(Method):
    """Moves the next token's log-probabilities away from those of the prompt without its image tokens.

    The part of an answer that the model would give blindly is language habit. With ``l`` the
    log-probabilities and ``u`` those without the image, ``gamma * (l - u) + u`` weakens it. Tokens less
    than `cutoff` times as likely as the likeliest cannot be chosen.

    Paper: "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
    LVLMs", arXiv 2407.21771 (PAI), the second of its two parts, and the authors' code; compared with two
    explicit runs of the model. The first part, stronger attention to image keys, is not in this method.

    Deviations: image tokens are taken out of the prompt row by row, and what the template puts around
    them (Qwen's start and end of vision) stays. The prompt's last position is changed and everything
    after it, not the positions before. Rows without images are left alone.

    Args:
        gamma: strength, at least 0; the authors' 1.1, their script's default is 2. At 1 nothing is
            changed, bitwise, and nothing is cut off.
        cutoff: share of the highest probability, in [0, 1]; the authors' 0.1. 0 cuts nothing.

    Shapes: logits ``[B, L, V]``; the changed ones are log-probabilities up to a constant.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for prompts in chunks or padded on the right, static caches, and assisted
            decoding.

    Cost: a second run of the model over the text alone, with a key/value cache of its own. The session's
    other methods do not act in it, as in the paper.
    """

    gamma: float = 1.1
    cutoff: float = 0.1

    name: ClassVar[str] = "image-guidance"
    seams: ClassVar[tuple[str, ...]] = ("logits",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens"})
    paper: ClassVar[str] = (
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs, "
        "arXiv 2407.21771"
    )

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"gamma must be at least 0, got {self.gamma}")
        require(0 <= self.cutoff <= 1, f"cutoff must be in [0, 1], got {self.cutoff}")

    @property
    def passive(self) -> bool:
        """True at ``gamma == 1``."""
        return self.gamma == 1

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """The guidance, for the positions from which new tokens are drawn."""
        if self.passive:
            return logits
        call = checked(site)
        if call.past == 0:
            site.state["rows"] = image_tokens(call).any(1)
        other = second_logits(logits, site=site, prompt=without_images, methods=False)
        return contrast(logits, other, self.guided, site.state["rows"])

    def guided(self, logits: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
        """``[..., V]`` from two ``[..., V]``."""
        seeing, blind = logits.log_softmax(-1), blind.log_softmax(-1)
        kept = plausible(seeing, self.cutoff)
        return (self.gamma * (seeing - blind) + blind).masked_fill(~kept, -torch.inf)


def without_images(call: ModelCall) -> Prompt | None:
    """The text of every row, padded on the left, with positions from 0; None if no row has an image."""
    ids, mask = call.arguments["input_ids"], call.arguments.get("attention_mask")
    image = image_tokens(call)
    if not bool(image.any()):
        return None
    real = (torch.ones_like(image) if mask is None else mask.bool()) & ~image
    width = int(real.sum(1).max())
    order = torch.argsort(real.int(), dim=1, stable=True)[:, -width:]
    kept = real.gather(1, order)
    # Any id will do at padding, which is masked; one of the row's own is surely in the vocabulary.
    text = torch.where(kept, ids.gather(1, order), ids[:, -1:])
    positions = (kept.long().cumsum(1) - 1).clamp(min=0)
    arguments = {"input_ids": text, "attention_mask": kept.long(), "position_ids": positions}
    return Prompt(arguments, alone=True)
