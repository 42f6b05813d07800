"""From measurements to settings: candidates and warm-ups per layer, within a bound or at a price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmattn.config import Recipe
from mmattn.methods.base import Method

Measured = Mapping[str, Mapping[str, Sequence[float]]]
"""Of one candidate: site path -> name (``density``, ``recall``, ``error``) -> value at every step."""


@dataclass(frozen=True)
class Choice:
    """What one layer runs.

    Args:
        candidate: index of the candidate, or None for the original attention.
        dense_steps: first steps in which the layer stays dense.
        cost: mean density over all steps.
    """

    candidate: int | None
    dense_steps: int
    cost: float


DENSE = Choice(None, 0, 1.0)


def within(measured: Sequence[Measured], recall: float) -> dict[str, Choice]:
    """For every site the cheapest candidate and warm-up with `recall` or more in every sparse step.

    Args:
        measured: one table per candidate, means over the prompts.
        recall: smallest share of attention mass.
    """
    chosen = {}
    for site in measured[0]:
        options = [DENSE]
        for index, table in enumerate(measured):
            recalled = table[site]["recall"]
            first = 1 + max((s for s, r in enumerate(recalled) if r < recall), default=-1)
            if first < len(recalled):
                options.append(_option(index, first, table[site]))
        chosen[site] = min(options, key=lambda option: option.cost)
    return chosen


def at_price(
    measured: Sequence[Measured], price: float, weights: Sequence[float]
) -> dict[str, Choice]:
    """For every site the candidate and warm-up with the least ``cost + price * error``.

    Costs and errors are means over all steps, where dense steps have no error. One price for all sites
    spends error where it saves most: this is how rate is allocated in coding.

    Args:
        measured: one table per candidate, means over the prompts.
        price: density that a unit of relative squared error is worth.
        weights: how much an error counts in each step.
    """
    chosen = {}
    for site in measured[0]:
        options = [(DENSE.cost, DENSE)]
        for index, table in enumerate(measured):
            errors = [w * e for w, e in zip(weights, table[site]["error"], strict=True)]
            for first in range(len(errors)):
                option = _option(index, first, table[site])
                options.append((option.cost + price * sum(errors[first:]) / len(errors), option))
        chosen[site] = min(options, key=lambda pair: pair[0])[1]
    return chosen


def uniform(measured: Sequence[Measured], candidate: int, first: int) -> dict[str, Choice]:
    """One candidate and one number of dense first steps for every site."""
    return {site: _option(candidate, first, v) for site, v in measured[candidate].items()}


def step_weights(table: Measured, losses: Mapping[int, float]) -> list[float]:
    """How much an error at a site counts in each step, from the loss of whole generations.

    What two numbers of dense steps differ by is put down to the errors in the steps between them.

    Args:
        table: what was measured of the candidate that ran.
        losses: mean squared error of the result, by number of dense first steps; 0 among them.

    Returns:
        A weight per step with mean 1, constant between the numbers in `losses`.
    """
    total = len(next(iter(table.values()))["error"])
    errors = [sum(values["error"][s] for values in table.values()) for s in range(total)]
    starts = sorted(losses)
    weights: list[float] = []
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        caused = losses[start] - losses.get(end, 0.0)
        weights += [caused / max(sum(errors[start:end]), 1e-12)] * (end - start)
    least = 0.01 * max(weights)  # a longer warm-up that happens to do worse must not earn anything
    weights = [max(w, least) for w in weights]
    return [w * total / sum(weights) for w in weights]


def _option(index: int, first: int, values: Mapping[str, Sequence[float]]) -> Choice:
    density = values["density"]
    return Choice(index, first, (first + sum(density[first:])) / len(density))


def mean_cost(chosen: Mapping[str, Choice]) -> float:
    """Mean density over sites and steps."""
    return sum(c.cost for c in chosen.values()) / len(chosen)


def recipe(chosen: Mapping[str, Choice], candidates: Sequence[Method], steps: int) -> Recipe:
    """A recipe with one method table per setting in use; sites that stay dense are in none."""
    groups: dict[tuple[int, int], list[str]] = {}
    for site, choice in chosen.items():
        if choice.candidate is not None:
            groups.setdefault((choice.candidate, choice.dense_steps), []).append(site)
    methods = []
    for (index, first), sites in groups.items():
        # A share and not a number, so that the recipe keeps its meaning with other numbers of steps.
        changes: dict[str, Any] = {"dense_steps": first / steps if first else 0}
        methods.append(replace(candidates[index], **changes).at(sites))
    return Recipe(tuple(methods))
