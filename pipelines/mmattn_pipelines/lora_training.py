"""Training an In-Context LoRA: the published recipe on peft, with resume and a variant for given panels.

```python
from mmattn_pipelines.lora_training import InContextLora, train

train(pipe, "data/movie-shots", "out/lora", InContextLora())
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmattn.batch.writers import atomic, write_json
from mmattn.errors import ConfigError
from mmattn_pipelines.in_context import lora_target_modules
from mmattn_pipelines.lora_data import Example, Latents, Size, batches, bucket_sizes, read_folder
from mmattn_pipelines.lora_files import comfyui_keys, diffusers_keys, write_lora
from mmattn_pipelines.panels import PanelLayout

ADAPTER = "in_context"
STATE = "state.safetensors"
LORA = "lora.safetensors"
COMFYUI = "lora_comfyui.safetensors"

Log = Callable[[str], None]


@dataclass(frozen=True)
class InContextLora:
    """The published recipe; every default is of its released configuration unless a line says otherwise.

    A text-to-image transformer already relates the parts of one picture to each other. A small LoRA,
    trained on 20 to 100 canvases whose panels belong together, turns that on for one kind of set.
    "In-Context LoRA for Diffusion Transformers", arXiv 2410.23775. Deviations: AdamW keeps its state in
    fp32 (published: 8 bit) and base weights stay in the precision they were loaded in (published: 8 bit);
    latents are modes, not samples.

    Args:
        rank: of the LoRA; alpha is equal to it.
        steps, batch, learning_rate: of AdamW, the rate is constant.
        max_grad_norm: length to which gradients are clipped.
        ema: decay of the average over steps that is saved; it ramps up at the beginning. 0 saves the
            last weights.
        resolutions: every canvas is trained at each, in at most resolution x resolution pixels.
        caption_dropout: share of canvases that are trained with an empty caption.
        guidance: what models with a guidance input are fed in training.
        max_sequence_length: tokens of the long text encoder.
        gradient_checkpointing: trade a third of the speed for memory.
        save_every, keep: steps between checkpoints, and how many of them stay.
        panels: rows and columns of the canvases; needed for `references`. Canvas sides are then rounded
            so that no token lies across two panels, and panels are encoded one by one.
        references: at most so many of the first panels are given: they are shown clean and are no part of
            the loss, so the LoRA learns to continue a set. How many is drawn anew, 0 included, for every
            batch. The paper names this as future work; 0 is its recipe.
        seed: of initial weights, order, noise.

    Raises:
        ConfigError: a value out of its range.
    """

    rank: int = 16
    steps: int = 5000
    batch: int = 4
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    ema: float = 0.99
    resolutions: tuple[int, ...] = (512, 768, 1024, 1280, 1536)
    caption_dropout: float = 0.05
    guidance: float = 1.0
    max_sequence_length: int = 512
    gradient_checkpointing: bool = True
    save_every: int = 250
    keep: int = 4
    panels: tuple[int, int] | None = None
    references: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("rank", "steps", "batch", "save_every", "keep", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ema", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.resolutions or min(self.resolutions) < 1:
            raise ConfigError(f"resolutions must be positive, got {list(self.resolutions)}")
        panels = 1 if self.panels is None else self.panels[0] * self.panels[1]
        if self.references and self.panels is None:
            raise ConfigError("references needs panels=(rows, columns) of the canvases")
        if not 0 <= self.references < max(panels, 1):
            raise ConfigError(
                f"of {panels} panels at most {panels - 1} can be given, got references={self.references}"
            )


@dataclass
class Trained:
    """What a training did.

    Args:
        lora: file that ``pipe.load_lora_weights`` takes.
        comfyui: the same weights for ComfyUI.
        steps: how many were taken in all; `resumed` of them by earlier runs.
        layers, parameters: what was trained.
        canvases, buckets: pictures of the folder, and (picture, size) pairs made of them.
        losses: the running mean of the loss every ten steps.
    """

    lora: Path
    comfyui: Path
    steps: int
    resumed: int
    layers: int
    parameters: int
    canvases: int
    buckets: int
    losses: list[tuple[int, float]] = field(default_factory=list)


def train(
    pipe: FluxPipeline,
    data: str | Path,
    out: str | Path,
    config: InContextLora | None = None,
    *,
    log: Log = lambda _: None,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a LoRA on a folder of canvases; a training that was stopped goes on where it was.

    The folder holds ``0001.jpg`` with ``0001.txt`` and so on. Everything that is written appears whole or
    not at all: after a kill at any moment the next call takes up the last checkpoint and ends with the
    same weights, bit by bit on the same machine, as if nothing had happened.

    Args:
        pipe: a FLUX pipeline, where its transformer should train. It comes back with the averaged LoRA
            loaded as the adapter ``in_context``.
        data: the folder.
        out: folder for `LORA`, `COMFYUI`, checkpoints, cached latents and ``training.json``.
        config: the recipe.
        log: receives lines about progress.
        on_step: receives the step and its loss.

    Raises:
        ConfigError: a folder that cannot be trained on, a pipeline that is not FLUX, a pipeline that has the
            adapter already, or an `out` in which something else was trained; before anything is encoded.
    """
    config = InContextLora() if config is None else config
    data, out = Path(data), Path(out)
    if not isinstance(pipe, FluxPipeline):
        raise ConfigError(
            f"In-Context LoRAs are trained on FLUX pipelines, got {type(pipe).__name__}"
        )
    examples = read_folder(data)
    unit = _unit(pipe, config)
    pairs = [
        (example, size)
        for example in examples
        for size in bucket_sizes(example.size, config.resolutions, unit)
    ]
    run = _Run(pipe, config, pairs, out)
    done = run.restore()
    if done:
        log(f"going on after step {done}")
    result = Trained(
        *(out / LORA, out / COMFYUI, config.steps, done),
        layers=run.layers,
        parameters=sum(p.numel() for p in run.parameters),
        canvases=len(examples),
        buckets=len(pairs),
    )
    log(
        f"{result.canvases} canvases at {result.buckets} sizes, {result.layers} layers, "
        f"{result.parameters:,} parameters"
    )
    run.encode(log)
    mean: float | None = None
    for step, rows in run.schedule(done):
        loss = run.step(step, rows)
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step} is {loss}; the last checkpoint in {out} is whole. Lower "
                "learning_rate, or load the pipeline in bfloat16 instead of float16"
            )
        if step % 10 == 0:
            result.losses.append((step, round(mean, 5)))
        if on_step is not None:
            on_step(step, loss)
        if step % config.save_every == 0 and step < config.steps:
            run.save(step)
            log(f"step {step}, loss {mean:.4f}, saved")
    run.finish()
    write_json(
        out / "training.json",
        {"recipe": asdict(config), **asdict(result), "lora": LORA, "comfyui": COMFYUI},
    )
    return result


