"""Curvature matrices of a tagged loss as matrix-free operators, and their spectra.

op = kfac.curvature.ggn(tagged, params, batches, approximation="full")
op.mv(v), op.diagonal(), op.trace(key), op.eigsh(k, key), op.to_dense()
kfac.curvature.measures.effective_dimension(op, damping, key)
"""

from kfac_jax_lite.curvature import measures, spectra
from kfac_jax_lite.curvature.matrices import (
    empirical_fisher,
    fisher,
    ggn,
    gradient_covariance,
    hessian,
    mc_fisher,
)
from kfac_jax_lite.curvature.operator import Operator

__all__ = [
    "Operator",
    "empirical_fisher",
    "fisher",
    "ggn",
    "gradient_covariance",
    "hessian",
    "mc_fisher",
    "measures",
    "spectra",
]
