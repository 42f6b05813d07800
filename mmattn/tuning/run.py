"""Tune sparse attention to a pipeline: measure candidates once, then pick per layer and per step.

Every candidate runs along the trajectory of the untouched model (`dry_run`), and at every layer and step
three numbers are taken: its density, the share of attention mass it recalls, and the error of its
output. With a budget in recall each layer gets the cheapest candidate and number of dense first steps
that keep it. With a budget in PSNR each layer gets those with the least cost plus priced error, and the
price is found by bisection over whole generations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmattn.attaching import attach
from mmattn.calls import draw
from mmattn.config import Recipe
from mmattn.errors import BudgetNotMet, ConfigError
from mmattn.evals.quality import psnr
from mmattn.loading import Loaded
from mmattn.methods.base import Method
from mmattn.tuning.choose import (
    DENSE,
    Choice,
    Measured,
    at_price,
    mean_cost,
    recipe,
    step_weights,
    uniform,
    within,
)
from mmattn.tuning.state import State

Progress = Callable[[int, int, str], None]
_EVALUATIONS = 8
"""Whole generations a PSNR budget may cost; each halves what is left of the prices."""

_WARMUPS = (0.0, 0.1, 0.25, 0.5)
"""Shares of dense first steps whose effect tells how much errors count when."""

_PRICES = (-2.0, 4.0)
"""Powers of ten between which the price of an error is looked for: density per relative squared error."""


@dataclass(frozen=True)
class Tuned:
    """A recipe and what is known of it.

    Args:
        recipe: for `mmattn.attach`.
        path: where it was written.
        density: share of query-key pairs it computes at the tuned sites, mean over layers and steps.
        psnr: against the untouched model, mean over the prompts, in dB.
        recall: mean share of the attention mass its sparse layers and steps recall.
        choices: per site, the candidate's index and the dense first steps.
    """

    recipe: Recipe
    path: Path
    density: float
    psnr: float
    recall: float
    choices: dict[str, Choice]


def tune(
    loaded: Loaded,
    prompts: Sequence[str],
    candidates: Sequence[Method],
    out: Path,
    *,
    min_psnr: float | None = None,
    min_recall: float | None = None,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **size: Any,
) -> Tuned:
    """Find a recipe within a budget and write it to `out`.

    The record beside it (``out`` with ``.tune.json`` for a suffix) makes a stopped run continue where
    it was; it stays, as the evidence for the recipe.

    Args:
        loaded: a text-to-image or text-to-video pipeline.
        prompts: what to generate; a few that are typical of the use.
        candidates: sparse methods with all steps sparse, in any order.
        out: the recipe, a ``.toml`` file.
        min_psnr: budget in dB against the untouched model's pictures, mean over the prompts.
        min_recall: budget as the share of attention mass that every sparse layer and step recalls.
        steps: denoising steps.
        guidance: classifier-free guidance scale, None for the pipeline's own.
        seed: of the first prompt; the others follow.
        progress: called with (done, total, what).
        size: height, width, num_frames of pipelines that are not embedded.

    Raises:
        ConfigError: not exactly one budget, no prompts or candidates, candidates that cannot be measured,
            a path that does not end in ``.toml``, or a record of other settings.
        BudgetNotMet: when even the most careful setting misses the budget. The record is kept.
    """
    _check(loaded, prompts, candidates, out, min_psnr, min_recall)
    candidates = [replace(c, dense_steps=0) for c in candidates]  # type: ignore[call-arg]
    state = State(
        out.with_suffix(".tune.json"),
        {
            "model": loaded.source,
            "prompts": list(prompts),
            "candidates": [c.to_dict() for c in candidates],
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "size": size,
        },
    )
    job = _Job(loaded, list(prompts), steps, guidance, seed, size, state, progress)
    job.total = len(prompts) * (len(candidates) + 1) + (
        1 if min_psnr is None else _EVALUATIONS + len(_WARMUPS)
    )
    measured = [job.measure(i, candidate) for i, candidate in enumerate(candidates)]
    if min_recall is not None:
        chosen = within(measured, min_recall)
        reached = job.generate(chosen, candidates)
        limit = f"recall of at least {min_recall}"
    else:
        assert min_psnr is not None
        chosen, reached = _bisect(job, measured, candidates, min_psnr)
        limit = f"PSNR of at least {min_psnr} dB"
    if all(choice.candidate is None for choice in chosen.values()):
        best = max(max(v["recall"]) for table in measured for v in table.values())
        raise BudgetNotMet(
            f"no candidate keeps a {limit} anywhere in this pipeline (best recall of any layer and step: "
            f"{best:.3f}). Offer denser candidates, or a smaller budget; {state.path} has the numbers."
        )
    made = recipe(chosen, candidates, steps)
    recalled = _recall(measured, chosen)
    density = mean_cost(chosen)
    made.save(
        out,
        comment=[
            f"tuned on {loaded.source}: {len(prompts)} prompts, {steps} steps, budget {limit}",
            f"density {density:.3f}, PSNR against dense {reached:.2f} dB, "
            f"mean recall of the sparse layers and steps {recalled:.3f}",
        ],
    )
    job.finish()
    return Tuned(made, out, density, reached, recalled, chosen)


def _check(
    loaded: Loaded,
    prompts: Sequence[str],
    candidates: Sequence[Method],
    out: Path,
    min_psnr: float | None,
    min_recall: float | None,
) -> None:
    if loaded.kind not in ("t2i", "t2v"):
        raise ConfigError(
            f"tuning needs a text-to-image or text-to-video pipeline, not {loaded.kind}"
        )
    if (min_psnr is None) == (min_recall is None):
        raise ConfigError("give one budget: min_psnr in dB, or min_recall as a share")
    if min_recall is not None and not 0 < min_recall <= 1:
        raise ConfigError(f"min_recall is a share in (0, 1], got {min_recall}")
    if not prompts or not candidates:
        raise ConfigError("tuning needs at least one prompt and one candidate method")
    if out.suffix != ".toml":
        raise ConfigError(f"a recipe is a .toml file, got {out.name}")
    for candidate in candidates:
        if not candidate.probes or not hasattr(candidate, "dense_steps"):
            raise ConfigError(
                f"{candidate.name} cannot be tuned: it does not measure what it leaves out, or has no "
                "dense_steps"
            )


class _Job:
    """One pipeline, its prompts, and the results that are on disk already."""

    def __init__(
        self,
        loaded: Loaded,
        prompts: list[str],
        steps: int,
        guidance: float | None,
        seed: int,
        size: dict[str, Any],
        state: State,
        progress: Progress | None,
    ) -> None:
        self.loaded, self.prompts, self.steps, self.seed = loaded, prompts, steps, seed
        self.guidance, self.size, self.state, self.progress = guidance, size, state, progress
        self.done = self.total = 0
        self._dense: list[Tensor] = []

    def _tick(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, what)

    def finish(self) -> None:
        """Whatever was not needed is done."""
        if self.progress is not None and self.done < self.total:
            self.progress(self.total, self.total, "done")

    def _draw(self, index: int) -> Tensor:
        return draw(
            self.loaded,
            [self.prompts[index]],
            [self.seed + index],
            steps=self.steps,
            guidance=self.guidance,
            **self.size,
        )

    def measure(self, number: int, candidate: Method) -> Measured:
        """Density, recall and error of one candidate at every site and step, means over the prompts."""
        found = []
        for index in range(len(self.prompts)):
            name = f"measure {number} {index}"
            if name not in self.state.results:
                with attach(
                    self.loaded.target, candidate, probe=True, dry_run=True, seed=self.seed
                ) as session:
                    self._draw(index)
                    table = {
                        site.path: {
                            key: list(site.meter.by_step(key).values())
                            for key in ("density", "recall", "error")
                        }
                        for run in session.runs
                        for site in run.sites
                    }
                self.state.save(name, table)
            found.append(self.state.results[name])
            self._tick(f"{candidate.name} {number + 1}, prompt {index + 1}")
        return {
            site: {
                key: [
                    sum(values) / len(found)
                    for values in zip(*(table[site][key] for table in found), strict=True)
                ]
                for key in found[0][site]
            }
            for site in found[0]
        }

    def generate(self, chosen: dict[str, Choice], candidates: Sequence[Method]) -> float:
        """PSNR of a choice against the untouched model, mean over the prompts, in dB."""
        made = recipe(chosen, candidates, self.steps)
        name = "generate " + " ".join(
            f"{site}={c.candidate}:{c.dense_steps}" for site, c in chosen.items()
        )
        if not made.methods:
            return float("inf")
        if name not in self.state.results:
            for index in range(len(self._dense), len(self.prompts)):
                self._dense.append(self._draw(index))
                self._tick(f"dense, prompt {index + 1}")
            likeness = []
            for index, dense in enumerate(self._dense):
                with attach(self.loaded.target, made, seed=self.seed):
                    likeness.append(float(psnr(self._draw(index), dense).mean()))
            self.state.save(name, sum(likeness) / len(likeness))
        value = float(self.state.results[name])
        self._tick(f"density {mean_cost(chosen):.3f} has {value:.1f} dB")
        return value


def _bisect(
    job: _Job, measured: Sequence[Measured], candidates: Sequence[Method], budget: float
) -> tuple[dict[str, Choice], float]:
    """The cheapest choice seen that keeps the PSNR; dense everywhere if none does.

    What an error at a site does to the picture is not known. How much it counts in early and in late
    steps is measured on the middle candidate, its price is found by trying.
    """
    middle_one = sorted(range(len(measured)), key=lambda i: mean_cost(uniform(measured, i, 0)))
    probe = middle_one[len(measured) // 2]
    losses = {}
    for first in sorted({int(share * job.steps) for share in _WARMUPS}):
        chosen = uniform(measured, probe, first)
        losses[first] = 10 ** (-job.generate(chosen, candidates) / 10)
    weights = step_weights(measured[probe], losses)
    best, reached = dict.fromkeys(measured[0], DENSE), float("inf")
    low, high = _PRICES  # in powers of ten: too cheap, dear enough
    for _ in range(_EVALUATIONS):
        middle = (low + high) / 2
        chosen = at_price(measured, 10**middle, weights)
        value = job.generate(chosen, candidates)
        if value >= budget:
            high = middle
            if mean_cost(chosen) < mean_cost(best):
                best, reached = chosen, value
        else:
            low = middle
    return best, reached


def _recall(measured: Sequence[Measured], chosen: dict[str, Choice]) -> float:
    values = [
        value
        for site, choice in chosen.items()
        if choice.candidate is not None
        for value in measured[choice.candidate][site]["recall"][choice.dense_steps :]
    ]
    return sum(values) / len(values)
