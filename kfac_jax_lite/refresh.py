"""What happens to layers that are due: average, compare, choose an interval, invert.

Matrices are touched inside gates, layer by layer; the clock's vectors over layers are
updated once for all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite import stagger
from kfac_jax_lite.exchange import agreed, exchanged
from kfac_jax_lite.factors.state import (
    Clock,
    Slices,
    curvature,
    moving_average,
    taking_part,
)
from kfac_jax_lite.linalg import LARGEST, relative_change
from kfac_jax_lite.options import Options
from kfac_jax_lite.ownership import Plan
from kfac_jax_lite.slices import is_packed, packed_statistics, sliced_change
from kfac_jax_lite.tree import choose, vary, varying_axes
from kfac_jax_lite.types import Array, LayerTag, computed


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

    def turn(loop: tuple[Array, Any]):
        _, carry = loop
        return jnp.zeros_like(flag), function(carry)

    return lax.while_loop(lambda loop: loop[0], turn, (flag, carry))[1]


def apart(
    flag: Array, function: Callable[[], Array], otherwise: Any, tree: Any
) -> Array:
    """A scalar, computed in a loop of one turn.

    All that leads to a scalar would else be compiled into every kernel that reads it.

    Args:
        flag: Whether to compute it; a traced value, or XLA would unroll the loop.
        function: Computes it.
        otherwise: Its value where it is not computed.
        tree: What it is computed from.

    Returns:
        The scalar, of the dtype that ``function`` gives.
    """
    axes = varying_axes((tree, flag))
    dtype = jax.eval_shape(function).dtype

    def compute(_: Any):
        return vary(function(), axes)

    return gated(vary(flag, axes), compute, vary(jnp.asarray(otherwise, dtype), axes))


def absorbed(
    options: Options,
    plan: Plan,
    layers: Sequence[LayerTag],
    factors: dict[str, Any],
    previous: dict[str, Any],
    clock: Clock,
    statistics: Any,
    clean: Array,
    step: Any,
) -> tuple[dict[str, Any], dict[str, Any], Clock, Array]:
    """Averages what is due, in one gate: a step with nothing due writes nothing.

    A layer that no gradient reaches has learned nothing about its curvature: its zeros
    are not averaged (after sixty of them ``F + λ`` would be ``λ``), its interval does
    not change, and it stays due until a gradient reaches it.

    Args:
        options: The optimiser's options.
        plan: Who does what.
        layers: The layers present.
        factors: Averaged statistics by layer name.
        previous: Remembered statistics by layer name.
        clock: Before.
        statistics: This device's fresh statistics.
        clean: Whether the gradients are finite, on every device.
        step: This step, from 1.

    Returns:
        ``(factors, previous, clock, accepted)``; a statistic that is not finite makes
        ``accepted`` false and changes nothing. In ``clock.due``, where accepted, the
        layers that no gradient has reached.
    """
    decay = options.factor_decay
    weight = (decay * clock.weight + (1 - decay)).astype(clock.weight.dtype)

    def absorb(carry: tuple[Any, ...]):
        factors, previous, _, clean, _ = carry
        own = computed(statistics)
        fresh = exchanged(options, plan, layers, clock.due, own)
        finite, idle = agreed(options, plan, layers, clock.due, fresh)
        good, idle = clean & finite, clock.due & idle
        gates, changes = clock.due & ~idle & good, []
        for i, layer in enumerate(layers):
            name = layer.name
            record = (layer, factors[name], previous[name], fresh[name])
            found = refreshed(options, *record, gates[i], weight, i)
            factors[name], previous[name], change = found
            changes.append(change)
        return factors, previous, jnp.stack(changes), good, idle

    none = jnp.zeros((len(layers), options.interval.memory), jnp.float32)
    wanted = clean & jnp.any(clock.due)
    carry = (factors, previous, none, clean, jnp.zeros_like(clock.due))
    factors, previous, changes, accepted, idle = gated(wanted, absorb, carry)
    gates = clock.due & ~idle & accepted
    clock = clock._replace(due=jnp.where(accepted, idle, clock.due))
    clock = clock_after_refresh(options, clock, gates, changes, weight, step)
    return factors, previous, clock, accepted


def refreshed(
    options: Options,
    layer: LayerTag,
    average: Any,
    past: tuple[Any, ...],
    fresh: Any,
    gate: Array,
    weight: Array,
    index: int,
) -> tuple[Any, tuple[Any, ...], Array]:
    """A layer's moving average and remembered statistics, where ``gate`` is true.

    Args:
        options: The optimiser's options.
        layer: The layer.
        average: Averaged statistics.
        past: Remembered fresh statistics, newest first.
        fresh: This step's statistics.
        gate: Whether the layer is refreshed.
        weight: Sums of the averages' weights, this step included, ``[layers]``.
        index: The layer's place there.

    Returns:
        ``(average, past, changes)``; ``changes [memory]`` are the relative changes
        against each remembered statistic.

    Raises:
        ValueError: EKFAC without second moments.
    """
    if getattr(average, "s", None) is not None and fresh.s is None:
        raise ValueError(
            'inverse="ekfac" needs second moments: call value_and_grad with '
            "opt_state=opt_state."
        )

    def refresh(carry: tuple[Any, ...]):
        average, past, _ = carry
        new = curvature(layer, fresh)
        if is_packed(average):
            new = packed_statistics(layer, new)
        if getattr(average, "s", 0) is None:
            new = new._replace(s=None)
        average, new = taking_part(layer, average, new)
        axis_name = options.axis_name
        changes = [largest_change(new, old, axis_name) for old in past]
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, average)
        average = moving_average(average, new, weight[index], options.factor_decay)
        kept = (new, *past)[: len(past)]
        stacked = jnp.stack(changes).astype(jnp.float32) if changes else no_changes
        return average, kept, stacked

    no_changes = jnp.zeros((len(past),), jnp.float32)
    return gated(gate, refresh, (average, past, no_changes))


def largest_change(new: Any, old: Any, axis_name: Any) -> Array:
    """The largest relative change over a layer's factors."""
    if isinstance(new[0], Slices):
        return sliced_change(new, old, axis_name)
    pairs = [(new[0], old[0])]
    if hasattr(new, "g"):
        pairs.append((new.g, old.g))
    changes = [relative_change(*jax.tree.leaves(pair)) for pair in pairs]
    return jnp.max(jnp.stack(changes))


