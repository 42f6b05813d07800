"""The op `mmattn::attention_with_column_mass`: its back ends, registration and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels._row_blocks import check_masking
from mmattn_kernels.column_mass import reference, torch as plain


def _triton_forward(*args: Any) -> Any:
    from mmattn_kernels.column_mass import triton

    return triton.forward(*args)


OP = Op(
    "attention_with_column_mass",
    Backend("triton", _backends.no_triton, _triton_forward),
    Backend("torch", _backends.always, plain.forward, plain.backward),
    Backend("reference", _backends.always, reference.forward, automatic=False),
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
    lse: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = OP.choose_backward(backend, Problem.of(q, k, v))
    dq, dk, dv, dw = run(
        grad_out, grad_lse, grad_mass, q, k, v, lse, mask, query_weights, is_causal, scale
    )
    return dq, dk, dv, dw


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    query_weights: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[:3] if query_weights is not None else (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(rows, dtype=state_dtype(q)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, query_weights, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, output[1], mask, query_weights)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    query_weights = ctx.saved_tensors[5]
    dq, dk, dv, dw = _OP_BACKWARD(*grads, *ctx.saved_tensors, *ctx.rest)
    given = None if query_weights is None else dw.to(query_weights.dtype)
    return dq, dk, dv, None, given, None, None, None


_REST = "Tensor? mask, Tensor? query_weights, bool is_causal, float scale, str backend"
_OP_BACKWARD = _library.define(
    "attention_with_column_mass_backward(Tensor grad_out, Tensor grad_lse, Tensor grad_mass, Tensor q, "
    f"Tensor k, Tensor v, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
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
    """Softmax attention that also returns how much probability every key received.

    What token pruning needs from attention (HiPrune, FastV, VisionZip, SnapKV), without writing out the
    Q x K probabilities: memory is linear in the number of tokens.

    Args:
        q: queries ``[B, H, Q, D]``, any strides.
        k, v: keys and values ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        mask: ``[B|1, H|1, Q|1, K]``, bool (True: visible) or added to the scores.
        is_causal: query i sees the keys up to ``i + K - Q``, so that one decoded row sees them all.
        scale: factor of the scores; None: ``D ** -0.5``.
        query_weights: how much each query counts in the mass, ``[B, Q]`` or ``[B, H, Q]``, not negative;
            None: 1.
        backend: ``auto``, ``triton`` (GPU), ``torch`` (blocks of rows; the CPU path) or ``reference``.

    Returns:
        Output ``[B, H, Q, D]``; LSE ``[B, H, Q]`` and mass ``[B, H, K]`` in fp32 (fp64 for fp64 inputs):
        ``mass_j = sum_i w_i P_ij``. All are differentiable. A row without keys gives 0, -inf and no mass.

    Raises:
        ValueError: shapes that do not fit, or (on a CPU, where it can be seen) a negative weight.
        TypeError: dtypes that differ, or a mask that asks for a gradient.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    name = "attention_with_column_mass"
    check_qkv(name, q, k, v)
    check_masking(name, q, k, mask)
    if query_weights is not None:
        if query_weights.ndim == 2:
            query_weights = query_weights[:, None].expand(-1, q.shape[1], -1)
        if query_weights.shape != q.shape[:3]:
            raise ValueError(
                f"{name}: query_weights must be [B, Q] or [B, H, Q] for queries {list(q.shape)}, got "
                f"{list(query_weights.shape)}."
            )
        on_cpu = query_weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and bool((query_weights < 0).any()):
            raise ValueError(f"{name}: query_weights must not be negative.")
    out: tuple[Tensor, Tensor, Tensor] = _OP(
        q, k, v, mask, query_weights, is_causal, scale_of(q, scale), backend
    )
    return out
