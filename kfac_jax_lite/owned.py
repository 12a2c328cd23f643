"""Layers inverted by one device: slices of factors, parcels of inverses, rows.

Runs on all devices of a mapped axis at once; ``ownership`` says who does what.

A refresh leaves every device with ``1/D`` of the layer's packed factors. For an
inversion the slices travel to the owner, which inverts and packs a *parcel* for each
device: a piece of what everyone needs (all-gathered afterwards) and, where the rows of
the larger inverse are divided, the device's rows.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.collectives import (
    from_root,
    gathered,
    split_in,
    to_root,
    varied,
)
from kfac_jax_lite.factors.state import Slices
from kfac_jax_lite.inverse import Method
from kfac_jax_lite.linalg import all_finite
from kfac_jax_lite.options import Options
from kfac_jax_lite.ownership import (
    Plan,
    cached_arrays,
    grouped,
    inverse_symmetric,
    larger_side,
    parcel_sizes,
    slice_sizes,
)
from kfac_jax_lite.packing import (
    field_shapes,
    from_vector,
    packed_size,
    to_vector,
)
from kfac_jax_lite.refresh import gated
from kfac_jax_lite.slices import joined_rows, sent_rows, whole_statistics
from kfac_jax_lite.tree import choose, vary, varying_axes
from kfac_jax_lite.types import Array, LayerTag


def parcels(
    layer: LayerTag, method: Method, plan: Plan, cached: Any, moments: Any
) -> Array:
    """What the owner sends after an inversion, ``[devices, n]``.

    Args:
        layer: The layer.
        method: Inversion method.
        plan: Who does what.
        cached: What it computed.
        moments: Second moments in the new basis, or None.

    Returns:
        A row for each device; not finite where the inversion failed.
    """
    good = all_finite(cached)
    if plan.sliced(layer.name):
        large = larger_side(layer) or ""
        small = "g" if large == "a" else "a"
        sent = {small: getattr(cached, small)}
        rows = [sent_rows(getattr(cached, large), plan).reshape(plan.devices, -1)]
    else:
        sent, rows = cached_arrays(cached), []
    if moments is not None:
        sent["s"] = moments
    vectors = [
        to_vector(x, inverse_symmetric(layer, k, x.shape, plan.packed))
        for k, x in sent.items()
    ]
    for_all = jnp.where(good, jnp.concatenate(vectors), jnp.nan)
    return jnp.concatenate([split_in(for_all, plan.devices), *rows], axis=1)


def opened(
    layer: LayerTag, method: Method, plan: Plan, own: Array, cached: Any, axis_name: Any
) -> tuple[Any, Any, Array]:
    """The new cached inverse, from this device's parcel.

    Args:
        layer: The layer.
        method: Inversion method.
        plan: Who does what.
        own: The parcel ``[n]``.
        cached: The cached inverse before; gives shapes.
        axis_name: Mapped axes.

    Returns:
        ``(cached, moments, good)``; ``moments`` is empty without EKFAC.
    """
    size = parcel_sizes(layer, plan, method)[0]
    vector = gathered(own[:size], axis_name).ravel()
    good, new, start = all_finite(vector), {}, 0
    for name, x in cached_arrays(cached).items():
        if isinstance(x, Slices):
            new[name] = Slices(own_rows(own[size:], x.values, plan, axis_name))
            continue
        symmetric = inverse_symmetric(layer, name, x.shape, plan.packed)
        new[name] = from_vector(vector[start:], x.shape, symmetric)
        start += packed_size(x.shape, symmetric)
    cached = cached._replace(**new)
    if not method.moments:
        return cached, (), good
    shape = field_shapes(layer, True)["s"]
    return cached, from_vector(vector[start:], shape, False), good


def own_rows(part: Array, like: Array, plan: Plan, axis_name: Any) -> Array:
    """The slice that a device holds, of the parts sent to those that share it."""
    if plan.devices == plan.slices:
        return part.reshape(like.shape)
    parts = gathered(part, axis_name, plan.columns())
    copies = plan.devices // plan.slices
    shape = (copies, *like.shape[:-2], like.shape[-2] // copies, like.shape[-1])
    return joined_rows(parts.reshape(shape))


def owned_inversions(
    options: Options,
    plan: Plan,
    layers: Sequence[LayerTag],
    records: dict[str, tuple[Any, ...]],
    shift: Array,
) -> dict[str, tuple[Any, ...]]:
    """Inverts owned layers where their gates are true; a step without any does nothing.

    Args:
        options: The optimiser's options.
        plan: Who does what.
        layers: The owned layers.
        records: Layer name to ``(statistics, cached, gate, first)``.
        shift: Damping.

    Returns:
        Layer name to ``(statistics, cached, good)``.
    """
    turns = options.method.moments
    gates = {name: record[2] for name, record in records.items()}
    start = {
        name: (record[0].s if turns else (), record[1], jnp.zeros_like(record[2]))
        for name, record in records.items()
    }

    def with_moments(name: str, moments: Any):
        statistics = records[name][0]
        return statistics._replace(s=moments) if turns else statistics

    def exchange(carry: dict[str, Any]):
        now = {
            name: (with_moments(name, moments), cached, *records[name][2:])
            for name, (moments, cached, _) in carry.items()
        }
        parcels = inverted_by_owners(
            layers, plan, options.method, options.axis_name, now, shift
        )

        def take(layer: LayerTag):
            fixed = (options.method, plan, options.axis_name, parcels[layer.name])
            spread_out = functools.partial(spread, layer, *fixed)
            return gated(
                gates[layer.name],
                lambda kept: spread_out(*kept[:2]),
                carry[layer.name],
            )

        return {layer.name: take(layer) for layer in layers}

    found = gated(jnp.any(jnp.stack(list(gates.values()))), exchange, start)
    return {
        name: (with_moments(name, moments), cached, good)
        for name, (moments, cached, good) in found.items()
    }


def inverted_by_owners(
    layers: Sequence[LayerTag],
    plan: Plan,
    method: Method,
    axis_name: Any,
    records: dict[str, tuple[Any, ...]],
    shift: Array,
) -> dict[str, Array]:
    """Brings factors to their owners and inverts them there.

    Args:
        layers: The owned layers.
        plan: Who does what.
        method: Inversion method.
        axis_name: Mapped axes.
        records: As in ``owned_inversions``.
        shift: Damping.

    Returns:
        Layer name to the parcels ``[devices · n]``; they mean something on the layer's
        owner, where its gate is true.
    """
    rows = {t.name: brought(t, plan, axis_name, *records[t.name]) for t in layers}
    by_owner: dict[int, list[LayerTag]] = {}
    for layer in layers:
        by_owner.setdefault(plan.owners[layer.name], []).append(layer)
    sizes = {t.name: plan.devices * sum(parcel_sizes(t, plan, method)) for t in layers}
    loads = {k: sum(sizes[t.name] for t in own) for k, own in by_owner.items()}
    longest = max(loads.values())
    dtype = jnp.result_type(*rows.values())

    def work(own: list[LayerTag], operands: Any):
        rows, records, shift = operands
        found = [
            invert_alike(alike, plan, method, rows, records, shift)
            for alike in grouped(own, method.ranks)
        ]
        flat = jnp.concatenate([x.ravel().astype(dtype) for x in found])
        return varied(jnp.pad(flat, (0, longest - flat.size)), axis_name)

    def idle(operands: Any):
        del operands
        return varied(jnp.zeros((longest,), dtype), axis_name)

    order = sorted(by_owner)
    branches = [functools.partial(work, by_owner[k]) for k in order]
    table = [
        order.index(i) if i in by_owner else len(order) for i in range(plan.devices)
    ]
    number = jnp.array(table)[lax.axis_index(axis_name)]
    flat = lax.switch(number, [*branches, idle], (rows, records, shift))
    found = {}
    for own in by_owner.values():
        start = 0
        for layer in (t for alike in grouped(own, method.ranks) for t in alike):
            size = sizes[layer.name]
            part = flat[start : start + size]
            found[layer.name] = part.astype(rows[layer.name].dtype)
            start += size
    return found


def brought(
    layer: LayerTag,
    plan: Plan,
    axis_name: Any,
    statistics: Any,
    cached: Any,
    gate: Array,
    first: Any,
) -> Array:
    """All slices of a layer's factors, on its owner."""
    del cached, first
    own = jnp.concatenate([statistics.a.values, statistics.g.values])

    def bring(own: Array):
        return to_root(own, axis_name, plan.devices, plan.owners[layer.name])

    def stay(own: Array):
        return varied(jnp.zeros((plan.devices, own.size), own.dtype), axis_name)

    return lax.cond(gate, bring, stay, own)


