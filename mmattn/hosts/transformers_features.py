"""How vision-language models of transformers pack image features into the prompt, family by family.

A family answers: which tower and which feature layer feed the language model, where each token of the
prompt comes from, and how numbers per patch of the tower become numbers per token. "Tower tokens" are
the projected features of all tiles of a call, one after the other, before any packing.

InstructBLIP is different: its prompt always holds the 32 answers of a Q-Former to learned queries. They have
no grid and no patches, so there is nothing that attention over patches could say about one of them. What
can be pruned there are the patches that the Q-Former looks at (`transformers_qformer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from mmattn.errors import UnsupportedCall


@dataclass(frozen=True)
class Packed:
    """One image as the prompt holds it.

    Args:
        source: ``[L]``, for every token of the prompt the tower token it shows, -1 for separators.
        tiles: ``(first tower token, (Y, X))`` of each tile.
    """

    source: torch.Tensor
    tiles: tuple[tuple[int, tuple[int, int]], ...]


class Family:
    """One way of packing; `call` holds the arguments of the running fusion call.

    Class attributes:
        tokenwise: whether the projector takes ``[tiles, M, E]`` and treats every token by itself.
        queried: whether a Q-Former stands between the tower and the prompt.
    """

    tokenwise = False
    queried = False

    def tower(self, fusion: Any) -> torch.nn.Module | None:
        """The vision tower."""
        raise UnsupportedCall("This model has no vision tower that mmattn knows.")

    def projector(self, fusion: Any) -> torch.nn.Module:
        """The module whose output are the tower tokens."""
        raise UnsupportedCall("This model has no projector that mmattn knows.")

    def output(self, fusion: Any, depth: int) -> int:
        """Index of the block whose output becomes the features."""
        return depth - 1

    def tokens(self, fusion: Any, out: Any) -> torch.Tensor:
        """Tower tokens ``[T, C]`` or ``[tiles, M, C]`` from the projector's output."""
        return out  # type: ignore[no-any-return]

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        """The images of a call, in prompt order."""
        raise UnsupportedCall("This model packs its images in a way mmattn does not know.")

    def per_token(
        self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor, values: Sequence[Any]
    ) -> torch.Tensor:
        """Numbers per patch, to numbers per tower token.

        Args:
            values: one ``[tiles, N]`` or ``[tiles, N, E]`` tensor per attention call.

        Returns:
            ``[T]`` or ``[T, E]``.
        """
        flat = torch.cat(list(values))
        extra = flat.shape[1] - tokens.shape[1]
        if flat.shape[0] != tokens.shape[0] or extra < 0:
            raise UnsupportedCall(
                f"The vision tower recorded {list(flat.shape)} numbers for features "
                f"{list(tokens.shape)}; run the tower and the language model in the same call."
            )
        return flat[:, extra:].flatten(0, 1)


class Llava(Family):
    """LLaVA 1.5: a CLIP tower, its class token dropped, every image one tile."""

    tokenwise = True

    def tower(self, fusion: Any) -> torch.nn.Module | None:
        return getattr(fusion, "vision_tower", None)

    def projector(self, fusion: Any) -> torch.nn.Module:
        return fusion.multi_modal_projector  # type: ignore[no-any-return]

    def output(self, fusion: Any, depth: int) -> int:
        layer = fusion.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else max(i % (depth + 1) for i in layer)
        return max(0, layer - 1) if layer >= 0 else depth + layer

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        if call.get("image_sizes") is not None:
            raise UnsupportedCall(
                "This LLaVA packs images of different sizes (image_sizes was passed, as for Pixtral), "
                "which pruning of image tokens does not cover."
            )
        grid = _grid(fusion, call["pixel_values"], tokens)
        size = tokens.shape[1]
        each = torch.arange(size, device=tokens.device)
        return [Packed(each + i * size, ((i * size, grid),)) for i in range(tokens.shape[0])]


class LlavaNext(Llava):
    """LLaVA-NeXT: a base tile and a grid of tiles, cropped to the image, a newline after each row."""

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes, config = call["image_sizes"], fusion.config
        strategy = call.get("vision_feature_select_strategy")
        strategy = config.vision_feature_select_strategy if strategy is None else strategy
        grid = _grid(fusion, call["pixel_values"], tokens)
        size, first, found = tokens.shape[1], 0, []
        newline = torch.full((1,), -1.0, dtype=torch.float64, device=tokens.device)
        for image in sizes:
            count = image_size_to_num_patches(
                image, config.image_grid_pinpoints, config.vision_config.image_size
            )
            # The model's own packing, run on token numbers instead of features.
            numbers = torch.arange(first, first + count * size, device=tokens.device)
            numbers = numbers.double().view(count, size, 1)
            packed, _ = fusion.pack_image_features([numbers], [image], strategy, newline)
            tiles = tuple((first + i * size, grid) for i in range(count))
            found.append(Packed(packed[0].reshape(-1).round().long(), tiles))
            first += count * size
        if first != tokens.shape[0] * size:
            raise UnsupportedCall(
                f"image_sizes asks for {first // size} tiles and the tower saw {tokens.shape[0]}."
            )
        return found


