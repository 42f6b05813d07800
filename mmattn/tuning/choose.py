"""From measurements to settings: per layer the cheapest candidate that stays within a bound."""

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


def choose(
    measured: Sequence[Measured], *, error: float | None = None, recall: float | None = None
) -> dict[str, Choice]:
    """For every site the cheapest candidate and warm-up whose sparse steps all stay within the bound.

    Args:
        measured: one table per candidate, means over the prompts.
        error: largest relative squared error of a site's output in any sparse step.
        recall: smallest share of attention mass in any sparse step.
    """
    chosen = {}
    for site in measured[0]:
        options = [DENSE]
        for index, table in enumerate(measured):
            values = table[site]
            bad = [
                step
                for step, (e, r) in enumerate(zip(values["error"], values["recall"], strict=True))
                if (error is not None and e > error) or (recall is not None and r < recall)
            ]
            first, total = (bad[-1] + 1 if bad else 0), len(values["error"])
            if first < total:
                cost = (first + sum(values["density"][first:])) / total
                options.append(Choice(index, first, cost))
        chosen[site] = min(options, key=lambda option: option.cost)
    return chosen


def mean_cost(chosen: Mapping[str, Choice]) -> float:
    """Mean density over sites and steps."""
    return sum(c.cost for c in chosen.values()) / len(chosen)


def bounds(measured: Sequence[Measured]) -> list[float]:
    """The errors at which some choice changes, ascending and each once."""
    return sorted({e for table in measured for values in table.values() for e in values["error"]})


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
