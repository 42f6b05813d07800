"""Bidirectional linear attention: `linear_state` over keys, `linear_apply` to queries, and both in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmattn_kernels import _backends, _library
from mmattn_kernels._backends import Backend, Op, Problem
from mmattn_kernels._checks import state_dtype
from mmattn_kernels.linear import reference, torch as plain
from mmattn_kernels.linear._checks import check_keys, check_names, check_queries, tables_of
from mmattn_kernels.linear.state import LinearState

FeatureMap = str | Callable[[Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


def _no_triton(problem: Problem) -> str | None:
    if problem.dtype == torch.float64:
        return "Triton kernels do not compute in float64"
    if max(problem.head_dim, problem.value_dim) > 256:
        return f"features or values are wider ({problem.head_dim}, {problem.value_dim}) than 256"
    return _backends.no_triton(problem)


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from mmattn_kernels.linear import triton

        return getattr(triton, name)(*args)

    return run


OP_STATE = Op(
    "linear_state",
    Backend("triton", _no_triton, _triton("state_forward"), _triton("state_backward")),
    Backend("torch", _backends.always, plain.state_forward, plain.state_backward),
    Backend(
        "reference",
        _backends.always,
        reference.state_forward,
        reference.state_backward,
        automatic=False,
    ),
)
OP_APPLY = Op(
    "linear_apply",
    Backend("triton", _no_triton, _triton("apply_forward"), _triton("apply_backward")),
    Backend("torch", _backends.always, plain.apply_forward, plain.apply_backward),
    Backend(
        "reference",
        _backends.always,
        reference.apply_forward,
        reference.apply_backward,
        automatic=False,
    ),
)


def _state_problem(k: Tensor, v: Tensor) -> Problem:
    return Problem(k.device, k.dtype, k.shape[3], v.shape[3], k.shape[1], k.shape[1], 0, k.shape[2])


def _apply_problem(q: Tensor, products: Tensor) -> Problem:
    heads, d, dv = products.shape[1:]
    return Problem(q.device, q.dtype, d, dv, q.shape[1], heads, q.shape[2], 0)


def _state(k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = given
    products, sums, values = OP_STATE.choose(backend, _state_problem(k, v)).forward(k, v, *rest)
    return products, sums, values


def _state_fake(k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, _n, d), dv, dtype = k.shape, v.shape[3], state_dtype(k)
    return (
        k.new_empty((b, h, d, dv), dtype=dtype),
        k.new_empty((b, h, d), dtype=dtype),
        k.new_empty((b, h, dv), dtype=dtype),
    )


def _state_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, cos, sin, key_mask, *ctx.rest = inputs
    ctx.save_for_backward(k, v, cos, sin, key_mask)


def _state_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return (*_STATE_BACKWARD(*grads, *ctx.saved_tensors, *ctx.rest), *(None,) * 5)


def _run_state_backward(
    grad_products: Tensor, grad_sums: Tensor, grad_values: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    *rest, backend = given
    run = OP_STATE.choose_backward(backend, _state_problem(k, v))
    dk, dv = run(grad_products, grad_sums, grad_values, k, v, *rest)
    return dk, dv


def _state_backward_fake(
    _p: Tensor, _s: Tensor, _v: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _apply(q: Tensor, products: Tensor, *given: Any) -> Tensor:
    *rest, backend = given
    chosen = OP_APPLY.choose(backend, _apply_problem(q, products))
    out: Tensor = chosen.forward(q, products, *rest)
    return out


def _apply_fake(q: Tensor, products: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], products.shape[3]))


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.feature_map, ctx.normalizer, ctx.scale, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rest = (ctx.feature_map, ctx.normalizer, ctx.scale, ctx.eps, ctx.backend)
    return (*_APPLY_BACKWARD(grad, *ctx.saved_tensors, *rest), *(None,) * 8)


def _run_apply_backward(
    grad: Tensor, q: Tensor, products: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, backend = given
    run = OP_APPLY.choose_backward(backend, _apply_problem(q, products))
    dq, dproducts, dsums, dvalues = run(grad, q, products, *rest)
    return dq, dproducts, dsums, dvalues


def _apply_backward_fake(
    _g: Tensor, q: Tensor, products: Tensor, sums: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = (x.new_empty(x.shape) for x in (products, sums, values))
    return (q.new_empty(q.shape), *state)  # type: ignore[return-value]


_KEYS = (
    "Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? key_mask, str feature_map, str backend"
)
_QUERIES = (
    "Tensor q, Tensor products, Tensor sums, Tensor values, Tensor count, Tensor? cos, Tensor? sin, "
    "str feature_map, str normalizer, float scale, float eps, str backend"
)
_STATE_BACKWARD = _library.define(
    "linear_state_backward(Tensor grad_products, Tensor grad_sums, Tensor grad_values, "
    f"{_KEYS}) -> (Tensor, Tensor)",
    _run_state_backward,
    _state_backward_fake,
)
_STATE = _library.define(
    f"linear_state({_KEYS}) -> (Tensor, Tensor, Tensor)",
    _state,
    _state_fake,
    setup=_state_setup,
    backward=_state_backward,
)
_APPLY_BACKWARD = _library.define(
    f"linear_apply_backward(Tensor grad, {_QUERIES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_apply_backward,
    _apply_backward_fake,
)
_APPLY = _library.define(
    f"linear_apply({_QUERIES}) -> Tensor",
    _apply,
    _apply_fake,
    setup=_apply_setup,
    backward=_apply_backward,
)


def linear_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap,
    rope: Rope | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> LinearState:
    """The sums over keys that `linear_apply` needs; states of disjoint sets of keys can be added.

    Args:
        k: keys ``[B, Hkv, K, D]``, any strides.
        v: values ``[B, Hkv, K, Dv]``.
        feature_map, rope, key_mask, backend: as in `linear_attention`.

    Raises:
        ValueError: shapes that do not belong together, an unknown feature map.
        TypeError: dtypes that differ, a mask that is not bool.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    k, name = _mapped(k, feature_map)
    check_names("linear_state", name)
    check_keys("linear_state", k, v, key_mask)
    cos, sin = tables_of("linear_state", rope, k)
    products, sums, values = _STATE(k, v, cos, sin, key_mask, name, backend)
    if key_mask is None:
        count = torch.full((k.shape[0],), float(k.shape[2]), dtype=sums.dtype, device=k.device)
    else:
        count = key_mask.sum(1, dtype=sums.dtype)
    return LinearState(products, sums, values, count)


