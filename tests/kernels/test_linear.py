"""`linear_attention`: every back end against the quadratic form that it is a rearrangement of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mmattn_kernels import linear_apply, linear_attention, linear_state
from oracles import gradients, loss_of, random_qkv

MAPS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "cubed_relu": lambda x: F.relu(x) ** 3,
    "elu1": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}
SHAPES = [(2, 4, 2, 37, 53, 16), (1, 2, 2, 63, 111, 40), (1, 1, 1, 1, 2, 16), (1, 2, 1, 33, 17, 72)]


def tables(n, d):
    angles = torch.linspace(0.1, 2.0, d // 2, dtype=torch.float64) * torch.arange(n)[:, None]
    return angles.cos(), angles.sin()


def turn(x, rope):
    if rope is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(*rope)).flatten(-2)


def quadratic(
    q, k, v, feature_map, normalizer, *, rope_q=None, rope_k=None, keep=None, scale=1.0, eps=1e-15
):
    """The Q x K form in fp64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        q.double(),
        k.double().repeat_interleave(group, 1),
        v.double().repeat_interleave(group, 1),
    )
    f = MAPS[feature_map]
    keep = torch.ones(q.shape[0], k.shape[2]) if keep is None else keep
    keep = keep.double()[:, None, None]
    n = keep.sum(-1, keepdim=True)
    weights = scale * (turn(f(q), rope_q) @ turn(f(k), rope_k).transpose(2, 3)) * keep
    mass = scale * ((f(q) @ f(k).transpose(2, 3)) * keep).sum(-1, keepdim=True)
    row, mean = weights @ v, (keep @ v) / n
    return {
        "sum": lambda: row / (mass + eps),
        "mean": lambda: (row / n) / (mass / n + eps),
        "count": lambda: row / n,
        "none": lambda: row,
        "mala": lambda: row / n * (1 + 1 / (mass / n + eps)) - mass / n * mean,
        "mala_paper": lambda: row * (1 + 1 / (mass + eps)) - mass * mean,
    }[normalizer]()


def make(shape, dtype, grad=True):
    b, h, kv, q_len, k_len, d = shape
    return random_qkv(b, h, q_len, k_len, d, kv_heads=kv, dtype=dtype, grad=grad)


