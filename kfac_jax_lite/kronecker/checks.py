"""Errors that name the layer, the shape seen and the shape wanted."""

import math
from collections.abc import Sequence
from typing import Any

import jax.core

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.kronecker.masking import part_of_statistics
from kfac_jax_lite.kronecker.state import KFACState, Packed, Slices


def check_state(layers: Sequence[LayerTag], state: KFACState) -> None:
    """Refuses a state whose layers or shapes are not those of the gradient."""
    if set(state.factors) != {layer.name for layer in layers}:
        other = sorted(set(state.factors) ^ {layer.name for layer in layers})
        raise ValueError(
            f"the optimiser state is of another model: it and the layers differ in "
            f"{other[0]}."
        )
    for layer in layers:
        first = state.factors[layer.name][0]
        if isinstance(first, Slices):
            continue
        if isinstance(first, Packed):
            check_packed(layer, first)
            continue
        shape = first.shape
        if shape != layer.a_shape:
            raise ValueError(
                f"the optimiser state is of another model: layer {layer.name} has a "
                f"factor of shape {shape} in it, wanted {layer.a_shape}."
            )


def check_packed(layer: LayerTag, factor: Packed) -> None:
    """A packed factor must have the entries of the layer's triangles."""
    *blocks, size, _ = layer.a_shape
    wanted = math.prod(blocks) * size * (size + 1) // 2
    if factor.values.shape != (wanted,):
        raise ValueError(
            f"the optimiser state is of another model: layer {layer.name} has a packed "
            f"factor of shape {factor.values.shape} in it, wanted {(wanted,)}."
        )


def check_nothing_due(state: KFACState) -> None:
    """Without statistics a step needs the certainty that none are wanted."""
    due = state.clock.due
    if isinstance(due, jax.core.Tracer) or bool(due.any()):
        raise ValueError(
            "update needs statistics=…: take them from value, grads, statistics = "
            "tagged.value_and_grad(params, *args, opt_state=opt_state) and call "
            "tx.update(grads, opt_state, params, statistics=statistics). Wrappers that "
            "hand no further arguments on (optax.lookahead, optax.contrib.sam) are "
            "called around a transformation that has them already: "
            "optax.GradientTransformation(tx.init, functools.partial(tx.update, "
            "statistics=statistics))."
        )


def checked_statistics(layer: LayerTag, statistics: Any) -> Any:
    """A layer's statistics, or an error that says what is wrong with them."""
    if layer.name not in statistics:
        raise ValueError(
            f"statistics hold nothing for layer {layer.name}: they are of another "
            "model."
        )
    own = part_of_statistics(layer, statistics[layer.name])
    wanted = [layer.a_shape]
    if layer.kronecker:
        wanted.append(layer.g_shape)
    if layer.tied:
        wanted += [layer.g_shape, layer.a_shape]
    shapes = [tuple(x.shape) for x in own[: len(wanted)]]
    if shapes != wanted:
        raise ValueError(
            f"layer {layer.name}: statistics have shapes {shapes}, wanted {wanted}."
        )
    return own
