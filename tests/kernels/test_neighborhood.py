"""`neighborhood_attention`: windows against a brute-force definition, the simulator against the paper."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mmattn_kernels import BackendUnavailable, neighborhood_attention
from mmattn_kernels.neighborhood import simulate
from oracles import dense, gradients, loss_of, random_qkv, sdpa_error

CASES = [
    # grid, settings, extra keys, leading queries too
    ((37,), {"window": 7}, 0, False),
    ((63,), {"window": 4, "stride": 3, "dilation": 5}, 2, False),
    ((8, 9), {"window": (3, 4), "stride": (2, 1)}, 5, True),
    ((9, 11), {"window": 4, "dilation": 2, "is_causal": (True, False)}, 3, True),
    ((16, 16), {"window": 8, "stride": 8}, 0, False),
    ((3, 5, 7), {"window": (3, 2, 5), "stride": (1, 2, 2)}, 17, True),
    ((4, 6, 8), {"window": (2, 4, 4), "stride": (2, 4, 4)}, 0, False),
    ((2, 1, 13), {"window": (1, 1, 6), "is_causal": (False, False, True)}, 0, False),
]


def brute_mask(grid, window, stride=1, dilation=1, is_causal=False):
    """Which keys every query sees, from the definition, one pair of coordinates at a time."""
    rank = len(grid)
    every = [
        x if isinstance(x, tuple) else (x,) * rank for x in (window, stride, dilation, is_causal)
    ]
    axes = []
    for n, w, s, d, causal in zip(grid, *every, strict=True):
        axis = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            members = list(range(i % d, n, d))
            length, p = len(members), i // d
            if causal:
                leader = min(s * (p // s) + s - 1, length - 1)
                seen = range(max(leader - w + 1, 0), p + 1)
            else:
                leader = min(s * (p // s) + s // 2, length - 1)
                first = min(max(leader - w // 2, 0), length - w)
                seen = range(first, first + w)
            axis[i, [members[key] for key in seen]] = True
        axes.append(axis)
    mask = axes[0]
    for axis in axes[1:]:
        mask = torch.kron(mask.int(), axis.int()).bool()
    return mask


def whole_mask(grid, setting, extra, leading):
    mask = F.pad(brute_mask(grid, **setting), (extra, 0), value=True)
    return F.pad(mask, (0, 0, extra if leading else 0, 0), value=True)


def inputs(case, dtype, *, d=16, heads=2, kv=2, grad=True):
    grid, _, extra, leading = case
    n = prod(grid)
    return random_qkv(
        1, heads, n + (extra if leading else 0), n + extra, d, kv_heads=kv, dtype=dtype, grad=grad
    )


def run(qkv, case, backend):
    grid, setting, extra, _ = case
    out, lse = neighborhood_attention(
        *qkv, grid, **setting, extra_keys=extra, return_lse=True, backend=backend
    )
    return (out, lse, *gradients(loss_of(out, lse), *qkv))


def check(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_and_loops_equal_the_brute_force_mask(case, poisoned):
    qkv = inputs(case, torch.float64, heads=4)
    mask = whole_mask(*case)
    assert not mask.all()
    out, lse, _ = dense(*qkv, mask)
    want = (out, lse, *gradients(loss_of(out, lse), *qkv))
    check(run(qkv, case, "torch"), want, 1e-11)
    check(run(qkv, case, "reference"), want, 1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_equals_the_brute_force_mask(case, poisoned):
    qkv = inputs(case, torch.float32, kv=1)
    out, lse, _ = dense(*qkv, whole_mask(*case))
    want = (out, lse, *gradients(loss_of(out, lse), *qkv))
    check(run(qkv, case, "triton"), want, 2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_sdpa(backend, dtype):
    case = ((8, 8), {"window": 5}, 6, False)
    qkv = inputs(case, dtype, d=64, grad=False)
    mask = whole_mask(*case)
    out = neighborhood_attention(*qkv, (8, 8), window=5, extra_keys=6, backend=backend)
    error = float((out.double() - dense(*qkv, mask)[0]).abs().max())
    assert error <= 2 * sdpa_error(*qkv, mask)


def test_head_dims_that_tiles_do_not_divide():
    case = ((6, 7), {"window": 3}, 0, False)
    for d in (40, 72, 96):
        qkv = inputs(case, torch.float32, d=d, grad=False)
        got = neighborhood_attention(*qkv, (6, 7), window=3, backend="triton")
        torch.testing.assert_close(
            got.double(), dense(*qkv, whole_mask(*case))[0], atol=1e-5, rtol=1e-5
        )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_geometry(data):
    rank = data.draw(st.integers(1, 3))
    grid, setting = [], {"window": [], "stride": [], "dilation": [], "is_causal": []}
    for _ in range(rank):
        n = data.draw(st.integers(1, 24 if rank == 1 else 7))
        dilation = data.draw(st.integers(1, n))
        window = data.draw(st.integers(1, n // dilation))
        grid.append(n)
        setting["window"].append(window)
        setting["dilation"].append(dilation)
        setting["stride"].append(data.draw(st.integers(1, window)))
        setting["is_causal"].append(data.draw(st.booleans()))
    case = (
        tuple(grid),
        {k: tuple(v) for k, v in setting.items()},
        data.draw(st.integers(0, 3)),
        False,
    )
    qkv = inputs(case, torch.float64, grad=False)
    out = neighborhood_attention(*qkv, case[0], **case[1], extra_keys=case[2], backend="torch")
    torch.testing.assert_close(out, dense(*qkv, whole_mask(*case))[0], atol=1e-11, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_special_cases(backend):
    q, k, v = random_qkv(1, 2, 36, 36, 16, dtype=torch.float32)
    whole = neighborhood_attention(q, k, v, (6, 6), window=6, backend=backend)
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=0)
    causal = neighborhood_attention(q, k, v, (36,), window=36, is_causal=True, backend=backend)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal, want, atol=2e-6, rtol=0)
    # Stride = window that divides the axis: blocks, each on its own.
    blocks = neighborhood_attention(q, k, v, (36,), window=9, stride=9, backend=backend)
    cut = [x.unflatten(2, (4, 9)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*cut).unflatten(0, (1, 4)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(blocks, want, atol=2e-6, rtol=0)
    # Dilation: every residue class on its own.
    dilated = neighborhood_attention(q, k, v, (36,), window=5, dilation=3, backend=backend)
    for r in range(3):
        part = [x[:, :, r::3] for x in (q, k, v)]
        want = neighborhood_attention(*part, (12,), window=5, backend=backend)
        torch.testing.assert_close(dilated[:, :, r::3], want, atol=2e-6, rtol=0)


HUNYUAN = ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8))
FLUX = ((256, 256), (80, 80), (16, 16), (16, 8))


@pytest.mark.parametrize(
    ("model", "stride", "speedup"),
    [
        (HUNYUAN, (1, 1, 1), 3.27),
        (HUNYUAN, (2, 1, 1), 3.60),
        (HUNYUAN, (1, 1, 8), 5.45),
        (HUNYUAN, (2, 1, 8), 6.00),
        (HUNYUAN, (1, 8, 8), 9.09),
        (HUNYUAN, (2, 8, 8), 10.0),
        (HUNYUAN, (16, 8, 8), 11.11),
        (HUNYUAN, (18, 24, 24), 6.67),
        (FLUX, (1, 1), 6.10),
        (FLUX, (16, 1), 8.53),
        (FLUX, (16, 16), 10.24),
    ],
)
def test_the_simulator_gives_the_published_speedups(model, stride, speedup):
    """Table of arXiv 2504.16922, for static tiles."""
    grid, window, q_tile, k_tile = model
    found = simulate(grid, window=window, stride=stride, q_tile=q_tile, k_tile=k_tile)
    assert found.speedup == pytest.approx(speedup, abs=0.006)


def test_opcheck_and_compile():
    case = ((5, 6), {"window": 3}, 2, False)
    qkv = inputs(case, torch.float32)
    settings_ = ([5, 6], [3, 3], [1, 1], [1, 1], [False, False], 2, 0.25, "torch")
    torch.library.opcheck(torch.ops.mmattn.neighborhood_attention.default, (*qkv, *settings_))

    def step(q, k, v):
        return neighborhood_attention(q * 2, k, v, (5, 6), window=3, extra_keys=2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), step(*qkv))
    check(gradients(loss_of(compiled(*qkv)), *qkv), gradients(loss_of(step(*qkv)), *qkv), 1e-5)


def test_wrong_inputs_are_named():
    q, k, v = random_qkv(1, 1, 30, 30, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="of grid"):
        neighborhood_attention(q, k, v, (5, 7), window=3)
    with pytest.raises(ValueError, match="window \\* dilation"):
        neighborhood_attention(q, k, v, (5, 6), window=4, dilation=2)
    with pytest.raises(ValueError, match="1 to the window"):
        neighborhood_attention(q, k, v, (5, 6), window=3, stride=4)
    with pytest.raises(ValueError, match="2 entries for a grid of 1"):
        neighborhood_attention(q, k, v, (30,), window=(3, 3))
    with pytest.raises(TypeError, match="int values"):
        neighborhood_attention(q, k, v, (5, 6), window=2.5)
    with pytest.raises(BackendUnavailable, match="natten"):
        neighborhood_attention(q, k, v, (5, 6), window=3, backend="natten")
