"""State of the optimiser, as tuples of arrays, and the averaging of statistics."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from kfac_jax_lite.core.linalg import expanded
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    Statistics,
    TiedStatistics,
)
from kfac_jax_lite.kronecker.factors import mean_diagonals
from kfac_jax_lite.kronecker.masking import part_of_statistics


class Slices(NamedTuple):
    """An array of which every device holds a part.

    Attributes:
        values: ``[devices, …]``, row ``i`` on device ``i`` of the mapped axis: a device
            sees its own row.
    """

    values: Array


class Packed(NamedTuple):
    """A symmetric factor kept as a triangle, off-diagonal entries times ``√2``.

    Attributes:
        values: ``[blocks · d (d + 1) / 2]``; its norm is the factor's.
    """

    values: Array


class Clock(NamedTuple):
    """When each layer was and will be refreshed; vectors over layers sorted by name.

    Attributes:
        due: Whether the layer's statistics are wanted at the next step.
        interval: Steps between refreshes, as decided at the last one.
        previous_interval: The interval before that.
        last_refresh: Step (from 1) of the last refresh; 0 before the first.
        last_inverse: Step of the last inversion; 0 before the first.
        refreshes: Number of refreshes.
        inversions: Number of inversions that succeeded.
        failures: Number of factorisations that failed (the last good inverse stayed).
        weight: Sum of the moving average's weights (bias correction).
        diff: Relative change of the statistics seen at the last refresh; the largest
            float32 where there is none.
        inverse_damping: Damping that the cached inverse holds.
        elements: Elements that one refresh reduces over devices (a constant), as
            ``words``: stacked layers of billions do not fit into 32 bits.
        bytes: Bytes that one refresh hands to collectives (a constant), as ``words``.
        inversion_bytes: The same of one inversion.
        step_bytes: The same of every step.
    """

    due: Array
    interval: Array
    previous_interval: Array
    last_refresh: Array
    last_inverse: Array
    refreshes: Array
    inversions: Array
    failures: Array
    weight: Array
    diff: Array
    inverse_damping: Array
    elements: Array
    bytes: Array
    inversion_bytes: Array
    step_bytes: Array


def words(values: Sequence[int]) -> Array:
    """Whole numbers below ``2^61`` as int32 ``[2, n]``, multiples of ``2^30`` first."""
    return jnp.array(
        [[v >> 30 for v in values], [v % 2**30 for v in values]], jnp.int32
    )


def from_words(pairs: Any) -> list[int]:
    """The numbers whose ``words`` these are."""
    return [(int(high) << 30) + int(low) for high, low in zip(*pairs, strict=True)]


class KFACState(NamedTuple):
    """State of ``scale_by_kfac``; arrays only, of fixed structure, shape and dtype.

    Attributes:
        count: Steps taken (batches accepted).
        skipped: Batches rejected: a gradient or statistic was not finite, or an
            adaptive damping took the last step back.
        damping: Damping of the last step.
        clock: Refresh bookkeeping, vectors over layers in sorted-name order.
        factors: Layer name to averaged, bias-corrected statistics.
        previous: Layer name to the last fresh statistics the interval rule compares.
        inverses: Layer name to what preconditioning reads.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    skipped: Array
    damping: Array
    clock: Clock
    factors: dict[str, Statistics]
    previous: dict[str, tuple[Statistics, ...]]
    inverses: dict[str, Any]


def curvature(layer: LayerTag, statistics: Any) -> Any:
    """What is averaged: of diagonals ``N · gradient²``, of tied weights one product.

    Both are made of statistics that devices have averaged already.
    """
    if isinstance(statistics, DiagonalStatistics):
        square = statistics.num_examples * jnp.square(statistics.gradient)
        return statistics._replace(gradient=square.astype(statistics.gradient.dtype))
    if isinstance(statistics, TiedStatistics):
        return merged(layer, statistics)
    return statistics


def merged(layer: LayerTag, statistics: TiedStatistics) -> KroneckerStatistics:
    """One Kronecker product for both uses of a tied weight.

    ``A ⊗ G + B ⊗ H ≈ (A + π B) ⊗ (G + H / π)`` with
    ``π² = (tr A · tr H) / (tr B · tr G)``, which makes the trace of the terms that are
    too many least. ``B = g_out`` and ``H = a_out`` are the factors of the reverse use.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6.3 (there ``B ⊗ H = λ I ⊗ I``).
    """
    a, g, h, b, s = statistics
    of_a, of_g = mean_diagonals(layer, a, g)
    of_b, of_h = mean_diagonals(layer, b, h)
    proper = (of_a * of_h > 0) & (of_b * of_g > 0)
    pi = jnp.sqrt(jnp.where(proper, of_a * of_h, 1) / jnp.where(proper, of_b * of_g, 1))
    return KroneckerStatistics(
        a + expanded(pi, b.ndim) * b, g + h / expanded(pi, h.ndim), s
    )


def output_parts(statistics: Any) -> tuple[Any, ...]:
    """Those of a layer's statistics that are zero where no gradient reaches it."""
    if isinstance(statistics, TiedStatistics):
        return statistics.g, statistics.g_out
    if isinstance(statistics, KroneckerStatistics):
        return (statistics.g,)
    return (statistics[0],)


def taking_part(layer: LayerTag, average: Any, fresh: Any) -> tuple[Any, Any]:
    """Statistics of blocks that no gradient reaches are those known already.

    Of a scanned stack some layers may be idle, of experts some, of an ensemble some
    members. Their averages stay what they are; the first statistics of a block are its
    average.

    Returns:
        ``(average, fresh)``, changed in those blocks.
    """
    lead = layer.stack + (layer.blocks if layer.kronecker else ())
    count, parts = math.prod(lead), output_parts(fresh)
    if count == 1 or any(isinstance(x, Slices) for x in fresh):
        return average, fresh

    def rows(x: Array):
        return x.reshape(count, -1)

    def empty(parts: Any):
        return jnp.stack([~jnp.any(rows(x) != 0, -1) for x in jax.tree.leaves(parts)])

    idle = jnp.all(empty(parts), 0)[:, None]
    begun = ~jnp.all(empty(output_parts(average)), 0)[:, None]

    def mixed(flag: Array, x: Array, y: Array):
        if x.size % count or x.ndim == 0:
            return y
        return jnp.where(flag, rows(x).astype(y.dtype), rows(y)).reshape(y.shape)

    known = jax.tree.map(lambda x, y: mixed(idle, x, y), average, fresh)
    first = jax.tree.map(lambda x, y: mixed(~begun, x, y), fresh, average)
    return first, known


def moving_average(average: Any, fresh: Any, weight: Any, decay: Any) -> Any:
    """One step of the bias-corrected exponential moving average.

    ``X̂ ← X̂ + (1 − d)/w · (X − X̂)`` with ``w ← d w + (1 − d)`` from 0: the zero start
    divided out. ``decay`` weights the *old* value.
    """

    def mix(old: Array, new: Array):
        rate = jnp.asarray((1 - decay) / weight, old.dtype)
        return old + rate * (new.astype(old.dtype) - old)

    return jax.tree.map(mix, average, fresh)


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
