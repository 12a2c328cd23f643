"""Layers inverted by one device: slices of factors, parcels of inverses, rows.

Runs on all devices of a mapped axis at once; ``ownership`` says who does what.

A refresh leaves every device with ``1/D`` of the layer's packed factors. For an
inversion the slices travel to the owner, which inverts and packs a *parcel* for each
device: a piece of what everyone needs (all-gathered afterwards) and, where the rows of
the larger inverse are divided, the device's rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import all_finite
from kfac_jax_lite.core.pytree import choose, vary, varying_axes
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import (
    Plan,
    cached_arrays,
    grouped,
    inverse_symmetric,
    larger_side,
    parcel_sizes,
    slice_sizes,
)
from kfac_jax_lite.distributed.collectives import (
    from_root,
    gathered,
    split_in,
    to_root,
    varied,
)
from kfac_jax_lite.distributed.context import Context
from kfac_jax_lite.distributed.layout import row_parts, whole_statistics
from kfac_jax_lite.kronecker.factors import (
    field_shapes,
    from_vector,
    packed_size,
    to_vector,
)
from kfac_jax_lite.kronecker.inverses import Method
from kfac_jax_lite.kronecker.state import Slices


def parcels(
    layer: LayerTag, method: Method, plan: Plan, cached: Any, moments: Any
) -> Array:
    """What the owner sends after an inversion, ``[devices, n]``."""
    good = all_finite(cached)
    if plan.sliced(layer.name):
        large = larger_side(layer) or ""
        small = "g" if large == "a" else "a"
        sent = {small: getattr(cached, small)}
        rows = [row_parts(getattr(cached, large), plan).reshape(plan.devices, -1)]
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
    context: Context, layer: LayerTag, own: Array, cached: Any
) -> tuple[Any, Any, Array]:
    """The new cached inverse, from this device's parcel.

    Args:
        own: The parcel ``[n]``.

    Returns:
        ``(cached, moments, good)``; ``moments`` is empty without EKFAC.
    """
    plan, method, axis_name = context.plan, context.method, context.axis_name
    size = parcel_sizes(layer, plan, method)[0]
    vector = gathered(own[:size], axis_name).ravel()
    good, new, start = all_finite(vector), {}, 0
    for name, x in cached_arrays(cached).items():
        if isinstance(x, Slices):
            new[name] = Slices(own[size:].reshape(x.values.shape))
            continue
        symmetric = inverse_symmetric(layer, name, x.shape, plan.packed)
        new[name] = from_vector(vector[start:], x.shape, symmetric)
        start += packed_size(x.shape, symmetric)
    cached = cached._replace(**new)
    if not method.moments:
        return cached, (), good
    shape = field_shapes(layer, True)["s"]
    return cached, from_vector(vector[start:], shape, False), good


class Wanted(NamedTuple):
    """What an inversion reads.

    Attributes:
        statistics: The layer's averaged statistics.
        cached: Its cached inverse.
        gate: Whether it is to be inverted.
        first: Whether it was never inverted before.
    """

    statistics: Any
    cached: Any
    gate: Array
    first: Array


class Inverted(NamedTuple):
    """What an inversion changes: EKFAC's moments (else empty) and the cached inverse.

    ``good`` is false where there was none or it failed.
    """

    moments: Any
    cached: Any
    good: Array


def not_inverted(context: Context, wanted: Wanted) -> Inverted:
    """What there is before an inversion."""
    moments = wanted.statistics.s if context.method.moments else ()
    return Inverted(moments, wanted.cached, jnp.zeros_like(wanted.gate))


def owned_inversions(
    context: Context, layers: Sequence[LayerTag], wanted: dict[str, Wanted]
) -> dict[str, Inverted]:
    """Inverts owned layers where their gates are true; often does nothing."""
    turns = context.method.moments
    start = {t.name: not_inverted(context, wanted[t.name]) for t in layers}

    def now(name: str, before: Inverted) -> Wanted:
        statistics = wanted[name].statistics
        if turns:
            statistics = statistics._replace(s=before.moments)
        return wanted[name]._replace(statistics=statistics, cached=before.cached)

    def exchange(carry: dict[str, Inverted]):
        current = {name: now(name, before) for name, before in carry.items()}
        sent = inverted_by_owners(context, layers, current)
        return {
            t.name: gated(
                wanted[t.name].gate,
                functools.partial(spread, context, t, sent[t.name]),
                carry[t.name],
            )
            for t in layers
        }

    anyone = jnp.any(jnp.stack([wanted[t.name].gate for t in layers]))
    return gated(anyone, exchange, start)


def inverted_by_owners(
    context: Context, layers: Sequence[LayerTag], wanted: dict[str, Wanted]
) -> dict[str, Array]:
    """Brings factors to their owners and inverts them there.

    Returns:
        Layer name to the parcels ``[devices · n]``; they mean something on the layer's
        owner, where its gate is true.
    """
    plan, method, axis_name = context.plan, context.method, context.axis_name
    rows = {t.name: brought(context, t, wanted[t.name]) for t in layers}
    by_owner: dict[int, list[LayerTag]] = {}
    for layer in layers:
        by_owner.setdefault(plan.owners[layer.name], []).append(layer)
    sizes = {t.name: plan.devices * sum(parcel_sizes(t, plan, method)) for t in layers}
    loads = {k: sum(sizes[t.name] for t in own) for k, own in by_owner.items()}
    longest = max(loads.values())
    dtype = jnp.result_type(*rows.values())

    def work(own: list[LayerTag], operands: Any):
        rows, wanted, shift = operands
        now = dataclasses.replace(context, shift=shift)
        found = [
            parcels_of_alike(now, alike, rows, wanted)
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
    flat = lax.switch(number, [*branches, idle], (rows, wanted, context.shift))
    found = {}
    for own in by_owner.values():
        start = 0
        for layer in (t for alike in grouped(own, method.ranks) for t in alike):
            size = sizes[layer.name]
            part = flat[start : start + size]
            found[layer.name] = part.astype(rows[layer.name].dtype)
            start += size
    return found


def brought(context: Context, layer: LayerTag, wanted: Wanted) -> Array:
    """All slices of a layer's factors, on its owner."""
    plan, axis_name, statistics = context.plan, context.axis_name, wanted.statistics
    own = jnp.concatenate([statistics.a.values, statistics.g.values])

    def bring(own: Array):
        return to_root(own, axis_name, plan.devices, plan.owners[layer.name])

    def stay(own: Array):
        return varied(jnp.zeros((plan.devices, own.size), own.dtype), axis_name)

    return lax.cond(wanted.gate, bring, stay, own)


