"""When is a layer's curvature refreshed next?

A rule is static and hashable. It decides from the relative changes between *fresh,
reduced* statistics, ``‖X − X_prev‖_F / ‖X_prev‖_F``, the largest over a layer's
factors. Steps count from ``t = 1``, when every layer is refreshed.

References:
    "Adaptive update intervals" for distributed K-FAC (Algorithm 1: ``adaptive``);
    Osawa et al., 2020, arXiv:2002.06015, Sec. 4.3 (``staleness``).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.types import Array

RULES = ("multiple", "elapsed")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A refresh rule; see ``every``, ``adaptive`` and ``staleness``.

    Attributes:
        kind: Name of the rule.
        period: First interval.
        threshold: Relative change below which statistics count as alike.
        multiple: Refresh when the step is a multiple of the interval, instead of when
            an interval has passed since the last refresh.
        max_interval: Longest interval, or None.
        memory: How many past statistics the rule compares with.
        together: Share of its interval after which a layer is refreshed along with
            another that is due, or None: each at its own time.
    """

    kind: str
    period: int = 1
    threshold: float = 0.0
    multiple: bool = False
    max_interval: int | None = None
    memory: int = 0
    together: float | None = None

    def is_due(self, step: Array, interval: Array, last_refresh: Array) -> Array:
        """Which layers are refreshed at ``step`` (all arguments broadcast)."""
        if self.multiple:
            return (step == 1) | (step % interval == 0)
        age = step - last_refresh
        due = (last_refresh == 0) | (age >= interval)
        if self.together is None:
            return due
        return due | (jnp.any(due) & (age >= self.together * interval))

    def next_interval(
        self, interval: Array, previous: Array, changes: tuple[Any, ...]
    ) -> Array:
        """The interval after a refresh.

        Args:
            interval: ``Δ₋₁``, in force until now.
            previous: ``Δ₋₂``, the one before.
            changes: Relative change against each remembered statistic, newest first;
                ``linalg.LARGEST`` where there is none yet.

        Returns:
            The next interval, in steps.
        """
        if self.kind == "every":
            return interval
        alike = [change < self.threshold for change in changes]
        if self.kind == "adaptive":
            new = interval + alike[0].astype(interval.dtype)
        else:
            longer = jnp.where(alike[1], interval + previous, interval)
            new = jnp.where(alike[0], longer, jnp.maximum(1, interval // 2))
        limit = self.max_interval
        return new if limit is None else jnp.minimum(new, limit)


def every(n: int) -> Interval:
    """Refresh at steps ``1, 1 + n, 1 + 2n, …``.

    Args:
        n: Period in steps.

    Returns:
        The rule.

    Raises:
        ValueError: ``n`` is not a whole number of at least 1.
    """
    return Interval("every", period=whole("every(n)", n))


def adaptive(
    threshold: float,
    rule: str = "multiple",
    max_interval: int | None = None,
    together: float | None = None,
) -> Interval:
    """Algorithm 1: a refresh that changes little lengthens the interval by one.

    After a refresh, ``interval += 1`` if the statistics' relative change is below
    ``threshold``. ``rule="multiple"`` refreshes whenever ``t % interval == 0`` (the
    algorithm to the letter: a growing interval still meets every even step);
    ``rule="elapsed"`` refreshes when ``interval`` steps have passed since the last.

    Args:
        threshold: ``λ``; the paper uses 0.2 to 0.3.
        rule: ``"multiple"`` or ``"elapsed"``.
        max_interval: Longest interval, or None.
        together: Not in the algorithm, for ``rule="elapsed"`` only: when a layer is
            due, so are those that have waited for this share of their intervals. A
            sampled Fisher's further backward pass then serves several layers at once.

    Returns:
        The rule.

    Raises:
        ValueError: An argument is out of range, or ``together`` with ``"multiple"``.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}.")
    if together is not None and rule == "multiple":
        raise ValueError('together wants rule="elapsed".')
    return Interval(
        "adaptive",
        threshold=positive(threshold),
        multiple=rule == "multiple",
        max_interval=limit(max_interval),
        memory=1,
        together=share(together),
    )


def staleness(
    threshold: float = 0.1,
    max_interval: int | None = None,
    together: float | None = None,
) -> Interval:
    """Halve the interval when statistics change, extend it when they are stale.

    With ``X₋₁, X₋₂`` the last two refreshed statistics and ``Δ₋₁, Δ₋₂`` the last two
    intervals: ``X`` unlike ``X₋₁`` → ``max(1, ⌊Δ₋₁ / 2⌋)``; like ``X₋₁`` but unlike
    ``X₋₂`` → ``Δ₋₁``; like both → ``Δ₋₁ + Δ₋₂``.

    Args:
        threshold: Relative change below which two statistics are alike.
        max_interval: Longest interval, or None.
        together: When a layer is due, so are those that have waited for this share of
            their intervals; None: each at its own time, as in the paper.

    Returns:
        The rule.

    Raises:
        ValueError: An argument is out of range.
    """
    return Interval(
        "staleness",
        threshold=positive(threshold),
        max_interval=limit(max_interval),
        memory=2,
        together=share(together),
    )


def whole(name: str, value: Any) -> int:
    """A whole number of at least 1, or an error."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} wants a whole number of at least 1, got {value!r}.")
    return value


def limit(value: int | None) -> int | None:
    """A valid ``max_interval``."""
    return None if value is None else whole("max_interval", value)


def share(together: float | None) -> float | None:
    """A valid ``together``."""
    if together is not None and not 0 < together <= 1:
        raise ValueError(f"together must be in (0, 1], got {together!r}.")
    return together


def positive(threshold: float) -> float:
    """A valid threshold."""
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}.")
    return float(threshold)
