"""VCD: subtract what the model would say about the same picture drowned in noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mmattn.errors import UnsupportedCall
from mmattn.methods._streams import (
    Prompt,
    checked,
    contrast,
    image_tokens,
    plausible,
    repeated,
    second_logits,
)
from mmattn.methods.base import Method, require
from mmattn.runs import ModelCall
from mmattn.sites import Site

_STEPS = 1000
_BLOCK = 64
_VIDEO = "pixel_values_videos"


@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Contrasts the next token's logits with those for a noised image (visual contrastive decoding).

    A picture drowned in noise leaves the model to its language habits. What it says then is taken away:
    ``(1 + alpha) * logits - alpha * logits_noised``. As that also lifts tokens that both streams find
    absurd, only tokens at least `beta` times as likely as the likeliest may be chosen.

    Paper: "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
    Decoding", arXiv 2311.16922, and the authors' code; compared with two explicit runs of the model.
    The paper samples (``do_sample=True``); greedy search and beams work as well.

    Deviations: every picture of a session gets the same noise, drawn from the session's generator, so
    that an answer depends neither on the rest of the batch nor on earlier prompts; choose another `seed`
    in `attach` for other noise. ``alpha=0`` turns the cut-off off, too. Both copies of a frame in a Qwen
    patch get the same noise. The prompt's last position is changed and everything after it, not the
    positions before. Prompts without images are left alone.

    Args:
        alpha: strength of the contrast, at least 0; the paper's 1. At 0 nothing is changed, bitwise.
        beta: cut-off as a share of the highest probability, in [0, 1]; the paper's 0.1, 0.2 in its POPE
            scripts. 0 cuts nothing.
        noise_step: how far the picture is noised, in diffusion steps of 1000, in [0, 999]; the paper's
            500. Noise is added to the normalised pixels.
        methods: whether other methods of the session act in the noised stream as well.

    Shapes: logits ``[B, L, V]``.

    Raises:
        ConfigError: for a setting out of range.
        UnsupportedCall: for videos, precomputed image features, prompts in chunks or padded on the right,
            static caches, and assisted decoding.

    Cost: a second run of the model with a key/value cache of the same size.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    methods: bool = True

    name: ClassVar[str] = "vcd"
    seams: ClassVar[tuple[str, ...]] = ("logits",)
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens", "pixels"})
    paper: ClassVar[str] = (
        "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive "
        "Decoding, arXiv 2311.16922"
    )

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"alpha must be at least 0, got {self.alpha}")
        require(0 <= self.beta <= 1, f"beta must be in [0, 1], got {self.beta}")
        fits = isinstance(self.noise_step, int) and 0 <= self.noise_step < _STEPS
        require(fits, f"noise_step must be a whole number in [0, 999], got {self.noise_step}")

    @property
    def passive(self) -> bool:
        """True at ``alpha == 0``."""
        return self.alpha == 0

    def logits(self, logits: torch.Tensor, *, site: Site) -> torch.Tensor:
        """The contrast, for the positions from which new tokens are drawn."""
        if self.passive:
            return logits
        call = checked(site)
        if call.past == 0:
            site.state["rows"] = image_tokens(call).any(1)
        other = second_logits(
            logits,
            site=site,
            prompt=lambda call: self._prompt(call, site),
            methods=self.methods,
        )
        return contrast(logits, other, self.contrasted, site.state["rows"])

    def contrasted(self, logits: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
        """``[..., V]`` from two ``[..., V]``."""
        kept = plausible(logits, self.beta)
        return ((1 + self.alpha) * logits - self.alpha * noised).masked_fill(~kept, -torch.inf)

    def _prompt(self, call: ModelCall, site: Site) -> Prompt | None:
        if not bool(image_tokens(call).any()):
            return None
        arguments, pictures = repeated(call), call.pictures
        encoded = arguments.get("mm_encoder_outputs") or {}
        if arguments.get(_VIDEO) is not None or encoded.get("video") is not None:
            raise UnsupportedCall("VCD adds noise to pictures; the prompt has a video.")
        if isinstance(arguments.get("pixel_values"), torch.Tensor):
            arguments["pixel_values"] = self.noised(arguments, site)
            return Prompt(arguments)
        clean = encoded.get("image")
        if clean is None or pictures is None or pictures.arguments is None:
            raise UnsupportedCall(
                "VCD needs the pixels behind the image tokens, and the model computed no image features "
                "since mmattn was attached (precomputed ones?). Pass pixel_values."
            )
        order = _order(list(clean.pooler_output), pictures.features)
        given = {k: v for k, v in pictures.arguments.items() if v is not None}
        given.update(pixel_values=self.noised(given, site), return_dict=True)
        assert pictures.module is not None
        out: Any = pictures.module.get_image_features(**given)  # type: ignore[operator]
        if order != list(range(len(pictures.features))):
            if getattr(out, "deepstack_features", None) is not None:
                raise UnsupportedCall(
                    "VCD cannot repeat deepstack features for beams or several samples; pass the prompt "
                    "as often as it is to be answered instead."
                )
            packed = [out.pooler_output[i] for i in order]
            whole = isinstance(out.pooler_output, torch.Tensor)
            out.pooler_output = torch.stack(packed) if whole else packed
        arguments["mm_encoder_outputs"] = {**encoded, "image": out}
        return Prompt(arguments)

    def noised(self, given: dict[str, Any], site: Site) -> torch.Tensor:
        """The pixel values of a call after `noise_step` diffusion steps.

        Args:
            given: holds ``pixel_values``: pictures ``[P, C, Y, X]``, tiles ``[P, T, C, Y, X]``, or packed
                patches ``[N, C * 2 * p * p]`` with ``image_grid_thw [P, 3]``.
            site: keeps the noise of the session.
        """
        pixels: torch.Tensor = given["pixel_values"]
        if pixels.ndim == 4:
            noise = _noise(1, pixels.shape[1:], site)[0].expand(pixels.shape)
        elif pixels.ndim == 5:
            noise = _noise(pixels.shape[1], pixels.shape[2:], site).expand(pixels.shape)
        elif pixels.ndim == 2 and given.get("image_grid_thw") is not None:
            counts = given["image_grid_thw"].prod(-1).tolist()
            # Channels, two frames, pixels: the frames of a picture are the same picture.
            drawn = _noise(max(counts), torch.Size((3, 1, pixels.shape[1] // 6)), site, _BLOCK)
            drawn = drawn.expand(-1, -1, 2, -1).flatten(1)
            noise = torch.cat([drawn[:count] for count in counts])
        else:
            raise UnsupportedCall(f"VCD does not know how to noise pixels {list(pixels.shape)}.")
        share = kept_share(self.noise_step)
        noise = noise.to(pixels.device, pixels.dtype)
        mixed: torch.Tensor = share**0.5 * pixels + (1 - share) ** 0.5 * noise
        return mixed


def _noise(count: int, shape: torch.Size, site: Site, block: int = 1) -> torch.Tensor:
    """``[count, *shape]``, the first of a table of the session's that grows by whole blocks."""
    table: dict[torch.Size, torch.Tensor] = site.shared.setdefault("noise", {})
    held = table.get(shape)
    missing = count - (0 if held is None else len(held))
    new = [torch.randn(block, *shape, generator=site.generator()) for _ in range(0, missing, block)]
    if new:
        table[shape] = torch.cat(new if held is None else [held, *new])
    return table[shape][:count]


def kept_share(step: int) -> float:
    """How much of the picture's variance is left after `step` steps of the paper's schedule."""
    betas = torch.linspace(-6, 6, _STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - betas).cumprod(0)[step])


def _order(used: list[torch.Tensor], known: list[torch.Tensor]) -> list[int]:
    """For each feature tensor of the prompt, which of the computed ones it is.

    Raises:
        UnsupportedCall: when the prompt holds other features.
    """
    order = []
    for one in used:
        same = (i for i, f in enumerate(known) if f is one or torch.equal(f, one))
        found = next(same, None)
        if found is None:
            raise UnsupportedCall(
                "The image features of the prompt are not those the model computed last, so VCD does not "
                "know their pixels. Pass pixel_values in the call."
            )
        order.append(found)
    return order
