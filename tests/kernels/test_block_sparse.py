"""`block_sparse_attention`: every back end against loops and dense attention, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from mmattn_kernels import BackendUnavailable, BlockLists, block_sparse_attention
from oracles import dense, gradients, loss_of, random_qkv, sdpa_error

SHAPES = [
    # B, H, Hkv, Q, K, D, q_block, k_block
    (2, 4, 2, 63, 111, 32, 16, 32),
    (1, 2, 2, 50, 50, 72, 16, 16),
    (1, 3, 1, 37, 5, 40, 7, 3),
    (1, 1, 1, 1, 2, 16, 16, 16),
    (2, 2, 2, 128, 64, 96, 64, 64),
    (1, 2, 1, 97, 83, 80, 48, 40),
]


def make_lists(
    shape: tuple[int, ...], kind: str, *, density: float = 0.45, seed: int = 1
) -> BlockLists:
    b, h, _, q_len, k_len, _, q_block, k_block = shape
    draw = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        mask = torch.rand(b, h, q_len, k_len, generator=draw) < density
        return BlockLists.from_token_mask(mask, q_block=q_block, k_block=k_block)
    lead = {"each": (b, h), "heads": (1, h), "items": (b, 1), "one": (1, 1)}[kind]
    blocks = (-(-q_len // q_block), -(-k_len // k_block))
    mask = torch.rand(*lead, *blocks, generator=draw) < density
    return BlockLists.from_mask(mask, q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, grad: bool = True):
    b, h, kv, q_len, k_len, d, _, _ = shape
    return random_qkv(b, h, q_len, k_len, d, kv_heads=kv, dtype=dtype, grad=grad)


def check(got, want, tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=tolerance, rtol=tolerance)


def run(q, k, v, lists, backend):
    out, lse = block_sparse_attention(q, k, v, lists, return_lse=True, backend=backend)
    return (out, lse, *gradients(loss_of(out, lse), q, k, v))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["each", "heads", "items", "one", "tokens"])
def test_torch_equals_loops_and_dense(shape, kind, poisoned):
    lists = make_lists(shape, kind)
    q, k, v = inputs(shape, torch.float64)
    got = run(q, k, v, lists, "torch")
    check(got, run(q, k, v, lists, "reference"), 1e-11)
    mask = lists.token_mask()
    assert not mask.all()
    out, lse, _ = dense(q, k, v, mask)
    check(got, (out, lse, *gradients(loss_of(out, lse), q, k, v)), 1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["each", "tokens"])
def test_triton_equals_torch(shape, kind, poisoned):
    lists = make_lists(shape, kind)
    q, k, v = inputs(shape, torch.float32)
    check(run(q, k, v, lists, "triton"), run(q, k, v, lists, "torch"), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_sdpa(backend, dtype):
    shape = (1, 2, 1, 96, 96, 64, 32, 32)
    lists = make_lists(shape, "each", density=0.6)
    q, k, v = inputs(shape, dtype, grad=False)
    mask = lists.token_mask()
    out = block_sparse_attention(q, k, v, lists, backend=backend)
    error = float((out.double() - dense(q, k, v, mask)[0]).abs().max())
    assert error <= 2 * sdpa_error(q, k, v, mask)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_in_half_precision_are_as_good_as_those_of_sdpa(backend):
    shape = (1, 2, 2, 64, 96, 32, 32, 32)
    lists = make_lists(shape, "each", density=0.7)
    q, k, v = inputs(shape, torch.float16)
    mask = lists.token_mask()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = gradients(loss_of(dense(*exact, mask)[0]), *exact)
    got = gradients(loss_of(block_sparse_attention(q, k, v, lists, backend=backend)), q, k, v)
    theirs = gradients(
        loss_of(torch.nan_to_num(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))), q, k, v
    )
    for g, t, w in zip(got, theirs, want, strict=True):
        kept = torch.isfinite(t)
        assert (g - w)[kept].abs().max() <= 2 * (t - w)[kept].abs().max()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_beyond_the_range_of_fp16(backend):
    """Scores near 1e5 overflow fp16, whose largest number is 65 504."""
    shape = (1, 1, 1, 32, 64, 32, 16, 16)
    lists = make_lists(shape, "one", density=0.7)
    q, k, v = inputs(shape, torch.float16, grad=False)
    q, k = q * 100, k * 100
    out, lse = block_sparse_attention(q, k, v, lists, scale=1.0, return_lse=True, backend=backend)
    want, want_lse, _ = dense(q, k, v, lists.token_mask(), scale=1.0)
    assert want_lse[torch.isfinite(want_lse)].max() > 65504
    torch.testing.assert_close(out.double(), want, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=1.0, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_rows_without_keys(backend, poisoned):
    q, k, v = random_qkv(1, 2, 40, 40, 16, dtype=torch.float32, grad=True)
    mask = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 2] = True
    lists = BlockLists.from_mask(mask, q_len=40, k_len=40, q_block=16, k_block=16)
    out, lse = block_sparse_attention(q, k, v, lists, return_lse=True, backend=backend)
    empty = torch.ones(1, 2, 40, dtype=torch.bool)
    empty[0, 0, 16:32] = False
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    assert torch.isfinite(lse[~empty]).all() and (out[~empty] != 0).any()
    dq, dk, dv = gradients(loss_of(out, lse), q, k, v)
    for grad in (dq, dk, dv):
        assert torch.isfinite(grad).all()
    assert (dq[empty] == 0).all() and (dq[~empty] != 0).any()
    assert (dk[:, 1] == 0).all() and (dv[0, 0, :32] == 0).all() and (dv[0, 0, 32:] != 0).any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend):
    shape = (2, 2, 2, 48, 48, 32, 16, 16)
    lists = make_lists(shape, "each")
    q, k, v = inputs(shape, torch.float32, grad=False)
    want = block_sparse_attention(q, k, v, lists, backend=backend)
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)  # [B, N, 3, H, D]
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert not views[0].is_contiguous()
    got = block_sparse_attention(*views, lists, backend=backend)
    assert torch.equal(got, want) and got.is_contiguous()
    odd = [F.pad(x, (1, 0))[..., 1:] for x in (q, k, v)]  # rows that start off 16 bytes
    assert torch.equal(block_sparse_attention(*odd, lists, backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_same_twice(backend):
    shape = SHAPES[2]
    q, k, v = inputs(shape, torch.float32)
    lists = make_lists(shape, "tokens")
    for first, second in zip(
        run(q, k, v, lists, backend), run(q, k, v, lists, backend), strict=True
    ):
        assert torch.equal(first, second)


def test_a_long_sequence_in_many_batches():
    """Lists of different lengths, a ragged tail, and more than one cache-sized batch of each."""
    shape = (1, 2, 1, 1000, 1000, 64, 32, 32)
    b, h, _, n, _, _, block, _ = shape
    draw = torch.Generator().manual_seed(5)
    mask = torch.rand(b, h, 32, 32, generator=draw) < torch.rand(b, h, 32, 1, generator=draw)
    lists = BlockLists.from_mask(mask, q_len=n, k_len=n, q_block=block, k_block=block)
    assert len(set(lists.counts.flatten().tolist())) > 10
    q, k, v = inputs(shape, torch.float32)
    out, lse, _ = dense(q, k, v, lists.token_mask())
    want = (out, lse, *gradients(loss_of(out, lse), q, k, v))
    check(run(q, k, v, lists, "torch"), want, 2e-5)


@settings(max_examples=40, deadline=None)
@given(
    q_len=st.integers(1, 70),
    k_len=st.integers(1, 70),
    q_block=st.integers(1, 33),
    k_block=st.integers(1, 33),
    seed=st.integers(0, 1000),
)
def test_everything_listed_is_dense_attention(q_len, k_len, q_block, k_block, seed):
    blocks = (1, 1, -(-q_len // q_block), -(-k_len // k_block))
    lists = BlockLists.from_mask(
        torch.ones(blocks, dtype=torch.bool),
        q_len=q_len,
        k_len=k_len,
        q_block=q_block,
        k_block=k_block,
    )
    assert float(lists.density()) == 1.0
    q, k, v = random_qkv(1, 2, q_len, k_len, 16, seed=seed)
    got = block_sparse_attention(q, k, v, lists, backend="torch")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    q_len=st.integers(1, 60),
    k_len=st.integers(1, 60),
    q_block=st.integers(1, 20),
    k_block=st.integers(1, 20),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_lists_say_what_the_mask_said(q_len, k_len, q_block, k_block, density, seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 1, q_len, k_len, generator=draw) < density
    lists = BlockLists.from_token_mask(mask, q_block=q_block, k_block=k_block)
    assert torch.equal(lists.token_mask(), mask)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in lists.counts.shape)).tolist():
        listed = lists.indices[tuple(at)][: int(lists.counts[tuple(at)])].tolist()
        assert listed == sorted(set(listed))
    assert float(lists.density()) >= float(mask.double().mean()) - 1e-12


def test_opcheck():
    q, k, v = random_qkv(1, 2, 40, 24, 16, dtype=torch.float32, grad=True)
    lists = make_lists((1, 2, 2, 40, 24, 16, 16, 16), "tokens")
    for given_lists in ((lists.patterns, lists.pattern_of), (None, None)):
        torch.library.opcheck(
            torch.ops.mmattn.block_sparse_attention.default,
            (q, k, v, lists.counts, lists.indices, *given_lists, 16, 16, 0.25, "torch"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    shape = (1, 2, 2, 48, 48, 32, 16, 16)
    lists = make_lists(shape, "each")

    def step(q, k, v):
        out, lse = block_sparse_attention(q * 2, k, v, lists, return_lse=True)
        return out + 1, lse

    q, k, v = inputs(shape, torch.float32)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for f, s in zip(compiled(q, k, v), step(q, k, v), strict=True):
        torch.testing.assert_close(f, s)
    got = gradients(loss_of(*compiled(q, k, v)), q, k, v)
    check(got, gradients(loss_of(*step(q, k, v)), q, k, v), 1e-5)


def test_lists_can_be_made_inside_a_graph():
    q, k, v = random_qkv(1, 2, 48, 48, 16, dtype=torch.float32)

    def step(q, k, v):
        pooled = q.unflatten(2, (3, 16)).mean(3) @ k.unflatten(2, (3, 16)).mean(3).transpose(2, 3)
        lists = BlockLists.from_mask(pooled > 0, q_len=48, k_len=48, q_block=16, k_block=16)
        return block_sparse_attention(q, k, v, lists)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v))


def test_back_ends_are_refused_with_reasons(monkeypatch):
    q, k, v = random_qkv(1, 1, 16, 16, 16, dtype=torch.float32)
    lists = make_lists((1, 1, 1, 16, 16, 16, 16, 16), "one", density=1.0)
    with pytest.raises(ValueError, match=r"no back end 'cuda'.*'torch'"):
        block_sparse_attention(q, k, v, lists, backend="cuda")
    with pytest.raises(BackendUnavailable, match="neither gradient nor LSE"):
        block_sparse_attention(q, k, v, lists, backend="flex")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="not on a CUDA device"):
        block_sparse_attention(q, k, v, lists, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": (16, 16)}, ValueError, "four axes"),
        ({"k": (1, 1, 16, 8)}, ValueError, "head_dim"),
        ({"v": (1, 1, 15, 16)}, ValueError, "not the same tokens"),
        ({"q": (1, 3, 16, 16), "k": (1, 2, 16, 16), "v": (1, 2, 16, 16)}, ValueError, "evenly"),
        ({"q": (1, 1, 17, 16)}, ValueError, "the lists are for 16 queries"),
        (
            {"q": (2, 1, 16, 16), "k": (2, 1, 16, 16), "v": (2, 1, 16, 16), "lists": (3, 1)},
            ValueError,
            "3 batch items",
        ),
    ],
)
def test_wrong_shapes_are_named(change, error, words):
    shapes = {name: change.get(name, (1, 1, 16, 16)) for name in "qkv"}
    q, k, v = (torch.randn(shape) for shape in shapes.values())
    mask = torch.ones(*change.get("lists", (1, 1)), 1, 1, dtype=torch.bool)
    lists = BlockLists.from_mask(mask, q_len=16, k_len=16, q_block=16, k_block=16)
    with pytest.raises(error, match=words):
        block_sparse_attention(q, k, v, lists)


def test_wrong_dtypes_and_lists_are_named():
    q = torch.randn(1, 1, 16, 16)
    common = {"q_len": 16, "k_len": 16, "q_block": 8, "k_block": 8}
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    lists = BlockLists.from_mask(mask, **common)
    with pytest.raises(TypeError, match="one floating dtype"):
        block_sparse_attention(q, q.half(), q, lists)
    with pytest.raises(TypeError, match="bool mask"):
        BlockLists.from_mask(mask.float(), **common)
    with pytest.raises(ValueError, match=r"\[B\|1, H\|1, 2, 2\]"):
        BlockLists.from_mask(mask[..., :1], **common)
    with pytest.raises(ValueError, match="must be positive"):
        BlockLists.from_mask(mask, **{**common, "q_block": 0})
    with pytest.raises(ValueError, match="give both"):
        BlockLists.from_mask(mask, **common, patterns=torch.ones(1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[P, 8, 8\]"):
        BlockLists.from_mask(
            mask,
            **common,
            patterns=torch.ones(1, 8, 7, dtype=torch.bool),
            pattern_of=torch.zeros(1, 1, 2, 2),
        )
