"""Time methods against the untouched model, interleaved, on whole calls of a model.

No number comes out before its checks are green: the model repeats itself, the method reaches every
planned site, gives finite output of the same shape twice over, and leaves the model as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmattn.attaching import attach
from mmattn.calls import draw, logits, preprocess
from mmattn.compare.jobs import sentence
from mmattn.errors import MmattnError
from mmattn.loading import Loaded
from mmattn.sites import Selector
from mmattn.variants import DENSE, Variant

Work = Callable[[], Tensor]


@dataclass
class Timing:
    """One line of a benchmark. The numbers are None unless every check was green.

    Args:
        median_ms, low_ms, high_ms: median and quartiles over the repeats.
        ratio: median over the median of dense; below 1 is faster.
        checks: what was verified first.
        refused: why there is no number, or None.
    """

    model: str
    label: str
    repeats: int
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    ratio: float | None = None
    density: float | None = None
    sites: int = 0
    checks: list[str] = field(default_factory=list)
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def workload(loaded: Loaded, *, seed: int = 0, steps: int = 4) -> Work:
    """A call that is typical for the model's kind, and returns a tensor to compare.

    Pictures and clips: `steps` denoising steps of one prompt. Vision-language: one picture and 16 new
    tokens. Classifier: a batch of 32.
    """
    if loaded.kind in ("t2i", "t2v"):
        prompt = "a big red circle on the left on a white background"
        if loaded.kind == "t2v":
            prompt = "a red circle moving right on a white background"
        return lambda: draw(loaded, [prompt], [seed], steps=steps)
    noise = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(64, 64, 3, generator=noise) * 255).byte().numpy()
    picture = Image.fromarray(pixels)
    if loaded.kind == "vit":
        batch = preprocess(loaded, [picture]).expand(32, -1, -1, -1).contiguous()
        return lambda: logits(loaded, batch)
    return _generation(loaded, picture)


def _generation(loaded: Loaded, picture: Image.Image) -> Work:
    model, processor = loaded.target, loaded.processor
    words = "describe the picture ." if loaded.embedded else "Describe the picture."
    content = [{"type": "image"}, {"type": "text", "text": words}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)

    @torch.no_grad()
    def call() -> Tensor:
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=16,
            min_new_tokens=16,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits).float()

    return call


def bench(
    loaded: Loaded,
    columns: Sequence[Variant],
    *,
    sites: Selector | None = None,
    repeats: int = 10,
    warmup: int = 3,
    seed: int = 0,
    steps: int = 4,
    progress: Callable[[str], None] | None = None,
) -> list[Timing]:
    """Time dense and every column in turn, `repeats` times, after `warmup` calls of each.

    Args:
        loaded: the model.
        columns: methods; dense is always measured as well and comes first.
        sites: where to attach; None takes every site a method accepts.
        repeats, warmup: counts, at least 1 and 0.
        seed: of the inputs and of random methods.
        steps: denoising steps of one call.
        progress: receives one line per stage.
    """
    work = workload(loaded, seed=seed, steps=steps)
    device = next(_parameters(loaded.target)).device
    tell = progress or (lambda line: None)
    name = loaded.source
    dense = Timing(name, DENSE.label, repeats)
    lines = [Timing(name, column.label, repeats) for column in columns]
    tell(f"{name}: checks")
    reference = work()
    if not _same(reference, work()):
        dense.refused = "the untouched model does not repeat itself with equal inputs"
        for line in lines:
            line.refused = dense.refused
        return [dense, *lines]
    dense.checks.append("repeats itself")
    ready = []
    for column, line in zip(columns, lines, strict=True):
        line.refused = _check(loaded, column, line, work, reference, sites, seed)
        if line.refused is None:
            ready.append((column, line))
    times: dict[str, list[float]] = {line.label: [] for line in (dense, *lines)}
    for turn in range(-warmup, repeats):
        tell(f"{name}: {'warm-up' if turn < 0 else f'repeat {turn + 1} of {repeats}'}")
        spent = _time(work, device)
        if turn >= 0:
            times[dense.label].append(spent)
        for column, line in ready:
            with attach(loaded.target, list(column.methods), sites=sites, seed=seed):
                spent = _time(work, device)
            if turn >= 0:
                times[line.label].append(spent)
    for line in [dense, *(line for _, line in ready)]:
        _summarise(line, times[line.label])
    for _, line in ready:
        assert line.median_ms is not None and dense.median_ms is not None
        line.ratio = line.median_ms / dense.median_ms
    return [dense, *lines]


def _check(
    loaded: Loaded,
    column: Variant,
    line: Timing,
    work: Work,
    reference: Tensor,
    sites: Selector | None,
    seed: int,
) -> str | None:
    """The reason to refuse, or None; fills the line's checks."""
    try:
        with attach(loaded.target, list(column.methods), sites=sites, seed=seed) as session:
            first = work()
            stats = session.stats
            session.reset()
            second = work()
    except MmattnError as error:
        return sentence(error)
    line.sites, line.density = stats.executed, stats.density
    if stats.executed != stats.planned or (stats.planned and stats.calls == 0):
        return f"only {stats.executed} of {stats.planned} planned sites were executed"
    if first.shape != reference.shape:
        return f"its output has shape {tuple(first.shape)}, dense gives {tuple(reference.shape)}"
    if not bool(torch.isfinite(first).all()):
        return "its output is not finite"
    if not _same(first, second):
        return "two runs with one seed differ"
    if not _same(reference, work()):
        return "the model is not as it was after detaching"
    line.checks += ["every site executed", "finite", "repeats itself", "detaches cleanly"]
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, up to the summation order of a GPU."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _parameters(target: Any) -> Any:
    if isinstance(target, torch.nn.Module):  # a pipeline has a `parameters` of another kind
        return target.parameters()
    parts = [p for p in target.components.values() if isinstance(p, torch.nn.Module)]
    return (parameter for part in parts for parameter in part.parameters())


def _time(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1000


def _summarise(line: Timing, spent: list[float]) -> None:
    line.median_ms = statistics.median(spent)
    ordered = sorted(spent)
    line.low_ms = ordered[len(ordered) // 4]
    line.high_ms = ordered[(3 * len(ordered)) // 4 if len(ordered) > 1 else 0]
    line.high_ms = max(line.high_ms, line.median_ms)
