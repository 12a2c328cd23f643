"""Which inverses are made anew in a step, here or on their owners.

Everything happens inside one gate. Layers of equal shape share one program, so that a
deep network compiles as fast as a shallow one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import all_finite
from kfac_jax_lite.core.pytree import choose
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import grouped
from kfac_jax_lite.distributed.context import Context
from kfac_jax_lite.distributed.layout import unpacked
from kfac_jax_lite.distributed.sharded_inverse import (
    Inverted,
    Wanted,
    not_inverted,
    owned_inversions,
)


def inversions(
    context: Context,
    factors: dict[str, Any],
    inverses: dict[str, Any],
    gates: Array,
    first: Array,
) -> tuple[dict[str, Any], dict[str, Any], Array]:
    """Inverts the layers whose gates are true.

    Args:
        gates: Which layers to invert, ``[layers]``.
        first: Which were never inverted before, ``[layers]``.

    Returns:
        ``(factors, inverses, good)``, ``good [layers]``; a factorisation that fails
        changes nothing and is not good.
    """
    wanted = {
        t.name: Wanted(factors[t.name], inverses[t.name], gates[i], first[i])
        for i, t in enumerate(context.layers)
        if t.kronecker
    }
    owners = context.plan.owners
    owned = [t for t in context.layers if t.name in owners]
    here = [t for t in context.layers if t.kronecker and t.name not in owners]
    found: dict[str, Inverted] = {}
    if owned:
        found |= owned_inversions(context, owned, wanted)
    if here:
        found |= inverted_here(context, here, wanted)
    good = {layer.name: jnp.asarray(True) for layer in context.layers}
    for name, (moments, inverses[name], good[name]) in found.items():
        if context.method.moments:
            factors[name] = factors[name]._replace(s=moments)
    return factors, inverses, jnp.stack([good[t.name] for t in context.layers])


def inverted_here(
    context: Context, layers: list[LayerTag], wanted: dict[str, Wanted]
) -> dict[str, Inverted]:
    """Inverts the layers that this device inverts, by name."""
    start = {t.name: not_inverted(context, wanted[t.name]) for t in layers}

    def kind(layer: LayerTag) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(start[layer.name])
        return tuple((x.shape, x.dtype) for x in leaves), structure

    def invert(carry: dict[str, Inverted]):
        for alike in grouped(layers, kind):
            names = [layer.name for layer in alike]
            whole = [wanted[name] for name in names]
            parts = [carry[name] for name in names]
            new = inverted_alike(context, alike[0], whole, parts)
            carry |= zip(names, new, strict=True)
        return carry

    anyone = jnp.any(jnp.stack([wanted[t.name].gate for t in layers]))
    return gated(anyone, invert, start)


def inverted_alike(
    context: Context, layer: LayerTag, wanted: list[Wanted], before: list[Inverted]
) -> list[Inverted]:
    """Inverts layers of equal shape, of which ``layer`` is one.

    On a CPU one after another, in a loop: what is not due costs nothing. Elsewhere in
    one batched call: small factorisations leave an accelerator idle.
    """
    inverse_of = functools.partial(inverted, context, layer)
    if len(wanted) == 1:
        return [gated(wanted[0].gate, lambda b: inverse_of(wanted[0], b), before[0])]

    def loop(wanted: Wanted, before: Inverted) -> Inverted:
        def turn(i: Any, parts: Inverted):
            one = jax.tree.map(lambda x: x[i], wanted)

            def put(parts: Inverted):
                new = inverse_of(one, jax.tree.map(lambda x: x[i], parts))
                return jax.tree.map(lambda x, y: x.at[i].set(y), parts, new)

            return gated(one.gate, put, parts)

        return lax.fori_loop(0, wanted.gate.size, turn, before)

    def batch(wanted: Wanted, before: Inverted) -> Inverted:
        new = jax.vmap(inverse_of)(wanted, before)
        return jax.vmap(choose)(wanted.gate, new, before)

    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x), *all_) for all_ in (wanted, before)
    ]
    new = lax.platform_dependent(*stacked, cpu=loop, default=batch)
    return [jax.tree.map(lambda x, i=i: x[i], new) for i in range(len(before))]


def inverted(
    context: Context, layer: LayerTag, wanted: Wanted, before: Inverted
) -> Inverted:
    """A layer's inversion; a failed one changes nothing."""
    factors, turns = unpacked(layer, wanted.statistics), context.method.moments
    if turns:
        factors = factors._replace(s=before.moments)
    new, factors = context.method.refresh(
        layer, factors, before.cached, context.shift, wanted.first
    )
    good = all_finite(new)
    moments = choose(good, factors.s, before.moments) if turns else ()
    return Inverted(moments, choose(good, new, before.cached), good)
