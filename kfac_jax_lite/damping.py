"""How much of the identity is added to the curvature.

A damping is a number or an optax schedule of the step count (from 0). It is added to
the Fisher block of the mean loss, so it means the same whatever the batch size.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.linalg import mean_diagonal
from kfac_jax_lite.types import Array

Damping = float | Array | Callable[[Any], Any]


def check(damping: Damping) -> None:
    """Raises ValueError for a concrete damping that is not positive."""
    if isinstance(damping, (int, float)) and not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping!r}.")


def value_at(damping: Damping, count: Array) -> Array:
    """The damping at a step.

    Args:
        damping: A number or a schedule.
        count: Steps taken before this one.

    Returns:
        A float32 scalar (or float64 where the damping is).
    """
    value = damping(count) if callable(damping) else damping
    return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))


def split(a: Array, g: Array, damping: Array) -> tuple[Array, Array]:
    """Splits Tikhonov damping over both Kronecker factors.

    ``π = √((tr A / dim A) / (tr G / dim G))``; ``A`` gets ``π √λ`` and ``G`` gets
    ``√λ / π``, so that ``(A + π√λ I) ⊗ (G + √λ/π I) ≈ A ⊗ G + λ I``.

    Args:
        a: ``[*blocks, in, in]``.
        g: ``[*blocks, out, out]``.
        damping: ``λ``, a scalar.

    Returns:
        The two additions, ``[*blocks]`` each; ``π = 1`` where a trace vanishes.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """
    trace_a, trace_g = mean_diagonal(a), mean_diagonal(g)
    proper = (trace_a > 0) & (trace_g > 0)
    ratio = jnp.where(proper, trace_a, 1) / jnp.where(proper, trace_g, 1)
    pi, root = jnp.sqrt(ratio), jnp.sqrt(damping).astype(a.dtype)
    return pi * root, root / pi
