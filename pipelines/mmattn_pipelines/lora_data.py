"""Training pictures of an In-Context LoRA: a folder of canvases with captions, sizes, cached latents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmattn.batch.writers import atomic
from mmattn.errors import ConfigError
from mmattn_pipelines.panels import PanelLayout

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PROBLEMS_SHOWN = 20

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Example:
    """One canvas with its caption: ``0001.jpg`` and ``0001.txt``, and the canvas's own size."""

    image: Path
    caption: str
    size: Size


def read_folder(folder: Path) -> list[Example]:
    """The examples of a folder, by name.

    Raises:
        ConfigError: no folder, no picture, or pictures without caption, captions without picture,
            empty captions, files that are no picture: all of them are named, up to twenty.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of training pictures at {folder}")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    captions = {p.stem: p for p in folder.iterdir() if p.suffix == ".txt"}
    problems, examples = [], []
    for image in images:
        text = captions.pop(image.stem, None)
        if text is None:
            problems.append(f"{image.name} has no {image.stem}.txt beside it")
            continue
        try:
            caption = " ".join(text.read_text(encoding="utf-8").split())
        except UnicodeDecodeError:
            problems.append(f"{text.name} is not UTF-8 text")
            continue
        if not caption:
            problems.append(f"{text.name} is empty")
            continue
        try:
            with Image.open(image) as picture:
                width, height = picture.size
                picture.verify()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            problems.append(f"{image.name} cannot be read as a picture: {error}")
            continue
        examples.append(Example(image, caption, (height, width)))
    problems += [f"{path.name} has no picture beside it" for path in captions.values()]
    if not images:
        problems.insert(0, f"no picture ({', '.join(SUFFIXES)}) is in it")
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        raise ConfigError(
            f"{folder} cannot be trained on: {shown}" + (f"; and {more} more" if more > 0 else "")
        )
    return examples


def bucket_sizes(size: Size, resolutions: Sequence[int], unit: Size) -> list[Size]:
    """The sizes one picture is trained at.

    At every resolution the picture keeps its shape, has at most ``resolution ** 2`` pixels, and sides
    that are multiples of `unit`; it is never enlarged, and equal sizes count once.

    Raises:
        ConfigError: no resolution leaves a picture of at least one unit.
    """
    height, width = size
    found: list[Size] = []
    for resolution in resolutions:
        scale = min(1.0, math.sqrt(resolution**2 / (height * width)))
        # Half a thousandth of slack: a side that is a multiple already must not lose one to rounding.
        made = tuple(int(side * scale / u + 5e-4) * u for side, u in zip(size, unit, strict=True))
        if min(made) > 0 and made not in found:
            found.append(made)  # type: ignore[arg-type]
    if not found:
        raise ConfigError(
            f"a picture of {width} x {height} pixels is too small at resolutions {list(resolutions)}: "
            f"its sides must be multiples of {unit[1]} x {unit[0]}"
        )
    return found


def batches(keys: Sequence[Size], batch: int, epoch: int, seed: int) -> list[list[int]]:
    """The batches of one epoch: places in `keys`, each batch of one size, in an order of its own.

    A function of its arguments alone, so that a training that goes on finds its place again.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    groups: dict[Size, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    made = []
    for group in groups.values():
        order = torch.randperm(len(group), generator=generator).tolist()
        made += [[group[i] for i in order[at : at + batch]] for at in range(0, len(group), batch)]
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


class Latents:
    """Encodes canvases once and keeps the latents on disk.

    Every panel is encoded on its own where a layout is known, because an autoencoder's normalisation and
    attention carry colours from one panel into another.

    Args:
        vae: an `AutoencoderKL`.
        folder: where the files are kept; what lies there for other pictures or another autoencoder is
            not used.
        panels: rows and columns of the canvases, or None.
    """

    def __init__(self, vae: Any, folder: Path, panels: tuple[int, int] | None = None) -> None:
        self._vae, self._folder, self._panels = vae, folder, panels
        self.encoded = 0
        parts = hashlib.sha256(repr(sorted(vae.config.items())).encode())
        for name, value in vae.state_dict().items():
            parts.update(name.encode() + str(value.double().sum().item()).encode())
        self._vae_key = parts.hexdigest()

    @torch.no_grad()
    def __call__(self, example: Example, size: Size) -> Tensor:
        """Latents ``[C, h, w]`` of a canvas at a size, scaled as the denoiser knows them."""
        key = hashlib.sha256(example.image.read_bytes())
        key.update(f"{size}{self._panels}{self._vae_key}".encode())
        file = self._folder / f"{key.hexdigest()[:32]}.safetensors"
        try:
            return load_file(file)["latents"]
        except (FileNotFoundError, SafetensorError, KeyError):
            pass  # not there, or torn by a kill: encode it
        latents = self._encode(example, size)
        with atomic(file) as temporary:
            save_file({"latents": latents.cpu().contiguous()}, temporary)
        self.encoded += 1
        return latents.cpu()

    def _encode(self, example: Example, size: Size) -> Tensor:
        height, width = size
        with Image.open(example.image) as opened:
            picture = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        rows, cols = self._panels or (1, 1)
        layout = PanelLayout(rows, cols, height // rows, width // cols)
        parts = [self._encode_one(panel) for panel in layout.split(picture)]
        lines = [torch.cat(parts[r * cols : (r + 1) * cols], dim=2) for r in range(rows)]
        return torch.cat(lines, dim=1)

    def _encode_one(self, picture: Image.Image) -> Tensor:
        vae = self._vae
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = data.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float()
        pixels = (pixels / 127.5 - 1).to(vae.device, vae.dtype)
        z = vae.encode(pixels).latent_dist.mode()[0].float()
        shift = vae.config.shift_factor or 0.0
        scaled: Tensor = (z - shift) * vae.config.scaling_factor
        return scaled
