"""Where the parts of the state are: specs for ``shard_map``, axes for ``pmap``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from kfac_jax_lite.core.linalg import safe_ratio
from kfac_jax_lite.core.pytree import find_states, leaves_by_path
from kfac_jax_lite.core.types import Array, KroneckerStatistics, LayerTag
from kfac_jax_lite.distributed.assignment import (
    GRADIENTS,
    Plan,
    held_rows,
    larger_side,
    slice_sizes,
)
from kfac_jax_lite.distributed.collectives import (
    gathered,
    mean,
    scattered_mean,
    split_in,
    varied,
)
from kfac_jax_lite.kronecker import masking as restrict
from kfac_jax_lite.kronecker.factors import (
    BLOCKS,
    forms_of,
    from_vector,
    symmetric_field,
    to_vector,
    widened,
    widths,
)
from kfac_jax_lite.kronecker.inverses import FactorInverses
from kfac_jax_lite.kronecker.state import KFACState, Packed, Slices

# What the clock knows of the layout: constants from `init` on.
CONSTANTS = ("elements", "bytes", "inversion_bytes", "step_bytes")


def is_slices(node: Any) -> bool:
    """Whether a node of a state is spread over devices."""
    return isinstance(node, Slices)


def state_specs(opt_state: Any, axis_name: Any) -> Any:
    """Partition specs of an optimiser state, for ``shard_map`` and ``NamedSharding``.

    Args:
        opt_state: Any optax state, arrays or shapes.
        axis_name: The mesh axes that ``axis_name`` of the optimiser names.

    Returns:
        The state's tree of ``PartitionSpec``: its slices along the first axis,
        everything else replicated.
    """

    def spec(node: Any):
        if is_slices(node):
            return Slices(PartitionSpec(axis_name))  # type: ignore[arg-type]
        return PartitionSpec()

    return jax.tree.map(spec, opt_state, is_leaf=is_slices)


def state_axes(opt_state: Any) -> Any:
    """The same as ``in_axes`` and ``out_axes`` of ``jax.pmap``: 0 for slices, or None.

    Args:
        opt_state: Any optax state, arrays or shapes.

    Returns:
        The state's tree of axes.
    """

    def axis(node: Any):
        return Slices(0) if is_slices(node) else None  # type: ignore[arg-type]

    return jax.tree.map(axis, opt_state, is_leaf=is_slices)


def own_part(layers: Sequence[LayerTag], state: KFACState, plan: Plan) -> KFACState:
    """A device's view of the state: its slices without the axis of the devices."""
    factors: dict[str, Any] = dict(state.factors)
    inverses, previous = dict(state.inverses), dict(state.previous)
    for layer in layers:
        name = layer.name
        if name not in plan.owners:
            continue
        a, g = slice_sizes(layer, plan)

        def local(statistics: Any, a: Any = a, g: Any = g, name: str = name):
            return statistics._replace(
                a=reshaped(name, statistics.a, (a,)),
                g=reshaped(name, statistics.g, (g,)),
            )

        factors[name] = local(factors[name])
        previous[name] = tuple(map(local, previous[name]))
        if plan.sliced(name):
            side = larger_side(layer) or ""
            rows, size = held_rows(layer, plan), max(layer.sizes)
            shape = (*layer.stack, *layer.blocks, rows, size)
            part = reshaped(name, getattr(inverses[name], side), shape)
            inverses[name] = inverses[name]._replace(**{side: part})
    return state._replace(factors=factors, inverses=inverses, previous=previous)


def reshaped(name: str, part: Any, shape: tuple[int, ...]) -> Slices:
    """A slice in the shape wanted, or an error that tells what to do."""
    seen = part.values.shape if is_slices(part) else part.shape
    if not is_slices(part) or seen not in (shape, (1, *shape)):
        raise ValueError(
            f"layer {name}: a device sees a slice of shape {seen} of the state, wanted "
            f"{shape}. Pass the state with in_axes=kfac.state_axes(opt_state) under "
            "pmap, in_specs=kfac.state_specs(opt_state, axis_name) under shard_map; "
            "Reduction.devices must be the size of the mapped axes."
        )
    return Slices(part.values.reshape(shape))


