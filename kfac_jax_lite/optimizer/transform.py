"""``scale_by_kfac``: gated statistics and inverses as an optax transformation."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from kfac_jax_lite.core.linalg import LARGEST, norms_finite
from kfac_jax_lite.core.mesh import automatic, explicit_mesh, resharded, specs_of
from kfac_jax_lite.core.pytree import leaves_by_path
from kfac_jax_lite.core.threads import warn_of_few_threads
from kfac_jax_lite.core.types import (
    Array,
    Deferred,
    LayerTag,
    accumulation_dtype,
    computed,
)
from kfac_jax_lite.distributed.context import Context
from kfac_jax_lite.distributed.exchange import everywhere
from kfac_jax_lite.distributed.layout import (
    divided,
    gather_rows,
    own_part,
    packed_statistics,
    precondition_rows,
    sliced_statistics,
    state_specs,
)
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.distributed.traffic import INVERSION, REFRESH, STEP, traffic
from kfac_jax_lite.kronecker.inverses import Method, method_named
from kfac_jax_lite.kronecker.masking import present_layers
from kfac_jax_lite.kronecker.precondition import (
    assemble,
    gather,
    precondition,
    precondition_thin,
    rows_of,
    zero_statistics,
)
from kfac_jax_lite.kronecker.state import (
    Clock,
    KFACState,
    check_nothing_due,
    check_state,
    words,
)
from kfac_jax_lite.optimizer import damping as damping_lib
from kfac_jax_lite.optimizer.intervals import Interval, every
from kfac_jax_lite.optimizer.inversions import inversions
from kfac_jax_lite.optimizer.line_search import keep_from_searches
from kfac_jax_lite.optimizer.options import Options
from kfac_jax_lite.optimizer.refresh import absorbed
from kfac_jax_lite.optimizer.schedule import (
    clock_after_inversion,
    inversion_gates,
    never_inverted,
    refreshes_due,
)
from kfac_jax_lite.optimizer.steps import adapted
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

EVERY_STEP = every(1)
ALL_REDUCE = Reduction()


def scale_by_kfac(
    layers: Sequence[LayerTag] | TaggedLoss,
    *,
    damping: damping_lib.Damping | damping_lib.Adaptive = 1e-3,
    factor_decay: float | Array = 0.95,
    interval: Interval = EVERY_STEP,
    inverse: str | Method = "cholesky",
    inverse_interval: int | Array = 1,
    axis_name: Any = None,
    reduction: Reduction = ALL_REDUCE,
    stagger: bool = False,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with Kronecker-factored curvature.

    ``u = (F + λ I)⁻¹ ∇L`` block by block, with ``F_l ≈ A_l ⊗ G_l``. A layer's
    statistics are averaged, reduced over devices and inverted only at the steps its
    interval names; ``TaggedLoss.value_and_grad(…, opt_state=…)`` computes them only
    then.

    Args:
        layers: ``tagged.layers``, or the tagged loss itself.
        damping: ``λ``, a number, an optax schedule of the step count, or
            ``kfac.damping.adaptive()``.
        factor_decay: ``d`` of ``X̂ ← d X̂ + (1 − d) X`` (it weights the *old* value;
            zero start, bias-corrected).
        interval: When statistics are refreshed, from ``kfac.intervals``.
        inverse: ``"cholesky"``, ``"newton_schulz"`` (damping split over the factors)
            or ``"auto"`` (the faster of them for the device and the size),
            ``"eigh"`` (exact Kronecker damping), ``"ekfac"`` (eigenbasis with
            re-estimated second moments) or ``"low_rank"`` (leading eigenpairs and a
            tail, exact Kronecker damping; ``kfac.low_rank(rank)`` says how many).
        inverse_interval: Least number of steps between inversions of a layer; it is
            skipped while neither its factors nor its damping have changed.
        axis_name: Mapped axes to average statistics over (``pmap``, ``shard_map``).
            None under ``jit``, whatever the sharding; with ``Reduction.mesh``, the axes
            of that mesh over which inversions are spread.
        reduction: How statistics travel between devices, and who inverts.
        stagger: Spread refreshes and inversions of layers over steps, so that no step
            takes long: those that have waited longest are served first (see
            ``optimizer.schedule``). A sampled Fisher's second pass is then taken in
            more steps. Intervals count from a layer's own last refresh.
        packed: Keep factors as triangles: half of their bytes between steps, for some
            copying at refreshes and inversions.

    Returns:
        An optax transformation. ``update(grads, state, params,
        statistics=statistics)``; gradients are expected to be averaged over devices
        already; ``damping=`` there overrides the one given here. A batch with a NaN
        or Inf in gradients or statistics, or with a gradient whose squared norm
        overflows, gives zero updates and changes nothing in the state but ``skipped``;
        so does one with ``reject=True``, after which inverses that hold damping are
        made anew.

    Raises:
        ValueError: A value is out of range; layers of another model; at ``update``,
            statistics are missing.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671; Osawa et al., 2020, arXiv:2002.06015.
    """
    if reduction.mode == "all" and reduction.mesh is not None:
        axis_name = None  # under jit, and nothing is spread: no axis is mapped
    rule = damping if isinstance(damping, damping_lib.Adaptive) else None
    options = Options(
        layers_of(layers),
        damping.initial if isinstance(damping, damping_lib.Adaptive) else damping,
        factor_decay,
        interval,
        method_named(inverse),
        inverse_interval,
        axis_name,
        reduction,
        stagger,
        packed,
    )
    options.check()

    def init_fn(params: Any):
        return init_state(options, params)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        statistics: Any = None,
        damping: Any = None,
        reject: Any = False,
        **extra_args: Any,
    ):
        del params
        keep_from_searches({**extra_args, "statistics": statistics})
        now = (
            options
            if damping is None
            else dataclasses.replace(options, damping=damping)
        )
        return placed_step(now, updates, state, statistics, reject)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return adapted(tx, rule, lag_of(inverse, inverse_interval), 1) if rule else tx


