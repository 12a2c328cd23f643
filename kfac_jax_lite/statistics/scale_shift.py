"""Unit-wise Fisher blocks of elementwise scales and shifts (normalisation layers).

For ``y = γ x̂ + β`` the gradient of one example with respect to unit ``u`` is
``s_n = (Σ_t c_tu x̂_tu, Σ_t c_tu)``, summed over the example's positions ``t``; its
Fisher block is ``F_u = N Σ_n s_n s_nᵀ`` (the ``N`` undoes the mean in ``c``).

References:
    Osawa et al., 2020, arXiv:2002.06015, Sec. 4.2 (unit-wise natural gradient).
"""

import functools
import operator
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.tagging.sites import Site, moved


def example_gradients(
    site: Site, factors: list[Array], cotangent: Array, roles: tuple[str, ...]
) -> Array:
    """``s_n`` of every unit at one site, ``[examples, units, k]``.

    Args:
        roles: ``("scale", "shift")`` or one of them.
    """
    geometry: Any = site.geometry
    dtype = accumulation_dtype(cotangent.dtype)
    c = cotangent.astype(dtype)
    parts_of_x = [
        moved(steps, f).astype(dtype)
        for steps, f in zip(geometry.factor_ops, factors, strict=True)
    ]
    x_hat = functools.reduce(operator.mul, parts_of_x, jnp.ones((), dtype))

    def per_example(value: Array):
        value = lax.transpose(value.real, geometry.order)
        shape = (site.examples, site.positions or 1, geometry.units)
        return value.reshape(shape).sum(1)

    parts = {"scale": lambda: per_example(c * x_hat), "shift": lambda: per_example(c)}
    return jnp.stack([parts[role]() for role in roles], -1)
