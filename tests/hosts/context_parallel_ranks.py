"""Two processes that run one embedded model together; started by test_context_parallel.py.

    python context_parallel_ranks.py FOLDER

The results of one process are computed first. Then two gloo processes are forked, enable diffusers' context
parallelism, and write what they found to FOLDER/rank0.json and FOLDER/rank1.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, QwenImageTransformer2DModel
from diffusers.hooks.context_parallel import remove_context_parallel

import mmattn
import mmattn.mini
from mmattn import Identity, NeighborhoodAttention, RandomBlocks, VMoBA
from mmattn.errors import UnsupportedCall
from mmattn.methods.base import Method

DEGREE = 2


@dataclass(frozen=True)
class Centred(Method):
    """Subtracts the mean query of all tokens and all heads: wrong wherever some of them are missing."""

    name: ClassVar[str] = "centred"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "cross")
    masks: ClassVar[bool] = True

    def attend(self, q, k, v, *, mask, scale, site, dense):
        site.note("heads", q.shape[1])
        site.note("tokens", q.shape[2])
        return dense(q - self.mean(q), k, v, mask=mask, scale=scale)

    def mean(self, q):
        return q.mean((1, 2), keepdim=True)


@dataclass(frozen=True)
class CentredHeads(Centred):
    """The same, head by head."""

    name: ClassVar[str] = "centred-heads"
    headwise: ClassVar[bool] = True

    def mean(self, q):
        return q.mean(2, keepdim=True)


@dataclass(frozen=True)
class ScaledHead(Method):
    """Doubles head 3 at the heads seam, which exists in the second process only if heads are cut."""

    name: ClassVar[str] = "scaled-head"
    seams: ClassVar[tuple[str, ...]] = ("heads",)

    def heads(self, out, *, site):
        factor = torch.ones(out.shape[1])
        factor[3] = 2.0
        return out * factor[:, None, None]


@dataclass(frozen=True)
class Swapped(Method):
    """Acts on hidden states."""

    name: ClassVar[str] = "swapped"
    seams: ClassVar[tuple[str, ...]] = ("tokens",)

    def leave(self, x, *, site):
        return x.flip(1)


@dataclass(frozen=True, kw_only=True)
class HeadwiseVMoBA(VMoBA):
    headwise: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class HeadwiseNeighborhood(NeighborhoodAttention):
    headwise: ClassVar[bool] = True


VIDEO = {
    "dense": None,
    "identity": Identity(),
    "vmoba": VMoBA(topk=2, dense_steps=0),
    "vmoba-headwise": HeadwiseVMoBA(topk=2, dense_steps=0),
    "neighborhood": NeighborhoodAttention(window=0.5),
    "neighborhood-headwise": HeadwiseNeighborhood(window=0.5),
    "random-blocks": RandomBlocks(block=16, density=0.4),
    "centred": Centred(),
    "centred-heads": CentredHeads(),
    "scaled-head": ScaledHead(),
}
PADDED = {
    "dense": None,
    "neighborhood": NeighborhoodAttention(window=0.5),
    "neighborhood-headwise": HeadwiseNeighborhood(window=0.5),
    "centred": Centred(),
    "centred-heads": CentredHeads(),
}
IMAGE = {
    "dense": None,
    "neighborhood": NeighborhoodAttention(window=0.5),
    "neighborhood-headwise": HeadwiseNeighborhood(window=0.5),
    "random-blocks": RandomBlocks(block=16, density=0.4),
    "centred-heads": CentredHeads(),
}
SIZES = {
    "t2v": {"height": 48, "width": 48, "num_frames": 5, "guidance_scale": 2.0},
    "t2i": {"height": 64, "width": 64, "guidance_scale": 3.0},
}


@torch.no_grad()
def draw(pipe, kind):
    """Latents after two steps."""
    made = pipe(
        "a red circle on a white background",
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **SIZES[kind],
    )
    return made.frames if kind == "t2v" else made.images


def drawn_with(pipe, kind, method):
    """Latents, and what the sites noted."""
    if method is None:
        return draw(pipe, kind), {}
    with mmattn.attach(pipe, method) as session:
        latents = draw(pipe, kind)
        return latents, notes(session)


def notes(session):
    sites = [site for run in session.runs for site in run.sites]
    found = {}
    for name in ("heads", "tokens", "density"):
        values = [value for s in sites if (value := s.meter.mean(name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found | {"sites": len(sites), "kinds": sorted({site.kind for site in sites})}


def gradient(model):
    """Of a query projection in the middle of the model, through sparse attention."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, 8, 2, 6, 6, generator=g)
    text = torch.randn(1, 16, 96, generator=g)
    weight = model.blocks[2].attn1.to_q.weight.requires_grad_()
    with mmattn.attach(model, VMoBA(topk=2, dense_steps=0)):
        out = model(hidden, torch.tensor([500]), text, return_dict=False)[0]
    (found,) = torch.autograd.grad(out.square().sum(), weight)
    weight.requires_grad_(False)
    return found


def padded_model():
    """A small untrained Qwen-Image: text in front, and a mask of padded text that the processes share."""
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()