def parcels_of_alike(
    context: Context,
    layers: list[LayerTag],
    rows: dict[str, Array],
    wanted: dict[str, Wanted],
) -> Array:
    """Inverts layers of equal shape in one batched call, if any of them is wanted."""
    plan, method = context.plan, context.method
    one, names = layers[0], [layer.name for layer in layers]
    gates = jnp.stack([wanted[name].gate for name in names])

    def whole(name: str):
        statistics, cached, _, first = wanted[name]
        a, g = jnp.split(rows[name], [slice_sizes(one, plan)[0]], axis=1)
        sliced = statistics._replace(a=Slices(a), g=Slices(g))
        return whole_statistics(one, sliced), warm(method, cached), first

    def invert(statistics: Any, cached: Any, first: Any):
        new, after = method.refresh(one, statistics, cached, context.shift, first)
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
    return cached if method.warm else ()


def spread(
    context: Context, layer: LayerTag, parcels: Array, before: Inverted
) -> Inverted:
    """Sends an owner's parcels ``[devices · n]`` out; a failed one changes nothing."""
    plan, axis_name = context.plan, context.axis_name
    rows = parcels.reshape(plan.devices, -1)
    own = from_root(rows, axis_name, plan.devices, plan.owners[layer.name])
    new, moments, good = opened(context, layer, own, before.cached)
    return Inverted(
        choose(good, moments, before.moments), choose(good, new, before.cached), good
    )