def layers_of(layers: Any) -> tuple[LayerTag, ...]:
    """The layers, of a tagged loss or as given."""
    if isinstance(layers, TaggedLoss):
        return layers.layers
    given = () if layers is None else layers
    return tuple(given) if isinstance(given, Iterable) else (given,)


def lag_of(inverse: str | Method, inverse_interval: Any) -> Any:
    """Steps until a new damping is in force."""
    return inverse_interval if method_named(inverse).damped else 1


def init_state(options: Options, params: Any) -> KFACState:
    """The state before the first step: everything due, identity inverses."""
    warn_of_few_threads(jax.tree.leaves(params))
    layers = present_layers(options.layers, params)
    dtypes = {k: leaf.dtype for k, leaf in leaves_by_path(params).items()}
    moments = options.method.moments
    if moments and any(
        len(t.params) < len(w.params) for t, w in pairs(options, layers)
    ):
        raise ValueError(
            'inverse="ekfac" needs whole layers: mask weight and bias together.'
        )
    plan = options.plan(layers)
    zeros, inverses, kinds = {}, {}, {}
    for layer in layers:
        dtype = accumulation_dtype(dtypes.get(layer.params[0], jnp.float32))
        kinds[layer.name] = dtype
        zeros[layer.name] = zero_statistics(layer, dtype, moments)
        inverses[layer.name] = options.method.initial(layer, dtype)
        if layer.name in plan.owners:
            zeros[layer.name] = sliced_statistics(layer, zeros[layer.name], plan)
        elif options.packed and layer.kronecker:
            zeros[layer.name] = packed_statistics(layer, zeros[layer.name])
        if plan.sliced(layer.name):
            inverses[layer.name] = divided(layer, inverses[layer.name], plan)
    counts = wire_counts(options, layers, kinds)
    n = len(layers)

    def ints(value: Any):
        return jnp.full((n,), value, jnp.int32)

    def floats(value: Any):
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
        diff=floats(LARGEST),
        inverse_damping=floats(0),
        **{name: words(row) for name, row in counts.items()},
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


def pairs(
    options: Options, layers: Sequence[LayerTag]
) -> list[tuple[LayerTag, LayerTag]]:
    """Layers as present, beside the whole ones."""
    whole = {layer.name: layer for layer in options.layers}
    return [(layer, whole[layer.name]) for layer in layers]


def wire_counts(
    options: Options, layers: Sequence[LayerTag], dtypes: dict[str, Any]
) -> dict[str, Any]:
    """What collectives move per layer: the clock's constants."""
    reduction = options.reduction
    mapped = options.axis_name is not None and reduction.mesh is None
    devices = options.plan(layers).devices
    counts: dict[str, list[int]] = {
        "elements": [], "bytes": [], "inversion_bytes": [], "step_bytes": []
    }  # fmt: skip
    events = {REFRESH: "bytes", INVERSION: "inversion_bytes", STEP: "step_bytes"}
    for layer in layers:
        size = jnp.dtype(dtypes[layer.name]).itemsize
        found = traffic(
            (layer,), reduction, devices, options.method, options.inverse_interval,
            mapped, size, memory(options),
        )  # fmt: skip
        found = [c for c in found if c.layer]
        for event, name in events.items():
            counts[name].append(sum(c.payload for c in found if c.event == event))
        elements = [c.elements * c.count for c in found if c.event == REFRESH]
        counts["elements"].append(sum(elements))
    return counts


def typed(
    run: Callable[..., Any],
    grads: Any,
    state: KFACState,
    statistics: Any,
    numbers: dict[str, Array],
) -> tuple[Any, KFACState]:
    """``run``; on an explicit mesh updates are typed like gradients."""
    known = () if isinstance(statistics, Deferred) else statistics
    if explicit_mesh((grads, state, known, numbers)) is None:
        return run(grads, state, statistics, numbers)
    statistics = computed(statistics, gated=True)
    specs = (specs_of(grads), specs_of(state))
    return automatic(run, grads, state, statistics, numbers, out_specs=specs)


