"""Dense warm-up: the first denoising steps that sparse methods leave alone."""

from __future__ import annotations

from mmattn.methods.base import require


def check_dense_steps(dense_steps: float) -> None:
    """Raise `ConfigError` unless `dense_steps` is a share in [0, 1] or a number of steps.

    A float is a share of the run's steps, an int a number of steps: 0.25 and 12 are much the same in a
    run of 50.
    """
    if isinstance(dense_steps, float):
        require(
            0 <= dense_steps <= 1,
            f"dense_steps as a float is a share of the steps in [0, 1], got {dense_steps}; "
            "for a number of steps give an int",
        )
    else:
        require(
            isinstance(dense_steps, int) and dense_steps >= 0,
            f"dense_steps is a share (float) or a number of steps (int >= 0), got {dense_steps!r}",
        )


def is_sparse(dense_steps: float, step: int | None, total: int | None) -> bool | None:
    """Whether `step` is past the dense ones; None where that depends on a clock that is not running.

    A share is rounded down: 0.25 of 50 steps are 12.
    """
    if dense_steps == 0:
        return True
    if step is None or total is None:
        return None
    first = int(dense_steps * total + 1e-9) if isinstance(dense_steps, float) else dense_steps
    return step >= first
