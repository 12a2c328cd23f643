"""The Lanczos process with full reorthogonalisation.

References:
    Lanczos, 1950, J. Res. Nat. Bur. Standards 45, 255; Parlett, 1998, The Symmetric
    Eigenvalue Problem, Ch. 13; Giraud, Langou & Rozložník, 2005, Comput. Math. Appl.
    50, 1069 (two passes of Gram-Schmidt are enough).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.flat import (
    Flat,
    Progress,
    counter,
    finite,
    flatten,
    normals,
    whole_number,
)

# A remainder below this many rounding units of the matrix's norm is no direction.
BREAKDOWN = 100.0
# Share of the matrix's norm by which products may disagree about being symmetric.
ASYMMETRY = 0.1

dot: Callable[..., Array] = functools.partial(jnp.matmul, precision="highest")


class Tridiagonal(NamedTuple):
    """``Qᵀ M Q = T``, with ``T`` tridiagonal.

    Attributes:
        alphas: ``[m]`` float64, the diagonal of ``T``.
        betas: ``[m − 1]`` float64, its off-diagonal, not negative.
        basis: The orthonormal columns of ``Q``, a parameter-shaped tree whose leaves
            have a leading axis ``m``.
        remainder: ``‖M Q − Q T‖``, the next off-diagonal entry; zero where the columns
            span an invariant subspace.
    """

    alphas: np.ndarray
    betas: np.ndarray
    basis: Any
    remainder: float


@functools.partial(jax.jit, donate_argnums=0)
def extend(
    basis: Array, vector: Array, row: Array
) -> tuple[Array, Array, Array, Array]:
    """Orthogonalises a vector against a basis and puts it there, normalised.

    Two passes of Gram-Schmidt; a third after the normalisation serves vectors that
    lie in the span but for rounding.

    Args:
        basis: ``[m, P]``, orthonormal rows; those not yet set are zero.
        vector: ``[P]``.

    Returns:
        The basis, what was put there, the vector's coefficients ``[m]`` in it, and the
        remainder's norm.
    """
    basis = basis.at[row].set(0)
    first = dot(basis, vector)
    vector = vector - dot(first, basis)
    second = dot(basis, vector)
    vector = vector - dot(second, basis)
    norm = jnp.linalg.norm(vector)
    vector = vector / jnp.where(norm > 0, norm, 1)
    vector = vector - dot(dot(basis, vector), basis)
    length = jnp.linalg.norm(vector)
    vector = vector / jnp.where(length > 0, length, 1)
    return basis.at[row].set(vector), vector, first + second, norm


def fresh_basis(matrix: Flat, rows: int, start: Array) -> Array:
    """``[rows, P]``, zero but for the first row, a vector that is normalised."""
    basis = jnp.zeros((rows, matrix.size), matrix.dtype)
    return extend(basis, start, 0)[0]


def lanczos_flat(
    matrix: Flat, steps: int, start: Array, tick: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, Array, float]:
    """Lanczos on flat vectors; stops early where the subspace is invariant.

    Args:
        start: ``[P]``, not zero.

    Returns:
        ``alphas [m'], betas [m' − 1], basis [m', P], remainder``, ``m' ≤ m``.
    """
    basis = fresh_basis(matrix, steps + 1, start)
    vector = basis[0]
    alphas, betas, scale = [], [], 0.0
    for i in range(steps):
        basis, vector, coefficients, beta = extend(basis, matrix.product(vector), i + 1)
        tick(1)
        h = finite(coefficients, "a product with the matrix")[: i + 1]
        scale = max(scale, float(np.abs(h).max()), float(beta))
        wanted = np.zeros(i)
        wanted[-1:] = betas[-1:]
        off = float(np.abs(h[:-1] - wanted).max(initial=0.0))
        if off > ASYMMETRY * scale:
            raise ValueError(
                f"M is not symmetric, or changes from product to product: entries "
                f"(i, j) and (j, i) of Qᵀ M Q differ by {off:.3g}, its largest is "
                f"{scale:.3g}"
            )
        alphas.append(h[-1])
        betas.append(float(beta))
        if i + 1 == matrix.size or betas[-1] <= BREAKDOWN * matrix.eps * scale:
            betas[-1] = 0.0
            break
    count = len(alphas)
    return np.array(alphas), np.array(betas[:-1]), basis[:count], betas[-1]


def lanczos(
    mv: Callable[[Any], Any],
    like: Any,
    num_steps: int,
    key: Array,
    *,
    start: Any = None,
    progress: Progress | None = None,
) -> Tridiagonal:
    """Tridiagonalises a symmetric matrix on a Krylov space.

    ``M Q = Q T + β_m q_{m+1} e_mᵀ`` with ``Qᵀ Q = I``: every new vector is
    orthogonalised against all before it, twice. Costs ``m`` products and the memory of
    ``m + 1`` vectors.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        num_steps: ``m``; more than ``P`` is read as ``P``.
        key: PRNG key of the first vector, standard normal before normalisation.
        start: The first vector instead, a tree shaped like ``like``.
        progress: Called as ``progress(done, total)`` after each product.

    Returns:
        ``Tridiagonal(alphas, betas, basis, remainder)``, shorter than ``m`` where the
        Krylov space is exhausted before.

    Raises:
        ValueError: ``num_steps`` below 1, a zero start, leaves that are neither float32
            nor float64, or products that are far from symmetric.
    """
    matrix = flatten(mv, like)
    steps = min(whole_number("num_steps", num_steps, 1), matrix.size)
    if start is None:
        vector = normals(key, 1, matrix)[0]
    else:
        vector = matrix.flat(start)
    if not float(jnp.linalg.norm(vector)) > 0:
        raise ValueError("the start vector is zero or NaN, wanted a direction")
    tick = counter(progress, steps)
    alphas, betas, basis, rest = lanczos_flat(matrix, steps, vector, tick)
    return Tridiagonal(alphas, betas, matrix.tree(basis), rest)
