"""What happens to one layer when it is due: average, compare, invert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.factors.state import KFACState, moving_average, squared
from kfac_jax_lite.linalg import all_finite, relative_change
from kfac_jax_lite.options import Options
from kfac_jax_lite.types import Array


def gated(flag: Array, function: Callable[[Any], Any], carry: Any) -> Any:
    """``function(carry)`` if ``flag``, else ``carry``, in place.

    A loop of at most one turn: XLA updates the carry of a ``while`` in its own buffers,
    where both branches of a ``cond`` would write a copy of everything they return.

    Args:
        flag: Scalar bool.
        function: Keeps structure, shapes and dtypes.
        carry: What it changes.

    Returns:
        The carry.
    """

    def turn(loop):
        _, carry = loop
        return jnp.zeros_like(flag), function(carry)

    return lax.while_loop(lambda loop: loop[0], turn, (flag, carry))[1]


def refreshed(
    options: Options, record: Any, fresh: Any, step_number: Array, gate: Array
) -> Any:
    """A layer's moving average, changes and next interval, where ``gate`` is true."""

    def refresh(record):
        average, past, entry = record
        weight = options.factor_decay * entry.weight + (1 - options.factor_decay)
        weight = weight.astype(entry.weight.dtype)
        curvature = squared(fresh)
        changes = [
            jnp.where(
                entry.refreshes > k,
                largest_change(curvature, old),
                jnp.inf,
            )
            for k, old in enumerate(past)
        ]
        interval = options.interval.next_interval(
            entry.interval, entry.previous_interval, tuple(changes)
        )
        if options.method.moments and getattr(fresh, "s", None) is None:
            if hasattr(fresh, "s"):
                raise ValueError(
                    'inverse="ekfac" needs second moments: call value_and_grad with '
                    "opt_state=opt_state."
                )
        entry = entry._replace(
            interval=interval.astype(jnp.int32),
            previous_interval=entry.interval,
            last_refresh=step_number,
            refreshes=entry.refreshes + 1,
            weight=weight,
            diff=changes[0].astype(jnp.float32) if changes else entry.diff,
        )
        if hasattr(average, "s") and average.s is None:
            curvature = curvature._replace(s=None)
        average = moving_average(average, curvature, weight, options.factor_decay)
        cast = jax.tree.map(lambda x, like: x.astype(like.dtype), curvature, average)
        past = ((cast, *past)[: len(past)]) if past else past
        return average, past, entry

    return gated(gate, refresh, record)


def largest_change(new: Any, old: Any) -> Array:
    """The largest relative change over a layer's factors."""
    changes = [relative_change(new[0], old[0])]
    if hasattr(new, "g"):
        changes.append(relative_change(new.g, old.g))
    return jnp.max(jnp.stack(changes))


def inverted(options: Options, record, shift: Array, step_number, accepted: Array):
    """Refreshes a layer's cached inverse if it is time and something changed."""
    statistics, cached, entry = record
    elapsed = step_number - entry.last_inverse >= options.inverse_interval
    first = entry.last_inverse == 0
    stale = entry.last_refresh > entry.last_inverse
    if options.method.damped:
        stale |= entry.inverse_damping != shift.astype(jnp.float32)
    gate = accepted & (first | elapsed) & stale
    # Only what a method changes goes through the loop: EKFAC also turns its moments.
    turns = options.method.moments

    def refresh(carry):
        moments, cached, entry = carry
        whole = statistics._replace(s=moments) if turns else statistics
        new, whole = options.method.refresh(whole, cached, shift, first)
        good = all_finite(new)

        def choose(a, b):
            return jax.tree.map(lambda x, y: jnp.where(good, x, y), a, b)

        entry = entry._replace(
            last_inverse=jnp.where(good, step_number, entry.last_inverse),
            inversions=entry.inversions + good,
            failures=entry.failures + ~good,
            inverse_damping=jnp.where(
                good, shift.astype(jnp.float32), entry.inverse_damping
            ),
        )
        return choose(whole.s, moments) if turns else (), choose(new, cached), entry

    carry = (statistics.s if turns else (), cached, entry)
    moments, cached, entry = gated(gate, refresh, carry)
    statistics = statistics._replace(s=moments) if turns else statistics
    return statistics, cached, entry


def advance(options: Options, state: KFACState, entries: list, accepted: Array):
    """The clock for the next step."""
    if not entries:
        return state.clock
    clock = jax.tree.map(lambda *xs: jnp.stack(xs), *entries)
    due = options.interval.is_due(state.count + 2, clock.interval, clock.last_refresh)
    return clock._replace(due=jnp.where(accepted, due, state.clock.due))
