"""The weights of a loss's terms, where the user has not said them.

The loss ``L = Σ_k w_k · mean_n ℓ_k(z_kn)`` with ``ℓ_k`` the negative log-likelihood
that the mark names has ``∂²L/∂z_k² = w_k/N_k Λ_k``. One product of either side with a
fixed vector tells ``w_k``, and whether they are multiples of each other at all: those
of another loss, such as a policy's advantage times its log-probability, are not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.likelihoods import (
    BESIDE,
    Output,
    fisher_product,
    masked_rows,
    weighed,
)
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.statistics.fisher_passes import typed_like
from kfac_jax_lite.tagging.interpreter import Interpreter
from kfac_jax_lite.tagging.trace import Trace

# Relative error up to which two products are multiples of each other.
MULTIPLE = 0.02


class OutputCurvature(NamedTuple):
    """The loss's second derivative by a marked output, beside the mark's ``Λ``.

    Attributes:
        weight: ``w`` for which ``w/N Λ v`` is nearest to ``∂²L/∂z² v``.
        error: Distance of the two over ``‖∂²L/∂z² v‖``; 1 where that is zero.
    """

    weight: Array
    error: Array

    @property
    def proper(self) -> Array:
        """Whether they are multiples of each other."""
        return (self.error <= MULTIPLE) & (self.weight > 0)


def output_curvature(
    tail: Callable[[Sequence[Array]], Array], outputs: Sequence[Output], number: int
) -> OutputCurvature:
    """Compares the loss's curvature at one of its outputs with its mark."""
    output, values = outputs[number], [o.value for o in outputs]

    def slope(z: Array) -> Array:
        before, after = values[:number], values[number + 1 :]
        return jax.grad(lambda z: tail([*before, z, *after]))(z)

    v = vary(typed_like(output, direction, None), varying_axes(output.value))
    # Reverse mode twice: a loss with a rule of its own may have no other.
    seen = jax.vjp(slope, output.value)[1](v)[0]
    wanted = masked_rows(output, typed_like(output, fisher_product, v))
    dtype = accumulation_dtype(output.value.dtype)
    seen, wanted = seen.astype(dtype), wanted.astype(dtype)
    size = jnp.sum(jnp.square(wanted))
    ratio = jnp.sum(seen * wanted) / jnp.where(size > 0, size, 1)
    # Scaled by the largest entry: squares of tiny ones would be lost.
    largest = jnp.max(jnp.abs(seen))
    whole = jnp.where(largest > 0, largest, 1)
    rest, norm = (jnp.linalg.norm(x / whole) for x in (seen - ratio * wanted, seen))
    error = jnp.where(norm > 0, rest / jnp.where(norm > 0, norm, 1), 1)
    return OutputCurvature(ratio * output.terms, error)


def direction(likelihood: str, value: Array, _: Any) -> Array:
    """A vector for the products: no multiple of one in any row."""
    del likelihood
    entries = jnp.cos(1.0 + 2.3 * jnp.arange(value.size, dtype=jnp.float32))
    return entries.reshape(value.shape).astype(value.dtype)


def tail_of(found: Trace, operands: Sequence[Any]) -> Callable[..., Array]:
    """The loss as a function of its marked outputs, all else as in the operands."""

    def tail(values: Sequence[Array]) -> Array:
        waiting = iter(values)

        def put(name: str, mark: Array):
            return mark if name in BESIDE else next(waiting)

        jaxpr, consts = found.closed.jaxpr, found.closed.consts
        run = Interpreter(None, {}, put).run
        return run(found.plan, jaxpr, consts, operands, {})[0][0]

    return tail


def with_weights(
    found: Trace, operands: Sequence[Any], outputs: Sequence[Output]
) -> list[Output]:
    """The outputs with their weights: those given, and of several, those measured."""
    if len(outputs) < 2 or all(output.given is not None for output in outputs):
        return list(outputs)
    tail, weights = tail_of(found, operands), []
    for number, output in enumerate(outputs):
        weight = output.given
        if weight is None:
            seen = output_curvature(tail, outputs, number)
            weight = jnp.where(seen.proper, seen.weight, 1)
        weights.append(weight)
    return weighed(outputs, weights)