class QwenVL(Family):
    """Qwen2-VL and Qwen2.5-VL: packed patches of any size, 2x2 merged, windows undone at the end."""

    def tower(self, fusion: Any) -> torch.nn.Module | None:
        return getattr(fusion, "visual", None)

    def projector(self, fusion: Any) -> torch.nn.Module:
        return fusion.visual  # type: ignore[no-any-return]

    def tokens(self, fusion: Any, out: Any) -> torch.Tensor:
        pooled = getattr(out, "pooler_output", out)
        return torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        if call.get("pixel_values_videos") is not None:
            raise UnsupportedCall("The call has a video; only image tokens can be pruned.")
        found, first, merge = [], 0, fusion.visual.spatial_merge_size
        for t, y, x in call["image_grid_thw"].tolist():
            if t != 1:
                raise UnsupportedCall(f"An image has {t} frames; only still images can be pruned.")
            grid = (y // merge, x // merge)
            size = grid[0] * grid[1]
            source = torch.arange(first, first + size, device=tokens.device)
            found.append(Packed(source, ((first, grid),)))
            first += size
        return found

    def per_token(
        self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor, values: Sequence[Any]
    ) -> torch.Tensor:
        flat = torch.cat([v.flatten(0, 1) for v in values])
        cell = fusion.visual.spatial_merge_size**2
        if flat.shape[0] != tokens.shape[0] * cell:
            raise UnsupportedCall(
                f"The vision tower recorded {flat.shape[0]} numbers for {tokens.shape[0]} tokens of "
                f"{cell} patches; run the tower and the language model in the same call."
            )
        merged: torch.Tensor = flat.unflatten(0, (-1, cell)).mean(1)
        if not hasattr(fusion.visual, "window_size"):
            return merged
        return merged[torch.argsort(window_order(fusion.visual, call["image_grid_thw"]))]


class Idefics3(Family):
    """Idefics3 and SmolVLM: square tiles, ``s x s`` patches of one shuffled into a token.

    The model does not say which tiles are one image, so all tiles of a row of the batch share a budget.
    """

    def tower(self, fusion: Any) -> torch.nn.Module | None:
        return getattr(fusion, "vision_model", None)

    def projector(self, fusion: Any) -> torch.nn.Module:
        return fusion.connector  # type: ignore[no-any-return]

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        pixels, size = call["pixel_values"], tokens.shape[1]
        side = isqrt(size)
        # Rows with fewer tiles than others are filled up with tiles of zeros, which the model drops.
        counts = (pixels.flatten(2) != 0).any(-1).sum(1).tolist()
        if sum(counts) != tokens.shape[0] or side * side != size:
            raise UnsupportedCall(
                f"The call has {sum(counts)} tiles with pixels, and the tower returned "
                f"{tokens.shape[0]} tiles of {size} tokens; only images in square tiles can be pruned."
            )
        found, first = [], 0
        for count in counts:
            source = torch.arange(first, first + count * size, device=tokens.device)
            tiles = tuple((first + i * size, (side, side)) for i in range(count))
            found.append(Packed(source, tiles))
            first += count * size
        return found

    def per_token(
        self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor, values: Sequence[Any]
    ) -> torch.Tensor:
        flat, scale = torch.cat(list(values)), fusion.connector.scale_factor
        side = isqrt(tokens.shape[1])
        if flat.shape[:2] != (tokens.shape[0], (side * scale) ** 2):
            raise UnsupportedCall(
                f"The vision tower recorded {list(flat.shape)} numbers for features "
                f"{list(tokens.shape)}; run the tower and the language model in the same call."
            )
        cells: torch.Tensor = flat.unflatten(1, (side, scale, side, scale))
        return cells.mean((2, 4)).flatten(0, 2)


class InstructBlip(Family):
    """InstructBLIP: a ViT whose patches, after a class token, are the keys of a Q-Former."""

    queried = True

    def tower(self, fusion: Any) -> torch.nn.Module | None:
        return getattr(fusion, "vision_model", None)

    def tokens(self, fusion: Any, out: Any) -> torch.Tensor:
        return out[:, 1:]  # type: ignore[no-any-return]

    def images(self, fusion: Any, call: dict[str, Any], tokens: torch.Tensor) -> list[Packed]:
        grid = _grid(fusion, call["pixel_values"], tokens)
        size = tokens.shape[1]
        each = torch.arange(size, device=tokens.device)
        return [Packed(each + i * size, ((i * size, grid),)) for i in range(tokens.shape[0])]


def window_order(visual: Any, grids: torch.Tensor) -> torch.Tensor:
    """``[M]``: for every merged token, in the order Qwen2.5-VL's tower keeps them, its raster index."""
    merge = visual.spatial_merge_size
    side = visual.window_size // merge // visual.patch_size
    parts, first = [], 0
    for t, y, x in grids.tolist():
        y, x = y // merge, x // merge
        rows, columns = torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij")
        across = -(-x // side)
        window = (rows // side) * across + columns // side
        order = torch.argsort(window.flatten(), stable=True)
        for _ in range(t):
            parts.append(order + first)
            first += y * x
    return torch.cat(parts).to(grids.device)


def _grid(fusion: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[int, int]:
    patch = fusion.config.vision_config.patch_size
    y, x = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if y * x != tokens.shape[1]:
        raise UnsupportedCall(
            f"An image of {y} x {x} patches became {tokens.shape[1]} tokens (a class token is kept, or "
            "the tower pools); pruning needs one token per patch."
        )
    return y, x


_FAMILIES: dict[str, Family] = {
    "LlavaModel": Llava(),
    "LlavaNextModel": LlavaNext(),
    "Qwen2VLModel": QwenVL(),
    "Qwen2_5_VLModel": QwenVL(),
    "Idefics3Model": Idefics3(),
    "SmolVLMModel": Idefics3(),
    "InstructBlipForConditionalGeneration": InstructBlip(),
    "InstructBlipModel": InstructBlip(),
}


def family_of(fusion: torch.nn.Module | None) -> Family | None:
    """How this model packs its image features, or None."""
    return _FAMILIES.get(type(fusion).__name__)