def clock_after_refresh(
    options: Options,
    clock: Clock,
    gates: Array,
    changes: Array,
    weight: Array,
    step: Any,
) -> Clock:
    """The clock with refreshes counted and intervals chosen.

    Args:
        options: The optimiser's options.
        clock: Before.
        gates: Which layers were refreshed, ``[layers]``.
        changes: Relative changes, ``[layers, memory]``.
        weight: Weights of their averages, as for the layers refreshed.
        step: This step, from 1.

    Returns:
        The clock after.
    """
    memory = options.interval.memory
    known = [
        jnp.where(clock.refreshes > k, changes[:, k], LARGEST) for k in range(memory)
    ]
    interval = options.interval.next_interval(
        clock.interval, clock.previous_interval, tuple(known)
    )
    new = clock._replace(
        interval=interval.astype(jnp.int32),
        previous_interval=clock.interval,
        last_refresh=jnp.full_like(clock.last_refresh, step),
        refreshes=clock.refreshes + 1,
        weight=weight,
        diff=known[0] if known else clock.diff,
    )
    return choose(gates, new, clock)


def refreshes_due(
    options: Options, layers: Sequence[LayerTag], clock: Clock, step: Any
) -> Array:
    """Which layers' statistics are wanted at ``step``.

    Args:
        options: The optimiser's options.
        layers: The layers present.
        clock: After the step before, ``due`` the layers that were idle in it.
        step: The step, from 1.

    Returns:
        Flags ``[layers]``: those idle, and those that the rule names. For the rule,
        which may serve layers together or in turns, the idle ones have been served.
    """
    last = jnp.where(clock.due, step - 1, clock.last_refresh)
    if options.stagger:
        record = (step, last, clock.refreshes, clock.interval)
        return clock.due | stagger.refreshes(layers, *record)
    return clock.due | options.interval.is_due(step, clock.interval, last)


def inversion_gates(
    options: Options,
    plan: Plan,
    layers: Sequence[LayerTag],
    clock: Clock,
    shift: Array,
    step: Any,
    accepted: Array,
) -> Array:
    """Which layers are inverted now: it is time and something has changed."""
    last = clock.last_inverse
    stale = (clock.last_refresh > last) | (last == 0)
    if options.method.damped:
        stale |= clock.inverse_damping != shift.astype(jnp.float32)
    ready = stale & (step - last >= options.inverse_interval)
    if options.stagger:
        busy = jnp.any(clock.last_refresh == step)
        record = (last, clock.inversions, options.inverse_interval, busy)
        ready = stagger.inversions(layers, plan, stale, step, *record)
    kronecker = jnp.array([layer.kronecker for layer in layers])
    return accepted & kronecker & stale & (ready | never_inverted(clock, step))


def never_inverted(clock: Clock, step: Any) -> Array:
    """Whose inverses hold no statistics: new layers, and those that were idle so far.

    Args:
        clock: After this step's refreshes.
        step: This step, from 1.

    Returns:
        Flags ``[layers]``.
    """
    woken = (clock.refreshes == 1) & (clock.last_refresh == step)
    return (clock.last_inverse == 0) | woken


def clock_after_inversion(
    clock: Clock, gates: Array, good: Array, shift: Array, step: Any
) -> Clock:
    """The clock with inversions and failures counted."""
    done, failed = gates & good, gates & ~good
    damping = jnp.where(done, shift.astype(jnp.float32), clock.inverse_damping)
    return clock._replace(
        last_inverse=jnp.where(done, step, clock.last_inverse),
        inversions=clock.inversions + done,
        failures=clock.failures + failed,
        inverse_damping=damping,
    )
