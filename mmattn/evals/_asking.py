"""Ask a vision-language model batches of questions about pictures, and time prefill and decoding."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmattn.errors import ConfigError
from mmattn.evals._protocol import Item, Picture

if TYPE_CHECKING:
    from mmattn.loading import Loaded


class Asker:
    """Answers batches of items with one vision-language model, and times prefill and decoding.

    Args:
        loaded: the model and its processor.
        picture: opens pictures.
        generation: arguments of `generate`; greedy unless they say otherwise.
    """

    cache_bytes: ClassVar[int] = 256 * 2**20

    def __init__(
        self, loaded: Loaded, picture: Picture, generation: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.processor, self.picture = loaded.target, loaded.processor, picture
        self.generation = {"do_sample": False, **(generation or {})}
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(
                f"{loaded.source}: its processor has no chat template, so it is not known how to ask it"
            )
        # Its prompts have one number of tokens for every picture; other families depend on the size.
        self.fixed = type(self.processor).__name__ == "LlavaProcessor"
        self._pixels: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._ids: dict[str, list[int]] = {}

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Response, its tokens, and milliseconds per item, for items with one `limit`."""
        device = self.model.device
        inputs = self._inputs(items)
        arguments = {**self.generation, "max_new_tokens": items[0].limit}
        clock = _FirstToken(device)
        start = clock.now()
        tokens = self.model.generate(**inputs, **arguments, stopping_criteria=[clock])
        end = clock.now()
        first = end if clock.at is None else clock.at
        fresh = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(fresh, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([-1] if ends is None else ends, device=fresh.device).reshape(-1)
        stopped = torch.isin(fresh, ends).cumsum(1) > 0
        per = 1e3 / len(items)
        return [
            {
                "response": text.strip(),
                "tokens": int(count),
                "prefill_ms": round((first - start) * per, 3),
                "decode_ms": round((end - first) * per, 3),
            }
            for text, count in zip(texts, (~stopped).sum(1).tolist(), strict=True)
        ]

    def _text(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        return text

    def _inputs(self, items: Sequence[Item]) -> Any:
        tokenizer = self.processor.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            if self.fixed:
                inputs = self._fixed_inputs(items, tokenizer)
            else:
                inputs = self.processor(
                    images=[[self.picture(item.picture)] for item in items],
                    text=[self._text(item.prompt) for item in items],
                    padding=True,
                    return_tensors="pt",
                )
        finally:
            tokenizer.padding_side = side
        return inputs.to(self.model.device, self.model.dtype)

    def _fixed_inputs(self, items: Sequence[Item], tokenizer: Any) -> Any:
        """The same tensors as the processor's, but every picture and every prompt is processed once."""
        fresh = [key for key in dict.fromkeys(i.picture for i in items) if key not in self._pixels]
        if fresh:
            pictures = [self.picture(key) for key in fresh]
            pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            self._pixels.update(zip(fresh, pixels, strict=True))
        for item in items:
            if item.prompt not in self._ids:
                whole = self.processor(
                    images=[self.picture(item.picture)],
                    text=[self._text(item.prompt)],
                    return_tensors="pt",
                )
                self._ids[item.prompt] = whole["input_ids"][0].tolist()
        padded = tokenizer.pad(
            {"input_ids": [self._ids[item.prompt] for item in items]}, return_tensors="pt"
        )
        pixels = torch.stack([self._pixels[item.picture] for item in items])
        while len(self._pixels) * pixels[0].nbytes > self.cache_bytes:
            self._pixels.popitem(last=False)
        feature = importlib.import_module("transformers").BatchFeature
        return feature({**padded, "pixel_values": pixels})


class _FirstToken:
    """When the first token was there: a stopping criterion that never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: float | None = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        if self.at is None:
            self.at = self.now()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of every parameter's name, shape and first values: another checkpoint has another one."""
    seen = hashlib.sha256()
    for name, value in model.state_dict().items():
        seen.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta:
            seen.update(str(value.flatten()[:8].float().tolist()).encode())
    return seen.hexdigest()[:16]
