"""UPLiFT's local attender: published golden numbers, loops, and what a convex combination promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmattn.errors import ConfigError, UnsupportedCall
from mmattn.nn.uplift import NEIGHBORHOODS, LocalAttender, local_attention


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters as the golden numbers want them: a sine over the elements, in order of names."""
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(module.named_parameters())):
            i = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((0.3 * torch.sin(1 + 0.7 * k + 0.37 * i)).view_as(p))
    return module


def waves(*shape: int, f: float = 0.11) -> torch.Tensor:
    n = torch.Size(shape).numel()
    return torch.cos(f * torch.arange(n, dtype=torch.float64) + 0.2).view(shape)


def loops(logits, value, offsets):
    (b, _, fine_y, fine_x), (_, c, y, x) = logits.shape, value.shape
    factor, out = fine_y // y, torch.zeros(b, c, fine_y, fine_x, dtype=value.dtype)
    for row in range(fine_y):
        for column in range(fine_x):
            weights = logits[:, :, row, column].softmax(-1)
            for i, (dy, dx) in enumerate(offsets):
                at_y = min(max(row // factor + dy, 0), y - 1)
                at_x = min(max(column // factor + dx, 0), x - 1)
                out[:, :, row, column] += weights[:, i, None] * value[:, :, at_y, at_x]
    return out


def test_golden_numbers_of_the_published_module():
    attender = filled(LocalAttender(6, 17).double())
    out = attender(waves(1, 6, 8, 12), waves(1, 3, 4, 6, f=0.29))
    assert out.sum().item() == pytest.approx(11.6296635687, abs=1e-9)
    assert out.norm().item() == pytest.approx(3.9674919565, abs=1e-9)
    first = [0.54880044, 0.54638824, 0.51020918, 0.50379465]
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-8)


def test_sizes_and_order_of_the_neighborhoods():
    assert {n: len(set(o)) for n, o in NEIGHBORHOODS.items()} == {n: n for n in (5, 9, 13, 17, 25)}
    assert all(list(o) == sorted(o) for o in NEIGHBORHOODS.values())
    assert NEIGHBORHOODS[17][:3] == ((-2, -2), (-2, 0), (-2, 2))
    assert NEIGHBORHOODS[17][6] == (0, -2) and NEIGHBORHOODS[5][0] == (-1, 0)
    assert sum(p.numel() for p in LocalAttender(64, 17).parameters()) == 1105


@pytest.mark.parametrize("neighbors", sorted(NEIGHBORHOODS))
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_equals_loops(neighbors, factor):
    torch.manual_seed(neighbors)
    value = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(
        2, neighbors, 4 * factor, 5 * factor, dtype=torch.float64, requires_grad=True
    )
    ours = local_attention(logits, value, NEIGHBORHOODS[neighbors])
    theirs = loops(logits, value, NEIGHBORHOODS[neighbors])
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (logits, value)),
        torch.autograd.grad((theirs * weight).sum(), (logits, value)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_one_neighbor_is_nearest_and_a_subset_is_a_mask():
    torch.manual_seed(0)
    value = torch.randn(1, 2, 3, 4)
    offsets = NEIGHBORHOODS[25]
    centre = torch.full((1, 25, 6, 8), -torch.inf)
    centre[:, offsets.index((0, 0))] = 0
    assert torch.equal(
        local_attention(centre, value, offsets), F.interpolate(value, scale_factor=2)
    )
    few = torch.randn(1, 13, 6, 8)
    many = torch.full((1, 25, 6, 8), -torch.inf)
    many[:, [offsets.index(o) for o in NEIGHBORHOODS[13]]] = few
    assert torch.allclose(
        local_attention(many, value, offsets),
        local_attention(few, value, NEIGHBORHOODS[13]),
        atol=1e-6,
    )


def test_no_value_appears_that_was_not_there():
    torch.manual_seed(0)
    value = torch.randn(1, 4, 5, 5)
    out = LocalAttender(3, 9)(10 * torch.randn(1, 3, 10, 10), value)
    lowest = -F.max_pool2d(-F.pad(value, (1,) * 4, mode="replicate"), 3, 1)
    highest = F.max_pool2d(F.pad(value, (1,) * 4, mode="replicate"), 3, 1)
    assert (out >= F.interpolate(lowest, scale_factor=2) - 1e-6).all()
    assert (out <= F.interpolate(highest, scale_factor=2) + 1e-6).all()
    assert not torch.allclose(out, F.interpolate(value, scale_factor=2))


def test_compiles_and_runs_in_half_precision():
    attender = LocalAttender(32).bfloat16()
    guide, value = torch.randn(1, 32, 8, 8).bfloat16(), torch.randn(1, 4, 4, 4).bfloat16()
    out = attender(guide, value)
    assert out.dtype == torch.bfloat16
    compiled = torch.compile(attender, fullgraph=True, backend="eager")
    assert torch.equal(compiled(guide, value), out)


def test_refusals():
    with pytest.raises(ConfigError, match="neighbors"):
        LocalAttender(3, 7)
    with pytest.raises(ConfigError, match="guide_channels"):
        LocalAttender(0)
    with pytest.raises(UnsupportedCall, match="whole multiple"):
        LocalAttender(3)(torch.zeros(1, 3, 9, 8), torch.zeros(1, 2, 4, 4))
    with pytest.raises(UnsupportedCall, match="2 rows"):
        LocalAttender(3)(torch.zeros(1, 3, 8, 8), torch.zeros(2, 2, 4, 4))
