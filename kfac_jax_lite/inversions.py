"""Which inverses are made anew in a step, here or on their owners.

Everything happens inside one gate. Layers of equal shape share one program, so that a
deep network compiles as fast as a shallow one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.linalg import all_finite
from kfac_jax_lite.options import Options
from kfac_jax_lite.owned import owned_inversions
from kfac_jax_lite.ownership import Plan, grouped
from kfac_jax_lite.refresh import gated
from kfac_jax_lite.slices import unpacked
from kfac_jax_lite.tree import choose
from kfac_jax_lite.types import Array, LayerTag


def inversions(
    options: Options,
    plan: Plan,
    layers: Sequence[LayerTag],
    factors: dict[str, Any],
    inverses: dict[str, Any],
    shift: Array,
    gates: Array,
    first: Array,
) -> tuple[dict[str, Any], dict[str, Any], Array]:
    """Inverts the layers whose gates are true.

    Args:
        options: The optimiser's options.
        plan: Who does what.
        layers: The layers present.
        factors: Averaged statistics by layer name.
        inverses: What preconditioning reads, by layer name.
        shift: Damping.
        gates: Which layers to invert, ``[layers]``.
        first: Which were never inverted before, ``[layers]``.

    Returns:
        ``(factors, inverses, good)``, ``good [layers]``; a factorisation that fails
        changes nothing and is not good.
    """
    index = {layer.name: i for i, layer in enumerate(layers)}
    owned = [t for t in layers if t.name in plan.owners]
    here = [t for t in layers if t.kronecker and t.name not in plan.owners]
    good = {layer.name: jnp.asarray(True) for layer in layers}
    if owned:
        records = {
            t.name: (factors[t.name], inverses[t.name], gates[k], first[k])
            for t, k in ((t, index[t.name]) for t in owned)
        }
        found = owned_inversions(options, plan, owned, records, shift)
        for name, result in found.items():
            factors[name], inverses[name], good[name] = result
    if here:
        flags = {t.name: (gates[index[t.name]], first[index[t.name]]) for t in here}
        found = inverted_here(options, here, factors, inverses, flags, shift)
        for name, (moments, inverses[name], good[name]) in found.items():
            if options.method.moments:
                factors[name] = factors[name]._replace(s=moments)
    return factors, inverses, jnp.stack([good[layer.name] for layer in layers])


def inverted_here(
    options: Options,
    layers: list[LayerTag],
    factors: dict[str, Any],
    inverses: dict[str, Any],
    flags: dict[str, tuple[Any, ...]],
    shift: Array,
) -> dict[str, tuple[Any, ...]]:
    """Layers that this device inverts.

    Args:
        options: The optimiser's options.
        layers: The layers.
        factors: Averaged statistics by layer name.
        inverses: Cached inverses by layer name.
        flags: Layer name to ``(gate, first)``.
        shift: Damping.

    Returns:
        Layer name to ``(moments, cached, good)``; ``moments`` is empty without EKFAC.
    """
    # Only what a method changes goes through the loop: EKFAC also turns its moments.
    turns = options.method.moments
    start = {
        t.name: (
            factors[t.name].s if turns else (),
            inverses[t.name],
            jnp.zeros_like(flags[t.name][0]),
        )
        for t in layers
    }

    def kind(layer: LayerTag) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(start[layer.name])
        return tuple((x.shape, x.dtype) for x in leaves), structure

    def invert(carry: dict[str, Any]):
        for alike in grouped(layers, kind):
            names = [layer.name for layer in alike]
            parts = [carry[name] for name in names]
            whole = [factors[name] for name in names]
            gates, first = zip(*(flags[name] for name in names), strict=True)
            record = (alike[0], whole, parts, shift, gates, first)
            carry |= zip(names, invert_alike(options, *record), strict=True)
        return carry

    anyone = jnp.any(jnp.stack([gate for gate, _ in flags.values()]))
    return gated(anyone, invert, start)


def invert_alike(
    options: Options,
    layer: LayerTag,
    factors: list[Any],
    parts: list[Any],
    shift: Array,
    gates: tuple[Any, ...],
    first: tuple[Any, ...],
) -> list[Any]:
    """Inverts layers of equal shape where their gates are true.

    On a CPU one after another, in a loop: what is not due costs nothing. Elsewhere in
    one batched call: small factorisations leave an accelerator idle.

    Args:
        options: The optimiser's options.
        layer: One of them.
        factors: Their averaged statistics.
        parts: Their ``(moments, cached, good)`` before.
        shift: Damping.
        gates: Which to invert.
        first: Which were never inverted before.

    Returns:
        Their ``(moments, cached, good)`` after.
    """

    def invert(factors: Any, part: Any, first: Any):
        return inverse_of(options, layer, factors, part, shift, first)

    if len(parts) == 1:
        work = functools.partial(invert, factors[0], first=first[0])
        return [gated(gates[0], work, parts[0])]

    def loop(factors: Any, parts: Any, gates: Any, first: Any) -> Any:
        def turn(i: Any, parts: Any):
            def put(parts: Any):
                args = jax.tree.map(lambda x: x[i], (factors, parts, first))
                return jax.tree.map(lambda x, y: x.at[i].set(y), parts, invert(*args))

            return gated(gates[i], put, parts)

        return lax.fori_loop(0, len(gates), turn, parts)

    def batch(factors: Any, parts: Any, gates: Any, first: Any):
        new = jax.vmap(invert)(factors, parts, first)
        return jax.vmap(choose)(gates, new, parts)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *zip(factors, parts, strict=True))
    flags = jnp.stack(gates), jnp.stack(first)
    new = lax.platform_dependent(*stacked, *flags, cpu=loop, default=batch)
    return [jax.tree.map(lambda x, i=i: x[i], new) for i in range(len(parts))]


def inverse_of(
    options: Options, layer: LayerTag, factors: Any, part: Any, shift: Array, first: Any
) -> Any:
    """A layer's ``(moments, cached, good)`` after an inversion."""
    moments, cached, _ = part
    factors = unpacked(layer, factors)
    turns = options.method.moments
    whole = factors._replace(s=moments) if turns else factors
    new, whole = options.method.refresh(layer, whole, cached, shift, first)
    good = all_finite(new)
    kept = choose(good, whole.s, moments) if turns else ()
    return kept, choose(good, new, cached), good