def relayout(opt_state: Any, like: Any, layers: Sequence[LayerTag]) -> Any:
    """An optimiser state in the layout of another number of devices or ``Reduction``.

    Args:
        opt_state: Any optax state with a ``KFACState``, whole arrays (of several
            processes, gather it first).
        like: A state of the layout wanted: ``new_tx.init(params)``.
        layers: ``tagged.layers``.

    Returns:
        The state on the host, with the numbers of ``opt_state`` and the shapes of
        ``like``.

    Raises:
        ValueError: The states are of different models.
    """
    tags = {layer.name: layer for layer in layers}
    host = jax.device_get((opt_state, like))
    opt_state, like = jax.tree.map(jnp.asarray, host)
    seen, wanted = len(find_states(opt_state)), find_states(like)
    if seen != len(wanted):
        raise ValueError(
            f"the states are of different models: opt_state holds {seen} KFACStates, "
            f"like {len(wanted)}."
        )
    targets = iter(wanted)

    def is_state(node: Any):
        return isinstance(node, KFACState)

    def convert(node: Any):
        return moved(node, next(targets), tags) if is_state(node) else node

    return jax.device_get(jax.tree.map(convert, opt_state, is_leaf=is_state))


def moved(state: KFACState, like: KFACState, tags: dict[str, LayerTag]) -> KFACState:
    """One ``KFACState`` in the layout of another."""
    if set(state.factors) != set(like.factors):
        other = sorted(set(state.factors) ^ set(like.factors))[0]
        raise ValueError(f"the states are of different models: they differ in {other}.")
    factors, previous, inverses = {}, {}, {}
    for name, old in state.factors.items():
        new = like.factors[name]
        layer = kept_layer(tags[name], state.inverses[name])
        old_plan = plan_of(layer, old, state.inverses[name])
        new_plan = plan_of(layer, new, like.inverses[name])

        def turn(
            statistics: Any,
            layer: LayerTag = layer,
            old_plan: Plan | None = old_plan,
            new_plan: Plan | None = new_plan,
            new: Any = new,
        ):
            statistics = unpacked(layer, statistics)
            if old_plan is not None:
                check_slices(layer, statistics, old_plan)
                statistics = whole_statistics(layer, statistics)
            if new_plan is not None:
                return sliced_statistics(layer, statistics, new_plan)
            pack = is_packed(new)
            return packed_statistics(layer, statistics) if pack else statistics

        factors[name] = turn(old)
        previous[name] = tuple(map(turn, state.previous[name]))
        inverse = state.inverses[name]
        if old_plan is not None and old_plan.sliced(name):
            inverse = undivided(layer, inverse)
        if new_plan is not None and new_plan.sliced(name):
            inverse = divided(layer, inverse, new_plan)
        inverses[name] = inverse
    constants = {k: getattr(like.clock, k) for k in CONSTANTS}
    result = state._replace(
        factors=factors,
        previous=previous,
        inverses=inverses,
        clock=state.clock._replace(**constants),
    )
    check_alike(result, like)
    return result


def check_alike(state: Any, like: Any) -> None:
    """The first array that one state lacks, or has in another shape, is an error."""
    seen, wanted = leaves_by_path(state), leaves_by_path(like)
    for path in sorted(set(seen) ^ set(wanted)):
        raise ValueError(
            "the states are of different models or options: only "
            f"{'opt_state' if path in seen else 'like'} has {path}."
        )
    for path, x in seen.items():
        if x.shape != wanted[path].shape:
            raise ValueError(
                f"the states are of different models: {path} has shape {x.shape}, "
                f"wanted {wanted[path].shape}."
            )