@torch.no_grad()
def padded(model, method):
    """Output for two rows whose text ends at 6 and at 3 of 8 tokens, the second in the first process."""
    g = torch.Generator().manual_seed(7)
    call = {
        "hidden_states": torch.randn(2, 24, 16, generator=g),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=g),
        "encoder_hidden_states_mask": torch.arange(8) < torch.tensor([[6], [3]]),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 4, 6)]] * 2,
        "return_dict": False,
    }
    if method is None:
        return model(**call)[0]
    with mmattn.attach(model, method):
        return model(**call)[0]


def enable(model, **config):
    # diffusers asks for the accelerator, which on a machine without one is the CPU, but counts none.
    with patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**config))


def disable(model):
    remove_context_parallel(model, model._cp_plan)
    model._parallel_config = None
    for module in model.modules():
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            module.processor._parallel_config = None


def refused(pipe, method):
    before = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    try:
        mmattn.attach(pipe, method).detach()
    except UnsupportedCall as error:
        after = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
        return {
            "error": str(error),
            "untouched": all(a is b for a, b in zip(before, after, strict=True)),
        }
    return {"error": None}


def error_of(latents, reference):
    return float((latents - reference).abs().max())


def run(rank, folder, pipes, references):
    """What one of the processes does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=DEGREE
    )
    found = {}
    for kind, cases in (("t2v", VIDEO), ("t2i", IMAGE)):
        pipe = pipes[kind]
        enable(pipe.transformer, ulysses_degree=DEGREE)
        stock = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
        plain = draw(pipe, kind)
        for name, method in cases.items():
            latents, noted = drawn_with(pipe, kind, method)
            reference, _ = references[kind, name]
            found[f"{kind} {name}"] = {"error": error_of(latents, reference), **noted}
        after = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
        found[f"{kind} detached"] = {
            "bitwise": bool(torch.equal(draw(pipe, kind), plain)),
            "processors": all(a is b for a, b in zip(stock, after, strict=True)),
        }
        disable(pipe.transformer)

    enable(pipes["padded"], ulysses_degree=DEGREE)
    for name, method in PADDED.items():
        error = error_of(padded(pipes["padded"], method), references["padded", name][0])
        found[f"padded {name}"] = {"error": error}

    video = pipes["t2v"]
    enable(video.transformer, ulysses_degree=DEGREE)
    found["tokens seam"] = refused(video, Swapped())
    disable(video.transformer)

    alone = gradient(video.transformer)
    enable(video.transformer, ulysses_degree=DEGREE)
    together = gradient(video.transformer)
    dist.all_reduce(together)
    size = float(alone.abs().max())
    found["gradient"] = {"error": error_of(together, alone) / size, "size": size}
    disable(video.transformer)

    with mmattn.attach(video, VMoBA(topk=2, dense_steps=0)):
        enable(video.transformer, ulysses_degree=DEGREE)  # after attaching
        late = error_of(draw(video, "t2v"), references["t2v", "vmoba"][0])
    kept = video.transformer.blocks[0].attn1.processor._parallel_config is not None
    found["enabled late"] = {
        "error": late,
        "detached": error_of(draw(video, "t2v"), references["t2v", "dense"][0]),
        "kept": kept,
    }
    disable(video.transformer)

    enable(video.transformer, ulysses_degree=DEGREE, ulysses_anything=True)
    found["anything"] = refused(video, VMoBA(topk=2, dense_steps=0))
    cpu = patch("torch.accelerator.current_accelerator", return_value=torch.device("cpu"))
    given = VMoBA(topk=2, dense_steps=0)
    with cpu, mmattn.attach(video, given, unsupported="dense") as session:
        error = error_of(draw(video, "t2v"), references["t2v", "dense"][0])
        reasons = [r for run in session.runs for s in run.sites for r in s.meter.dense]
        found["anything dense"] = {"error": error, "reasons": sorted(set(reasons))}
    disable(video.transformer)

    enable(video.transformer, ring_degree=DEGREE)
    found["ring"] = refused(video, VMoBA(topk=2, dense_steps=0))
    disable(video.transformer)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder):
    torch.set_num_threads(1)
    pipes = {kind: mmattn.mini.load(kind) for kind in ("t2v", "t2i")}
    for pipe in pipes.values():
        pipe.transformer.requires_grad_(False)
    references = {
        (kind, name): drawn_with(pipes[kind], kind, method)
        for kind, cases in (("t2v", VIDEO), ("t2i", IMAGE))
        for name, method in cases.items()
    }
    pipes["padded"] = padded_model()
    for name, method in PADDED.items():
        references["padded", name] = padded(pipes["padded"], method), {}
    moved = {
        f"{kind} {name}": error_of(latents, references[kind, "dense"][0])
        for (kind, name), (latents, _) in references.items()
    }
    Path(folder, "moved.json").write_text(json.dumps(moved))
    # Forked, so that torch, diffusers and the models are loaded once; nothing here ran a backward yet.
    torch.multiprocessing.start_processes(
        run, (folder, pipes, references), nprocs=DEGREE, start_method="fork"
    )


if __name__ == "__main__":
    main(sys.argv[1])