def linear_apply(
    q: Tensor,
    state: LinearState,
    *,
    feature_map: FeatureMap,
    normalizer: str = "sum",
    rope: Rope | None = None,
    scale: float = 1.0,
    eps: float = 1e-15,
    backend: str = "auto",
) -> Tensor:
    """What queries ``q [B, H, Q, D]`` read from a state: output ``[B, H, Q, Dv]``.

    Args:
        q: queries, any strides; the heads of the state divide H.
        state: of `linear_state`, with the same feature map.
        feature_map, normalizer, rope, scale, eps, backend: as in `linear_attention`.

    Raises:
        ValueError: shapes that do not belong together, an unknown feature map or normaliser.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    q, name = _mapped(q, feature_map)
    check_names("linear_apply", name, normalizer)
    check_queries("linear_apply", q, state)
    cos, sin = tables_of("linear_apply", rope, q)
    out: Tensor = _APPLY(
        q,
        state.products,
        state.sums,
        state.values,
        state.count,
        cos,
        sin,
        name,
        normalizer,
        float(scale),
        float(eps),
        backend,
    )
    return out


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap,
    normalizer: str = "sum",
    rope: Rope | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    scale: float = 1.0,
    eps: float = 1e-15,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Attention whose weights are products of features, in time and memory linear in the tokens.

    Every query sees every key (Katharopoulos et al., *Transformers are RNNs*, arXiv 2006.16236, without
    its causal mask). With features ``f``, and ``r`` the rotation of RoPE,

        product_i = scale * r(f(q_i)) . sum_j r(f(k_j)) v_j      mass_i = scale * f(q_i) . sum_j f(k_j)

    RoPE turns features in the product only, as SANA-Video (arXiv 2509.24695), MALA (arXiv 2507.00698)
    and NaLaFormer (arXiv 2506.21137) do. Sums are kept in fp32.

    Args:
        q: queries ``[B, H, Q, D]``, any strides.
        k: keys ``[B, Hkv, K, D]``; Hkv divides H (grouped-query attention).
        v: values ``[B, Hkv, K, Dv]``.
        feature_map: "identity", "relu", "squared_relu", "cubed_relu", "elu1" (ELU + 1), "exp", "sigmoid",
            "softmax" (over D), or a function of tensors ``[B, H, N, D]`` that is called first (two
            functions: call them yourself and say "identity"). exp is not shifted.
        normalizer: what becomes of product and mass; n is the number of keys.
            "sum": product / (mass + eps), the weights' sum (SANA, SLAB).
            "mean": the same of product / n and mass / n, so that eps is per key (NaLaFormer).
            "count": product / n. "none": product.
            "mala": MALA as released, with scale = D ** -0.5: of product / n and m = mass / n,
            product * (1 + 1 / (m + eps)) - m * mean of values.
            "mala_paper": its equations, product * (1 + 1 / (mass + eps)) - mass * mean of values.
        rope: ``(cos, sin)``, each ``[N, D / 2]``, one angle per pair of neighbours (0, 1), (2, 3), ...;
            or ``(cos_q, sin_q, cos_k, sin_k)`` when queries and keys have other positions.
        scale: factor of products and mass; it only matters beside eps with "sum".
        eps: keeps a query without any weight finite: it gives 0. Where the denominator is exactly 0 the
            output is 0.
        key_mask: bool ``[B, K]``, False at padding; what lies there is never used, be it NaN.
        backend: "auto", or one of "triton", "torch", "reference" by name.

    Returns:
        Output ``[B, H, Q, Dv]`` in the dtype of q; 0 for a batch item without keys.

    Raises:
        ValueError: shapes that do not belong together, an unknown feature map or normaliser.
        TypeError: dtypes that differ, a mask that is not bool.
        BackendUnavailable: `backend` was named and cannot run this call.
    """
    of_q, of_k = _both(rope)
    if q.dtype != k.dtype:
        raise TypeError(
            f"linear_attention: q is {q.dtype} and k is {k.dtype}; one dtype is needed."
        )
    state = linear_state(
        k, v, feature_map=feature_map, rope=of_k, key_mask=key_mask, backend=backend
    )
    return linear_apply(
        q,
        state,
        feature_map=feature_map,
        normalizer=normalizer,
        rope=of_q,
        scale=scale,
        eps=eps,
        backend=backend,
    )


def _mapped(x: Tensor, feature_map: FeatureMap) -> tuple[Tensor, str]:
    return (x, feature_map) if isinstance(feature_map, str) else (feature_map(x), "identity")


def _both(
    rope: Rope | tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Rope | None, Rope | None]:
    if rope is None:
        return None, None
    if len(rope) == 4:
        return (rope[0], rope[1]), (rope[2], rope[3])
    if len(rope) == 2:
        return rope, rope
    raise ValueError(
        f"linear_attention: rope has {len(rope)} tables; (cos, sin) or (cos_q, sin_q, cos_k, sin_k) "
        "is needed."
    )
