"""UniformPrune: exact budgets, even distances, whole models."""

from itertools import pairwise

import pytest
import torch
import transformers_zoo as zoo

import mmattn
from mmattn.methods.uniform_prune import UniformPrune, spread


@pytest.mark.parametrize("grid", [(24, 24), (4, 4), (6, 10), (1, 9), (9, 1), (7, 13)])
def test_exact_budgets_in_order(grid):
    total = grid[0] * grid[1]
    for count in range(1, total + 1):
        cells = spread(grid, count)
        assert len(cells) == count and cells[0] >= 0 and cells[-1] < total
        assert all(a < b for a, b in pairwise(cells))


def farthest(grid, cells):
    """How far, in tokens, the cell that is worst off is from a kept one."""
    points = torch.tensor([divmod(c, grid[1]) for c in range(grid[0] * grid[1])]).float()
    return float(torch.cdist(points, points[cells]).amin(1).max())


@pytest.mark.parametrize("count", [192, 128, 64, 36, 11])
def test_holes_are_as_small_as_a_square_lattice_has_them(count):
    grid = (24, 24)
    # A square lattice of `count` points on 576 cells: half of the diagonal of its cell, and rounding.
    assert farthest(grid, spread(grid, count)) <= (576 / count / 2) ** 0.5 + 1
    generator = torch.Generator().manual_seed(count)
    chance = [torch.randperm(576, generator=generator)[:count].tolist() for _ in range(10)]
    assert farthest(grid, spread(grid, count)) < min(farthest(grid, c) for c in chance)


def test_a_lattice_where_the_numbers_allow_it():
    want = [y * 24 + x for y in range(1, 24, 3) for x in range(1, 24, 3)]
    assert spread((24, 24), 64) == want
    assert spread((4, 4), 4) == [5, 7, 13, 15] and spread((4, 4), 16) == list(range(16))
    assert spread((5, 5), 1) == [12]


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3", "smolvlm"])
def test_models(name):
    model, call, _ = zoo.made(name)
    stock, greedy = zoo.logits(model, call), zoo.tokens(model, call)
    with mmattn.attach(model, UniformPrune(keep=0.25)) as session:
        first = zoo.logits(model, call)
        assert torch.equal(zoo.logits(model, call), first)
        zoo.tokens(model, call, num_beams=2)
        row = next(r for r in session.stats.sites if r.kind == "features")
    assert first.shape[1] < stock.shape[1] and 0 < row.tokens_kept < row.tokens_in
    with mmattn.attach(model, UniformPrune(keep=None)):
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call), greedy)


def test_settings():
    for keep in (0, 0.0, 1.5, True):
        with pytest.raises(mmattn.ConfigError):
            UniformPrune(keep=keep)
    assert UniformPrune.from_dict(UniformPrune(keep=9).to_dict()) == UniformPrune(keep=9)
    assert UniformPrune(keep=1.0).passive and not UniformPrune().passive