def kept_layer(layer: LayerTag, inverse: Any) -> LayerTag:
    """The layer without the parameters that a mask hides, read off its inverse."""
    if not layer.kronecker or len(layer.params) == 1 or BLOCKS in forms_of(layer)[:1]:
        return layer
    width = inverse.input_width
    if width >= layer.sizes[0]:
        return layer
    return restrict.part(layer, [layer.roles.index("bias" if width == 1 else "weight")])


def check_slices(layer: LayerTag, statistics: Any, plan: Plan) -> None:
    """Slices must be of the layer's factors."""
    seen = tuple(x.values.shape[-1] for x in (statistics.a, statistics.g))
    wanted = slice_sizes(layer, plan)
    if seen != wanted:
        raise ValueError(
            f"the state is of another model: layer {layer.name} has slices of {seen} "
            f"entries of its factors, wanted {wanted}."
        )


def plan_of(layer: LayerTag, statistics: Any, inverse: Any) -> Plan | None:
    """The plan that a layer's state was made for, read off its shapes; None: whole."""
    if not is_slices(getattr(statistics, "a", None)):
        return None
    devices = statistics.a.values.shape[0]
    share = {layer.name: GRADIENTS} if any(map(is_slices, inverse)) else {}
    return Plan(devices, {layer.name: 0}, share, True)


def sliced_statistics(layer: LayerTag, statistics: Any, plan: Plan) -> Any:
    """Whole factors as ``[devices, n]``, row ``i`` for device ``i``."""
    rows = {}
    for name in ("a", "g"):
        x = getattr(statistics, name)
        symmetric = symmetric_field(layer, name, x.shape, True)
        rows[name] = Slices(split_in(to_vector(x, symmetric, True), plan.devices))
    return statistics._replace(**rows)


def whole_statistics(layer: LayerTag, sliced: Any) -> Any:
    """The factors whose ``sliced_statistics`` these are."""
    whole = {}
    for name, shape in (("a", layer.a_shape), ("g", layer.g_shape)):
        symmetric = symmetric_field(layer, name, shape, True)
        vector = getattr(sliced, name).values.ravel()
        whole[name] = from_vector(vector, shape, symmetric, True)
    return sliced._replace(**whole)


def packed_statistics(layer: LayerTag, statistics: Any) -> Any:
    """Symmetric factors of a Kronecker layer as triangles."""
    rows = {}
    for name in ("a", "g"):
        x = getattr(statistics, name)
        if symmetric_field(layer, name, x.shape, True):
            rows[name] = Packed(to_vector(x, True, True))
    return statistics._replace(**rows)


def unpacked(layer: LayerTag, statistics: Any) -> Any:
    """The statistics whose ``packed_statistics`` these are, or as they were."""
    whole = {}
    for name, shape in (("a", layer.a_shape), ("g", layer.g_shape)):
        x = getattr(statistics, name, None)
        if isinstance(x, Packed):
            whole[name] = from_vector(x.values, shape, True, True)
    return statistics._replace(**whole)


def is_packed(statistics: Any) -> bool:
    """Whether a factor is kept as a triangle."""
    return any(isinstance(x, Packed) for x in statistics)


def scattered(
    layer: LayerTag, statistics: Any, plan: Plan, axis_name: Any, wire: Any
) -> KroneckerStatistics:
    """This device's slices of a layer's statistics, averaged over the devices."""
    rows = sliced_statistics(layer, statistics, plan)
    size = slice_sizes(layer, plan)[0]
    both = jnp.concatenate([rows.a.values, rows.g.values], axis=1)
    own = scattered_mean(both, axis_name, wire)
    s = statistics.s
    if s is not None:
        s = mean(s.ravel(), axis_name, wire).reshape(s.shape)
    a, g = Slices(own[:size]), Slices(own[size:])
    return KroneckerStatistics(a, g, s)  # type: ignore[arg-type]