def check(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


def compare(qkv, backend, tolerance, feature_map, normalizer, **given):
    oracle = dict(given)
    if "rope" in given:
        cos_q, sin_q, cos_k, sin_k = oracle.pop("rope")
        oracle |= {"rope_q": (cos_q, sin_q), "rope_k": (cos_k, sin_k)}
    if "key_mask" in given:
        oracle["keep"] = oracle.pop("key_mask")
    settings_ = {"feature_map": feature_map, "normalizer": normalizer}
    got = linear_attention(*qkv, **settings_, **given, backend=backend)
    want = quadratic(*qkv, feature_map, normalizer, **oracle)
    check((got, *gradients(loss_of(got), *qkv)), (want, *gradients(loss_of(want), *qkv)), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("feature_map", [name for name in MAPS if name != "identity"])
def test_torch_equals_the_quadratic_form(shape, feature_map, poisoned):
    # With two keys a rectified query may have no weight at all, which is tested below.
    feature_map = "exp" if feature_map.endswith("relu") and shape[4] == 2 else feature_map
    compare(make(shape, torch.float64), "torch", 1e-7, feature_map, "sum")


@pytest.mark.parametrize("normalizer", ["mean", "count", "none", "mala", "mala_paper"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_normalisers(normalizer, backend):
    compare(make(SHAPES[0], torch.float64), backend, 1e-9, "elu1", normalizer, scale=0.3, eps=1e-3)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_rope_and_padding(backend, poisoned):
    shape = (2, 4, 2, 21, 33, 16)
    exact = backend != "triton"
    qkv = make(shape, torch.float64 if exact else torch.float32)
    keep = torch.ones(2, 33, dtype=torch.bool)
    keep[1, 20:] = False
    rope = (*tables(21, 16), *tables(33, 16))
    compare(qkv, backend, 1e-9 if exact else 2e-4, "elu1", "sum", rope=rope, key_mask=keep)


@pytest.mark.parametrize("feature_map", ["relu", "elu1", "softmax", "identity"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_triton_equals_the_quadratic_form(shape, feature_map, poisoned):
    normalizer = "count" if feature_map == "identity" else "mean"
    compare(make(shape, torch.float32), "triton", 5e-4, feature_map, normalizer, eps=1e-2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_products_in_half_precision(backend, dtype):
    qkv = make((1, 2, 1, 40, 64, 32), dtype, grad=False)
    got = linear_attention(*qkv, feature_map="elu1", normalizer="sum", backend=backend)
    want = quadratic(*qkv, "elu1", "sum")
    q, k, v = qkv[0], *(x.repeat_interleave(2, 1) for x in qkv[1:])
    f = MAPS["elu1"]
    weights = f(q) @ f(k).transpose(2, 3)
    theirs = (weights @ v) / weights.sum(-1, keepdim=True)
    error = float((got.double() - want).abs().max())
    assert error <= 2 * float((theirs.double() - want).abs().max())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_beyond_the_range_of_fp16(backend):
    q, k, v = make((1, 1, 1, 16, 200, 16), torch.float16, grad=False)
    k = k.abs() * 1000
    assert float(k.double().sum(2).max()) > 65504
    got = linear_attention(q.abs(), k, v, feature_map="relu", normalizer="sum", backend=backend)
    want = quadratic(q.abs(), k, v, "relu", "sum")
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_no_weight_and_no_keys_give_zero(backend, poisoned):
    q, k, v = make((2, 1, 1, 8, 8, 16), torch.float32)
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1] = False
    poisoned_k = torch.where(keep[:, None, :, None], k, torch.nan)
    out = linear_attention(
        -q.abs(),
        poisoned_k,
        v,
        feature_map="relu",
        normalizer="sum",
        key_mask=keep,
        backend=backend,
    )
    assert (out == 0).all()
    out = linear_attention(
        q, poisoned_k, v, feature_map="elu1", normalizer="sum", key_mask=keep, backend=backend
    )
    assert (out[1] == 0).all() and torch.isfinite(out).all() and (out[0] != 0).all()


@settings(max_examples=30, deadline=None)
@given(q_len=st.integers(1, 40), k_len=st.integers(1, 60), seed=st.integers(0, 999))
def test_invariants(q_len, k_len, seed):
    q, k, v = random_qkv(1, 2, q_len, k_len, 16, seed=seed)
    given_ = {"feature_map": "elu1", "normalizer": "sum", "backend": "torch"}
    want = linear_attention(q, k, v, **given_)
    order = torch.randperm(k_len)
    got = linear_attention(q, k[:, :, order], v[:, :, order], **given_)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(linear_attention(q, k, 3 * v, **given_), 3 * want)
    # A weighted mean of values stays among them.
    assert (want <= v.amax(2, keepdim=True) + 1e-9).all()
    # The state of all keys is the sum of the states of the parts.
    cut = k_len // 2
    if cut:
        parts = [
            linear_state(k[:, :, s], v[:, :, s], feature_map="elu1")
            for s in (slice(cut), slice(cut, None))
        ]
        got = linear_apply(q, parts[0] + parts[1], feature_map="elu1")
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_a_function_as_feature_map():
    q, k, v = make(SHAPES[0], torch.float64, grad=False)
    got = linear_attention(q, k, v, feature_map=MAPS["elu1"], normalizer="sum")
    torch.testing.assert_close(got, linear_attention(q, k, v, feature_map="elu1", normalizer="sum"))


def test_opcheck_and_compile():
    qkv = make((1, 2, 1, 12, 20, 16), torch.float32)
    _, k, v = qkv
    torch.library.opcheck(
        torch.ops.mmattn.linear_state.default, (k, v, None, None, None, "elu1", "torch")
    )

    def step(q, k, v):
        return linear_attention(q * 2, k, v, feature_map="elu1", normalizer="sum")

    for dynamic in (False, True):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(*qkv), step(*qkv))
        check(gradients(loss_of(compiled(*qkv)), *qkv), gradients(loss_of(step(*qkv)), *qkv), 1e-4)


def test_wrong_inputs_are_named():
    q, k, v = make((1, 2, 1, 12, 20, 16), torch.float32, grad=False)
    with pytest.raises(ValueError, match="'gelu'"):
        linear_attention(q, k, v, feature_map="gelu", normalizer="sum")
    with pytest.raises(ValueError, match="'l2'"):
        linear_attention(q, k, v, feature_map="relu", normalizer="l2")
    with pytest.raises(TypeError, match="one dtype"):
        linear_attention(q.half(), k, v, feature_map="relu")
    with pytest.raises(ValueError, match="linear_state"):
        linear_attention(q, k[:, :, 1:], v, feature_map="relu")
    with pytest.raises(TypeError, match="bool"):
        linear_attention(q, k, v, feature_map="relu", key_mask=torch.ones(1, 20))
