"""How much of the identity is added to the curvature.

A damping is a number or an optax schedule of the step count (from 0). It is added to
the Fisher block of the mean loss, so it means the same whatever the batch size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.types import Array

Damping = float | Array | Callable[[Any], Any]


def check(damping: Damping) -> None:
    """Raises for a damping that is no number or schedule, or not positive."""
    if isinstance(damping, LevenbergMarquardt):
        raise TypeError("levenberg_marquardt needs kfac.kfac, which knows the step.")
    if damping is None or isinstance(damping, str):
        raise TypeError(f"damping must be a number or a schedule, got {damping!r}.")
    if isinstance(damping, (int, float)) and not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping!r}.")


def value_at(damping: Damping, count: Array) -> Array:
    """The damping, or another number or schedule, at a step.

    Args:
        damping: A number or a schedule.
        count: Steps taken before this one.

    Returns:
        A float32 scalar (or float64 where the damping is).
    """
    value = damping(count) if callable(damping) else damping
    return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))


def split(mean_a: Array, mean_g: Array, damping: Array) -> tuple[Array, Array]:
    """Splits Tikhonov damping over both Kronecker factors.

    ``π = √((tr A / dim A) / (tr G / dim G))``; ``A`` gets ``π √λ`` and ``G`` gets
    ``√λ / π``, so that ``(A + π√λ I) ⊗ (G + √λ/π I) ≈ A ⊗ G + λ I``.

    Args:
        mean_a: ``tr A / dim A``, ``[*blocks]``.
        mean_g: ``tr G / dim G``, ``[*blocks]``.
        damping: ``λ``, a scalar.

    Returns:
        The two additions, ``[*blocks]`` each; ``π = 1`` where a trace vanishes.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3.
    """
    proper = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(proper, mean_a, 1) / jnp.where(proper, mean_g, 1)
    pi, root = jnp.sqrt(ratio), jnp.sqrt(damping).astype(mean_a.dtype)
    return pi * root, root / pi


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model predicts the loss.

    See ``levenberg_marquardt``.
    """

    initial: float
    factor: float
    interval: int
    minimum: float
    maximum: float

    def adjust(self, damping: Array, ratio: Array) -> Array:
        """The next damping, given the reduction ratio ``ρ``."""
        change = jnp.asarray(self.factor**self.interval, damping.dtype)
        lower = jnp.where(ratio > 0.75, damping * change, damping)
        # A ratio that is not a number is a step into nowhere: trust the model less.
        new = jnp.where(ratio >= 0.25, lower, damping / change)
        return jnp.clip(new, self.minimum, self.maximum)


def levenberg_marquardt(
    initial: float = 1.0,
    factor: float = 0.95,
    interval: int = 5,
    minimum: float = 1e-8,
    maximum: float = 1e8,
) -> LevenbergMarquardt:
    """Adapts the damping to the reduction ratio, every ``interval`` steps.

    ``ρ = (L(θ + d) − L(θ)) / M(d)`` on one batch, ``M`` the quadratic model with its
    damping. ``ρ > 3/4``: ``λ ← λ ω^T``; ``ρ < 1/4``: ``λ ← λ / ω^T``.

    Args:
        initial: First ``λ``.
        factor: ``ω``, below 1.
        interval: ``T`` in steps.
        minimum: Lower bound of ``λ``.
        maximum: Upper bound of ``λ``.

    Returns:
        A damping for ``kfac.kfac``, whose ``update`` then needs ``model=``.

    Raises:
        ValueError: A value is out of range.

    References:
        Moré, 1978; Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.5.
    """
    if not 0 < minimum <= initial <= maximum:
        raise ValueError(
            f"damping wants 0 < minimum <= initial <= maximum, got {minimum}, "
            f"{initial}, {maximum}."
        )
    if not 0 < factor < 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor}.")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be a whole number >= 1, got {interval!r}.")
    return LevenbergMarquardt(initial, factor, interval, minimum, maximum)
