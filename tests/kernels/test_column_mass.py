"""`attention_with_column_mass`: output, LSE and mass against dense attention, and the memory it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from mmattn_kernels import _row_blocks, attention_with_column_mass
from mmattn_kernels.column_mass import torch as plain
from oracles import dense, gradients, loss_of, random_qkv, sdpa_error
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True, params=["whole", "blocks"])
def path(request, monkeypatch):
    """Small problems take one product for the whole batch; both ways must give the same."""
    if request.param == "blocks":
        monkeypatch.setattr(plain, "is_small", lambda q, k: False)
    return request.param


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, min(x.numel(), storage))
        return found


SHAPES = [
    # B, H, Hkv, Q, K, D
    (2, 4, 2, 37, 53, 32),
    (1, 2, 2, 63, 63, 72),
    (1, 2, 1, 1, 64, 16),
    (1, 1, 1, 2, 1, 40),
    (1, 2, 2, 33, 111, 96),
]
KINDS = ["plain", "causal", "padding", "added", "weighted", "everything"]


def make(shape, dtype, kind, *, grad=True):
    """Inputs, keyword arguments, and what they mean to the oracle: a bias and weights of the queries."""
    b, h, kv, q_len, k_len, d = shape
    q, k, v = random_qkv(b, h, q_len, k_len, d, kv_heads=kv, dtype=dtype, grad=grad)
    draw = torch.Generator().manual_seed(4)
    given: dict = {}
    bias = torch.zeros(b, h, q_len, k_len, dtype=torch.float64)
    shares = torch.ones(b, 1, q_len, dtype=torch.float64)
    if kind in ("causal", "everything"):
        given["is_causal"] = True
        late = torch.arange(k_len) > (torch.arange(q_len)[:, None] + k_len - q_len)
        bias = bias.masked_fill(late, float("-inf"))
    if kind == "padding":
        visible = torch.rand(b, 1, 1, k_len, generator=draw) < 0.6
        given["mask"] = visible
        bias = bias.masked_fill(~visible, float("-inf"))
    if kind in ("added", "everything"):
        added = torch.randn(1, h, q_len, k_len, generator=draw).to(dtype)
        added[:, :, q_len // 2] = float("-inf")
        given["mask"] = added
        bias = bias + added.double()
    if kind in ("weighted", "everything"):
        weights = torch.rand(b, h, q_len, generator=draw)
        weights[..., ::3] = 0
        given["query_weights"] = weights.to(dtype).requires_grad_(grad)
        shares = given["query_weights"].double()
    return (q, k, v), given, bias, shares


def exact(qkv, bias, shares):
    out, lse, weights = dense(*qkv, bias)
    return out, lse, (weights * shares[..., None]).sum(2)


def check(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


def leaves(qkv, given):
    return (*qkv, *([given["query_weights"]] if "query_weights" in given else []))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_equals_loops_and_dense(shape, kind, poisoned):
    qkv, given, bias, shares = make(shape, torch.float64, kind)
    got = attention_with_column_mass(*qkv, **given, backend="torch")
    check(got, attention_with_column_mass(*qkv, **given, backend="reference"), 1e-11)
    want = exact(qkv, bias, shares)
    check(got, want, 1e-11)
    inputs = leaves(qkv, given)
    check(gradients(loss_of(*got), *inputs), gradients(loss_of(*want), *inputs), 1e-10)


@pytest.mark.parametrize("scores", [1, 300, 2000])
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 53, 16), (1, 6, 2, 53, 37, 16)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "added", "everything"])
def test_many_parts_are_as_one(shape, kind, scores, monkeypatch, poisoned):
    """Cuts between rows, between key heads and, with causality, between keys; some rows see no key."""
    monkeypatch.setattr(_row_blocks, "_SCORES", scores)
    monkeypatch.setattr(_row_blocks, "_LEAST_ROWS", 1)
    monkeypatch.setattr(_row_blocks, "_CAUSAL_ROWS", 9)
    qkv, given, bias, shares = make(shape, torch.float64, kind)
    got = attention_with_column_mass(*qkv, **given, backend="torch")
    want = exact(qkv, bias, shares)
    check(got, want, 1e-11)
    inputs = leaves(qkv, given)
    check(gradients(loss_of(*got), *inputs), gradients(loss_of(*want), *inputs), 1e-10)


@pytest.mark.parametrize("kind", ["plain", "causal"])
def test_a_thousand_tokens(kind):
    qkv, given, bias, shares = make((1, 2, 1, 1000, 1000, 32), torch.float32, kind)
    got = attention_with_column_mass(*qkv, **given, backend="torch")
    check(got, exact(qkv, bias, shares), 2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_nothing_to_see_and_nobody_to_look(backend, poisoned):
    q, k, v = random_qkv(1, 2, 3, 0, 16, dtype=torch.float32)
    out, lse, mass = attention_with_column_mass(q, k, v, backend=backend)
    assert (out == 0).all() and (lse == float("-inf")).all() and mass.shape == (1, 2, 0)
    out, lse, mass = attention_with_column_mass(k, q, q, backend=backend)
    assert out.shape == (1, 2, 0, 16) and lse.shape == (1, 2, 0)
    assert mass.shape == (1, 2, 3) and (mass == 0).all()


def test_a_row_masked_by_the_least_number_spreads_evenly(poisoned):
    """The other way to write masks; an LSE loses log(keys) next to it, so gradients must not use one."""
    q, k, v = random_qkv(1, 1, 3, 5, 16, dtype=torch.float32, grad=True)
    mask = torch.zeros(1, 1, 3, 5)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    out, _, mass = attention_with_column_mass(q, k, v, mask=mask, backend="torch")
    torch.testing.assert_close(out[0, 0, 1], v[0, 0].mean(0))
    torch.testing.assert_close(mass.sum(), torch.tensor(3.0))
    (grad,) = gradients(out[:, :, 1].sum(), v)
    torch.testing.assert_close(grad, torch.full_like(v, 0.2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_equals_dense(shape, kind, poisoned):
    qkv, given, bias, shares = make(shape, torch.float32, kind)
    got = attention_with_column_mass(*qkv, **given, backend="triton")
    want = exact(qkv, bias, shares)
    check(got, want, 2e-5)
    inputs = leaves(qkv, given)
    check(gradients(loss_of(*got), *inputs), gradients(loss_of(*want), *inputs), 1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_sdpa(backend, dtype):
    qkv, _, bias, shares = make((1, 2, 1, 96, 80, 64), dtype, "plain", grad=False)
    out, _, mass = attention_with_column_mass(*qkv, backend=backend)
    want, _, want_mass = exact(qkv, bias, shares)
    assert float((out.double() - want).abs().max()) <= 2 * sdpa_error(*qkv)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), want_mass, atol=0, rtol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_beyond_the_range_of_fp16(backend):
    qkv, _, _, _ = make((1, 1, 1, 32, 48, 32), torch.float16, "plain", grad=False)
    q, k, v = qkv[0] * 100, qkv[1] * 100, qkv[2]
    out, _, mass = attention_with_column_mass(q, k, v, scale=1.0, backend=backend)
    want, want_lse, weights = dense(q, k, v, scale=1.0)
    assert want_lse.max() > 65504
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-3)
    # Scores near 1e5 are known to 0.01 in fp32, and probabilities no better than that.
    torch.testing.assert_close(mass.double(), weights.sum(2), atol=0.1, rtol=0.1)


@settings(max_examples=40, deadline=None)
@given(q_len=st.integers(1, 50), k_len=st.integers(1, 70), seed=st.integers(0, 999))
def test_mass_is_what_the_rows_gave_away(q_len, k_len, seed):
    q, k, v = random_qkv(1, 3, q_len, k_len, 16, seed=seed)
    weights = torch.rand(1, q_len, generator=torch.Generator().manual_seed(seed)).double()
    _, _, mass = attention_with_column_mass(q, k, v, query_weights=weights, backend="torch")
    total = weights.sum().expand(1, 3)
    torch.testing.assert_close(mass.sum(-1), total, atol=1e-12, rtol=1e-12)
    # A key that is shown twice shares its mass evenly.
    double = [torch.cat([x, x[:, :, :1]], 2) for x in (k, v)]
    _, _, both = attention_with_column_mass(q, *double, backend="torch")
    torch.testing.assert_close(both[..., 0], both[..., -1], atol=1e-12, rtol=0)


def test_no_block_of_scores_is_larger_than_promised(monkeypatch):
    """With 3000 x 3000 pairs and 8 heads, what is held at once stays at two million scores."""
    seen = []
    stock = _row_blocks.Workspace.scores

    def watched(*args):
        scores = stock(*args)
        seen.append(scores.numel())
        return scores

    monkeypatch.setattr(_row_blocks.Workspace, "scores", watched)
    q, k, v = random_qkv(1, 8, 3000, 3000, 16, dtype=torch.float32)
    _, _, mass = attention_with_column_mass(q, k, v, backend="torch")
    assert sum(seen) == 8 * 3000 * 3000 and max(seen) <= 1 << 21
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 8), 3000.0))


@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_grows_with_both_lengths(backward):
    """Whatever torch makes on the way is as large as a block of scores, or as q; the op itself hides it."""
    for n in (2048, 4096):
        q, k, v = random_qkv(1, 4, n, n, 16, kv_heads=2, dtype=torch.float32)
        rest = (None, None, True, 0.25)
        with Largest() as watch:
            out, lse, mass = plain.forward(q, k, v, *rest)
            if backward:
                plain.backward(out, lse, mass, q, k, v, lse, *rest)
        assert q.numel() <= watch.numbers <= max(q.numel(), _row_blocks._SCORES) < n * n


def test_decoding_copies_no_key():
    """One row of 32 heads over 8 key heads: nothing as large as keys of every query head is made."""
    q, k, v = random_qkv(1, 32, 1, 512, 64, kv_heads=8, dtype=torch.float32)
    with Largest() as watch:
        plain.forward(q, k, v, None, None, False, 0.125)
    assert 32 * 512 <= watch.numbers <= k.numel()


def test_many_small_heads_run_together(monkeypatch, path):
    calls = []
    stock = _row_blocks.Workspace.scores
    monkeypatch.setattr(
        _row_blocks.Workspace, "scores", lambda *args: calls.append(1) or stock(*args)
    )
    q, k, v = random_qkv(1, 16, 50, 50, 16, kv_heads=4, dtype=torch.float64)
    out, lse, mass = attention_with_column_mass(q, k, v, backend="torch")
    assert len(calls) == (1 if path == "blocks" else 0)
    want = dense(q, k, v)
    check((out, lse, mass), (want[0], want[1], want[2].sum(2)), 1e-11)


def test_strides_do_not_matter():
    q, k, v = random_qkv(2, 2, 40, 40, 32, dtype=torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mask = torch.randn(40, 2, 40).permute(1, 0, 2)[None]
    for backend in ("torch", "triton"):
        got = attention_with_column_mass(*strided, mask=mask, backend=backend)
        check(got, attention_with_column_mass(q, k, v, mask=mask.contiguous(), backend=backend), 0)


def test_opcheck_and_compile():
    qkv, given, _, _ = make((1, 2, 1, 24, 20, 16), torch.float32, "everything")
    arguments = (given["mask"], given["query_weights"], True, 0.25, "torch")
    torch.library.opcheck(torch.ops.mmattn.attention_with_column_mass.default, (*qkv, *arguments))

    def step(q, k, v):
        return attention_with_column_mass(q * 2, k, v, is_causal=True)

    for dynamic in (False, True):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        check(compiled(*qkv), step(*qkv), 1e-6)
        check(
            gradients(loss_of(*compiled(*qkv)), *qkv), gradients(loss_of(*step(*qkv)), *qkv), 1e-5
        )


def test_wrong_inputs_are_named():
    q, k, v = random_qkv(1, 2, 8, 9, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mask \[8, 9\] must be"):
        attention_with_column_mass(q, k, v, mask=torch.zeros(8, 9))
    with pytest.raises(ValueError, match=r"\[1, 2, 8, 9\]"):
        attention_with_column_mass(q, k, v, mask=torch.zeros(1, 1, 7, 9))
    with pytest.raises(TypeError, match="asks for a gradient"):
        attention_with_column_mass(q, k, v, mask=torch.zeros(1, 1, 8, 9, requires_grad=True))
    with pytest.raises(ValueError, match="query_weights must be"):
        attention_with_column_mass(q, k, v, query_weights=torch.ones(1, 7))
    with pytest.raises(ValueError, match="not be negative"):
        attention_with_column_mass(q, k, v, query_weights=-torch.ones(1, 8))
