"""`grouped_attention`: re-weighted probabilities against the dense formula, with their gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmattn_kernels import BackendUnavailable, _row_blocks, grouped_attention
from mmattn_kernels.grouped import torch as plain
from oracles import dense, gradients, loss_of, random_qkv, sdpa_error

SHAPES = [
    # B, H, Hkv, Q, K, D
    (2, 4, 2, 37, 53, 32),
    (1, 2, 2, 63, 63, 72),
    (2, 2, 1, 1, 64, 16),
    (1, 2, 2, 33, 111, 96),
]


@pytest.fixture(autouse=True, params=["whole", "blocks"])
def path(request, monkeypatch):
    """Small problems take one product for the whole batch; both ways must give the same."""
    if request.param == "blocks":
        monkeypatch.setattr(plain, "is_small", lambda q, k: False)
    return request.param


def var(masses):
    """As VAR: most of the sink's probability goes to the others, in proportion to what they have."""
    sink, rest = masses[..., :1], masses[..., 1:]
    gain = 1 + 0.6 * sink / rest.sum(-1, keepdim=True).clamp(min=1e-6)
    return torch.cat([torch.full_like(sink, 0.4), gain.expand_as(rest)], -1)


def normalised(masses):
    """As ZeroTuning: a group counts more, and the row is made to sum to 1 again."""
    factors = torch.ones(masses.shape[-1], dtype=masses.dtype)
    factors[0] = 2.5
    return factors / (factors * masses).sum(-1, keepdim=True).clamp(min=1e-6)


def fixed(masses):
    """As ACT: a constant per group, the same for every row."""
    return torch.linspace(-0.5, 1.5, masses.shape[-1], dtype=masses.dtype)


def make(shape, dtype, kind, *, groups=3, grad=True):
    b, h, kv, q_len, k_len, d = shape
    q, k, v = random_qkv(b, h, q_len, k_len, d, kv_heads=kv, dtype=dtype, grad=grad)
    draw = torch.Generator().manual_seed(4)
    names = torch.randint(groups, (b, k_len), generator=draw)
    names[:, :groups] = torch.arange(groups)
    given: dict = {}
    bias = torch.zeros(b, h, q_len, k_len, dtype=torch.float64)
    if kind in ("padded", "everything"):
        names[-1, groups + 1 :: 4] = -1
        bias = bias.masked_fill((names < 0)[:, None, None], float("-inf"))
    if kind in ("causal", "everything"):
        given["is_causal"] = True
        late = torch.arange(k_len) > (torch.arange(q_len)[:, None] + k_len - q_len)
        bias = bias.masked_fill(late, float("-inf"))
    if kind == "everything":
        given["mask"] = torch.rand(b, 1, q_len, k_len, generator=draw) < 0.7
        bias = bias.masked_fill(~given["mask"], float("-inf"))
    return (q, k, v), names, given, bias


def exact(qkv, names, bias, coefficients, groups=3):
    q, k, v = (x.double() for x in qkv)
    _, _, weights = dense(q, k, v, bias)
    members = F.one_hot(names.clamp(min=0), groups).double() * (names >= 0)[..., None]
    masses = weights @ members[:, None]
    factors = coefficients(masses).expand(masses.shape) @ members[:, None].transpose(2, 3)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights * factors) @ values, masses


