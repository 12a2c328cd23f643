"""``scale_by_kfac``: gated statistics and inverses as an optax transformation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite import damping as damping_lib
from kfac_jax_lite.factors.checks import (
    check_nothing_due,
    check_state,
    checked_statistics,
)
from kfac_jax_lite.factors.restrict import present_layers
from kfac_jax_lite.factors.state import (
    Clock,
    KFACState,
    zero_statistics,
)
from kfac_jax_lite.intervals import Interval, every
from kfac_jax_lite.inverse import initial_inverse, method_named
from kfac_jax_lite.linalg import all_finite
from kfac_jax_lite.options import Options
from kfac_jax_lite.precondition import gather, precondition, scatter
from kfac_jax_lite.reduce import Reduction, reduce_statistics, wire_elements
from kfac_jax_lite.refresh import (
    clock_after_inversion,
    clock_after_refresh,
    inversion_gates,
    inverted,
    refreshed,
)
from kfac_jax_lite.tree import leaves_by_path, replace_leaves, varying_axes
from kfac_jax_lite.types import Array, LayerTag, accumulation_dtype

EVERY_STEP = every(1)
ALL_REDUCE = Reduction()


def scale_by_kfac(
    layers: Sequence[LayerTag],
    damping: damping_lib.Damping = 1e-3,
    factor_decay: float | Array = 0.95,
    interval: Interval = EVERY_STEP,
    inverse: str = "cholesky",
    inverse_interval: int | Array = 1,
    axis_name: Any = None,
    reduction: Reduction = ALL_REDUCE,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with Kronecker-factored curvature.

    ``u = (F + λ I)⁻¹ ∇L`` block by block, with ``F_l ≈ A_l ⊗ G_l``. A layer's
    statistics are averaged, reduced over devices and inverted only at the steps its
    interval names; ``TaggedLoss.value_and_grad(…, opt_state=…)`` computes them only
    then.

    Args:
        layers: ``tagged.layers``.
        damping: ``λ``, a number or an optax schedule of the step count.
        factor_decay: ``d`` of ``X̂ ← d X̂ + (1 − d) X`` (it weights the *old* value;
            zero start, bias-corrected).
        interval: When statistics are refreshed, from ``kfac.intervals``.
        inverse: ``"cholesky"`` or ``"newton_schulz"`` (damping split over the factors),
            ``"eigh"`` (exact Kronecker damping) or ``"ekfac"`` (eigenbasis with
            re-estimated second moments).
        inverse_interval: Least number of steps between inversions of a layer; it is
            skipped while neither its factors nor its damping have changed.
        axis_name: Mapped axes to average statistics over (``pmap``, ``shard_map``).
            None under ``jit``, whatever the sharding.
        reduction: How statistics travel between devices.

    Returns:
        An optax transformation. ``update(grads, state, params,
        statistics=statistics)``; gradients are expected to be averaged over devices
        already; ``damping=`` there overrides the one given here. A batch with a NaN
        or Inf in gradients or statistics gives zero updates and changes nothing in the
        state but ``skipped``.

    Raises:
        ValueError: A value is out of range; layers of another model; at ``update``,
            statistics are missing.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671; Osawa et al., 2020, arXiv:2002.06015.
    """
    options = Options(
        tuple(layers or ()),
        damping,
        factor_decay,
        interval,
        method_named(inverse),
        inverse_interval,
        axis_name,
        reduction,
    )
    options.check()

    def init_fn(params):
        return init_state(options, params)

    def update_fn(
        updates, state, params=None, *, statistics=None, damping=None, **extra_args
    ):
        del params, extra_args
        now = (
            options
            if damping is None
            else dataclasses.replace(options, damping=damping)
        )
        return step(now, updates, state, statistics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def init_state(options: Options, params: Any) -> KFACState:
    """The state before the first step: everything due, identity inverses."""
    layers = present_layers(options.layers, params)
    dtypes = {k: leaf.dtype for k, leaf in leaves_by_path(params).items()}
    moments = options.method.moments
    if moments and any(
        len(t.params) < len(w.params) for t, w in pairs(options, layers)
    ):
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
        weight=jnp.zeros((n,), widest(zeros)),
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


def widest(tree: Any) -> Any:
    """Float32, or float64 if some statistics are."""
    return jnp.result_type(jnp.float32, *{x.dtype for x in jax.tree.leaves(tree)})


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
    fresh = reduced(options, layers, state, statistics)
    accepted = is_accepted(options, layers, state, grads, fresh)
    shift = damping_lib.value_at(options.damping, state.count)
    number, clock = state.count + 1, state.clock
    factors, previous = dict(state.factors), dict(state.previous)
    if fresh:
        gates, decay = clock.due & accepted, options.factor_decay
        weight = (decay * clock.weight + (1 - decay)).astype(clock.weight.dtype)
        changes = []
        for i, layer in enumerate(layers):
            name = layer.name
            record = (layer, factors[name], previous[name], fresh[name])
            record += (gates[i], weight[i])
            factors[name], previous[name], change = refreshed(options, *record)
            changes.append(change)
        clock = clock_after_refresh(
            options, clock, gates, jnp.stack(changes), weight, number
        )
    gates = inversion_gates(options, clock, shift, number, accepted)
    gates &= jnp.array([layer.kronecker for layer in layers])
    inverses, good = dict(state.inverses), []
    for i, layer in enumerate(layers):
        name, done = layer.name, jnp.asarray(True)
        if layer.kronecker:
            first = clock.last_inverse[i] == 0
            record = (layer, factors[name], inverses[name], shift, gates[i], first)
            factors[name], inverses[name], done = inverted(options, *record)
        good.append(done)
    clock = clock_after_inversion(clock, gates, jnp.stack(good), shift, number)
    due = options.interval.is_due(number + 1, clock.interval, clock.last_refresh)
    new_state = KFACState(
        count=state.count + accepted,
        skipped=state.skipped + ~accepted,
        damping=jnp.where(accepted, shift, state.damping).astype(state.damping.dtype),
        clock=clock._replace(due=jnp.where(accepted, due, clock.due)),
        factors=factors,
        previous=previous,
        inverses=inverses,
    )
    return directions(layers, grads, new_state, shift, accepted), new_state


def directions(
    layers: Sequence[LayerTag], grads: Any, state: KFACState, shift: Array, accepted
) -> Any:
    """Preconditioned gradients; zeros where the batch was rejected."""
    leaves = leaves_by_path(grads)
    outputs: dict[str, Array] = {}
    for layer in layers:
        factors, inverse = state.factors[layer.name], state.inverses[layer.name]
        v = gather(layer, leaves).astype(factors[0].dtype)
        u = precondition(layer, v, factors, inverse, shift)
        for path, part in scatter(layer, u, leaves).items():
            outputs[path] = outputs[path] + part if path in outputs else part
    updates = {
        path: jnp.where(accepted, u, 0).astype(leaves[path].dtype)
        for path, u in outputs.items()
    }
    return replace_leaves(grads, updates)


def is_accepted(options, layers, state: KFACState, grads: Any, fresh: dict) -> Array:
    """Whether gradients and wanted statistics are finite, on every device."""
    accepted = all_finite(grads)
    for i, layer in enumerate(layers):
        if fresh:
            due = state.clock.due[i]
            accepted &= lax.cond(due, all_finite, always, fresh[layer.name])
    if options.axis_name is not None:
        accepted = lax.pmin(accepted.astype(jnp.int32), options.axis_name) > 0
    return accepted


def always(statistics: Any) -> Array:
    """Statistics that nobody asked for are not looked at."""
    del statistics
    return jnp.asarray(True)


def reduced(options: Options, layers: Sequence[LayerTag], state, statistics) -> dict:
    """Each layer's statistics averaged over devices, inside its gate."""
    fresh = {}
    for i, layer in enumerate(layers):
        if statistics is None:
            break
        own = checked_statistics(layer, statistics)
        if options.axis_name is not None:

            def reduce(own, layer=layer):
                return reduce_statistics(
                    layer, own, options.axis_name, options.reduction
                )

            def skip(own):
                # Types that vary over devices do not after the reduction.
                if not varying_axes(own):
                    return own
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own)

            own = lax.cond(state.clock.due[i], reduce, skip, own)
        fresh[layer.name] = own
    return fresh
