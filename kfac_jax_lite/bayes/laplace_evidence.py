"""The marginal likelihood of a Laplace approximation, and priors that maximise it.

``log p(D) ≈ 1/τ log p(D | μ) + log p(μ) + P/2 log 2π − ½ log det(N/τ F + p I)`` with
``log p(μ) = P/2 log(p/2π) − p/2 ‖μ‖²``. It is exact for a linear model with normal
noise at its maximum a posteriori. Eigenvalues ``λ`` of ``F`` are known, so that with
one prior precision for every layer it is a sum over the layers of

``½ (P_l log p_l − p_l ‖μ_l‖² − Σ_i log(N/τ λ_i + p_l))``.

References:
    MacKay, 1992, "Bayesian interpolation", Neural Computation 4(3), 415-447; Immer et
    al., 2021, arXiv:2104.04975, Sec. 3.
"""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize

from kfac_jax_lite.bayes.laplace_blocks import Eigenblocks


def group_eigenvalues(
    blocks: Sequence[Eigenblocks], groups: int
) -> tuple[np.ndarray, ...]:
    """Eigenvalues of every layer's blocks, float64.

    Returns:
        ``[P_l]`` of each.
    """
    found: list[list[np.ndarray]] = [[] for _ in range(groups)]
    for block in blocks:
        values = np.asarray(block.values, np.float64)
        owner = np.asarray(block.group)
        for group in np.unique(owner):
            found[group].append(values[owner == group].ravel())
    return tuple(np.concatenate(parts) for parts in found)


def layer_evidence(
    values: np.ndarray, squared_norm: float, scale: float, precisions: np.ndarray
) -> np.ndarray:
    """One layer's term of the marginal likelihood.

    Args:
        values: ``λ [P_l]``.
        precisions: ``p [k]``.

    Returns:
        ``½ (P_l log p − p ‖μ_l‖² − Σ_i log(N/τ λ_i + p)) [k]``.
    """
    found = [
        len(values) * np.log(p) - p * squared_norm - np.log(scale * values + p).sum()
        for p in precisions
    ]
    return np.asarray(found) / 2


def maximise(
    function: Callable[[np.ndarray], np.ndarray],
    bounds: tuple[float, float],
    num_points: int,
) -> float:
    """The argument between bounds at which a function is largest.

    A grid in the logarithm finds the highest of several maxima, Brent's bounded search
    between the best point's neighbours refines it.

    Args:
        function: Of arguments ``[k]``.
    """
    grid = np.log(np.geomspace(*bounds, num_points))
    values = function(np.exp(grid))
    best = int(np.argmax(values))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, num_points - 1)]
    found = scipy.optimize.minimize_scalar(
        lambda x: -function(np.exp([x]))[0],
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-8},
    )
    inner = -found.fun > values[best]
    return float(np.exp(found.x if inner else grid[best]))