def check(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("coefficients", [var, normalised, fixed])
@pytest.mark.parametrize("kind", ["plain", "causal", "padded", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_the_dense_formula(shape, kind, coefficients, poisoned):
    qkv, names, given, bias = make(shape, torch.float64, kind)
    got = grouped_attention(*qkv, names, coefficients, **given, return_masses=True, backend="torch")
    want = exact(qkv, names, bias, coefficients)
    check(got, want, 1e-10)
    assert not torch.allclose(want[0], dense(*qkv, bias)[0], atol=1e-3)
    check(gradients(loss_of(*got), *qkv), gradients(loss_of(*want), *qkv), 1e-9)


@pytest.mark.parametrize("runs", [0, 64])
@pytest.mark.parametrize("scores", [1, 300, 2000])
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 53, 16), (1, 6, 2, 53, 37, 16)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "everything"])
def test_many_parts_are_as_one(shape, kind, scores, runs, monkeypatch, poisoned):
    """Cuts between rows, key heads and keys; multiplied run by run, or by a product with the members."""
    monkeypatch.setattr(_row_blocks, "_SCORES", scores)
    monkeypatch.setattr(_row_blocks, "_LEAST_ROWS", 1)
    monkeypatch.setattr(_row_blocks, "_CAUSAL_ROWS", 9)
    monkeypatch.setattr("mmattn_kernels.grouped.torch._MOST_RUNS", runs)
    qkv, names, given, bias = make(shape, torch.float64, kind)
    got = grouped_attention(*qkv, names, var, **given, return_masses=True, backend="torch")
    want = exact(qkv, names, bias, var)
    check(got, want, 1e-10)
    check(gradients(loss_of(*got), *qkv), gradients(loss_of(*want), *qkv), 1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand_tokens_in_three_runs(causal):
    (q, k, v), _, given, bias = make(
        (1, 2, 1, 1000, 1000, 32), torch.float32, "causal" if causal else "plain", grad=False
    )
    names = torch.full((1, 1000), 2)
    names[:, :40], names[:, 40:616], names[:, 990:] = 0, 1, -1
    bias = bias.masked_fill((names < 0)[:, None, None], float("-inf"))
    got = grouped_attention(q, k, v, names, var, **given, return_masses=True, backend="torch")
    check(got, exact((q, k, v), names, bias, var), 2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_no_keys(backend, poisoned):
    q, k, v = random_qkv(1, 2, 3, 0, 16, dtype=torch.float32)
    names = torch.zeros(1, 0, dtype=torch.int64)
    out, masses = grouped_attention(
        q, k, v, names, torch.ones_like, num_groups=2, return_masses=True, backend=backend
    )
    assert (out == 0).all() and (masses == 0).all() and masses.shape == (1, 2, 3, 2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_small_probabilities_in_fp16(backend):
    """A sink leaves about 1e-5 to each key, below the normal numbers of fp16, which start at 6e-5."""
    q, k, v = random_qkv(1, 1, 16, 512, 16, dtype=torch.float64)
    q[..., 0], k[..., 0], k[:, :, 0] = 4.0, 0.0, 0.0
    k[:, :, 0, 0], v[:, :, 0], v[:, :, 1:] = 12.0, 0.0, 30 * v[:, :, 1:]
    q, k, v = q.half(), k.half(), v.half()
    names = torch.zeros(1, 512, dtype=torch.int64)
    out = grouped_attention(q, k, v, names, torch.ones_like, num_groups=1, backend=backend)
    want, _, weights = dense(q, k, v)
    assert 1e-7 < weights[..., 1:].median() < 3e-5
    error = (out.double() - want).norm() / want.norm()
    assert error <= 2**-11


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_loops_agree(kind):
    qkv, names, given, bias = make((2, 2, 1, 9, 17, 16), torch.float64, kind)
    got = grouped_attention(*qkv, names, var, **given, return_masses=True, backend="reference")
    check(got, exact(qkv, names, bias, var), 1e-11)


@pytest.mark.parametrize("kind", ["plain", "causal", "padded", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_dense_formula(shape, kind, poisoned):
    qkv, names, given, bias = make(shape, torch.float32, kind)
    got = grouped_attention(*qkv, names, var, **given, return_masses=True, backend="triton")
    want = exact(qkv, names, bias, var)
    check(got, want, 2e-5)
    check(gradients(loss_of(*got), *qkv), gradients(loss_of(*want), *qkv), 1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_eight_groups_and_more(backend):
    for groups in (8, 9):
        qkv, names, _, bias = make((1, 2, 2, 20, 40, 16), torch.float32, "plain", groups=groups)
        if backend == "triton" and groups == 9:
            with pytest.raises(BackendUnavailable, match="9 groups are more than 8"):
                grouped_attention(*qkv, names, fixed, backend=backend)
            continue
        got = grouped_attention(*qkv, names, fixed, return_masses=True, backend=backend)
        check(got, exact(qkv, names, bias, fixed, groups), 2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_sdpa(backend, dtype):
    qkv, names, _, bias = make((1, 2, 1, 64, 80, 64), dtype, "plain", grad=False)
    out = grouped_attention(*qkv, names, torch.ones_like, backend=backend)
    assert float((out.double() - dense(*qkv)[0]).abs().max()) <= 2 * sdpa_error(*qkv)
    out = grouped_attention(*qkv, names, var, backend=backend)
    error = float((out.double() - exact(qkv, names, bias, var)[0]).abs().max())
    assert error <= 3 * sdpa_error(*qkv)  # multipliers here reach 1.5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ones_are_plain_attention_and_masses_sum_to_one(backend):
    (q, k, v), names, _, _ = make(SHAPES[0], torch.float32, "plain", grad=False)
    out, masses = grouped_attention(
        q, k, v, names, torch.ones_like, return_masses=True, backend=backend
    )
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=0)
    torch.testing.assert_close(masses.sum(-1), torch.ones(masses.shape[:3]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_without_keys_are_zero(backend, poisoned):
    q, k, v = random_qkv(2, 2, 12, 20, 16, dtype=torch.float32, grad=True)
    names = torch.zeros(2, 20, dtype=torch.int64)
    names[1] = -1
    out, masses = grouped_attention(
        q, k, v, names, lambda m: m + 1, return_masses=True, backend=backend
    )
    assert (out[1] == 0).all() and (masses[1] == 0).all() and (masses[0] != 0).all()
    for grad in gradients(loss_of(out, masses), q, k, v):
        assert torch.isfinite(grad).all() and (grad[1] == 0).all() and (grad[0] != 0).any()


def test_decoding_one_row_equals_the_last_row_of_prefill():
    (q, k, v), names, _, _ = make((2, 4, 2, 40, 40, 32), torch.float32, "padded", grad=False)
    whole = grouped_attention(q, k, v, names, var, is_causal=True)
    last = grouped_attention(q[:, :, -1:], k, v, names, var, is_causal=True)
    torch.testing.assert_close(last, whole[:, :, -1:], atol=1e-6, rtol=0)


def test_opcheck():
    (q, k, v), names, given, _ = make((1, 2, 1, 12, 20, 16), torch.float32, "everything")
    rest = (True, 0.25, "torch")
    mask = given["mask"]
    torch.library.opcheck(torch.ops.mmattn.group_masses.default, (q, k, names, mask, 3, *rest))
    lse, masses = torch.ops.mmattn.group_masses(q, k, names, mask, 3, *rest)
    factors, lse = masses.detach().requires_grad_(), lse.detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.mmattn.grouped_apply.default, (q, k, v, factors, lse, names, mask, *rest)
    )


def test_compiles_without_graph_breaks():
    qkv, names, _, _ = make((1, 2, 1, 24, 20, 16), torch.float32, "plain")

    def step(q, k, v):
        return grouped_attention(q * 2, k, v, names, var, num_groups=3)

    for dynamic in (False, True):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(*qkv), step(*qkv))
        check(gradients(loss_of(compiled(*qkv)), *qkv), gradients(loss_of(step(*qkv)), *qkv), 1e-5)


def test_wrong_inputs_are_named():
    (q, k, v), names, _, _ = make((1, 2, 1, 8, 20, 16), torch.float32, "plain")
    with pytest.raises(TypeError, match="groups must be integers"):
        grouped_attention(q, k, v, names.float(), var)
    with pytest.raises(ValueError, match=r"must be \[B, K\] = \[1, 20\]"):
        grouped_attention(q, k, v, names[:, 1:], var)
    with pytest.raises(ValueError, match="go up to 2, but num_groups is 2"):
        grouped_attention(q, k, v, names, var, num_groups=2)
    with pytest.raises(ValueError, match="there is no group"):
        grouped_attention(q, k, v, torch.full_like(names, -1), var)
    with pytest.raises(ValueError, match="do not broadcast to the masses"):
        grouped_attention(q, k, v, names, lambda m: torch.ones(2, 1, 1, 3))