def own_slices(
    layer: LayerTag, statistics: Any, plan: Plan, axis_name: Any
) -> KroneckerStatistics:
    """This device's slices of statistics that are averaged already."""
    rows = sliced_statistics(layer, statistics, plan)
    index = lax.axis_index(axis_name)
    a, g = (Slices(varied(x.values, axis_name)[index]) for x in (rows.a, rows.g))
    return rows._replace(a=a, g=g)


def sliced_change(new: Any, old: Any, axis_name: Any) -> Array:
    """The largest relative change over the factors, from all devices' slices."""
    pairs = [(x.values, y.values) for x, y in ((new.a, old.a), (new.g, old.g))]
    squares = [jnp.sum(jnp.square(v)) for x, y in pairs for v in (x - y, y)]
    norms = jnp.sqrt(lax.psum(jnp.stack(squares), axis_name))
    return jnp.maximum(safe_ratio(norms[0], norms[1]), safe_ratio(norms[2], norms[3]))


def row_parts(matrix: Array, plan: Plan) -> Array:
    """``[*blocks, d, d]`` by device, padded: ``[devices, *blocks, rows, d]``."""
    d = matrix.shape[-1]
    rows = -(-d // plan.devices)
    missing = plan.devices * rows - d
    padded = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, missing), (0, 0)])
    split = padded.reshape(*matrix.shape[:-2], plan.devices, rows, d)
    return jnp.moveaxis(split, -3, 0)


def joined_rows(parts: Array) -> Array:
    """``[*blocks, parts · rows, n]`` of ``[parts, *blocks, rows, n]``."""
    moved = jnp.moveaxis(parts, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def divided(layer: LayerTag, inverse: FactorInverses, plan: Plan) -> FactorInverses:
    """Explicit inverses with the larger one as the slices that devices hold."""
    side = larger_side(layer)
    assert side is not None
    return inverse._replace(**{side: Slices(row_parts(getattr(inverse, side), plan))})


def undivided(layer: LayerTag, inverse: Any) -> FactorInverses:
    """The whole inverses that were ``divided``."""
    side = larger_side(layer)
    assert side is not None
    whole = joined_rows(getattr(inverse, side).values)
    return inverse._replace(**{side: whole[..., : whole.shape[-1], :]})


def precondition_rows(layer: LayerTag, inverse: FactorInverses, v: Array) -> Array:
    """This device's rows of ``A⁻¹ V G⁻¹``, or of its transpose if ``G`` is divided.

    Rows first: both products are then divided among the devices.

    Args:
        v: The gradient's block ``[*blocks, in(+1), out]``.

    Returns:
        ``[*blocks, rows, n]``.
    """
    (form_a, form_g), (wide_a, wide_g) = forms_of(layer), widths(layer)
    if isinstance(inverse.a, Slices):
        return form_g.times(inverse.a.values @ widened(v, wide_g), inverse.g)
    rows: Any = inverse.g
    wide = widened(jnp.swapaxes(v, -1, -2), wide_a)
    return form_a.times(rows.values @ wide, inverse.a)


def gather_rows(
    layers: Sequence[LayerTag],
    axis_name: Any,
    rows: dict[str, Array],
    shapes: dict[str, tuple[Any, ...]],
) -> dict[str, Array]:
    """Preconditioned gradients of all divided layers, in one all-gather."""
    flat = jnp.concatenate([rows[t.name].ravel() for t in layers])
    parts, start, found = gathered(flat, axis_name), 0, {}
    for layer in layers:
        own, shape = rows[layer.name], shapes[layer.name]
        mine = parts[:, start : start + own.size].reshape(-1, *own.shape)
        start += own.size
        whole = joined_rows(mine)
        if larger_side(layer) == "g":
            whole = jnp.swapaxes(whole, -1, -2)
        found[layer.name] = whole[..., : shape[-2], : shape[-1]]
    return found
