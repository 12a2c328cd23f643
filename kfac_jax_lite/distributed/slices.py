"""Arrays of which every device holds a part: slices of factors, rows of inverses."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.linalg import safe_ratio
from kfac_jax_lite.core.types import Array, KroneckerStatistics, LayerTag
from kfac_jax_lite.distributed.assignment import Plan, larger_side, slice_sizes
from kfac_jax_lite.distributed.collectives import (
    checked_axes,
    gathered,
    mean,
    scattered_mean,
    split_in,
    varied,
)
from kfac_jax_lite.kronecker.factors import forms_of, widened, widths
from kfac_jax_lite.kronecker.inverses import FactorInverses
from kfac_jax_lite.kronecker.packing import from_vector, symmetric_field, to_vector
from kfac_jax_lite.kronecker.state import Packed, Slices


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
    """Rows of ``[*blocks, d, d]`` as ``[slices, copies, *blocks, rows, d]``.

    A slice is what a device holds; each of the ``copies`` devices that hold it gets one
    part of it from the owner.
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
    plan: Plan,
    axis_name: Any,
    rows: dict[str, Array],
    shapes: dict[str, tuple[Any, ...]],
) -> dict[str, Array]:
    """Preconditioned gradients of all divided layers, in one all-gather."""
    groups, count = plan.groups(), plan.slices
    copies = plan.devices // plan.slices
    typed = groups is not None and bool(checked_axes(axis_name))
    if typed:
        # A group's gather has no type that says it is equal everywhere: all devices
        # gather, each a part of its rows.
        number, groups, count = (
            lax.axis_index(axis_name) // plan.slices,
            None,
            plan.devices,
        )
        rows = {k: part_of_rows(x, number, copies) for k, x in rows.items()}
    flat = jnp.concatenate([rows[t.name].ravel() for t in layers])
    parts, start, found = gathered(flat, axis_name, groups), 0, {}
    for layer in layers:
        own, shape = rows[layer.name], shapes[layer.name]
        mine = parts[:, start : start + own.size].reshape(count, *own.shape)
        start += own.size
        if typed:
            mine = mine.reshape(copies, plan.slices, *own.shape)
            mine = jnp.swapaxes(mine, 0, 1).reshape(count, *own.shape)
        whole = joined_rows(mine)
        if larger_side(layer) == "g":
            whole = jnp.swapaxes(whole, -1, -2)
        found[layer.name] = whole[..., : shape[-2], : shape[-1]]
    return found


def part_of_rows(rows: Array, number: Array, copies: int) -> Array:
    """One of ``copies`` equal parts of a device's rows."""
    size = rows.shape[-2] // copies
    return lax.dynamic_slice_in_dim(rows, number * size, size, rows.ndim - 2)
