"""When layers are refreshed and inverted, and what the clock says of it.

With ``stagger``, which of the layers that wait are served in a step, so that no step is
a long one.

A layer waits from the moment its interval has passed. In every step those that have
waited longest are served, until they cost what a step has to do on average,
``Σ_l cost_l / interval_l``: the queue does not grow, and a step exceeds that average by
less than one layer. After its first service, which all layers get in the first step, a
layer waits for a part of its interval only, its share of all work up to and including
it; from then on the layers' turns are spread.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.linalg import LARGEST
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import Plan, inverse_cost
from kfac_jax_lite.kronecker.state import Clock
from kfac_jax_lite.optimizer.options import StepContext

# The part of an inversion's interval for which it makes way for refreshes.
PATIENCE = 8


def phases(cost: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Share of its group's work that is done when a layer's turn ends, ``[layers]``."""
    done = np.array(
        [cost[: i + 1][groups[: i + 1] == g].sum() for i, g in enumerate(groups)]
    )
    total = np.array([cost[groups == g].sum() for g in groups])
    return done / np.maximum(total, 1e-30)


def wait(times: Array, interval: Array, phase: np.ndarray) -> Array:
    """Steps between two services: after the first only the layer's share of them."""
    part = jnp.ceil(jnp.asarray(phase, jnp.float32) * interval - 1e-4)
    part = jnp.maximum(part.astype(jnp.int32), 1)
    return jnp.where(times == 1, part, interval)


def served(
    waiting: Array, late: Array, interval: Array, cost: np.ndarray, groups: np.ndarray
) -> Array:
    """Which of the waiting layers are served now.

    Args:
        waiting: Which wait, ``[layers]``.

    Returns:
        Flags ``[layers]``.
    """
    number = np.arange(len(cost))
    same = groups[:, None] == groups[None, :]
    tie = (late[None, :] == late[:, None]) & (number[None, :] < number[:, None])
    earlier = same & waiting[None, :] & ((late[None, :] > late[:, None]) | tie)
    ahead = jnp.sum(jnp.where(earlier, jnp.asarray(cost, jnp.float32), 0), 1)
    share = jnp.asarray(cost, jnp.float32) / interval
    budget = jnp.sum(jnp.where(same, share, 0), 1)
    # A layer that costs nothing never stands back; rounding must not starve one.
    return waiting & ((ahead < budget * (1 - 1e-4)) | (ahead == 0))


def refresh_costs(layers: Sequence[LayerTag]) -> np.ndarray:
    """One for every Kronecker layer: convolutions of a network cost about the same."""
    return np.array([float(layer.kronecker) for layer in layers])


def inversion_costs(layers: Sequence[LayerTag]) -> np.ndarray:
    """``a³ + g³``; 0 for layers that are solved directly."""
    return np.array([float(inverse_cost(t)) if t.kronecker else 0.0 for t in layers])


def owners(layers: Sequence[LayerTag], plan: Plan) -> np.ndarray:
    """The device that inverts each layer; −1 for all of them."""
    return np.array([plan.owners.get(layer.name, -1) for layer in layers])


def staggered_refreshes(
    layers: Sequence[LayerTag], step: Any, last: Array, times: Array, interval: Array
) -> Array:
    """Which layers are refreshed at ``step``, after their first refresh.

    Returns:
        Flags ``[layers]``.
    """
    cost, groups = refresh_costs(layers), np.zeros(len(layers), int)
    wanted = wait(times, interval, phases(cost, groups))
    late = step - last - wanted
    return (times == 0) | served(late >= 0, late, interval, cost, groups)


def staggered_inversions(
    layers: Sequence[LayerTag],
    plan: Plan,
    stale: Array,
    step: Any,
    last: Array,
    times: Array,
    interval: Any,
    busy: Array,
) -> Array:
    """Which layers are inverted at ``step``, after their first inversion.

    Returns:
        Flags ``[layers]``.
    """
    cost, groups = inversion_costs(layers), owners(layers, plan)
    interval = jnp.broadcast_to(jnp.asarray(interval, jnp.int32), last.shape)
    late = step - last - wait(times, interval, phases(cost, groups))
    ready = stale & (late >= 0) & (~busy | (late >= interval // PATIENCE))
    return served(ready, late, interval, cost, groups)


def clock_after_refresh(
    context: StepContext, clock: Clock, gates: Array, changes: Array, weight: Array
) -> Clock:
    """The clock with refreshes counted and intervals chosen.

    Args:
        gates: Which layers were refreshed, ``[layers]``.
        changes: Relative changes, ``[layers, memory]``.
    """
    memory = context.interval.memory
    known = [
        jnp.where(clock.refreshes > k, changes[:, k], LARGEST) for k in range(memory)
    ]
    interval = context.interval.next_interval(
        clock.interval, clock.previous_interval, tuple(known)
    )
    new = clock._replace(
        interval=interval.astype(jnp.int32),
        previous_interval=clock.interval,
        last_refresh=jnp.full_like(clock.last_refresh, context.step),
        refreshes=clock.refreshes + 1,
        weight=weight,
        diff=known[0] if known else clock.diff,
    )
    return choose(gates, new, clock)


def refreshes_due(context: StepContext, clock: Clock) -> Array:
    """Which layers' statistics are wanted at the next step.

    Returns:
        Flags ``[layers]``: those idle, and those that the rule names. For the rule,
        which may serve layers together or in turns, the idle ones have been served.
    """
    step = context.step + 1
    last = jnp.where(clock.due, context.step, clock.last_refresh)
    if not context.stagger:
        return clock.due | context.interval.is_due(step, clock.interval, last)
    times, interval = clock.refreshes, clock.interval
    return clock.due | staggered_refreshes(context.layers, step, last, times, interval)


def inversion_gates(context: StepContext, clock: Clock, accepted: Array) -> Array:
    """Which layers are inverted now: it is time and something has changed."""
    last, step, every = clock.last_inverse, context.step, context.inverse_interval
    stale = (clock.last_refresh > last) | (last == 0)
    if context.method.damped:
        stale |= clock.inverse_damping != context.shift.astype(jnp.float32)
    if context.stagger:
        busy = jnp.any(clock.last_refresh == step)
        ready = staggered_inversions(
            context.layers, context.plan, stale, step, last, clock.inversions,
            every, busy,
        )  # fmt: skip
    else:
        ready = stale & (step - last >= every)
    kronecker = jnp.array([layer.kronecker for layer in context.layers])
    return accepted & kronecker & stale & (ready | never_inverted(clock, step))


def never_inverted(clock: Clock, step: Any) -> Array:
    """Whose inverses hold no statistics: new layers, and those that were idle so far.

    Returns:
        Flags ``[layers]``.
    """
    woken = (clock.refreshes == 1) & (clock.last_refresh == step)
    return (clock.last_inverse == 0) | woken


def clock_after_inversion(
    context: StepContext, clock: Clock, gates: Array, good: Array
) -> Clock:
    """The clock with inversions and failures counted."""
    done, failed = gates & good, gates & ~good
    shift = context.shift.astype(jnp.float32)
    return clock._replace(
        last_inverse=jnp.where(done, context.step, clock.last_inverse),
        inversions=clock.inversions + done,
        failures=clock.failures + failed,
        inverse_damping=jnp.where(done, shift, clock.inverse_damping),
    )
