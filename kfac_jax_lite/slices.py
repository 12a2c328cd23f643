"""Arrays of which every device holds a part: slices of factors, rows of inverses."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.collectives import mean, scattered_mean, split_in, varied
from kfac_jax_lite.factors.state import Slices
from kfac_jax_lite.inverse import FactorInverses
from kfac_jax_lite.linalg import safe_ratio
from kfac_jax_lite.ownership import Plan, larger_side, slice_sizes
from kfac_jax_lite.packing import from_vector, symmetric_field, to_vector
from kfac_jax_lite.types import Array, KroneckerStatistics, LayerTag


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


def scattered(
    layer: LayerTag, statistics: Any, plan: Plan, axis_name: Any, wire: Any
) -> KroneckerStatistics:
    """This device's slices of a layer's statistics, averaged over the devices.

    Args:
        layer: The layer.
        statistics: This device's statistics.
        plan: Who does what.
        axis_name: Mapped axes.
        wire: Precision on the wire, or None.

    Returns:
        Slices of the factors; second moments, if any, in whole.
    """
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
    """Rows of ``[*blocks, d, d]`` as ``[slices, copies, *blocks, rows, d]``.

    A slice is what a device holds; each of the ``copies`` devices that hold it gets one
    part of it from the owner.

    Args:
        matrix: The matrix.
        plan: Who does what.

    Returns:
        The rows, filled up with zeros.
    """
    d, copies = matrix.shape[-1], plan.devices // plan.slices
    rows = -(-d // plan.devices)
    missing = plan.devices * rows - d
    padded = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, missing), (0, 0)])
    split = padded.reshape(*matrix.shape[:-2], plan.slices, copies, rows, d)
    return jnp.moveaxis(split, (-4, -3), (0, 1))


def joined_rows(parts: Array) -> Array:
    """``[*blocks, parts · rows, n]`` of ``[parts, *blocks, rows, n]``."""
    moved = jnp.moveaxis(parts, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def sent_rows(matrix: Array, plan: Plan) -> Array:
    """What the owner sends to each device: ``[devices, *blocks, rows, d]``."""
    parts = jnp.swapaxes(row_parts(matrix, plan), 0, 1)
    return parts.reshape(plan.devices, *parts.shape[2:])


def divided(layer: LayerTag, inverse: FactorInverses, plan: Plan) -> FactorInverses:
    """Explicit inverses with the larger one as the slices that devices hold."""
    side = larger_side(layer)
    assert side is not None
    parts = row_parts(getattr(inverse, side), plan)
    held = jax.vmap(joined_rows)(parts)
    copies = plan.devices // plan.slices
    held = jnp.tile(held, (copies,) + (1,) * (held.ndim - 1))
    return inverse._replace(**{side: Slices(held)})


def undivided(layer: LayerTag, inverse: Any, plan: Plan) -> FactorInverses:
    """The whole inverses that were ``divided``."""
    side = larger_side(layer)
    assert side is not None
    whole = joined_rows(getattr(inverse, side).values[: plan.slices])
    return inverse._replace(**{side: whole[..., : whole.shape[-1], :]})
