"""Where the parts of the state are: specs for ``shard_map``, axes for ``pmap``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kfac_jax_lite.core.pytree import find_states, leaves_by_path
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.distributed.assignment import (
    GRADIENTS,
    Plan,
    held_rows,
    larger_side,
    slice_sizes,
)
from kfac_jax_lite.distributed.slices import (
    divided,
    is_packed,
    packed_statistics,
    sliced_statistics,
    undivided,
    unpacked,
    whole_statistics,
)
from kfac_jax_lite.kronecker import masking as restrict
from kfac_jax_lite.kronecker.factors import BLOCKS, forms_of
from kfac_jax_lite.kronecker.state import KFACState, Slices

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
            rows, size = held_rows(layer, plan)[1], max(layer.sizes)
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
            inverse = undivided(layer, inverse, old_plan)
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
    parts = [x for x in inverse if is_slices(x)]
    if not parts:
        return Plan(devices, devices, {layer.name: 0}, {}, True)
    sent, held = -(-parts[0].values.shape[-1] // devices), parts[0].values.shape[-2]
    slices = devices * sent // held
    return Plan(devices, slices, {layer.name: 0}, {layer.name: GRADIENTS}, True)
