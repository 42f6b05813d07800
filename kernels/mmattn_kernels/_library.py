"""Registration of ops with `torch.library`: one boundary per public call, opaque to compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mmattn", "FRAGMENT")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an op of the namespace ``mmattn`` and return it.

    Args:
        schema: as in ``"name(Tensor q, float scale) -> Tensor"``.
        run: the implementation, for every device; it chooses a back end itself, so that a compiler sees
            one opaque call.
        fake: shapes, dtypes and strides of the outputs, without data.
        setup: saves what `backward` needs, ``setup(ctx, inputs, output)``.
        backward: gradients of the inputs, ``backward(ctx, *grads)``.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmattn::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"mmattn::{name}", backward, setup_context=setup, lib=_LIBRARY
        )
    op: Callable[..., Any] = getattr(torch.ops.mmattn, name).default
    return op
