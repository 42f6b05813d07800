"""The op `mmattn::attention_with_column_mass`: its back ends, registration and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels._masking import check_mask
from mmattn_kernels.column_mass import reference, torch as plain


def _triton_forward(*args: Any) -> Any:
    from mmattn_kernels.column_mass import triton

    return triton.forward(*args)


OP = Op(
    "attention_with_column_mass",
    Backend("triton", _backends.no_triton, _triton_forward),
    Backend("torch", _backends.always, plain.forward, plain.backward),
    Backend("reference", _backends.always, reference.forward, reference.backward, automatic=False),
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = OP.choose(backend, Problem.of(q, k, v)).forward
    out, lse, mass = run(q, k, v, mask, query_weights, is_causal, scale)
    return out, lse, mass


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    work = state_dtype(q)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=work),
        q.new_empty((*q.shape[:2], k.shape[2]), dtype=work),
    )


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = OP.choose_backward(backend, Problem.of(q, k, v))
    grads = (grad_out, grad_lse, grad_mass)
    dq, dk, dv, dw = run(*grads, q, k, v, mask, query_weights, is_causal, scale)
    return dq, dk, dv, dw


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(q.shape[:3], dtype=state_dtype(q)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, query_weights, *ctx.rest = inputs
    ctx.weighted = query_weights is not None
    ctx.save_for_backward(q, k, v, mask, query_weights)


def _backward(
    ctx: Any, grad_out: Tensor, grad_lse: Tensor, grad_mass: Tensor
) -> tuple[Tensor | None, ...]:
    grads = _OP_BACKWARD(grad_out, grad_lse, grad_mass, *ctx.saved_tensors, *ctx.rest)
    dq, dk, dv, dw = grads
    return dq, dk, dv, None, dw if ctx.weighted else None, None, None, None


_REST = "Tensor? mask, Tensor? query_weights, bool is_causal, float scale, str backend"
_OP_BACKWARD = _library.define(
    "attention_with_column_mass_backward(Tensor grad_out, Tensor grad_lse, Tensor grad_mass, Tensor q, "
    f"Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_OP = _library.define(
    f"attention_with_column_mass(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    setup=_setup,
    backward=_backward,
)


def attention_with_column_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    query_weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that also sums the probability every key received: ``mass_j = sum_i w_i P_ij``.

    Methods that rank tokens by the attention they draw (FastV, arXiv 2403.06764; SnapKV, arXiv
    2404.14469; HiPrune, arXiv 2508.00553) need the masses alone, not the Q x K matrix; here it is never
    stored, and memory grows with Q + K.

    Args:
        q: queries ``[B, H, Q, D]``, any strides.
        k, v: keys and values ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        mask: bool (True: visible) or added to the scores, ``[B|1, H|1, Q|1, K]``; it has no gradient.
        is_causal: query i sees keys j <= i + K - Q, that is, the last query sees every key. (torch SDPA
            aligns the other corner, j <= i, which differs when Q != K.)
        scale: factor of the scores; None: ``D ** -0.5``.
        query_weights: how much each query counts in the masses, ``[B, Q]`` or ``[B, H, Q]``, of any sign;
            None: 1. A query of weight 0 adds nothing, and on a GPU blocks of such queries cost nothing.
        backend: ``auto``, ``triton`` (GPU; no atomics, the same bits every time), ``torch`` (the CPU
            path) or ``reference`` (loops).

    Returns:
        Output ``[B, H, Q, D]``; natural-log LSE ``[B, H, Q]`` and masses ``[B, H, K]`` in fp32 (fp64 for
        fp64 inputs). All are differentiable in q, k, v, and the masses in `query_weights`. A row without
        keys gives 0 and -inf, and adds to no mass.

    Raises:
        ValueError: shapes that do not fit, or a mask that wants a gradient.
        TypeError: dtypes that differ or do not fit.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    name = "attention_with_column_mass"
    check_qkv(name, q, k, v)
    check_mask(name, q, k, mask)
    if query_weights is not None:
        query_weights = _weights_of(name, q, query_weights)
    out, lse, mass = _OP(q, k, v, mask, query_weights, bool(is_causal), scale_of(q, scale), backend)
    return out, lse, mass


def _weights_of(op: str, q: Tensor, weights: Tensor) -> Tensor:
    """Query weights as ``[B, H, Q]`` in the dtype of the masses."""
    b, h, q_len, _ = q.shape
    if weights.is_complex():
        raise TypeError(f"{op}: query_weights have dtype {weights.dtype}; real numbers are needed.")
    if weights.device != q.device:
        raise ValueError(f"{op}: query_weights are on {weights.device}, the queries on {q.device}.")
    if tuple(weights.shape) == (b, q_len):
        weights = weights[:, None]
    elif tuple(weights.shape) != (b, h, q_len):
        raise ValueError(
            f"{op}: query_weights have shape {list(weights.shape)}; [{b}, {q_len}] or "
            f"[{b}, {h}, {q_len}] is needed."
        )
    return weights.to(state_dtype(q)).expand(b, h, q_len).contiguous()
