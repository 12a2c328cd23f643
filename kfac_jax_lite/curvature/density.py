"""Stochastic Lanczos quadrature: traces of functions of a matrix, spectral densities.

For a vector ``v`` of signs, ``m`` steps of Lanczos from ``v`` give ``T = S Θ Sᵀ``, and
``vᵀ f(M) v ≈ P Σ_j (S_1j)² f(θ_j)``: Gauss quadrature, exact for polynomials of degree
``2 m − 1``. Its mean over ``v`` estimates ``tr f(M)``.

References:
    Golub & Meurant, 1994, Matrices, Moments and Quadrature; Ubaru, Chen & Saad, 2017,
    SIAM J. Matrix Anal. Appl. 38, 1075; Ghorbani, Krishnan & Xiao, 2019,
    arXiv:1901.10159.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.flat import (
    Estimate,
    Progress,
    counter,
    flatten,
    mean_and_error,
    signs,
    whole_number,
)
from kfac_jax_lite.curvature.lanczos import lanczos_flat

# A density's width as a share of the spectrum's range, where none is asked for; how
# far its grid goes beyond the spectrum, in widths, and how fine it is.
WIDTH, MARGIN, POINTS_PER_WIDTH = 0.01, 6, 4


class Density(NamedTuple):
    """A spectral density, smoothed.

    Attributes:
        grid: ``[G]`` float64, eigenvalues.
        density: ``[G]``: share of the eigenvalues per unit; integrates to 1.
        error: ``[G]``, its standard error.
        width: Standard deviation of the normal kernel that smooths it.
    """

    grid: np.ndarray
    density: np.ndarray
    error: np.ndarray
    width: float


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """Nodes and weights of ``n`` independent samples, for any number of functions.

    Attributes:
        size: ``P``.
        nodes: ``[n, m]`` float64, Ritz values.
        weights: ``[n, m]``, not negative; each row sums to 1.
        fewer: Nodes and weights ``[n, m − 1]`` with one step of Lanczos less (with
            ``m`` nodes where ``m`` is 1).
    """

    size: int
    nodes: np.ndarray
    weights: np.ndarray
    fewer: tuple[np.ndarray, np.ndarray]

    def integrate(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Estimates ``tr f(M)``, or several at once.

        Args:
            function: ``f``, on eigenvalues ``[…]``, elementwise; it may return further
                axes in front.

        Returns:
            The trace and its error: the root of the sum of squares of the samples'
            standard error and of the change by the last step of Lanczos. The latter
            stands for the quadrature's own error, and is less than that where it falls
            slowly: then take more steps.
        """

        def samples(nodes: np.ndarray, weights: np.ndarray):
            return self.size * np.einsum("...nm,nm->n...", function(nodes), weights)

        estimate = mean_and_error(samples(self.nodes, self.weights))
        change = estimate.value - samples(*self.fewer).mean(0)
        return Estimate(estimate.value, np.hypot(estimate.error, change))


def _nodes(alphas: np.ndarray, betas: np.ndarray, length: int) -> np.ndarray:
    """``[2, length]``: Ritz values and weights, filled up with weights of zero."""
    values, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas)
    result = np.stack([np.full(length, values[0]), np.zeros(length)])
    result[:, : len(values)] = values, vectors[0] ** 2
    return result


def quadrature(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    num_samples: int,
    num_steps: int,
    *,
    progress: Progress | None = None,
) -> Quadrature:
    """Runs Lanczos from ``n`` vectors of signs; what costs products is all here.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: ``n``, at least 2.
        num_steps: ``m``, products for each; more than ``P`` is read as ``P``. Keeps
            ``m + 1`` vectors.
        progress: Called as ``progress(done, total)`` after each product; ends early
            where a Krylov space is exhausted.

    Returns:
        Nodes and weights, for ``integrate``.

    Raises:
        ValueError: Fewer than 2 samples or 1 step, leaves that are neither float32 nor
            float64, or products that are far from symmetric.
    """
    whole_number("num_samples", num_samples, 2)
    matrix = flatten(mv, like)
    steps = min(whole_number("num_steps", num_steps, 1), matrix.size)
    tick = counter(progress, num_samples * steps)
    full, fewer = [], []
    for one in jax.random.split(key, num_samples):
        alphas, betas, _, rest = lanczos_flat(
            matrix, steps, signs(one, 1, matrix)[0], tick
        )
        full.append(_nodes(alphas, betas, steps))
        # Where the space is exhausted the quadrature is exact, and stays.
        last = len(alphas) if rest == 0 else max(1, len(alphas) - 1)
        fewer.append(_nodes(alphas[:last], betas[: last - 1], steps))
    nodes, weights = np.stack(full, axis=1)
    return Quadrature(matrix.size, nodes, weights, tuple(np.stack(fewer, axis=1)))


