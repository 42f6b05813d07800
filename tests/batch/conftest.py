"""A light pipeline with a real writer behind it: these tests are about batches, not about models."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmattn.batch.jobs import Jobs
from mmattn.batch.ledger import Ledger
from mmattn.batch.local import Rules, Run
from mmattn.batch.models import Models, Source
from mmattn.batch.worker import Options, Worker
from mmattn.loading import Loaded

PRINTS = {"image": "fake-model", "video": "fake-model"}


@dataclass
class FakePipe:
    """Draws noise from each item's own generator, tinted by its prompt.

    Prompts with ``poison`` raise, with ``nan`` turn into NaN after the second step. More items in a call
    than `fits` run out of memory, unless decoding is tiled and `tiled_fits`.
    """

    delay: float = 0.0
    fits: int | None = None
    tiled_fits: bool = False
    calls: list[int] = field(default_factory=list)
    vae: SimpleNamespace = field(default_factory=SimpleNamespace)

    def __post_init__(self):
        vae = self.vae
        vae.use_tiling, vae.tilings = False, 0

        def enable():
            vae.use_tiling, vae.tilings = True, vae.tilings + 1

        def disable():
            vae.use_tiling = False

        vae.enable_tiling, vae.disable_tiling = enable, disable

    def __call__(
        self,
        prompt,
        num_inference_steps,
        generator,
        output_type,
        width=16,
        height=16,
        num_frames=None,
        negative_prompt=None,
        guidance_scale=None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=None,
    ):
        self.calls.append(len(prompt))
        time.sleep(self.delay * len(prompt))
        tiled = self.tiled_fits and self.vae.use_tiling
        if self.fits is not None and len(prompt) > self.fits and not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if any("poison" in text for text in prompt):
            raise ValueError("poisoned prompt")
        shape = (3, height, width) if num_frames is None else (num_frames, 3, height, width)
        latents = torch.stack([torch.randn(shape, generator=g) for g in generator])
        for step in range(num_inference_steps):
            latents = latents * 0.9
            for row, text in enumerate(prompt):
                if "nan" in text and step == 1:
                    latents[row].view(-1)[0] = float("nan")
            if callback_on_step_end is not None:
                given = {"latents": latents}
                latents = callback_on_step_end(self, step, 0, given)["latents"]
        tint = torch.tensor([float(sum(text.encode()) % 97) / 97 for text in prompt])
        drawn = (latents + tint.view(-1, *[1] * len(shape))).sigmoid()
        return SimpleNamespace(images=drawn, frames=None if num_frames is None else drawn)


@dataclass
class Bench:
    """Runs job files on a `FakePipe`."""

    folder: Path
    pipe: FakePipe = field(default_factory=FakePipe)

    def write(self, rows, name="jobs.jsonl"):
        path = self.folder / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    def models(self):
        kinds = {"image": "t2i", "video": "t2v"}
        return Models(
            {row: Source("fake", kind) for row, kind in kinds.items()},
            lambda source: Loaded(source.kind, self.pipe),
        )

    def jobs(self, path, **more):
        kinds = dict.fromkeys(PRINTS, False)
        jobs = Jobs(path, {"steps": 2}, kinds=kinds, **more)
        jobs.check()
        return jobs

    def items(self, path, shard=None):
        return list(self.jobs(path).items(PRINTS, shard))

    def run(self, path, out="out", *, batch=1, shard=None, rules=None, stop=None, watch=None):
        """One run with the local engine; returns its summary."""
        from mmattn.batch.pages import finish

        folder = self.folder / out
        more = {} if stop is None else {"stop": stop}
        more |= {} if watch is None else {"watch": watch}
        with Ledger(folder, shard) as ledger:
            worker = Worker(self.models(), Options(folder, batch))
            run = Run(
                self.jobs(path), PRINTS, ledger, worker, rules or Rules(), shard=shard, **more
            )
            with worker:
                run()
            finish(folder)
        return run.summary

    def records(self, out="out"):
        from mmattn.batch.ledger import read_records

        return list(read_records(self.folder / out))

    def hashes(self, out="out"):
        """Id to the hash of the file, for all that are ok."""
        from mmattn.batch.ledger import read_last

        last = read_last(self.folder / out)
        return {name: entry.sha256 for name, entry in last.items() if entry.status == "ok"}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)
