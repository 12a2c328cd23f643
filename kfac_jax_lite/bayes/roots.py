"""Square roots of damped inverse curvature: noise with a layer's covariance.

``R e`` with ``R Rᵀ = (F + δ I)⁻¹`` and ``e`` standard normal, block by block:

* Kronecker layers with explicit inverses: the matrix normal
  ``L_A E L_Gᵀ``, ``L_A L_Aᵀ = (A + π√δ I)⁻¹``, ``L_G L_Gᵀ = (G + √δ/π I)⁻¹``;
* in eigenbases, exactly: ``Q_A ((Q_Aᵀ E Q_G) / √(s + δ)) Q_Gᵀ``, ``s`` the products of
  the factors' eigenvalues or EKFAC's second moments;
* scales and shifts unit by unit, diagonals entry by entry.

References:
    Zhang, Sun, Duvenaud & Grosse, 2018, arXiv:1712.02390, Sec. 3.3 (matrix-variate
    normal posterior); Gupta & Nagar, 1999, "Matrix Variate Distributions", Ch. 2.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.linalg import inverse_half, one_by_one
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
)
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import Eigenbases, FactorInverses, damped_factors
from kfac_jax_lite.kronecker.precondition import precondition


def inverse_root(matrix: Array, form: forms.Form) -> Array:
    """``Lᵀ`` with ``L Lᵀ = M⁻¹``: the inverse of ``M``'s Cholesky factor."""
    if not form.matrix:
        return jnp.where(matrix > 0, lax.rsqrt(matrix), jnp.nan)
    return one_by_one(inverse_half, matrix, lead=matrix.ndim - 2)


def factor_roots(
    layer: LayerTag, factors: KroneckerStatistics, damping: Any
) -> FactorInverses:
    """``L_Aᵀ`` and ``L_Gᵀ`` of a layer's damped factors."""
    a, g = damped_factors(layer, factors, jnp.asarray(damping, jnp.float32))
    form_a, form_g = forms.forms_of(layer)
    form_a, form_g = forms.forms_of(layer)
    return FactorInverses(inverse_root(a, form_a), inverse_root(g, form_g))


def root_times(
    layer: LayerTag, e: Array, factors: Any, inverse: Any, damping: Any
) -> Array:
    """``R e`` for a layer's block."""
    if isinstance(factors, DiagonalStatistics):
        return e * lax.rsqrt(factors.gradient + jnp.asarray(damping, e.dtype))
    if isinstance(factors, ScaleShiftStatistics):
        return unit_root_times(factors.blocks, e, damping)
    zero = jnp.zeros((), e.dtype)
    if isinstance(inverse, Eigenbases):
        s = inverse.products if factors.s is None else factors.s
        factors = factors._replace(s=jnp.sqrt(s + jnp.asarray(damping, s.dtype)))
    return precondition(layer, e, factors, inverse, zero)


def unit_root_times(blocks: Array, e: Array, damping: Any) -> Array:
    """``R_u e_u`` for 1×1 and 2×2 blocks, by their Cholesky factors in closed form.

    Args:
        blocks: ``F_u [units, k, k]``.
        e: ``[units, k]``.

    Returns:
        ``[units, k]``.
    """
    shift = jnp.asarray(damping, blocks.dtype)
    first = jnp.sqrt(blocks[..., 0, 0] + shift)
    if blocks.shape[-1] == 1:
        return e / first[..., None]
    slope = blocks[..., 0, 1] / first
    # With F_u positive semidefinite, the Schur complement is at least the damping.
    rest = blocks[..., 1, 1] + shift - jnp.square(slope)
    last = jnp.sqrt(jnp.maximum(rest, shift))
    y = e[..., 1] / last
    return jnp.stack([(e[..., 0] - slope * y) / first, y], -1)
