"""Which inverses are made anew in a step, here or on their owners.

Everything happens inside one gate. Layers of equal shape share one program, and so do
explicit inverses of about equal size, so that a deep network compiles as fast as a
shallow one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kfac_jax_lite.core.control import gated
from kfac_jax_lite.core.linalg import BLOCK, all_finite, filled_up, spd_inverse
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
from kfac_jax_lite.kronecker.factors import Form, forms_of
from kfac_jax_lite.kronecker.inverses import FactorInverses, damped_factors

# Matrices are filled up to one size if none grows by more than this factor: 1.5 times
# the operations.
FILLED_UP = 1.145
# Up to this size all matrices of a program are inverted at once.
SMALL = 2 * BLOCK


def inversions(
    context: Context,
    factors: dict[str, Any],
    inverses: dict[str, Any],
    gates: Array,
    first: Array,
) -> tuple[dict[str, Any], dict[str, Any], Array]:
    """Inverts the layers whose gates are true.

    Args:
        context: What is fixed in this update.
        factors: Averaged statistics by layer name.
        inverses: What preconditioning reads, by layer name.
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
        classes, stacks = grouped(layers, kind), []
        for alike in classes:
            names = [t.name for t in alike]
            pairs = [(wanted[name], carry[name]) for name in names]
            stacks.append(
                Stack(alike[0], *jax.tree.map(lambda *x: jnp.stack(x), *pairs))
            )
        by_size = context.method.damped and not context.method.warm
        run = inverted_by_size if by_size else inverted_by_class
        for alike, new in zip(classes, run(context, stacks), strict=True):
            for i, layer in enumerate(alike):
                carry[layer.name] = jax.tree.map(lambda x, i=i: x[i], new)
        return carry

    anyone = jnp.any(jnp.stack([wanted[t.name].gate for t in layers]))
    return gated(anyone, invert, start)


class Stack(NamedTuple):
    """Layers of equal shape, of which ``layer`` is one; arrays have one more axis."""

    layer: LayerTag
    wanted: Wanted
    before: Inverted


def inverted_by_class(context: Context, stacks: list[Stack]) -> list[Inverted]:
    """One program for the layers of a shape.

    On a CPU one after another, in a loop: what is not due costs nothing. Elsewhere in
    one batched call: small factorisations leave an accelerator idle.
    """
    return [
        one_by_one_or_at_once(
            functools.partial(inverted, context, layer), wanted.gate, wanted, before
        )
        for layer, wanted, before in stacks
    ]


def one_by_one_or_at_once(
    function: Callable[[Any, Any], Any], gates: Array, operands: Any, before: Any
) -> Any:
    """``function(operand, before)`` of every slice whose gate is true."""

    def loop(gates: Array, operands: Any, before: Any) -> Any:
        def turn(i: Any, parts: Any):
            def put(parts: Any):
                own = jax.tree.map(lambda x: x[i], (operands, parts))
                return jax.tree.map(lambda x, y: x.at[i].set(y), parts, function(*own))

            return gated(gates[i], put, parts)

        return lax.fori_loop(0, gates.size, turn, before)

    def batch(gates: Array, operands: Any, before: Any) -> Any:
        new = jax.vmap(function)(operands, before)
        return jax.vmap(choose)(gates, new, before)

    return lax.platform_dependent(gates, operands, before, cpu=loop, default=batch)


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


def inverted_by_size(context: Context, stacks: list[Stack]) -> list[Inverted]:
    """One program for the explicit inverses of about equal size, of whatever layer."""
    places: list[Place] = []
    for i, (layer, wanted, _) in enumerate(stacks):

        def damped(statistics: Any, layer: LayerTag = layer):
            return damped_factors(layer, unpacked(layer, statistics), context.shift)

        pair = jax.vmap(damped)(wanted.statistics)
        triples = zip((0, 1), forms_of(layer), pair, strict=True)
        places += [Place(i, *triple, wanted.gate) for triple in triples]
    found: dict[tuple[int, int], Array] = {}
    for group in alike_in_size([p for p in places if p.form.matrix]):
        found |= inverted_together(group)
    for p in places:
        if not p.form.matrix:
            found[p.stack, p.side] = p.form.inverse(p.factor)
    return [
        finished(stack, FactorInverses(found[i, 0], found[i, 1]))
        for i, stack in enumerate(stacks)
    ]


class Place(NamedTuple):
    """A damped factor of a stack of layers, ``[layers, *blocks, d, d]``."""

    stack: int
    side: int
    form: Form
    factor: Array
    gate: Array


def finished(stack: Stack, new: FactorInverses) -> Inverted:
    """The explicit inverses of a stack of layers, where they are wanted and finite."""
    good = jax.vmap(all_finite)(new) & stack.wanted.gate
    return Inverted((), jax.vmap(choose)(good, new, stack.before.cached), good)


def alike_in_size(places: Sequence[Place]) -> list[list[Place]]:
    """Matrices by dtype and by the size that they are filled up to, a group's first."""
    groups: list[list[Place]] = []
    for place in sorted(places, key=lambda p: (str(p.factor.dtype), -size_of(p))):
        first = groups[-1][0] if groups else place
        grows_little = size_of(first) <= max(BLOCK, size_of(place) * FILLED_UP)
        if groups and grows_little and first.factor.dtype == place.factor.dtype:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def size_of(place: Place) -> int:
    """Rows of a factor."""
    return place.factor.shape[-1]


def inverted_together(group: list[Place]) -> dict[tuple[int, int], Array]:
    """Inverses of factors of several sizes by one program, by stack and side."""
    size = size_of(group[0])
    flat = [p.factor.reshape(-1, *p.factor.shape[-2:]) for p in group]
    stacked = jnp.concatenate([filled_up(x, size) for x in flat])
    counts = [len(x) for x in flat]
    if size <= SMALL:
        new = spd_inverse(stacked)
    else:
        pairs = zip(group, counts, strict=True)
        gates = [jnp.repeat(p.gate, count // p.gate.size) for p, count in pairs]
        new = one_by_one_or_at_once(
            lambda x, _: spd_inverse(x), jnp.concatenate(gates), stacked, stacked
        )
    parts = jnp.split(new, np.cumsum(counts)[:-1])
    return {
        (p.stack, p.side): x[:, : y.shape[-1], : y.shape[-1]].reshape(p.factor.shape)
        for p, x, y in zip(group, parts, flat, strict=True)
    }
