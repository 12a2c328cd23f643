"""Backward passes for the curvature: sampled labels, or every column of the Hessian.

The plain backward pass gives the loss's gradient, the input factors and, for the
empirical Fisher, everything. The MC and exact Fisher pull further cotangents of the
marked outputs back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.factors.canonical import canonical
from kfac_jax_lite.factors.recipe import COUNTS, INPUT_SIDE, Recipe, finish
from kfac_jax_lite.likelihoods import (
    Output,
    masked_rows,
    sampled_cotangent,
    square_root_column,
)
from kfac_jax_lite.sharding import automatic, explicit_mesh, specs_of
from kfac_jax_lite.tagging.taps import Slot
from kfac_jax_lite.tree import vary, varying_axes

ALL_FIELDS = frozenset({"a", "g", "a_out", "g_out", "s", "blocks", "squares"})


@dataclasses.dataclass(frozen=True)
class Finisher:
    """Gives what the taps returned its last touch, inside the gates of the layers.

    Attributes:
        recipes: Recipe of every tapped layer.
        slots: Slot of every tapped layer.
        terms: How many loss terms count, where the output is masked.
    """

    recipes: dict[str, Recipe]
    slots: dict[str, Slot]
    terms: jax.Array | None

    def __call__(
        self, raw: dict[str, Any], wanted: frozenset[str] = ALL_FIELDS
    ) -> dict[str, Any]:
        """Statistics by layer and field."""
        return {k: self._finish(k, raw[k], wanted) for k in raw if raw[k]}

    def _finish(
        self, name: str, raw: dict[str, Any], wanted: frozenset[str]
    ) -> dict[str, Any]:
        recipe, slot = self.recipes[name], self.slots[name]

        def touch(raw: dict[str, Any]):
            return finish(recipe, raw, slot.basis, self.terms, wanted)

        if slot.due is None or not (recipe.counted or recipe.by_example):
            return touch(raw)
        shapes, axes = jax.eval_shape(touch, raw), varying_axes(raw)

        def skip(raw: dict[str, Any]):
            del raw
            return vary(zeros_of(shapes), axes)

        return lax.cond(slot.due, lambda raw: vary(touch(raw), axes), skip, raw)


def zeros_of(shapes: Any) -> Any:
    """Zeros in the shapes of a tree."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def sampled_pull(
    outputs: list[Output],
    pullback: Callable[..., Any],
    plain: dict[str, Any],
    n: Any,
    finisher: Finisher,
    leaves: Sequence[int],
    cotangents: list[jax.Array],
) -> tuple[dict[int, jax.Array], dict[str, Any]]:
    """Pulls cotangents of the outputs back: gradients and statistics but ``A``.

    Gradients that nobody reads must not leave the conditional around this: XLA would
    compute them.

    Args:
        outputs: The marked outputs.
        pullback: Of the loss and everything marked.
        plain: What the taps returned in the plain backward pass.
        n: Number of loss terms.
        finisher: Of the statistics.
        leaves: Numbers of the parameters whose gradients are wanted.
        cotangents: One for every output, of the sum of the terms.

    Returns:
        Those gradients and the statistics.
    """
    marks = []
    for output, c in zip(outputs, cotangents, strict=True):
        if output.mask is not None:
            marks.append(jnp.zeros_like(output.mask))
        marks.append((c / n).astype(c.dtype))
    grads, raw = pullback(marks)
    for name, values in raw.items():
        counts = {k: plain[name][k] for k in values if k in COUNTS}
        raw[name] = values | counts
    return {i: grads[i] for i in leaves}, finisher(raw, ALL_FIELDS - INPUT_SIDE)


def resampled(
    fisher: str,
    outputs: list[Output],
    pull: Callable[..., Any],
    plain: dict[str, Any],
    key: Any,
    grads: dict[int, jax.Array],
    finisher: Any,
    gated: bool,
) -> tuple[dict[int, jax.Array], dict[str, Any]]:
    """The MC or exact Fisher's statistics, computed when any layer is due.

    Input factors come from the plain backward pass: XLA drops the other statistics of
    that pass.

    Args:
        fisher: ``"mc"`` or ``"exact"``.
        outputs: The marked outputs.
        pull: Numbers of parameters and cotangents of the outputs to gradients of those
            parameters and statistics.
        plain: What the taps returned in the plain backward pass.
        key: PRNG key.
        grads: The plain gradients that the diagonals need.
        finisher: Of the statistics.
        gated: Whether to skip by itself where nothing is due.

    Returns:
        Gradients for the diagonals, and statistics.
    """
    pull = canonical(functools.partial(pull, list(grads)))
    dues = [s.due for s in finisher.slots.values() if s.due is not None]
    shapes = jax.eval_shape(pull, [o.value for o in outputs])[1]
    axes = varying_axes([o.value for o in outputs])

    def nothing():
        return grads, vary(zeros_of(shapes), axes)

    def resample():
        if fisher == "exact":
            return grads, exact_statistics(outputs, pull, nothing()[1])
        keys = jax.random.split(key, len(outputs))
        pairs = zip(outputs, keys, strict=True)
        draws = [(o, typed_like(o, sampled_cotangent, k)) for o, k in pairs]
        return pull([masked_rows(output, draw) for output, draw in draws])

    if len(dues) < len(finisher.slots) or not dues or not gated:
        grads, found = resample()
    else:
        grads, found = lax.cond(jnp.any(jnp.stack(dues)), resample, nothing)
    sides = finisher(plain, INPUT_SIDE)
    return grads, {k: found[k] | sides[k] for k in found}


def typed_like(
    output: Output, function: Callable[..., jax.Array], argument: Any
) -> jax.Array:
    """``function(likelihood, value, argument)``, typed like a marked output's value."""
    run = functools.partial(function, output.likelihood)
    if explicit_mesh(output.value) is None:
        return run(output.value, argument)
    specs = specs_of(output.value)
    return automatic(run, output.value, argument, out_specs=specs)


def hessian_column(likelihood: str, value: jax.Array, j: jax.Array) -> jax.Array:
    """Column ``j`` of the square root of the output's Hessian."""
    return square_root_column(likelihood, value)[1](j)


def exact_statistics(
    outputs: list[Output], pull: Callable[..., Any], total: dict[str, Any]
) -> dict[str, Any]:
    """Adds the statistics of each column of the output Hessian's square root."""
    for number, output in enumerate(outputs):
        columns, _ = square_root_column(output.likelihood, output.value)

        def add(
            total: dict[str, Any],
            j: jax.Array,
            number: int = number,
            output: Output = output,
        ):
            zeros = [jnp.zeros_like(other.value) for other in outputs]
            zeros[number] = masked_rows(output, typed_like(output, hessian_column, j))
            _, statistics = pull(zeros)
            return jax.tree.map(jnp.add, total, statistics), None

        total, _ = lax.scan(add, total, jnp.arange(columns))
    return total
