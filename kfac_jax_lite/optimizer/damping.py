"""How much of the identity is added to the curvature.

A damping is a number, an optax schedule of the step count (from 0), or a rule that
adapts it: ``adaptive`` or ``levenberg_marquardt``. It is added to the Fisher block of
the mean loss, so it means the same whatever the batch size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.linalg import LARGEST
from kfac_jax_lite.core.types import Array

Damping = float | Array | Callable[[Any], Any]
# A step that ends this much steeper than it began counts as going no farther.
FARTHEST = 5.0
# Reduction ratios beyond which ``levenberg_marquardt`` changes the damping.
POOR, GOOD = 0.25, 0.75


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


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Damping that follows where steps end along their direction; see ``adaptive``."""

    initial: float
    gain: float
    minimum: float
    maximum: float
    retreat: float | None

    def adjust(self, damping: Array, agreement: Array, lag: Any = 1) -> Array:
        """The next damping, given ``r``; unchanged where that is not known."""
        known = agreement < LARGEST  # not so of NaN, either
        r = jnp.clip(jnp.where(known, agreement, 0), -FARTHEST, 1)
        new = damping * jnp.exp(-self.gain * r / lag)
        return jnp.clip(new, self.minimum, self.maximum).astype(damping.dtype)

    def raised(self, damping: Array, excess: Array) -> Array:
        """The damping after a step that is taken back.

        Args:
            damping: ``λ`` of that step.
            excess: Its slope uphill where it ended, over the greatest of late.

        Returns:
            ``λ`` times ``excess``, but at least ``retreat`` and at most its square.
        """
        least = 1.0 if self.retreat is None else self.retreat
        new = damping * jnp.clip(excess, least, least**2)
        return jnp.minimum(new, self.maximum).astype(damping.dtype)


def adaptive(
    initial: float = 1.0,
    gain: float = 0.5,
    minimum: float = 1e-8,
    maximum: float = 1e8,
    retreat: float | None = 10.0,
) -> Adaptive:
    """Damping with which steps end, on average, at the minimum along their direction.

    ``λ ← λ exp(−γ r)``, ``r = dᵀ∇L₊ / dᵀ∇L``: the slope along the last step ``d`` where
    it ended, on the next batch, over the slope where it began. Steps that are too short
    (``r`` near 1) lower the damping, those that go too far (``r < 0``) raise it. As
    noise takes over, ``r`` falls below 0 and the damping grows: steps get shorter as
    under a decaying learning rate. Costs two inner products per step and one more copy
    of the parameters. A damping that inverses hold (all methods but ``"eigh"``,
    ``"ekfac"``, ``"low_rank"``) comes into force with the next inversion: ``γ`` is then
    divided by ``inverse_interval``.

    In ``kfac.kfac``, a step that ended steeper uphill than any of late was steep,
    ``dᵀ∇L₊ > max |dᵀ∇L|``, is taken back: the next update is ``−d``, momentum starts
    anew, that batch is refused, ``λ`` grows tenfold or more, and inverses are made anew
    with it. So a first ``λ`` many decades too small costs a few steps, not the run.
    What follows in an ``optax.chain`` must leave updates as they are for this to be
    exact; running averages of a network, as batch norm's, are not taken back.

    Args:
        initial: First ``λ``. Too large costs some steps, ``ln(λ₀/λ)/γ`` at most as
            many; too small some that are taken back.
        gain: ``γ``.
        minimum: Lower bound of ``λ``.
        maximum: Upper bound of ``λ``.
        retreat: Least factor, of the damping, of a step that is taken back; None takes
            none back, as does ``kfac.scale_by_kfac``, which does not know the steps.

    Returns:
        A damping for ``kfac.kfac`` and ``kfac.scale_by_kfac``.

    Raises:
        ValueError: A value is out of range.

    References:
        Pflug, 1990, used the signal to detect stationarity, Almeida et al., 1999, and
        Baydin et al., 2018, arXiv:1703.04782, to adapt learning rates; Moré, 1978,
        refuses steps and raises damping; O'Donoghue & Candès, 2015, arXiv:1204.3982,
        restart momentum where it points uphill.
    """
    check_range(initial, minimum, maximum)
    if not 0 < gain <= 2:
        raise ValueError(f"gain must be in (0, 2], got {gain}.")
    if retreat is not None and not 1 < retreat < 1e4:
        raise ValueError(f"retreat must be in (1, 1e4) or None, got {retreat}.")
    return Adaptive(initial, gain, minimum, maximum, retreat)


def check_range(initial: float, minimum: float, maximum: float) -> None:
    """Raises unless ``0 < minimum <= initial <= maximum``."""
    if not 0 < minimum <= initial <= maximum < float("inf"):
        raise ValueError(
            f"damping wants 0 < minimum <= initial <= maximum, got {minimum}, "
            f"{initial}, {maximum}."
        )


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
        lower = jnp.where(ratio > GOOD, damping * change, damping)
        # A ratio that is not a number is a step into nowhere: trust the model less.
        new = jnp.where(ratio >= POOR, lower, damping / change)
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
    check_range(initial, minimum, maximum)
    if not 0 < factor < 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor}.")
    # Callers without a type checker pass anything.
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"interval must be a whole number >= 1, got {interval!r}.")
    return LevenbergMarquardt(initial, factor, interval, minimum, maximum)
