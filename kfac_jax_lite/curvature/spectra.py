"""Matrix-free spectra: eigenpairs, traces, diagonals, determinants and densities.

Every function takes a product ``mv`` (parameter-shaped tree -> tree) and ``like``, a
tree of that shape; see ``flat`` for how products are driven. Every stochastic figure
is an ``Estimate`` of value and error.
"""

from kfac_jax_lite.curvature.density import (
    Density,
    Quadrature,
    density_of,
    logdet,
    quadrature,
    spectral_density,
)
from kfac_jax_lite.curvature.eigsh import Eigenpairs, eigsh
from kfac_jax_lite.curvature.flat import Estimate
from kfac_jax_lite.curvature.lanczos import Tridiagonal, lanczos
from kfac_jax_lite.curvature.traces import diagonal, frobenius, trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Quadrature",
    "Tridiagonal",
    "density_of",
    "diagonal",
    "eigsh",
    "frobenius",
    "lanczos",
    "logdet",
    "quadrature",
    "spectral_density",
    "trace",
]
