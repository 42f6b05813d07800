"""The op `mmattn::block_sparse_attention`: its back ends, registration and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels.block_sparse import flex, reference, torch as plain
from mmattn_kernels.block_sparse.lists import BlockLists


def _triton_forward(*args: Any) -> Any:
    from mmattn_kernels.block_sparse import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from mmattn_kernels.block_sparse import triton

    return triton.backward(*args)


OP = Op(
    "block_sparse_attention",
    Backend("triton", _backends.no_triton, _triton_forward, _triton_backward),
    Backend("torch", _backends.always, plain.forward, plain.backward),
    Backend("flex", flex.can_run, flex.forward, automatic=False),
    Backend("reference", _backends.always, reference.forward, reference.backward, automatic=False),
)


def _problem(q: Tensor, k: Tensor, v: Tensor, patterns: Tensor | None) -> Problem:
    return Problem.of(q, k, v, patterns=patterns is not None)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lists = (counts, indices, patterns, pattern_of, q_block, k_block, scale)
    chosen = OP.choose(backend, _problem(q, k, v, patterns))
    out, lse = chosen.forward(q, k, v, *lists)
    return out, lse


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=state_dtype(q))


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    patterns: Tensor | None,
    pattern_of: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = (counts, indices, patterns, pattern_of, q_block, k_block, scale)
    run = OP.choose_backward(backend, _problem(q, k, v, patterns))
    dq, dk, dv = run(grad_out, grad_lse, q, k, v, out, lse, *lists)
    return dq, dk, dv


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, indices, patterns, pattern_of, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, counts, indices, patterns, pattern_of)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = _OP_BACKWARD(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 8)


_LISTS = (
    "Tensor counts, Tensor indices, Tensor? patterns, Tensor? pattern_of, int q_block, int k_block, "
    "float scale, str backend"
)
_OP_BACKWARD = _library.define(
    "block_sparse_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_LISTS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_OP = _library.define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_LISTS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    setup=_setup,
    backward=_backward,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which a block of queries sees the blocks of keys on its list.

    Args:
        q: queries ``[B, H, Q, D]``, any strides.
        k, v: keys and values ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        lists: `BlockLists` for Q and K, for one or every batch item and one or every head.
        scale: factor of the scores; None: ``D ** -0.5``.
        return_lse: also return the log-sum-exp of every row.
        backend: ``auto``, ``triton`` (GPU), ``torch`` (gathers blocks; the CPU path), ``flex``
            (FlexAttention) or ``reference`` (loops).

    Returns:
        Output ``[B, H, Q, D]``, and with `return_lse` the natural-log LSE ``[B, H, Q]`` in fp32 (fp64 for
        fp64 inputs). Both are differentiable. A row without keys gives 0 and -inf.

    Raises:
        ValueError: shapes or lists that do not fit.
        TypeError: dtypes that differ.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    check_qkv("block_sparse_attention", q, k, v)
    check_lists("block_sparse_attention", q, k, lists)
    out, lse = _OP(
        q,
        k,
        v,
        lists.counts,
        lists.indices,
        lists.patterns,
        lists.pattern_of,
        lists.q_block,
        lists.k_block,
        scale_of(q, scale),
        backend,
    )
    return (out, lse) if return_lse else out


def check_lists(op: str, q: Tensor, k: Tensor, lists: BlockLists) -> None:
    """Check that lists belong to these queries and keys.

    Raises:
        ValueError: other lengths, batch or heads that do not broadcast, another device.
    """
    if (lists.q_len, lists.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"{op}: the lists are for {lists.q_len} queries and {lists.k_len} keys, the call has "
            f"{q.shape[2]} and {k.shape[2]}."
        )
    for axis, name in ((0, "batch items"), (1, "heads")):
        if lists.counts.shape[axis] not in (1, q.shape[axis]):
            raise ValueError(
                f"{op}: the lists are for {lists.counts.shape[axis]} {name}, the call has "
                f"{q.shape[axis]}; 1 would serve all."
            )
    if lists.counts.device != q.device:
        raise ValueError(
            f"{op}: the lists are on {lists.counts.device}, the queries on {q.device}."
        )