def traced_numbers(options: Options, state: KFACState, reject: Any) -> dict[str, Array]:
    """Arrays that a step reads beside its trees."""
    # They are passed, never closed over: what is closed over keeps the type that it has
    # outside ``shard_map`` and on an explicit mesh.
    damping = damping_lib.value_at(options.damping, state.count)
    decay, n = options.factor_decay, options.inverse_interval
    numbers: dict[str, Any] = dict(
        damping=damping, factor_decay=decay, inverse_interval=n, reject=reject
    )
    return {k: x for k, x in numbers.items() if isinstance(x, jax.Array)}


def placed_step(
    options: Options, grads: Any, state: KFACState, statistics: Any, reject: Any
) -> tuple[Any, KFACState]:
    """``step``, under ``jit`` on every device of ``Reduction.mesh``."""
    if statistics is None:  # before any mapping makes the flags unknown
        check_nothing_due(state)
    mesh = options.reduction.mesh
    numbers = traced_numbers(options, state, reject)

    def run(grads: Any, state: KFACState, statistics: Any, numbers: dict[str, Any]):
        given = dict(numbers)
        flag = given.pop("reject", reject)
        now = dataclasses.replace(options, **given)
        return step(now, grads, state, statistics, flag)

    if mesh is None or options.reduction.mode == "all":
        return typed(run, grads, state, statistics, numbers)
    statistics = computed(statistics, gated=True)
    names = options.axis_name
    specs, whole = state_specs(state, names), PartitionSpec()
    manual = jax.shard_map(
        functools.partial(typed, run),
        mesh=mesh,
        in_specs=(whole, specs, whole, whole),
        out_specs=(whole, specs),
        axis_names={names} if isinstance(names, str) else set(names),
    )
    typed_mesh = explicit_mesh((grads, state, statistics, numbers))
    if typed_mesh is None:
        return manual(grads, state, statistics, numbers)
    gathered, averaged, known = resharded((grads, statistics, numbers), typed_mesh)
    # Under jit also in eager code: shard_map, called outside of one, cannot change the
    # type of a sharded axis among manual ones.
    updates, state = jax.jit(manual)(gathered, state, averaged, known)
    return resharded(updates, typed_mesh, specs_of(grads)), state


def step(
    options: Options, grads: Any, state: KFACState, statistics: Any, reject: Any
) -> tuple[Any, KFACState]:
    """One update: reduce, average, invert, precondition."""
    layers = present_layers(options.layers, grads)
    if not layers:  # a mask hides them all
        return grads, state._replace(count=state.count + 1)
    check_state(layers, state)
    before = state
    shift = damping_lib.value_at(options.damping, state.count)
    context = options.context(layers, shift, state.count + 1)
    state = own_part(layers, state, context.plan)
    clock = state.clock
    clock = clock._replace(due=clock.due.astype(bool))  # see ``read_state``
    accepted = everywhere(norms_finite(grads), options.axis_name)
    accepted &= ~jnp.asarray(reject)
    factors, previous = dict(state.factors), dict(state.previous)
    if statistics is not None:
        factors, previous, clock, accepted = absorbed(
            context, factors, previous, clock, statistics, accepted
        )
    else:
        clock = clock._replace(due=jnp.where(accepted, False, clock.due))
    gates = inversion_gates(context, clock, accepted)
    first = never_inverted(clock, context.step)
    factors, inverses, good = inversions(
        context, factors, dict(state.inverses), gates, first
    )
    clock = clock_after_inversion(context, clock, gates, good)
    if options.method.damped:
        void = jnp.where(reject, 0, clock.last_inverse)
        clock = clock._replace(last_inverse=void)
    due = refreshes_due(context, clock)
    new_state = KFACState(
        count=state.count + accepted,
        skipped=state.skipped + ~accepted,
        damping=jnp.where(accepted, shift, state.damping).astype(state.damping.dtype),
        clock=clock._replace(due=jnp.where(accepted, due, clock.due)),
        factors=factors,
        previous=previous,
        inverses=inverses,
    )
    updates = directions(context, grads, new_state, statistics, accepted)
    new_state = jax.tree.map(lambda x, y: x.reshape(y.shape), new_state, before)
    return updates, new_state


def directions(
    context: Context, grads: Any, state: KFACState, statistics: Any, accepted: Array
) -> Any:
    """Preconditioned gradients; zeros where the batch was rejected."""
    layers, plan = context.layers, context.plan
    leaves = leaves_by_path(grads)
    blocks, rows = {}, {}
    for layer in layers:
        name, factors = layer.name, state.factors[layer.name]
        inverse = state.inverses[name]
        v = gather(layer, leaves).astype(jax.tree.leaves(factors)[0].dtype)
        v = jnp.where(accepted, v, 0)
        if plan.sliced(name):
            rows[name] = precondition_rows(layer, inverse, v)
            blocks[name] = v
        elif thin := rows_of(layer, statistics, inverse, leaves):
            blocks[name] = precondition_thin(inverse, thin, accepted)
        else:
            blocks[name] = precondition(layer, v, factors, inverse, context.shift)
    divided = [layer for layer in layers if layer.name in rows]
    if divided:
        shapes = {name: blocks[name].shape for name in rows}
        blocks |= gather_rows(divided, context.axis_name, rows, shapes)
    return assemble(layers, blocks, grads)
