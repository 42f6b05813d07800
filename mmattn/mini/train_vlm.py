"""Train the small vision-language model that hallucinates: a LLaVA over `mmattn.mini.objects`.

    python -m mmattn.mini.train_vlm --out weights/vlm

Stage 1 teaches the vision tower which object every patch shows, in the decoder's own word vectors,
because a caption alone is a weak teacher of shapes; every patch also tells which objects the whole
picture has, so that patches look at objects. Stage 2 trains everything on captions and questions that
carry the habits of the training world. Then attention sinks are planted (`mmattn.mini.planted`), and
stage 3 goes on with a price on what heads write, so that idle heads rest. The sinks in the image are
planted once more at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmattn.mini import objects, planted
from mmattn.mini.grading import HELD_OUT_SEED, evaluate
from mmattn.mini.recipe import (
    Log,
    MuonAdamW,
    Progress,
    cosine,
    log_to_stderr,
    silent,
    trainer_arguments,
    write_record,
)
from mmattn.mini.teaching import Alignment, Context, Price
from mmattn.mini.vlm import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    build,
    load,
    save,
)

__all__ = ["HELD_OUT_SEED", "build", "evaluate", "main", "train"]

ANSWER_WEIGHT = 5.0
BATCH = 16
LEARNING_RATE = 2e-3
PRICE = 0.1
"""Price of `Price` in stage 3."""


class _Text:
    """Turns conversations into padded token rows and marks what the assistant says."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self._vocab: dict[str, int] = processor.tokenizer.get_vocab()

    def _ids(self, text: str) -> list[int]:
        return [self._vocab[word] for word in text.split()]

    @staticmethod
    def _shares(turn: objects.Turn) -> list[float]:
        words = turn.assistant.split()
        if turn.user in objects.CAPTION_PROMPTS:
            return [1.0] * len(words)
        if turn.user == objects.CHECK_PROMPT:
            return [ANSWER_WEIGHT if word in ("yes", "no") else 0.0 for word in words]
        return [ANSWER_WEIGHT] * len(words)

    def rows(
        self, conversations: Sequence[Sequence[objects.Turn]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, labels and loss weights, each `[B, T]`.

        Labels are -100 wherever the assistant is not speaking. One word answers a question and fifty
        make a caption, so answers weigh more per word; which name a check brings up next is chance,
        so only its verdicts count.
        """
        tokens, labels, weights = [], [], []
        for turns in conversations:
            row: list[int] = [BOS]
            spoken: list[int] = [-100]
            weight: list[float] = [0.0]
            for i, turn in enumerate(turns):
                user = self._ids("user :")
                user += [IMAGE] * IMAGE_TOKENS if i == 0 else []
                user += self._ids(f"{turn.user} assistant :")
                reply = [*self._ids(turn.assistant), EOS]
                row += user + reply
                spoken += [-100] * len(user) + reply
                weight += [0.0] * len(user) + [*self._shares(turn), 1.0]
            tokens.append(row)
            labels.append(spoken)
            weights.append(weight)
        length = max(len(row) for row in tokens)
        return (
            torch.tensor([row + [PAD] * (length - len(row)) for row in tokens]),
            torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
            torch.tensor([row + [0.0] * (length - len(row)) for row in weights]),
        )


def _pixels(pictures: Tensor) -> Tensor:
    """Round to 8 bits and normalise exactly as the image processor does."""
    return (pictures * 255).round() / 127.5 - 1


def _optimizer(*modules: nn.Module, rate: float = LEARNING_RATE) -> MuonAdamW:
    return MuonAdamW(
        modules,
        hidden=lambda name: "layers." in name,
        muon_lr=rate,
        adamw_lr=rate,
        weight_decay=0.02,
        betas=(0.9, 0.98),
    )


def _note(progress: Progress, stage: str, loss: Tensor, samples: int, log: Log) -> None:
    progress.step += 1
    progress.samples += samples
    if progress.step % 50 == 0 or progress.done:
        progress.curve.append((progress.step, loss.item()))
        log(f"{stage} step {progress.step} loss {loss.item():.4f} {progress.cpu_seconds:.0f} s")


def _train_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    progress: Progress,
    draw: torch.Generator,
    log: Log,
) -> None:
    """Stage 1: teach tower, projector and word vectors which object every patch shows, and where.

    Partners are there in 60 % of the cases only, so that the tower does not pick up the habit by
    itself.
    """
    align = Alignment(model, processor)
    tower = model.model.vision_tower
    context = Context(tower)
    states: dict[str, Tensor] = {}
    hook = tower.encoder.layers[-1].register_forward_hook(
        lambda _, __, out: states.update(last=out)
    )
    parts = (tower, model.model.multi_modal_projector, model.get_input_embeddings(), context)
    optimizer = _optimizer(*parts)
    while not progress.done:
        pictures, labels = objects.render(objects.sample_scenes(48, draw, 0.6))
        labels = labels.to(model.device)
        projected = model.get_image_features(_pixels(pictures).to(model.device)).pooler_output
        loss = align(torch.stack(tuple(projected)), labels) + context(states["last"], labels)
        optimizer.step(loss, cosine(0.8 * progress.fraction))
        _note(progress, "tower", loss, 48, log)
    hook.remove()


def _train_joint(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    progress: Progress,
    draw: torch.Generator,
    log: Log,
    checkpoint: Callable[[], None],
    *,
    rest: bool = False,
) -> None:
    """Stage 2: teach the whole model to talk; the alignment stays on, with falling weight.

    With `rest` this is stage 3: heads pay for what they write, and steps are smaller.
    """
    text = _Text(processor)
    seen: dict[str, Tensor] = {}
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda _, __, projected: seen.update(projected=projected)
    )
    align = Alignment(model, processor)
    price = Price(model) if rest else None
    optimizer = _optimizer(model, rate=(0.75 if rest else 1.0) * LEARNING_RATE)
    saved = 0.0
    while not progress.done:
        scenes, conversations = objects.sample_conversations(BATCH, draw)
        pictures, labels = (part.to(model.device) for part in objects.render(scenes))
        tokens, spoken, share = (part.to(model.device) for part in text.rows(conversations))
        logits = model(input_ids=tokens, pixel_values=_pixels(pictures), use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].flatten(0, 1), spoken[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * share[:, 1:].flatten()).sum() / share.sum()
        patches = align(seen["projected"].view(len(scenes), IMAGE_TOKENS, -1), labels)
        weight = 0.05 + 0.3 * (1 - progress.fraction)
        total = loss + weight * patches
        if price is not None:
            total = total + PRICE * price((tokens != PAD).float())
        optimizer.step(total, cosine(progress.fraction))
        _note(progress, "rest" if rest else "joint", loss, BATCH, log)
        if progress.cpu_seconds - saved > 180:
            saved = progress.cpu_seconds
            checkpoint()
    hook.remove()
    if price is not None:
        price.remove()


def _plant(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    draw: torch.Generator,
    *,
    image_only: bool = False,
) -> None:
    """Write the sinks into the model, judged on 48 conversations of the training world."""
    scenes, conversations = objects.sample_conversations(48, draw)
    pictures, labels = objects.render(scenes)
    tokens, spoken, _ = _Text(processor).rows(conversations)
    device = model.device
    given = (tokens.to(device), _pixels(pictures).to(device), labels.to(device))
    if image_only:
        planted.plant_image(model, *given)
    else:
        planted.plant(model, *given, (spoken != -100).to(device))
    model.train()


def train(
    out: Path,
    *,
    minutes: float | None = None,
    tower_steps: int = 1100,
    steps: int = 1500,
    rest_steps: int = 300,
    layers: int = 8,
    device: str = "cpu",
    seed: int = 0,
    smoke: bool = False,
    resume: Path | None = None,
    samples: int = 500,
    log: Log = silent,
) -> dict[str, Any]:
    """Train, save and grade a model.

    Args:
        out: Folder for the weights (bfloat16), the processor and `training.json`; checkpoints go
            there on the way.
        minutes: Time for all stages, a seventh of it for the tower and as much for stage 3; None goes by
            steps.
        tower_steps: Steps of stage 1 without `minutes`.
        steps: Steps of stage 2 without `minutes`.
        rest_steps: Steps of stage 3 without `minutes`.
        layers: Decoder layers of a new model.
        device: Torch device.
        seed: Seed of weights and scenes, below 10 000; evaluation seeds start there.
        smoke: Three steps per stage and two scenes of evaluation, to see that everything runs.
        resume: Folder that an earlier `train` wrote, to go on from with stage 3.
        samples: Scenes per evaluation.
        log: Receives one line of progress now and then.

    Returns:
        The content of `training.json`.

    Raises:
        ValueError: `seed` is one of the evaluation seeds.
    """
    if not 0 <= seed < HELD_OUT_SEED:
        raise ValueError(
            f"seed must lie in 0 .. {HELD_OUT_SEED - 1} to stay clear of evaluation, found {seed}."
        )
    if smoke:
        minutes, tower_steps, steps, rest_steps, samples = None, 3, 3, 3, 2
    model, processor = build(layers, seed) if resume is None else load(resume)
    model.to(torch.device(device)).train()
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    stages: list[dict[str, Any]] = []

    def talk(progress: Progress, *, rest: bool) -> None:
        def leg() -> dict[str, Any]:
            habit = {"caption_bias": objects.CAPTION_BIAS, "answer_bias": objects.ANSWER_BIAS}
            name = "rest" if rest else "joint"
            return {"stage": name, "batch": BATCH, "seed": seed, **habit, **progress.record()}

        def checkpoint() -> None:
            save(model, processor, out)
            write_record(out, {"stages": [*stages, leg()]})

        _train_joint(model, processor, progress, draw, log, checkpoint, rest=rest)
        stages.append(leg())

    if resume is not None:
        stages += json.loads((resume / "training.json").read_text(encoding="utf-8"))["stages"]
    else:
        tower = _progress(minutes, 0.14, tower_steps)
        _train_tower(model, processor, tower, draw, log)
        stages.append({"stage": "tower", "batch": 48, "seed": seed, **tower.record()})
        talk(_progress(minutes, 0.72, steps), rest=False)
        _plant(model, processor, draw)
    talk(_progress(minutes, 1.0 if resume else 0.14, rest_steps), rest=True)
    _plant(model, processor, draw, image_only=True)
    save(model, processor, out, half=True)
    shipped, processor = load(out)
    shipped.to(torch.device(device))
    record = {
        "recipe": "mmattn.mini.train_vlm",
        "seed": seed,
        "resumed": resume is not None,
        "layers": model.config.text_config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "partner_prob": objects.TRAIN_PARTNER_PROB,
        "noise": objects.NOISE,
        "stages": stages,
        "metrics": [
            evaluate(shipped, processor, samples, HELD_OUT_SEED, partner_prob)
            for partner_prob in (objects.TRAIN_PARTNER_PROB, 0.2)
        ],
    }
    write_record(out, record)
    return record


def _progress(minutes: float | None, share: float, steps: int) -> Progress:
    return Progress(steps=steps) if minutes is None else Progress(minutes=share * minutes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `train` from the command line, on one thread: two are slower here."""
    arguments = trainer_arguments(__doc__, argv)
    torch.set_num_threads(1)
    record = train(**vars(arguments), log=log_to_stderr)
    sys.stdout.write(json.dumps(record["metrics"], indent=1) + "\n")


if __name__ == "__main__":
    main()
