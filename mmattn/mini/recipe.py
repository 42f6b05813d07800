"""What the trainers of the embedded models share: optimizers, schedules, averaging, and the record
of a run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

Log = Callable[[str], None]


def silent(message: str) -> None:
    """Discard a progress message; the default of every trainer."""


def log_to_stderr(message: str) -> None:
    """Write a progress message to the error stream."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class MuonAdamW:
    """Muon for the hidden weight matrices of transformer blocks, AdamW for every other parameter.

    Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix, so all its directions learn
    at one speed. It suits the matrices inside the blocks; embeddings, norms, biases, and the first
    and last projection keep AdamW.

    The blocks of a T5 get a tenth of AdamW's rate. Its queries and keys are not scaled by the head
    size and its residual stream is not normalised, so at the full rate every word soon sees one word
    only, and the feed-forward output drowns what it saw.

    Args:
        modules: The networks to train.
        hidden: Tells from a parameter's name whether it is a hidden matrix.
        muon_lr: Muon's learning rate, scaled per matrix to AdamW's update size.
        adamw_lr: AdamW's learning rate.
        weight_decay: Weight decay of both.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        hidden: Callable[[str], bool],
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        t5_blocks: list[nn.Parameter] = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if "SelfAttention" in name or "DenseReluDense" in name:
                    t5_blocks.append(parameter)
                else:
                    (matrices if parameter.ndim == 2 and hidden(name) else others).append(parameter)
        self.parameters = matrices + others + t5_blocks
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=adamw_lr, betas=betas, weight_decay=weight_decay)
        ]
        if t5_blocks:
            slow = torch.optim.AdamW(t5_blocks, lr=0.1 * adamw_lr, betas=betas, weight_decay=0.0)
            self._optimizers.append(slow)
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(
                    matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self._base = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def step(self, loss: Tensor, scale: float, *, clip: float = 1.0) -> None:
        """Follow the gradient of `loss` at `scale` times the learning rates."""
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = base * scale
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, clip)
        for optimizer in self._optimizers:
            optimizer.step()


@torch.no_grad()
def look_at_neighbours(encoder: nn.Module) -> None:
    """Let the heads of a new T5 start at the words 3 and 2 before, and 1 and 2 after, their own.

    In "a red ring left of a blue square" that is where the word is that says which side "red" is on,
    and its distance says whether "red" is the first or the second. The stock biases are near zero, so
    an untrained T5 is all but blind to the order of words, and which object is where is a parity of
    two words that plain training does not find.
    """
    before, after = 0, 8  # buckets of an encoder with 16: distances up to 3 have their own
    favourites = (before + 3, before + 2, after + 1, after + 2)
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=0.1)
            for head, bucket in enumerate(favourites):
                parameter[bucket, head] = 4.0


class Ema:
    """A running average of parameters; `decay` ramps up so that early averages follow early
    learning.
    """

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self._modules = list(modules)
        self._decay = decay
        self._steps = 0
        self._average = [p.detach().clone() for m in self._modules for p in m.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current parameters."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        current = [p.detach() for m in self._modules for p in m.parameters()]
        torch._foreach_lerp_(self._average, current, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average; call it twice to be back."""
        parameters = [p for m in self._modules for p in m.parameters()]
        for parameter, average in zip(parameters, self._average, strict=True):
            keep = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(keep)


def cosine(progress: float, *, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Return the learning-rate factor at `progress` in [0, 1]: a linear rise, then half a cosine
    down to `floor`.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    travelled = min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * travelled))


@dataclass
class Progress:
    """How far a training stage is, by steps or by minutes, and what its loss was.

    Exactly one of `steps` and `minutes` ends the stage; with minutes the schedule follows the
    clock.
    """

    steps: int | None = None
    minutes: float | None = None
    step: int = 0
    samples: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.minutes is not None
        return min(1.0, (time.monotonic() - self._started) / (60 * self.minutes))

    @property
    def done(self) -> bool:
        return self.fraction >= 1.0

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu

    def record(self) -> dict[str, Any]:
        """Steps, samples, seconds and the loss at about twenty points."""
        stride = max(1, len(self.curve) // 20)
        return {
            "steps": self.step,
            "samples": self.samples,
            "cpu_seconds": round(self.cpu_seconds),
            "loss": [(step, round(loss, 4)) for step, loss in self.curve[::stride]],
        }


@dataclass(frozen=True)
class Plan:
    """How long the stages of a training last: by minutes of the clock (`minutes`, one per stage) or
    by `steps`.
    """

    minutes: tuple[float, ...] | None = None
    steps: tuple[int, ...] | None = None

    @classmethod
    def make(
        cls,
        minutes: float | None,
        steps: tuple[int, ...] | None,
        shares: tuple[float, ...],
        default: float,
    ) -> Plan:
        """Split `minutes` (or `default`) by `shares`, unless `steps` are given."""
        if minutes is not None and steps is not None:
            raise ValueError(
                "Both minutes and steps were given, but one of them ends the training. "
                "Leave one out."
            )
        if steps is not None:
            if len(steps) != len(shares):
                raise ValueError(
                    f"{len(steps)} step counts were given for {len(shares)} stages. "
                    "Give one per stage."
                )
            return cls(steps=steps)
        total = default if minutes is None else minutes
        return cls(minutes=tuple(total * share for share in shares))

    def stage(self, index: int) -> Progress:
        """Start the clock of one stage."""
        if self.steps is not None:
            return Progress(steps=self.steps[index])
        assert self.minutes is not None
        return Progress(minutes=self.minutes[index])


def trainer_arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line that the trainers share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--minutes", type=float, help="time for all stages together")
    parser.add_argument("--device", default="cpu", help="device of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of saved weights to go on from")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that the recipe runs"
    )
    return parser.parse_args(argv)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `training.json` into a folder of weights."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of pictures in [-1, 1]."""
    error = torch.mean((got.clamp(-1, 1) - want) ** 2).item() / 4
    return -10 * math.log10(max(error, 1e-12))


def save_half(pipe: Any, out: Path) -> None:
    """Save a pipeline in the standard folder layout, with bfloat16 weights where that is safe.

    The transformer and the autoencoder are rounded, except for parameters their class keeps in fp32
    (`_keep_in_fp32_modules`). The small text encoders stay in fp32: transformers loads a file in the
    file's own type and diffusers loads in fp32, so a plain `from_pretrained` would mix the two.
    """
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, ModelMixin):
            part = copy.deepcopy(part)
            keep = set(getattr(part, "_keep_in_fp32_modules", None) or ())
            for key, parameter in part.named_parameters():
                if not keep & set(key.split(".")):
                    parameter.data = parameter.data.bfloat16()
        parts[name] = part
    type(pipe)(**parts).save_pretrained(out)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    for file in out.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where the weights were on the machine that trained them
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Checkpoint:
    """Saves the pipeline into `folder` every few minutes, so that a stopped training can be looked
    at and resumed.
    """

    def __init__(self, folder: Path, minutes: float = 5.0) -> None:
        self._folder = folder
        self._minutes = minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last > 60 * self._minutes

    def save(self, pipe: Any) -> None:
        """Save now, in full precision."""
        pipe.save_pretrained(self._folder)
        self._last = time.monotonic()
