"""The ops `mmattn::group_masses` and `mmattn::grouped_apply`, and `grouped_attention` made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels._row_blocks import check_masking
from mmattn_kernels.grouped import reference, torch as plain

MOST_GROUPS = 8
"""Groups that the Triton kernels take; each costs a comparison per score."""


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from mmattn_kernels.grouped import triton

        return getattr(triton, name)(*args)

    return run


def _can_triton(problem: Problem) -> str | None:
    if problem.extra["groups"] > MOST_GROUPS:
        return f"{problem.extra['groups']} groups are more than {MOST_GROUPS}"
    return _backends.no_triton(problem)


OP = Op(
    "grouped_attention",
    Backend("triton", _can_triton, _triton("apply")),
    Backend("torch", _backends.always, plain.apply, plain.apply_backward),
    Backend("reference", _backends.always, reference.apply, automatic=False),
)
MASSES = Op(
    "group_masses",
    Backend("triton", _can_triton, _triton("masses")),
    Backend("torch", _backends.always, plain.masses, plain.masses_backward),
    Backend("reference", _backends.always, reference.masses, automatic=False),
)


def _run_masses(
    q: Tensor,
    k: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    num_groups: int,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = MASSES.choose(backend, Problem.of(q, k, k, groups=num_groups)).forward
    lse, masses = run(q, k, groups, mask, num_groups, is_causal, scale)
    return lse, masses


def _fake_masses(
    q: Tensor, k: Tensor, groups: Tensor, mask: Tensor | None, num_groups: int, *_: Any
) -> tuple[Tensor, Tensor]:
    work = state_dtype(q)
    return (
        q.new_empty(q.shape[:3], dtype=work),
        q.new_empty((*q.shape[:3], num_groups), dtype=work),
    )


def _run_masses_backward(
    grad_lse: Tensor,
    grad_masses: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem.of(q, k, k, groups=grad_masses.shape[3])
    run = MASSES.choose_backward(backend, problem)
    dq, dk = run(grad_lse, grad_masses, q, k, lse, groups, mask, is_causal, scale)
    return dq, dk


def _fake_masses_backward(
    grad_lse: Tensor, grad_masses: Tensor, q: Tensor, k: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_masses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, groups, mask, _, *ctx.rest = inputs
    ctx.save_for_backward(q, k, output[0], groups, mask)


def _backward_masses(ctx: Any, grad_lse: Tensor, grad_masses: Tensor) -> tuple[Any, ...]:
    grads = _MASSES_BACKWARD(grad_lse, grad_masses, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 6)


def _run_apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    run = OP.choose(backend, Problem.of(q, k, v, groups=coefficients.shape[3])).forward
    out: Tensor = run(q, k, v, coefficients, lse, groups, mask, is_causal, scale)
    return out


def _fake_apply(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _run_apply_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    lse: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(q, k, v, groups=coefficients.shape[3])
    run = OP.choose_backward(backend, problem)
    dq, dk, dv, dc, dl = run(grad_out, q, k, v, coefficients, lse, groups, mask, is_causal, scale)
    return dq, dk, dv, dc, dl


def _fake_apply_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, coefficients: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q_like, k_like, v_like, c_like, l_like = (
        x.new_empty(x.shape) for x in (q, k, v, coefficients, lse)
    )
    return q_like, k_like, v_like, c_like, l_like


def _setup_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, is_causal, scale, backend = inputs
    ctx.rest = (is_causal, scale, backend)
    ctx.save_for_backward(*tensors)


def _backward_apply(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    grads = _APPLY_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 5)


_REST = "bool is_causal, float scale, str backend"
_MASSES_BACKWARD = _library.define(
    "group_masses_backward(Tensor grad_lse, Tensor grad_masses, Tensor q, Tensor k, Tensor lse, "
    f"Tensor groups, Tensor? mask, {_REST}) -> (Tensor, Tensor)",
    _run_masses_backward,
    _fake_masses_backward,
)
_MASSES = _library.define(
    f"group_masses(Tensor q, Tensor k, Tensor groups, Tensor? mask, int num_groups, {_REST}) "
    "-> (Tensor, Tensor)",
    _run_masses,
    _fake_masses,
    setup=_setup_masses,
    backward=_backward_masses,
)
_APPLY_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor coefficients, Tensor lse, Tensor groups, Tensor? mask, "
    + _REST
)
_APPLY_BACKWARD = _library.define(
    f"grouped_apply_backward(Tensor grad_out, {_APPLY_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_apply_backward,
    _fake_apply_backward,
)
_APPLY = _library.define(
    f"grouped_apply({_APPLY_ARGUMENTS}) -> Tensor",
    _run_apply,
    _fake_apply,
    setup=_setup_apply,
    backward=_backward_apply,
)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    coefficients: Callable[[Tensor], Tensor],
    *,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_masses: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention whose probabilities are multiplied per group of keys, after the softmax.

    ``out_i = sum_j c_ig(j) P_ij v_j``, where the multipliers of row i may depend on the probability that
    each group has in it. VAR (arXiv 2503.03321), ACT and ZeroTuning re-weigh attention in this way; nothing
    of size Q x K is held.

    Args:
        q: queries ``[B, H, Q, D]``, any strides; one row while decoding.
        k, v: keys and values ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        groups: integers ``[B, K]``: the group of every key, 0 .. G-1; -1 hides a key (padding).
        coefficients: takes the masses ``[B, H, Q, G]`` and returns multipliers that broadcast to them.
            Probabilities are not normalised again; a function that wants that divides by
            ``(c * masses).sum(-1)``. It is differentiated through.
        num_groups: G; None reads it from `groups`, which on a GPU waits for the device.
        mask: ``[B|1, H|1, Q|1, K]``, bool (True: visible) or added to the scores.
        is_causal: query i sees the keys up to ``i + K - Q``, so that one decoded row sees them all.
        scale: factor of the scores; None: ``D ** -0.5``.
        return_masses: also return the masses.
        backend: ``auto``, ``triton`` (GPU, at most 8 groups), ``torch`` (blocks of rows; the CPU path) or
            ``reference`` (loops).

    Returns:
        Output ``[B, H, Q, D]``, and with `return_masses` the masses ``[B, H, Q, G]`` in fp32 (fp64 for fp64
        inputs), which sum to 1 in every row that sees a key. A row without keys gives 0.

    Raises:
        ValueError: shapes that do not fit, or a group that is not below `num_groups` (on a CPU).
        TypeError: dtypes that differ, groups that are not integers, or a mask that asks for a gradient.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    name = "grouped_attention"
    check_qkv(name, q, k, v)
    check_masking(name, q, k, mask, groups)
    if num_groups is None:
        num_groups = int(groups.max()) + 1 if groups.numel() else 1
    elif groups.device.type == "cpu" and not torch.compiler.is_compiling() and groups.numel():
        highest = int(groups.max())
        if highest >= num_groups:
            raise ValueError(f"{name}: groups go up to {highest}, but num_groups is {num_groups}.")
    if num_groups < 1:
        raise ValueError(
            f"{name}: there is no group; all keys are hidden or num_groups is below 1."
        )
    factor = scale_of(q, scale)
    lse, masses = _MASSES(q, k, groups, mask, num_groups, is_causal, factor, backend)
    multipliers = coefficients(masses)
    if torch.broadcast_shapes(multipliers.shape, masses.shape) != masses.shape:
        raise ValueError(
            f"{name}: the multipliers {list(multipliers.shape)} do not broadcast to the masses "
            f"{list(masses.shape)}."
        )
    multipliers = multipliers.to(masses.dtype).expand(masses.shape)
    out = _APPLY(q, k, v, multipliers, lse, groups, mask, is_causal, factor, backend)
    return (out, masses) if return_masses else out