def invert_alike(
    layers: list[LayerTag],
    plan: Plan,
    method: Method,
    rows: dict[str, Array],
    records: dict[str, tuple[Any, ...]],
    shift: Array,
) -> Array:
    """Inverts layers of equal shape in one batched call, if any of them is wanted."""
    one, names = layers[0], [layer.name for layer in layers]
    gates = jnp.stack([records[name][2] for name in names])

    def whole(name: str):
        statistics, cached, _, first = records[name]
        a, g = jnp.split(rows[name], [slice_sizes(one, plan)[0]], axis=1)
        sliced = statistics._replace(a=Slices(a), g=Slices(g))
        return whole_statistics(one, sliced), warm(method, cached), first

    def invert(statistics: Any, cached: Any, first: Any):
        new, after = method.refresh(one, statistics, cached, shift, first)
        return parcels(one, method, plan, new, after.s if method.moments else None)

    def run():
        found = [whole(name) for name in names]
        if len(found) == 1:
            return invert(*found[0])[None]
        return jax.vmap(invert)(*jax.tree.map(lambda *x: jnp.stack(x), *found))

    shape, axes = jax.eval_shape(run), varying_axes(rows)

    def skip():
        return vary(jnp.zeros(shape.shape, shape.dtype), axes)

    return lax.cond(jnp.any(gates), run, skip)


def warm(method: Method, cached: Any) -> Any:
    """The cached inverse where the method starts from it."""
    return () if method.name in ("cholesky", "eigh") else cached


def spread(
    layer: LayerTag,
    method: Method,
    plan: Plan,
    axis_name: Any,
    parcel: Array,
    moments: Any,
    cached: Any,
) -> tuple[Any, Any, Array]:
    """Sends an owner's parcels out.

    Args:
        layer: The layer.
        method: Inversion method.
        plan: Who does what.
        axis_name: Mapped axes.
        parcel: The parcels ``[devices · n]``, read on the owner.
        moments: EKFAC's second moments, else empty.
        cached: The cached inverse.

    Returns:
        ``(moments, cached, good)``; after a failed inversion the first two as before.
    """
    rows = parcel.reshape(plan.devices, -1)
    own = from_root(rows, axis_name, plan.devices, plan.owners[layer.name])
    new, turned, good = opened(layer, method, plan, own, cached, axis_name)
    return choose(good, turned, moments), choose(good, new, cached), good
