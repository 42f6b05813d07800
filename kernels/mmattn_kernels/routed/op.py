"""The op `mmattn::routed_attention`: its back ends, registration and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels.routed import reference, torch as plain


def _triton_forward(*args: Any) -> Any:
    from mmattn_kernels.routed import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from mmattn_kernels.routed import triton

    return triton.backward(*args)


OP = Op(
    "routed_attention",
    Backend("triton", _backends.no_triton, _triton_forward, _triton_backward),
    Backend("torch", _backends.always, plain.forward, plain.backward),
    Backend("reference", _backends.always, reference.forward, reference.backward, automatic=False),
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_ids: Tensor,
    selected: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = OP.choose(backend, Problem.of(q, k, v)).forward
    out, lse = run(q, k, v, chunk_ids, selected, scale)
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
    chunk_ids: Tensor,
    selected: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = OP.choose_backward(backend, Problem.of(q, k, v))
    dq, dk, dv = run(grad_out, grad_lse, q, k, v, out, lse, chunk_ids, selected, scale)
    return dq, dk, dv


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, chunk_ids, selected, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, chunk_ids, selected)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = _OP_BACKWARD(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 4)


_ROUTES = "Tensor chunk_ids, Tensor selected, float scale, str backend"
_OP_BACKWARD = _library.define(
    "routed_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_ROUTES}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_OP = _library.define(
    f"routed_attention(Tensor q, Tensor k, Tensor v, {_ROUTES}) -> (Tensor, Tensor)",
    _run,
    _fake,
    setup=_setup,
    backward=_backward,
)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_ids: Tensor,
    selected: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the union of the key chunks it selected.

    The form of MoBA (arXiv 2502.13189) and VMoBA (arXiv 2506.23858): selection is per query and head,
    chunks have any length, and the softmax is one over all selected keys. Nothing is routed by gradient.

    Args:
        q: queries ``[B, H, Q, D]``, any strides.
        k, v: keys and values ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        chunk_ids: integers ``[K]``: the chunk of every key, 0 .. C-1 in any order; -1 marks keys that
            every query sees, such as text.
        selected: bool ``[B, H, Q, C]``, True where a query selected a chunk.
        scale: factor of the scores; None: ``D ** -0.5``.
        return_lse: also return the log-sum-exp of every row.
        backend: ``auto``, ``triton`` (GPU), ``torch`` (gathers queries per chunk; the CPU path) or
            ``reference`` (loops). The cost of ``triton`` is the union over neighbouring queries.

    Returns:
        Output ``[B, H, Q, D]``, and with `return_lse` the natural-log LSE ``[B, H, Q]`` in fp32 (fp64 for
        fp64 inputs). Both are differentiable. A row without keys gives 0 and -inf.

    Raises:
        ValueError: shapes that do not fit, or (on a CPU, where it can be seen) a chunk that is not in
            `selected`.
        TypeError: dtypes that differ, `selected` not bool, or `chunk_ids` not integers.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    check_qkv("routed_attention", q, k, v)
    if selected.dtype != torch.bool:
        raise TypeError(f"routed_attention: selected must be bool, got {selected.dtype}.")
    if chunk_ids.is_floating_point() or chunk_ids.dtype == torch.bool:
        raise TypeError(f"routed_attention: chunk_ids must be integers, got {chunk_ids.dtype}.")
    if chunk_ids.shape != k.shape[2:3]:
        raise ValueError(
            f"routed_attention: chunk_ids {list(chunk_ids.shape)} must name a chunk for each of "
            f"{k.shape[2]} keys."
        )
    if selected.ndim != 4 or selected.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"routed_attention: selected {list(selected.shape)} must be [B, H, Q, C] for queries "
            f"{list(q.shape)}."
        )
    if chunk_ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(chunk_ids):
        low, high = int(chunk_ids.min()), int(chunk_ids.max())
        if low < -1 or high >= selected.shape[3]:
            raise ValueError(
                f"routed_attention: chunk_ids run from {low} to {high}, but selected knows chunks 0 to "
                f"{selected.shape[3] - 1} (and -1 for keys that everybody sees)."
            )
    out, lse = _OP(q, k, v, chunk_ids, selected, scale_of(q, scale), backend)
    return (out, lse) if return_lse else out
