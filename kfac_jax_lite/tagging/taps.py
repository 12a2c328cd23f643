"""Zero-valued probes whose cotangents are a layer's statistics.

``tap`` is the identity on a layer's output. Its backward rule hands the cotangent on
unchanged and returns, as the cotangents of the probes, whatever the estimators compute
from the layer's inputs and that cotangent. Sites of one layer share its probes, so
reverse mode itself adds up what weight sharing repeats.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array

Estimator = Callable[[Any, Array], Array]
Estimators = tuple[tuple[str, Estimator], ...]
Probes = dict[str, Array]


class Slot(NamedTuple):
    """What the taps of one layer share.

    Attributes:
        due: Scalar bool, or None for always.
        probes: Zeros, shaped like what the layer's taps return, by name.
        basis: Eigenbases ``(Q_A, Q_G)`` for EKFAC, else an empty tuple.
        output: Zeros, shaped like the output whose cotangent is wanted, or None.
    """

    due: Array | None
    probes: Probes
    basis: tuple[Array, ...] = ()
    output: Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap(
    estimators: Estimators, output: Array, inputs: Any, due: Any, probes: Probes
) -> Array:
    """Returns ``output``; see the module's docstring.

    Args:
        estimators: For every probe its name and a function ``(inputs, cotangent) ->
            statistic``.
    """
    del estimators, inputs, due, probes
    return output


def _forward(
    estimators: Estimators, output: Array, inputs: Any, due: Any, probes: Probes
):
    del estimators
    return output, (inputs, due, probes)


def _backward(estimators: Estimators, residuals: tuple[Any, ...], cotangent: Array):
    inputs, due, probes = residuals
    statistics = estimated(estimators, inputs, cotangent, due, probes)
    return cotangent, None, None, statistics


def estimated(
    estimators: Estimators, inputs: Any, cotangent: Array, due: Any, probes: Probes
) -> Probes:
    """What the estimators make of a site's inputs and cotangent, where it is due."""
    statistics = {}
    for name, estimate in estimators:
        probe = probes[name]

        def refresh(
            inputs: Any, cotangent: Array, probe: Array, estimate: Estimator = estimate
        ):
            statistic = automatic(estimate, inputs, cotangent).astype(probe.dtype)
            return vary(statistic, varying_axes(probe))

        def skip(inputs: Any, cotangent: Array, probe: Array):
            del inputs, cotangent
            return untouched(probe)

        if due is None:
            statistics[name] = refresh(inputs, cotangent, probe)
            continue
        statistics[name] = lax.cond(due, refresh, skip, inputs, cotangent, probe)
    return statistics


def untouched(probe: Array) -> Array:
    """The zeros of a skipped statistic.

    Fresh zeros spare XLA a copy of the probe; under ``shard_map`` they would lack the
    probe's varying axes, which both branches of a ``cond`` must share.
    """
    return probe if varying_axes(probe) else jnp.zeros_like(probe)


tap.defvjp(_forward, _backward)


@jax.custom_vjp
def watch(output: Array, probe: Array) -> Array:
    """Returns ``output``; the cotangent of ``probe``, shaped alike, is the output's."""
    del probe
    return output


watch.defvjp(
    lambda output, probe: (output, probe),
    lambda probe, c: (c, vary(c, varying_axes(probe))),
)
