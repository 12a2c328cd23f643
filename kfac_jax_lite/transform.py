"""``scale_by_kfac``: gated statistics and inverses as an optax transformation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite import damping as damping_lib
from kfac_jax_lite.factors.restrict import part_of_statistics, present_layers
from kfac_jax_lite.factors.state import (
    Clock,
    KFACState,
    moving_average,
    squared,
    zero_statistics,
)
from kfac_jax_lite.intervals import Interval, every
from kfac_jax_lite.inverse import Method, initial_inverse, method_named
from kfac_jax_lite.linalg import all_finite, relative_change
from kfac_jax_lite.precondition import gather, precondition, scatter
from kfac_jax_lite.reduce import Reduction, reduce_statistics, wire_elements
from kfac_jax_lite.tree import leaves_by_path, replace_leaves
from kfac_jax_lite.types import Array, LayerTag, accumulation_dtype


def scale_by_kfac(
    layers: Sequence[LayerTag],
    damping: damping_lib.Damping = 1e-3,
    factor_decay: float = 0.95,
    interval: Interval | None = None,
    inverse: str = "cholesky",
    inverse_interval: int = 1,
    axis_name: Any = None,
    reduction: Reduction | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with Kronecker-factored curvature.

    ``u = (F + λ I)⁻¹ ∇L`` block by block, with ``F_l ≈ A_l ⊗ G_l``. A layer's statistics
    are averaged, reduced over devices and inverted only at the steps its interval names;
    ``TaggedLoss.value_and_grad(…, opt_state=…)`` computes them only then.

    Args:
        layers: ``tagged.layers``.
        damping: ``λ``, a number or an optax schedule of the step count.
        factor_decay: ``d`` of ``X̂ ← d X̂ + (1 − d) X`` (it weights the *old* value;
            zero start, bias-corrected).
        interval: When statistics are refreshed, from ``kfac.intervals``; None: every
            step.
        inverse: ``"cholesky"`` or ``"newton_schulz"`` (damping split over the factors),
            ``"eigh"`` (exact Kronecker damping) or ``"ekfac"`` (eigenbasis with
            re-estimated second moments).
        inverse_interval: Least number of steps between inversions of a layer; it is
            skipped while neither its factors nor its damping have changed.
        axis_name: Mapped axes to average statistics over (``pmap``, ``shard_map``).
            None under ``jit``, whatever the sharding.
        reduction: How statistics travel between devices; None: ``Reduction()``.

    Returns:
        An optax transformation. ``update(grads, state, params, statistics=statistics)``;
        gradients are expected to be averaged over devices already. A batch with a NaN
        or Inf in gradients or statistics gives zero updates and changes nothing in the
        state but ``skipped``.

    Raises:
        ValueError: A value is out of range; layers of another model; at ``update``,
            statistics are missing.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671; Osawa et al., 2020, arXiv:2002.06015.
    """
    options = Options(
        tuple(layers),
        damping,
        factor_decay,
        every(1) if interval is None else interval,
        method_named(inverse),
        inverse_interval,
        axis_name,
        Reduction() if reduction is None else reduction,
    )
    options.check()

    def init_fn(params):
        return init_state(options, params)

    def update_fn(updates, state, params=None, *, statistics=None, **extra_args):
        del params, extra_args
        return step(options, updates, state, statistics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of ``scale_by_kfac``; numbers may be traced values."""

    layers: tuple[LayerTag, ...]
    damping: damping_lib.Damping
    factor_decay: Any
    interval: Interval
    method: Method
    inverse_interval: Any
    axis_name: Any
    reduction: Reduction

    def check(self) -> None:
        """Raises for values that cannot be right; traced values pass."""
        if not all(isinstance(layer, LayerTag) for layer in self.layers):
            raise TypeError("layers must be LayerTags: pass tagged.layers.")
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise ValueError("two layers share a name: pass layers of one tagged loss.")
        damping_lib.check(self.damping)
        decay = self.factor_decay
        if isinstance(decay, (int, float)) and not 0 <= decay < 1:
            raise ValueError(f"factor_decay must be in [0, 1), got {decay!r}.")
        n = self.inverse_interval
        if isinstance(n, (int, float)) and (n < 1 or n != int(n)):
            raise ValueError(f"inverse_interval must be a whole number >= 1, got {n!r}.")
        if not isinstance(self.interval, Interval):
            raise TypeError(
                f"interval must come from kfac.intervals, got {self.interval!r}."
            )


def init_state(options: Options, params: Any) -> KFACState:
    """The state before the first step: everything due, identity inverses."""
    layers = present_layers(options.layers, params)
    dtypes = {k: leaf.dtype for k, leaf in leaves_by_path(params).items()}
    moments = options.method.moments
    if moments and any(len(t.params) < len(w.params) for t, w in pairs(options, layers)):
        raise ValueError(
            'inverse="ekfac" needs whole layers: mask weight and bias together.'
        )
    zeros, inverses, sizes = {}, {}, []
    for layer in layers:
        dtype = accumulation_dtype(dtypes[layer.params[0]])
        zeros[layer.name] = zero_statistics(layer, dtype, moments)
        inverses[layer.name] = initial_inverse(layer, options.method, dtype)
        wire = options.reduction.dtype or dtype
        elements = wire_elements(layer, options.reduction, moments)
        sizes.append((elements, elements * jnp.dtype(wire).itemsize))
    n = len(layers)

    def ints(value):
        return jnp.full((n,), value, jnp.int32)

    def floats(value):
        return jnp.full((n,), value, jnp.float32)

    clock = Clock(
        due=jnp.ones((n,), bool),
        interval=ints(options.interval.period),
        previous_interval=ints(options.interval.period),
        last_refresh=ints(0),
        last_inverse=ints(0),
        refreshes=ints(0),
        inversions=ints(0),
        failures=ints(0),
        weight=floats(0),
        diff=floats(jnp.inf),
        inverse_damping=floats(0),
        elements=jnp.array([s[0] for s in sizes], jnp.int32),
        bytes=jnp.array([s[1] for s in sizes], jnp.int32),
    )
    return KFACState(
        count=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        damping=jnp.zeros((), jnp.float32),
        clock=clock,
        factors=zeros,
        previous={
            name: tuple(jax.tree.map(jnp.zeros_like, z) for _ in range(memory(options)))
            for name, z in zeros.items()
        },
        inverses=inverses,
    )


def memory(options: Options) -> int:
    """How many past statistics are kept."""
    return options.interval.memory


def pairs(options: Options, layers: Sequence[LayerTag]):
    """Layers as present, beside the whole ones."""
    whole = {layer.name: layer for layer in options.layers}
    return [(layer, whole[layer.name]) for layer in layers]


def step(options: Options, grads: Any, state: KFACState, statistics: Any):
    """One update: reduce, average, invert, precondition."""
    layers = present_layers(options.layers, grads)
    check_state(layers, state)
    if statistics is None:
        check_nothing_due(state)
    fresh = {}
    for i, layer in enumerate(layers):
        if statistics is not None:
            given = checked_statistics(layer, statistics)
            fresh[layer.name] = reduced(options, given, state.clock.due[i])
    accepted = all_finite((grads, fresh))
    if options.axis_name is not None:
        accepted = lax.pmin(accepted.astype(jnp.int32), options.axis_name) > 0
    leaves = leaves_by_path(grads)
    shift = damping_lib.value_at(options.damping, state.count)
    entries, factors, previous, inverses = [], {}, {}, {}
    outputs: dict[str, Array] = {}
    for i, layer in enumerate(layers):
        name = layer.name
        entry = jax.tree.map(lambda x, i=i: x[i], state.clock)
        record = (state.factors[name], state.previous[name], entry)
        if fresh:
            gate = entry.due & accepted
            record = lax.cond(
                gate, refresher(options), keeper, record, fresh[name], state.count + 1
            )
        factors[name], previous[name], entry = record
        solved = (factors[name], state.inverses[name], entry)
        if layer.kronecker:
            solved = inverted(options, solved, shift, state.count + 1, accepted)
        factors[name], inverses[name], entry = solved
        v = gather(layer, leaves).astype(accumulation_dtype(factors[name][0].dtype))
        u = precondition(layer, v, factors[name], inverses[name], shift)
        u = jnp.where(accepted, u, 0)
        for path, part in scatter(layer, u, leaves).items():
            outputs[path] = outputs[path] + part if path in outputs else part
        entries.append(entry)
    clock = advance(options, state, entries, accepted)
    updates = {k: u.astype(leaves[k].dtype) for k, u in outputs.items()}
    new_state = KFACState(
        count=state.count + accepted,
        skipped=state.skipped + ~accepted,
        damping=jnp.where(accepted, shift, state.damping).astype(state.damping.dtype),
        clock=clock,
        factors=factors,
        previous=previous,
        inverses=inverses,
    )
    return replace_leaves(grads, updates), new_state


def check_state(layers: Sequence[LayerTag], state: KFACState) -> None:
    """Refuses a state whose layers or shapes are not those of the gradient."""
    if set(state.factors) != {layer.name for layer in layers}:
        other = sorted(set(state.factors) ^ {layer.name for layer in layers})
        raise ValueError(
            f"the optimiser state is of another model: it and the layers differ in "
            f"{other[0]}."
        )
    for layer in layers:
        shape = state.factors[layer.name][0].shape
        if shape != layer.a_shape:
            raise ValueError(
                f"the optimiser state is of another model: layer {layer.name} has a "
                f"factor of shape {shape} in it, wanted {layer.a_shape}."
            )


def check_nothing_due(state: KFACState) -> None:
    """Without statistics a step is possible only if it is known that none are wanted."""
    due = state.clock.due
    if isinstance(due, jax.core.Tracer) or bool(due.any()):
        raise ValueError(
            "update needs statistics=…: take them from value, grads, statistics = "
            "tagged.value_and_grad(params, *args, opt_state=opt_state) and call "
            "tx.update(grads, opt_state, params, statistics=statistics)."
        )


def checked_statistics(layer: LayerTag, statistics: Any) -> Any:
    """A layer's statistics, or an error that says what is wrong with them."""
    if layer.name not in statistics:
        raise ValueError(
            f"statistics hold nothing for layer {layer.name}: they are of another model."
        )
    own = part_of_statistics(layer, statistics[layer.name])
    shapes = [tuple(own[0].shape)]
    wanted = [layer.a_shape]
    if layer.kronecker:
        shapes.append(tuple(own.g.shape))
        wanted.append(layer.g_shape)
    if shapes != wanted:
        raise ValueError(
            f"layer {layer.name}: statistics have shapes {shapes}, wanted {wanted}."
        )
    return own


def reduced(options: Options, statistics: Any, due: Array) -> Any:
    """Statistics averaged over devices, inside the gate."""
    if options.axis_name is None:
        return statistics
    return lax.cond(
        due,
        lambda s: reduce_statistics(s, options.axis_name, options.reduction),
        lambda s: s,
        statistics,
    )


def keeper(record, fresh, step_number):
    """The branch of a layer that is not refreshed."""
    del fresh, step_number
    return record


def refresher(options: Options):
    """The branch of a layer that is: moving average, changes, next interval."""

    def refresh(record, fresh, step_number):
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

    return refresh


def largest_change(new: Any, old: Any) -> Array:
    """The largest relative change over a layer's factors."""
    changes = [relative_change(new[0], old[0])]
    if hasattr(new, "g"):
        changes.append(relative_change(new.g, old.g))
    return jnp.max(jnp.stack(changes))


def inverted(options: Options, record, shift: Array, step_number, accepted: Array):
    """Refreshes a layer's cached inverse if it is time and something changed."""
    _, _, entry = record
    elapsed = step_number - entry.last_inverse >= options.inverse_interval
    first = entry.last_inverse == 0
    stale = entry.last_refresh > entry.last_inverse
    if options.method.damped:
        stale |= entry.inverse_damping != shift.astype(jnp.float32)
    gate = accepted & (first | elapsed) & stale

    def refresh(record):
        statistics, cached, entry = record
        new, turned = options.method.refresh(statistics, cached, shift, first)
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
        return choose(turned, statistics), choose(new, cached), entry

    return lax.cond(gate, refresh, lambda record: record, record)


def advance(options: Options, state: KFACState, entries: list, accepted: Array):
    """The clock for the next step."""
    if not entries:
        return state.clock
    clock = jax.tree.map(lambda *xs: jnp.stack(xs), *entries)
    due = options.interval.is_due(state.count + 2, clock.interval, clock.last_refresh)
    return clock._replace(due=jnp.where(accepted, due, state.clock.due))
