"""What happens to layers that are due: average, compare, choose an interval, invert.

Matrices are touched inside gates, layer by layer; the clock's vectors over layers are
updated once for all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import relative_change
from kfac_jax_lite.core.types import Array, LayerTag, computed
from kfac_jax_lite.distributed.exchange import agreed, exchanged
from kfac_jax_lite.distributed.layout import is_packed, packed_statistics, sliced_change
from kfac_jax_lite.kronecker.state import (
    Clock,
    Slices,
    curvature,
    moving_average,
    taking_part,
)
from kfac_jax_lite.optimizer.options import StepContext
from kfac_jax_lite.optimizer.schedule import clock_after_refresh


def absorbed(
    context: StepContext,
    factors: dict[str, Any],
    previous: dict[str, Any],
    clock: Clock,
    statistics: Any,
    clean: Array,
) -> tuple[dict[str, Any], dict[str, Any], Clock, Array]:
    """Averages what is due, in one gate: a step with nothing due writes nothing.

    A layer that no gradient reaches has learned nothing about its curvature: its zeros
    are not averaged (after sixty of them ``F + λ`` would be ``λ``), its interval does
    not change, and it stays due until a gradient reaches it.

    Returns:
        ``(factors, previous, clock, accepted)``; a statistic that is not finite makes
        ``accepted`` false and changes nothing. In ``clock.due``, where accepted, the
        layers that no gradient has reached.
    """
    layers, decay = context.layers, context.factor_decay
    weight = (decay * clock.weight + (1 - decay)).astype(clock.weight.dtype)

    def absorb(carry: tuple[Any, ...]):
        factors, previous, _, clean, _ = carry
        own = computed(statistics)
        fresh = exchanged(context, clock.due, own)
        finite, idle = agreed(context, clock.due, fresh)
        good, idle = clean & finite, clock.due & idle
        gates, changes = clock.due & ~idle & good, []
        for i, layer in enumerate(layers):
            name = layer.name
            factors[name], previous[name], change = refreshed(
                context, layer, factors[name], previous[name], fresh[name],
                gates[i], weight[i],
            )  # fmt: skip
            changes.append(change)
        return factors, previous, jnp.stack(changes), good, idle

    none = jnp.zeros((len(layers), context.interval.memory), jnp.float32)
    wanted = clean & jnp.any(clock.due)
    carry = (factors, previous, none, clean, jnp.zeros_like(clock.due))
    factors, previous, changes, accepted, idle = gated(wanted, absorb, carry)
    gates = clock.due & ~idle & accepted
    clock = clock._replace(due=jnp.where(accepted, idle, clock.due))
    clock = clock_after_refresh(context, clock, gates, changes, weight)
    return factors, previous, clock, accepted


def refreshed(
    context: StepContext,
    layer: LayerTag,
    average: Any,
    past: tuple[Any, ...],
    fresh: Any,
    gate: Array,
    weight: Array,
) -> tuple[Any, tuple[Any, ...], Array]:
    """A layer's moving average and remembered statistics, where ``gate`` is true.

    Returns:
        ``(average, past, changes)``; ``changes [memory]`` are the relative changes
        against each remembered statistic.
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
        changes = [largest_change(new, old, context.axis_name) for old in past]
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, average)
        average = moving_average(average, new, weight, context.factor_decay)
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