def logdet(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    damping: float,
    num_samples: int,
    num_steps: int,
    *,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates ``log det (M + λ I) = tr log(M + λ I)`` by Lanczos quadrature.

    Converges like ``((√κ − 1) / (√κ + 1))^{2m}``, ``κ`` the condition number of
    ``M + λ I``; too few steps err upwards.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        damping: ``λ``, in units of ``M``'s eigenvalues.
        num_samples: Vectors, at least 2.
        num_steps: Products for each, ``m``.
        progress: Called as ``progress(done, total)`` after each product.

    Returns:
        The logarithm and its error, which holds that of the quadrature.

    Raises:
        ValueError: ``M + λ I`` is not positive definite, or as ``quadrature``.
    """
    found = quadrature(mv, like, key, num_samples, num_steps, progress=progress)
    least = float(min(found.nodes.min(), found.fewer[0].min()))
    if not least + damping > 0:
        raise ValueError(
            f"M + damping I is not positive definite: M has a Ritz value {least:.6g}, "
            f"damping is {damping:.6g}; wanted a damping above {-least:.6g}"
        )
    return found.integrate(lambda x: np.log(x + damping))


def density_of(
    found: Quadrature, grid: Any = None, width: float | None = None
) -> Density:
    """The spectral density of a ``quadrature``; see ``spectral_density``."""
    low, high = float(found.nodes.min()), float(found.nodes.max())
    if width is None:
        scale = max(abs(low), abs(high))
        width = WIDTH * (high - low if high - low > 1e-6 * scale else scale or 1.0)
    if not width > 0:
        raise ValueError(f"width is {width!r}, wanted a positive number")
    if grid is None:
        low, high = low - MARGIN * width, high + MARGIN * width
        points = math.ceil(POINTS_PER_WIDTH * (high - low) / width) + 1
        grid = np.linspace(low, high, points)
    grid = np.asarray(grid, np.float64)
    if grid.ndim != 1:
        raise ValueError(f"grid has shape {grid.shape}, wanted [G]")

    def kernel(nodes: np.ndarray):
        scaled = (grid[:, None, None] - nodes) / width
        return np.exp(-(scaled**2) / 2) / (width * math.sqrt(2 * math.pi))

    value, error = found.integrate(kernel)
    return Density(grid, value / found.size, error / found.size, float(width))


def spectral_density(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    num_samples: int,
    num_steps: int,
    grid: Any = None,
    width: float | None = None,
    *,
    progress: Progress | None = None,
) -> Density:
    """Estimates ``φ(x) = (1/P) Σ_i N(x; λ_i, σ²)`` by Lanczos quadrature.

    ``φ = tr f_x(M) / P`` with ``f_x`` the normal density around ``x``. The narrower
    the kernel, the more steps are wanted: about the spectrum's range over ``σ``.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: Vectors, at least 2.
        num_steps: Products for each.
        grid: ``[G]`` eigenvalues; by default evenly over the spectrum and six widths
            beyond, four points a width.
        width: ``σ``; by default a hundredth of the spectrum's range.
        progress: Called as ``progress(done, total)`` after each product.

    Returns:
        Grid, density, its error (which holds that of the quadrature), and the width.

    Raises:
        ValueError: A width that is not positive, a grid that is not a vector, or as
            ``quadrature``.
    """
    found = quadrature(mv, like, key, num_samples, num_steps, progress=progress)
    return density_of(found, grid, width)