def _unit(pipe: FluxPipeline, config: InContextLora) -> Size:
    """What sides of canvases are multiples of: a token of every panel."""
    token = pipe.vae_scale_factor * 2
    rows, cols = config.panels or (1, 1)
    return token * rows, token * cols


class _Run:
    """The mutable part of a training."""

    def __init__(
        self,
        pipe: FluxPipeline,
        config: InContextLora,
        pairs: list[tuple[Example, Size]],
        out: Path,
    ) -> None:
        self._pipe, self._config, self._pairs, self._out = pipe, config, pairs, out
        model = pipe.transformer
        if ADAPTER in getattr(model, "peft_config", {}):
            raise ConfigError(
                f"this pipeline has an adapter {ADAPTER!r} already; pipe.unload_lora_weights() first"
            )
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, model):
            if part is not None:
                part.requires_grad_(False)
        targets = lora_target_modules(model)
        self.layers = len(targets)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            model.add_adapter(
                LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets),
                adapter_name=ADAPTER,
            )
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in self._named.values():
            parameter.data = parameter.data.float()
        self.parameters = list(self._named.values())
        self._average = [p.detach().clone() for p in self.parameters]
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.01
        )
        self._texts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._latents: list[Tensor] = []

    # -- data ------------------------------------------------------------------------------------

    def encode(self, log: Log) -> None:
        """Encode captions and canvases; canvases come from the cache where they are in it."""
        config, pipe = self._config, self._pipe
        with torch.no_grad():
            for text in dict.fromkeys(["", *(example.caption for example, _ in self._pairs)]):
                self._texts[text] = pipe.encode_prompt(
                    prompt=text,
                    prompt_2=text,
                    device=pipe.transformer.device,
                    max_sequence_length=config.max_sequence_length,
                )
        cache = Latents(pipe.vae, self._out / "latents", config.panels)
        for example, size in self._pairs:
            z = cache(example, size)
            self._latents.append(pipe._pack_latents(z[None], 1, *z.shape)[0])
        log(f"{cache.encoded} canvases encoded, {len(self._pairs) - cache.encoded} from the cache")

    def schedule(self, done: int) -> Iterator[tuple[int, list[int]]]:
        """Steps that are left, from 1, with the places of their batches."""
        step, keys = 0, [size for _, size in self._pairs]
        for epoch in count():
            for rows in batches(keys, self._config.batch, epoch, self._config.seed):
                step += 1
                if step > self._config.steps:
                    return
                if step > done:
                    yield step, rows

    def _given(self, size: Size, generator: torch.Generator) -> Tensor | None:
        """Which tokens of a canvas are shown clean, ``[tokens]``; None when no panel is given."""
        config = self._config
        if not config.references:
            return None
        number = int(torch.randint(config.references + 1, (), generator=generator))
        assert config.panels is not None
        token = self._pipe.vae_scale_factor * 2
        height, width = size[0] // token, size[1] // token
        rows, cols = config.panels
        given = torch.zeros(height, width, dtype=torch.bool)
        layout = PanelLayout(rows, cols, height // rows, width // cols)
        for left, top, right, bottom in layout.boxes[:number]:
            given[top:bottom, left:right] = True
        return given.flatten()

    # -- one step --------------------------------------------------------------------------------

    def step(self, step: int, rows: list[int]) -> float:
        """One step of the optimiser; everything random in it is named by the seed and the step."""
        config, model = self._config, self._pipe.transformer
        generator = torch.Generator().manual_seed(config.seed * 7_919_777 + step)
        size = self._pairs[rows[0]][1]
        clean = torch.stack([self._latents[row] for row in rows])
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(rows), generator=generator))
        dropped = torch.rand(len(rows), generator=generator) < config.caption_dropout
        given = self._given(size, generator)
        captions = [
            "" if drop else self._pairs[row][0].caption
            for row, drop in zip(rows, dropped.tolist(), strict=True)
        ]
        noisy = torch.lerp(clean, noise, t.view(-1, 1, 1))
        if given is not None:
            noisy = torch.where(given[None, :, None], clean, noisy)
        velocity = self._predict(noisy, t, captions, size)
        error = (velocity - (noise - clean).to(velocity.device)).square().mean(2)
        loss = error.mean() if given is None else error[:, ~given.to(error.device)].mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self._optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters], 1 - decay)
        model.zero_grad(set_to_none=True)
        return loss.item()

    def _predict(self, noisy: Tensor, t: Tensor, captions: list[str], size: Size) -> Tensor:
        pipe, model, config = self._pipe, self._pipe.transformer, self._config
        model.train()
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        texts = [self._texts[caption] for caption in captions]
        height, width = (side // (pipe.vae_scale_factor * 2) for side in size)
        dtype, device = pipe.dtype, model.device
        ids = pipe._prepare_latent_image_ids(len(texts), height, width, device, dtype)
        guidance = None
        if model.config.guidance_embeds:
            guidance = torch.full((len(texts),), config.guidance, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            velocity = model(
                hidden_states=noisy.to(device, dtype),
                timestep=t.to(device, dtype),
                guidance=guidance,
                encoder_hidden_states=torch.cat([text for text, _, _ in texts]),
                pooled_projections=torch.cat([pooled for _, pooled, _ in texts]),
                txt_ids=texts[0][2],
                img_ids=ids,
                return_dict=False,
            )[0]
        return velocity.float()  # type: ignore[no-any-return]

    # -- files -----------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        """What must not change between two runs into one folder; the number of steps may."""
        recipe = asdict(self._config)
        for free in ("steps", "save_every", "keep", "gradient_checkpointing"):
            recipe.pop(free)
        pairs = [[e.image.name, e.caption, list(size)] for e, size in self._pairs]
        return json.dumps({"recipe": recipe, "data": pairs}, sort_keys=True)

    def restore(self) -> int:
        """Take up the state of an earlier run; returns the steps it had done, 0 without one.

        Raises:
            ConfigError: the folder holds another training, or a state that cannot be read.
        """
        file = self._out / STATE
        if not file.is_file():
            return 0
        try:
            with safe_open(file, framework="pt") as stored:
                about = dict(stored.metadata() or {})
                held = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}); delete it to start anew"
            ) from error
        if about.get("fingerprint") != self._fingerprint():
            raise ConfigError(
                f"{self._out} holds a training with another recipe or other data; choose another folder, "
                f"or delete {STATE} in it to start anew"
            )
        done = int(about["step"])
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(held[f"{i}.now"])
            self._average[i].copy_(held[f"{i}.average"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(done)),
                "exp_avg": held[f"{i}.first"].to(parameter.device),
                "exp_avg_sq": held[f"{i}.second"].to(parameter.device),
            }
        return done

    def save(self, step: int) -> None:
        """Write a checkpoint in both spellings of its step, then the state that goes on from it."""
        folder = self._out / "checkpoints"
        self._write(folder / f"step-{step:06d}.safetensors", None)
        held: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            state = self._optimizer.state[parameter]
            held[f"{i}.now"], held[f"{i}.average"] = parameter.detach(), self._average[i]
            held[f"{i}.first"], held[f"{i}.second"] = state["exp_avg"], state["exp_avg_sq"]
        about = {"step": str(step), "fingerprint": self._fingerprint()}
        with atomic(self._out / STATE) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in held.items()}, temporary, about)
        for old in sorted(folder.glob("step-*.safetensors"))[: -self._config.keep]:
            old.unlink()

    def finish(self) -> None:
        """Write the result, and leave the pipeline with it."""
        self.save(self._config.steps)
        self._write(self._out / LORA, self._out / COMFYUI)
        if self._config.ema:
            for parameter, average in zip(self.parameters, self._average, strict=True):
                parameter.data.copy_(average)
        self._pipe.transformer.disable_gradient_checkpointing()
        self._pipe.transformer.requires_grad_(False).eval()

    def _write(self, file: Path, comfyui: Path | None) -> None:
        held = [p.detach().clone() for p in self.parameters]
        if self._config.ema:
            for parameter, average in zip(self.parameters, self._average, strict=True):
                parameter.data.copy_(average)
        try:
            weights = {
                k: v.clone() for k, v in diffusers_keys(self._pipe.transformer, ADAPTER).items()
            }
        finally:
            for parameter, kept in zip(self.parameters, held, strict=True):
                parameter.data.copy_(kept)
        about = {"recipe": json.dumps(asdict(self._config))}
        write_lora(weights, file, about)
        if comfyui is not None:
            write_lora(comfyui_keys(weights), comfyui, about)
