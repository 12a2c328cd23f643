"""Statistics of all layers over all devices, each inside the gate of its layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.linalg import all_finite
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.distributed.assignment import is_small
from kfac_jax_lite.distributed.collectives import checked_axes, varied
from kfac_jax_lite.distributed.context import Context
from kfac_jax_lite.distributed.layout import own_slices, scattered
from kfac_jax_lite.distributed.reduction import reduce_statistics
from kfac_jax_lite.kronecker.state import checked_statistics, output_parts


def exchanged(context: Context, due: Array, statistics: Any) -> dict[str, Any]:
    """Each layer's statistics averaged over devices; slices of owned layers.

    Small layers travel together where all of them are due, and one by one otherwise.

    Args:
        due: Which are due, ``[layers]``.
    """
    layers, owners = context.layers, context.plan.owners
    own = {t.name: checked_statistics(t, statistics) for t in layers}
    flags = {t.name: due[i] for i, t in enumerate(layers)}
    fresh = {
        t.name: sliced(context, t, own[t.name], flags[t.name])
        for t in layers
        if t.name in owners
    }
    rest = [t for t in layers if t.name not in owners]
    if context.axis_name is None or context.reduction.mesh is not None:
        return fresh | {t.name: own[t.name] for t in rest}
    moments = context.method.moments
    small = [t for t in rest if is_small(t, context.reduction, moments)]
    if len(small) > 1:
        names = [t.name for t in small]
        fresh |= bucket(context, small, *([d[k] for k in names] for d in (own, flags)))
    for layer in rest:
        if layer.name not in fresh:
            name = layer.name
            fresh[name] = alone(context, layer, own[name], flags[name])
    return fresh


def sliced(context: Context, layer: LayerTag, own: Any, flag: Array) -> Any:
    """This device's slices of an owned layer's statistics, where the layer is due."""
    axis_name, plan, reduction = context.axis_name, context.plan, context.reduction

    def share(own: Any):
        if reduction.mesh is not None:
            return own_slices(layer, own, plan, axis_name)
        return scattered(layer, own, plan, axis_name, reduction.dtype)

    shapes = jax.eval_shape(share, own)

    def skip(own: Any):
        del own
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        axes = checked_axes(axis_name)
        return zeros._replace(a=vary(zeros.a, axes), g=vary(zeros.g, axes))

    return lax.cond(flag, share, skip, own)


def alone(context: Context, layer: LayerTag, own: Any, flag: Array) -> Any:
    """A layer's statistics averaged in a collective of its own, where it is due."""

    def reduce(own: Any):
        (mean,) = reduce_statistics(
            (layer,), (own,), context.axis_name, context.reduction
        )
        return mean

    return lax.cond(flag, reduce, unreduced, own)


def unreduced(own: Any) -> Any:
    """What stands for statistics that are not due.

    Types that vary over devices do not after a reduction; fresh zeros do not either.
    """
    if not varying_axes(own):
        return own
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own)


def bucket(
    context: Context, layers: list[LayerTag], own: list[Any], flags: list[Array]
) -> dict[str, Any]:
    """Small layers' statistics: one collective if all are due, else one each."""

    def together(own: Any):
        return reduce_statistics(
            tuple(layers), tuple(own), context.axis_name, context.reduction
        )

    def apart(own: Any):
        each = zip(layers, own, flags, strict=True)
        return tuple(alone(context, t, mine, flag) for t, mine, flag in each)

    everyone = jnp.all(jnp.stack(flags))
    means = lax.cond(everyone, together, apart, tuple(own))
    return dict(zip((t.name for t in layers), means, strict=True))


def agreed(context: Context, due: Array, fresh: dict[str, Any]) -> tuple[Array, Array]:
    """What all devices find in the statistics that are due.

    Args:
        due: Which are due, ``[layers]``.

    Returns:
        ``(finite, idle)``: whether all are finite, and which layers took no part: no
        gradient has reached them, though one could, ``[layers]``.
    """
    layers = context.layers
    # Statistics that nobody asked for are not looked at.
    flags = [all_finite(fresh[t.name]) | ~due[i] for i, t in enumerate(layers)]
    never = jnp.asarray(False)
    idle = {t.name: vanishes(fresh[t.name]) if t.reached else never for t in layers}
    # Only slices may vanish on some devices and not on others.
    owned = [t.name for t in layers if t.name in context.plan.owners and t.reached]
    words = jnp.stack([jnp.all(jnp.stack(flags)), *(idle[name] for name in owned)])
    words = everywhere(words, context.axis_name)
    idle |= {name: words[1 + i] for i, name in enumerate(owned)}
    return words[0], jnp.stack([idle[t.name] for t in layers])


def vanishes(statistics: Any) -> Array:
    """Whether no gradient is in a layer's statistics: what is made of it is zero."""
    parts = output_parts(statistics)
    return ~jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(parts)]))


def everywhere(flag: Array, axis_name: Any) -> Array:
    """Whether a flag is true on every device."""
    if axis_name is None:
        return flag
    return lax.pmin(varied(flag, axis_name).astype(jnp.int32), axis_name) > 0
