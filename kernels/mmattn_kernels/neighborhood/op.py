"""The op `mmattn::neighborhood_attention`: its back ends, registration and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import check_qkv, scale_of, state_dtype
from mmattn_kernels.neighborhood import natten, reference, torch as plain
from mmattn_kernels.neighborhood.windows import check_geometry


def _triton_forward(*args: Any) -> Any:
    from mmattn_kernels.neighborhood import triton

    return triton.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from mmattn_kernels.neighborhood import triton

    return triton.backward(*args)


OP = Op(
    "neighborhood_attention",
    Backend("triton", _backends.no_triton, _triton_forward, _triton_backward),
    Backend("torch", _backends.always, plain.forward, plain.backward),
    Backend("natten", natten.can_run, natten.forward, automatic=False),
    Backend("reference", _backends.always, reference.forward, reference.backward, automatic=False),
)


def _problem(q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: list[int]) -> Problem:
    return Problem.of(q, k, v, grid=tuple(grid), window=tuple(window))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    extra_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = OP.choose(backend, _problem(q, k, v, grid, window))
    out, lse = chosen.forward(q, k, v, grid, window, stride, dilation, is_causal, extra_keys, scale)
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
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    extra_keys: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = (grid, window, stride, dilation, is_causal, extra_keys)
    run = OP.choose_backward(backend, _problem(q, k, v, grid, window))
    dq, dk, dv = run(grad_out, grad_lse, q, k, v, out, lse, *geometry, scale)
    return dq, dk, dv


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = _OP_BACKWARD(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 8)


_GEOMETRY = (
    "int[] grid, int[] window, int[] stride, int[] dilation, bool[] is_causal, int extra_keys, "
    "float scale, str backend"
)
_OP_BACKWARD = _library.define(
    "neighborhood_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_OP = _library.define(
    f"neighborhood_attention(Tensor q, Tensor k, Tensor v, {_GEOMETRY}) -> (Tensor, Tensor)",
    _run,
    _fake,
    setup=_setup,
    backward=_backward,
)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    extra_keys: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which a query on a 1-D, 2-D or 3-D grid sees a window around it.

    Windows are those of generalized neighborhood attention (arXiv 2504.16922), as NATTEN computes them:
    at a border a window moves inward and keeps its size; `stride` queries share the window of their
    leader, the one right of the middle; an even window reaches one further to the left. With `dilation`
    every residue class of an axis is a problem of its own. On a causal axis a query sees at most `window`
    keys, the last of them itself, and fewer where it comes before the leader of its group, the last one.
    A query sees a key when it does so on every axis. `stride` 1 is neighborhood attention
    (arXiv 2204.07143, dilated 2209.15001), `stride` = `window` that divides the axis is blocked
    attention, and windows as long as the grid are dense attention.

    Args:
        q: queries ``[B, H, Q, D]``, any strides; Q is the number of grid tokens N in row-major order, or
            ``extra_keys + N``. Then the leading queries see every key.
        k, v: keys and values ``[B, Hkv, extra_keys + N, D]``; Hkv divides H (grouped-query attention).
        grid: tokens per axis, 1 to 3 axes with product N, such as ``(frames, height, width)``.
        window: keys per axis; ``window * dilation`` may not exceed the axis. A window of 1, which NATTEN
            refuses, is allowed.
        stride: queries per axis that share a window, 1 to `window`.
        dilation: distance of neighboring keys of a window.
        is_causal: whether a query sees only keys up to itself on an axis.
            `window`, `stride`, `dilation`, `is_causal` take one value, or one per axis.
        extra_keys: leading keys outside the grid, such as text, that every query sees in the same softmax.
        scale: factor of the scores; None: ``D ** -0.5``.
        return_lse: also return the log-sum-exp of every row.
        backend: ``auto``, ``triton`` (GPU), ``torch`` (gathers boxes of keys; the CPU path), ``natten`` or
            ``reference`` (loops).

    Returns:
        Output ``[B, H, Q, D]``, and with `return_lse` the natural-log LSE ``[B, H, Q]`` in fp32 (fp64 for
        fp64 inputs). Both are differentiable.

    Raises:
        ValueError: shapes, grid or windows that do not fit each other.
        TypeError: dtypes that differ, or settings that are not integers or booleans.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    name = "neighborhood_attention"
    check_qkv(name, q, k, v)
    geometry = _geometry(grid, window, stride, dilation, is_causal)
    check_lengths(name, q, k, geometry[0], extra_keys)
    out, lse = _OP(
        q,
        k,
        v,
        *geometry,
        extra_keys,
        scale_of(q, scale),
        backend,
    )
    return (out, lse) if return_lse else out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _geometry(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
    """The checked settings as one list each; a constant of any graph."""
    axes = check_geometry("neighborhood_attention", grid, window, stride, dilation, is_causal)
    return (
        [axis.length for axis in axes],
        [axis.window for axis in axes],
        [axis.stride for axis in axes],
        [axis.dilation for axis in axes],
        [axis.causal for axis in axes],
    )


def check_lengths(op: str, q: Tensor, k: Tensor, grid: list[int], extra_keys: int) -> None:
    """Check that queries and keys are the tokens of the grid and the extra ones.

    Raises:
        ValueError: other numbers of tokens.
    """
    tokens = prod(grid)
    if extra_keys < 0 or k.shape[2] != extra_keys + tokens:
        raise ValueError(
            f"{op}: k has {k.shape[2]} tokens; {extra_keys} extra keys and the {tokens} tokens of grid "
            f"{grid} are needed."
        )
    if q.shape[2] not in (tokens, extra_keys + tokens):
        raise ValueError(
            f"{op}: q has {q.shape[2]} tokens; the {tokens} of grid {grid} are needed, or "
            f"{extra_keys + tokens} with a leading query for each extra key."
        )
