"""A few eigenpairs of a symmetric matrix: Lanczos with thick restarts, LOBPCG.

References:
    Wu & Simon, 2000, SIAM J. Matrix Anal. Appl. 22, 602 (thick restarts); Knyazev,
    2001, SIAM J. Sci. Comput. 23, 517 (LOBPCG, as in
    ``jax.experimental.sparse.linalg``).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse.linalg import lobpcg_standard

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
from kfac_jax_lite.curvature.lanczos import BREAKDOWN, dot, extend, fresh_basis

Tick = Callable[[int], None]
# Least number of vectors that Lanczos keeps, beyond twice the eigenpairs wanted, and
# how often it may fill them.
SPARE, CYCLES = 20, 20
# What comes first in each order of eigenvalues.
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "largest": lambda values: np.argsort(-values, kind="stable"),
    "magnitude": lambda values: np.argsort(-np.abs(values), kind="stable"),
    "smallest": lambda values: np.argsort(values, kind="stable"),
}


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs ``M v ≈ θ v``.

    Attributes:
        values: ``[k]`` float64.
        vectors: Orthonormal, a parameter-shaped tree with a leading axis ``k``.
        residuals: ``[k]``, ``‖M v − θ v‖``, measured afresh: some eigenvalue lies
            within that distance of ``θ``.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray


def eigsh(
    mv: Callable[[Any], Any],
    like: Any,
    k: int,
    key: Array,
    method: str = "lanczos",
    *,
    which: str = "largest",
    num_vectors: int | None = None,
    max_products: int | None = None,
    tol: float | None = None,
    mm: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The ``k`` extreme eigenpairs of a symmetric matrix.

    - ``"lanczos"``: Rayleigh-Ritz on a Krylov space with full reorthogonalisation and
      thick restarts. A single vector's Krylov space holds each eigenvalue once; so once
      converged it looks again, with a fresh random vector beside the ``k`` found, until
      a filling of the space (at least ``SPARE`` products) changes nothing. Clusters
      narrower than ``tol`` may still be found in part.
    - ``"lobpcg"``: JAX's, on blocks of ``k`` vectors; needs a traceable ``mv`` and
      ``P > 5 k``. ``"magnitude"`` runs it at both ends.

    Neither raises where it does not converge: the residuals tell.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        k: Number of eigenpairs, at most ``P``.
        key: PRNG key of the first vectors.
        method: ``"lanczos"`` or ``"lobpcg"``.
        which: ``"largest"``, ``"smallest"`` (both by value) or ``"magnitude"``.
        num_vectors: Lanczos: vectors kept, ``m``, ``k + 2 ≤ m`` or ``m = P``; by
            default ``2 k + 20``.
        max_products: The most products, without the ``k`` that measure residuals, at
            least ``k``; by default ``20 m``, and 100 iterations of LOBPCG.
        tol: Residual at which an eigenpair has converged, relative to the largest
            ``|θ|`` (LOBPCG: to the pair's own); by default the root of the dtype's
            rounding unit, which makes the eigenvalues accurate to about that unit where
            they are well apart.
        mm: The product with several trees at once, leading axis on every leaf.
        progress: Called as ``progress(done, total)``; ends early on convergence.

    Returns:
        Eigenpairs, by descending value (``"magnitude"``: by descending ``|θ|``).

    Raises:
        ValueError: Another method or order; ``k``, ``num_vectors`` or ``max_products``
            out of range; LOBPCG with ``P ≤ 5 k`` or a product that is not traceable;
            leaves that are neither float32 nor float64.
    """
    if method not in ("lanczos", "lobpcg"):
        raise ValueError(f"method is {method!r}, wanted 'lanczos' or 'lobpcg'")
    if which not in ORDERS:
        raise ValueError(f"which is {which!r}, wanted one of {sorted(ORDERS)}")
    matrix = flatten(mv, like, mm)
    if whole_number("k", k, 1) > matrix.size:
        raise ValueError(f"k is {k}, wanted at most P = {matrix.size}")
    close = matrix.eps**0.5 if tol is None else tol
    if method == "lobpcg":
        limit = 100 * k if max_products is None else max_products
        whole_number("max_products", limit, k)
        tick = counter(progress, limit + k)
        vectors = _lobpcg(matrix, k, key, which, limit // k, close)
        tick(limit)
    else:
        size = min(matrix.size, 2 * k + SPARE if num_vectors is None else num_vectors)
        whole_number("num_vectors", size, min(k + 2, matrix.size))
        limit = CYCLES * size if max_products is None else max_products
        whole_number("max_products", limit, k)
        tick = counter(progress, limit + k)
        vectors = _Restarted(matrix, k, which, size, limit, close, tick).run(key)
    return _measured(matrix, vectors, which, tick)


@jax.jit
def _residuals(vectors: Array, images: Array) -> tuple[Array, Array]:
    values = jnp.einsum("kp,kp->k", vectors, images, precision="highest")
    return values, jnp.linalg.norm(images - values[:, None] * vectors, axis=1)


def _measured(matrix: Flat, vectors: Array, which: str, tick: Tick) -> Eigenpairs:
    """Rayleigh quotients and residuals, by ``k`` products."""
    values, residuals = _residuals(vectors, matrix.products(vectors, tick))
    values = finite(values, "a product with the matrix")
    order = ORDERS["magnitude" if which == "magnitude" else "largest"](values)
    return Eigenpairs(
        values[order], matrix.tree(vectors[order]), np.asarray(residuals)[order]
    )


# ------------------------------------------------------------- Lanczos


@functools.partial(jax.jit, donate_argnums=0)
def _rotate(basis: Array, turn: Array) -> Array:
    """Rows ``turnᵀ @ basis``, in the basis's memory."""
    return dot(turn.T, basis)


class _Restarted:
    """Lanczos with thick restarts, the projected matrix ``H = Qᵀ M Q`` kept whole.

    Orthogonalising ``M q_j`` against the basis gives the whole column ``j`` of ``H``,
    so that restarts and fresh random vectors need no case of their own.
    """

    def __init__(
        self,
        matrix: Flat,
        k: int,
        which: str,
        size: int,
        limit: int,
        tol: float,
        tick: Tick,
    ):
        self.matrix, self.k, self.size, self.limit = matrix, k, size, limit
        self.order, self.tol, self.tick = ORDERS[which], tol, tick
        self.inner = np.zeros((size, size))
        self.done, self.scale = 0, 0.0

    def run(self, key: Array) -> Array:
        """Orthonormal ``[k, P]`` whose span is all but invariant."""
        self.key, key = jax.random.split(key)
        basis = fresh_basis(self.matrix, self.size + 1, normals(key, 1, self.matrix)[0])
        kept, before, look = 0, None, 0
        while True:
            basis, filled, beta = self.fill(basis, kept)
            values, vectors = np.linalg.eigh(self.inner[:filled, :filled])
            order = self.order(values)
            values, vectors = values[order], vectors[:, order]
            close = self.tol * self.scale
            converged = (beta * np.abs(vectors[-1, : self.k]) <= close).all()
            same = before is not None and (np.abs(values[: self.k] - before) <= close)
            looked = before is None or self.done - look >= SPARE
            spent = self.done >= self.limit or self.size == self.matrix.size
            if spent or (converged and looked and np.all(same)):
                basis = self.restart(basis, vectors, filled, self.k)
                return _orthonormal(basis[: self.k])
            if converged and looked:
                # Only what converged is kept: the remainder goes.
                before, look, kept = values[: self.k], self.done, self.k
                basis = self.restart(basis, vectors, filled, kept)
                basis = self.fresh(basis, kept)
            else:
                kept = (self.k + filled) // 2
                basis = self.restart(basis, vectors, filled, kept)
            self.inner[:] = 0
            self.inner[range(kept), range(kept)] = values[:kept]

    def restart(
        self, basis: Array, vectors: np.ndarray, filled: int, kept: int
    ) -> Array:
        """Leaves the first Ritz vectors and the remainder, then zeros."""
        turn = np.zeros((self.size + 1,) * 2)
        turn[:filled, :kept] = vectors[:, :kept]
        turn[filled, kept] = 1
        return _rotate(basis, jnp.asarray(turn, self.matrix.dtype))

    def fill(self, basis: Array, start: int) -> tuple[Array, int, float]:
        """Fills rows and columns of ``H`` from ``start`` on; the last remainder."""
        matrix, beta, row = self.matrix, 0.0, start
        vector = basis[row]
        while row < self.size and self.done < self.limit:
            image = matrix.product(vector)
            basis, vector, coefficients, norm = extend(basis, image, row + 1)
            self.done += 1
            self.tick(1)
            column = finite(coefficients, "a product with the matrix")[: row + 1]
            self.inner[: row + 1, row] = self.inner[row, : row + 1] = column
            beta = float(norm)
            self.scale = max(self.scale, float(np.abs(column).max()), beta)
            row += 1
            if row == matrix.size:
                beta = 0.0
            elif beta <= BREAKDOWN * matrix.eps * self.scale:
                # The space is invariant: go on outside of it.
                basis, beta = self.fresh(basis, row), 0.0
                vector = basis[row]
        return basis, row, beta

    def fresh(self, basis: Array, row: int) -> Array:
        """A random vector, orthogonal to all others, in this row."""
        self.key, key = jax.random.split(self.key)
        return extend(basis, normals(key, 1, self.matrix)[0], row)[0]


@jax.jit
def _orthonormal(vectors: Array) -> Array:
    """Rows that are orthonormal but for rounding, made so in their own directions."""
    columns, upper = jnp.linalg.qr(vectors.T)
    return (columns * jnp.where(jnp.diag(upper) < 0, -1, 1)).T


# -------------------------------------------------------------- LOBPCG


def _lobpcg(
    matrix: Flat, k: int, key: Array, which: str, steps: int, tol: float
) -> Array:
    """Orthonormal ``[k, P]`` by LOBPCG."""
    if matrix.size <= 5 * k:
        raise ValueError(
            f"LOBPCG wants more than 5 k = {5 * k} parameters, there are "
            f"{matrix.size}; take method='lanczos'"
        )
    mm = jax.vmap(matrix.mv) if matrix.mm is None else matrix.mm
    start = normals(key, k, matrix).T
    # There a pair has converged if ‖M v − θ v‖ < 10 P tol (θ + ‖M v‖).
    tol /= 20 * matrix.size

    def end(sign: int) -> tuple[np.ndarray, Array]:
        def product(columns: Array):
            return sign * matrix.flat(mm(matrix.tree(columns.T)), 1).T

        try:
            values, vectors, _ = lobpcg_standard(product, start, m=steps, tol=tol)
        except jax.errors.JAXTypeError as error:
            raise ValueError(
                "LOBPCG traces the product, which cannot be traced (does it stream "
                "batches or use numpy?); take method='lanczos'"
            ) from error
        return sign * np.asarray(values), vectors.T

    found = [
        end(s) for s, skipped in ((1, "smallest"), (-1, "largest")) if which != skipped
    ]
    values = np.concatenate([values for values, _ in found])
    vectors = jnp.concatenate([vectors for _, vectors in found])
    return _orthonormal(vectors[ORDERS[which](values)[:k]])
