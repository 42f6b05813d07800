"""`routed_attention`: every back end against loops and dense attention, and its invariants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mmattn_kernels import routed_attention
from oracles import dense, gradients, loss_of, random_qkv, sdpa_error

SHAPES = [
    # B, H, Hkv, Q, K, D, chunks
    (2, 4, 2, 63, 111, 32, 5),
    (1, 2, 2, 50, 90, 72, 40),
    (1, 1, 1, 1, 2, 16, 2),
    (1, 2, 1, 70, 64, 80, 3),
    (1, 2, 2, 33, 64, 128, 1),
]


def case(shape, dtype, *, text: bool, density: float = 0.4, grad: bool = True):
    b, h, kv, q_len, k_len, d, chunks = shape
    q, k, v = random_qkv(b, h, q_len, k_len, d, kv_heads=kv, dtype=dtype, grad=grad)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(-1 if text else 0, chunks, (k_len,), generator=draw)
    selected = torch.rand(b, h, q_len, chunks, generator=draw) < density
    return q, k, v, ids, selected


def token_mask(ids, selected):
    return selected[..., ids.clamp(min=0)] | (ids < 0)


def run(q, k, v, ids, selected, backend):
    out, lse = routed_attention(q, k, v, ids, selected, return_lse=True, backend=backend)
    return (out, lse, *gradients(loss_of(out, lse), q, k, v))


def check(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", [False, True])
def test_torch_equals_loops_and_dense(shape, text, poisoned):
    q, k, v, ids, selected = case(shape, torch.float64, text=text)
    got = run(q, k, v, ids, selected, "torch")
    check(got, run(q, k, v, ids, selected, "reference"), 1e-11)
    out, lse, _ = dense(q, k, v, token_mask(ids, selected))
    check(got, (out, lse, *gradients(loss_of(out, lse), q, k, v)), 1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", [False, True])
def test_triton_equals_torch(shape, text, poisoned):
    args = case(shape, torch.float32, text=text)
    check(run(*args, "triton"), run(*args, "torch"), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_sdpa(backend, dtype):
    q, k, v, ids, selected = case((1, 2, 1, 80, 96, 64, 6), dtype, text=True, grad=False)
    mask = token_mask(ids, selected)
    out = routed_attention(q, k, v, ids, selected, backend=backend)
    error = float((out.double() - dense(q, k, v, mask)[0]).abs().max())
    assert error <= 2 * sdpa_error(q, k, v, mask)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_beyond_the_range_of_fp16(backend):
    q, k, v, ids, selected = case((1, 1, 1, 32, 64, 32, 4), torch.float16, text=True, grad=False)
    q, k = q * 100, k * 100
    out = routed_attention(q, k, v, ids, selected, scale=1.0, backend=backend)
    want, want_lse, _ = dense(q, k, v, token_mask(ids, selected), scale=1.0)
    assert want_lse[torch.isfinite(want_lse)].max() > 65504
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_rows_that_selected_nothing(backend, poisoned):
    q, k, v, ids, selected = case((1, 2, 2, 40, 30, 16, 3), torch.float32, text=False)
    selected[:, :, :20] = False
    selected[:, :, 20:, 0] = True
    out, lse, dq, dk, dv = run(q, k, v, ids, selected, backend)
    assert (out[:, :, :20] == 0).all() and (lse[:, :, :20] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 20:]).all()
    assert (dq[:, :, :20] == 0).all() and (dq[:, :, 20:] != 0).any()
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


@pytest.mark.parametrize("chunk", [455, 37])
def test_chunks_of_a_length_that_no_tile_divides(chunk):
    """1000 keys in chunks of 455 or 37 tokens, as VMoBA's cuboids are, against a dense mask."""
    q, k, v = random_qkv(1, 2, 300, 1000, 32, dtype=torch.float32, grad=True)
    ids = torch.arange(1000) // chunk
    count = int(ids.max()) + 1
    selected = torch.rand(1, 2, 300, count, generator=torch.Generator().manual_seed(0)) < 0.4
    out, lse, _ = dense(q, k, v, token_mask(ids, selected))
    want = (out, lse, *gradients(loss_of(out, lse), q, k, v))
    check(run(q, k, v, ids, selected, "torch"), want, 2e-5)


@settings(max_examples=30, deadline=None)
@given(
    q_len=st.integers(1, 40),
    k_len=st.integers(1, 60),
    chunks=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_invariants(q_len, k_len, chunks, seed):
    q, k, v = random_qkv(1, 2, q_len, k_len, 16, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, chunks, (k_len,), generator=draw)
    everything = torch.ones(1, 2, q_len, chunks, dtype=torch.bool)
    got = routed_attention(q, k, v, ids, everything, backend="torch")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0)

    selected = torch.rand(1, 2, q_len, chunks, generator=draw) < 0.5
    want = routed_attention(q, k, v, ids, selected, backend="torch")
    # Chunks may be renamed ...
    names = torch.randperm(chunks, generator=draw)
    renamed = torch.where(ids < 0, ids, names[ids.clamp(min=0)])
    got = routed_attention(q, k, v, renamed, selected[..., names.argsort()], backend="torch")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    # ... and keys may lie in any order.
    order = torch.randperm(k_len, generator=draw)
    got = routed_attention(q, k[:, :, order], v[:, :, order], ids[order], selected, backend="torch")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    # A query does not depend on what others selected.
    others = selected.clone()
    others[:, :, 1:] = ~others[:, :, 1:]
    got = routed_attention(q, k, v, ids, others, backend="torch")
    torch.testing.assert_close(got[:, :, 0], want[:, :, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend):
    q, k, v, ids, selected = case((2, 2, 2, 40, 40, 32, 4), torch.float32, text=True, grad=False)
    want = routed_attention(q, k, v, ids, selected, backend=backend)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned = selected.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    got = routed_attention(*strided, ids.int(), turned, backend=backend)
    assert torch.equal(got, want)


def test_opcheck_and_compile():
    q, k, v, ids, selected = case((1, 2, 1, 40, 30, 16, 3), torch.float32, text=True)
    torch.library.opcheck(
        torch.ops.mmattn.routed_attention.default, (q, k, v, ids, selected, 0.25, "torch")
    )

    def step(q, k, v):
        return routed_attention(q * 2, k, v, ids, selected, return_lse=True)

    for dynamic in (False, True):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        check(compiled(q, k, v), step(q, k, v), 1e-6)


def test_wrong_inputs_are_named():
    q, k, v, ids, selected = case((1, 2, 1, 40, 30, 16, 3), torch.float32, text=False)
    with pytest.raises(TypeError, match="must be bool"):
        routed_attention(q, k, v, ids, selected.float())
    with pytest.raises(TypeError, match="must be integers"):
        routed_attention(q, k, v, ids.float(), selected)
    with pytest.raises(ValueError, match="for each of 30 keys"):
        routed_attention(q, k, v, ids[:-1], selected)
    with pytest.raises(ValueError, match=r"must be \[B, H, Q, C\]"):
        routed_attention(q, k, v, ids, selected[:, :1])
    with pytest.raises(ValueError, match="chunks 0 to 1"):
        routed_attention(q, k, v, ids, selected[..., :2])
