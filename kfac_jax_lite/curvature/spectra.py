"""Matrix-free spectra: eigenpairs, traces, diagonals, determinants and densities.

Every function takes a product ``mv`` (parameter-shaped tree -> tree) and ``like``, a
tree of that shape; see ``flat`` for how products are driven. Every stochastic figure
is an ``Estimate`` of value and error. ``num_samples`` of traces, diagonals and norms is
the number of products whatever the method, so that equal numbers cost the same.

Stochastic Lanczos quadrature: for a vector ``v`` of signs, ``m`` steps of Lanczos from
``v`` give ``T = S Θ Sᵀ``, and ``vᵀ f(M) v ≈ P Σ_j (S_1j)² f(θ_j)``: Gauss quadrature,
exact for polynomials of degree ``2 m − 1``. Its mean over ``v`` estimates ``tr f(M)``.

References:
    Lanczos: Lanczos, 1950, J. Res. Nat. Bur. Standards 45, 255; Parlett, 1998, The
    Symmetric Eigenvalue Problem, Ch. 13; Giraud, Langou & Rozložník, 2005, Comput.
    Math. Appl. 50, 1069 (two passes of Gram-Schmidt are enough); Wu & Simon, 2000,
    SIAM J. Matrix Anal. Appl. 22, 602 (thick restarts). LOBPCG: Knyazev, 2001, SIAM J.
    Sci. Comput. 23, 517 (as in ``jax.experimental.sparse.linalg``).
    Traces: Hutchinson, 1990, Commun. Stat. Simul. 19, 433; Bekas, Kokiopoulou & Saad,
    2007, Appl. Numer. Math. 57, 1214; Meyer, Musco, Musco & Woodruff, 2021,
    arXiv:2010.09649; Epperly, Tropp & Webber, 2024, arXiv:2301.07825; Hoeffding, 1948,
    Ann. Math. Stat. 19, 293 (the error of a mean over pairs).
    Quadrature: Golub & Meurant, 1994, Matrices, Moments and Quadrature; Ubaru, Chen &
    Saad, 2017, SIAM J. Matrix Anal. Appl. 38, 1075; Ghorbani, Krishnan & Xiao, 2019,
    arXiv:1901.10159.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.experimental.sparse.linalg import lobpcg_standard

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.flat import (
    BLOCK,
    Estimate,
    Flat,
    Progress,
    counter,
    finite,
    flatten,
    mean_and_error,
    normals,
    signs,
    whole_number,
)

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

Tick = Callable[[int], None]
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
    matrix: Flat, steps: int, start: Array, tick: Tick
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


# --------------------------------------------------------------------------- eigenpairs


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


# ------------------------------------------------------------------------------- traces


def trace(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    num_samples: int,
    method: str = "hutchinson",
    *,
    mm: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates ``tr M`` without bias.

    - ``"hutchinson"``: the mean of ``vᵀ M v`` over vectors of signs. The error falls
      like ``n^-1/2``, ``M`` need not be low-rank; keeps only ``BLOCK`` vectors.
    - ``"hutch++"``: a third of the products finds an orthonormal ``Q`` that spans
      ``M S``, a third gives ``tr Qᵀ M Q`` exactly, the others are Hutchinson's on
      ``(I − Q Qᵀ) M (I − Q Qᵀ)``. Exact on rank ``n / 3``; the error falls like
      ``1 / n`` for ``M ≥ 0``. The error is that of the last part, given ``Q``.
    - ``"xtrace"``: ``n / 2`` vectors ``ω_i`` serve as both: with ``Q_i`` that spans the
      other images, the mean of ``tr Q_iᵀ M Q_i + ω_iᵀ (I − Q_i Q_iᵀ) M (I − Q_i Q_iᵀ)
      ω_i``, the residual rescaled to its expected length. Exact on rank ``n / 2 − 1``.
      Its terms are correlated; the error counts that (see ``error_of_terms``). In 1000
      runs each (the slow test over many spectra; Student's t, ``n / 2 − 1`` degrees of
      freedom), 95 % intervals held the trace in 94.8 to 98.1 % and 68 % intervals in
      66 to 76 % where eigenvalues are flat or decay like ``i^-0.7``, ``1 / i`` or
      ``0.95^i``. Where the error falls fast (``i^-2``, ``0.8^i`` to ``0.5^i``, steps)
      95 % intervals held it in 94.1 to 100 %: the root of the mean square of the error
      was up to 3.6 times the truth, 58 times for a step to a thousandth after 4 of 40
      eigenvalues with ``n = 12``.

    The last two keep ``n / 3`` and ``3 n / 2`` vectors.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: ``n``, products with ``M``: at least 2 (``"hutchinson"``), 4
            (``"hutch++"``) or 6 (``"xtrace"``).
        method: One of the three names.
        mm: The product with several trees at once, leading axis on every leaf.
        progress: Called as ``progress(done, total)`` after each product or block.

    Returns:
        The trace and its standard error, float64.

    Raises:
        ValueError: Another name, too few samples, or leaves that are neither float32
            nor float64.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, wanted one of {sorted(METHODS)}")
    run, least = METHODS[method]
    whole_number("num_samples", num_samples, least)
    matrix = flatten(mv, like, mm)
    return run(matrix, key, num_samples, counter(progress, num_samples))


def _probes(key: Array, count: int, matrix: Flat):
    """Blocks of vectors of signs, ``count`` in all, never all of them in memory."""
    for index, start in enumerate(range(0, count, BLOCK)):
        many = min(BLOCK, count - start)
        yield signs(jax.random.fold_in(key, index), many, matrix)


def _forms(vectors: Array, images: Array) -> np.ndarray:
    """``v_iᵀ w_i``, float64."""
    products = jnp.einsum("kp,kp->k", vectors, images, precision="highest")
    return finite(products, "vᵀ M v")


def _hutchinson(matrix: Flat, key: Array, count: int, tick: Tick) -> Estimate:
    forms = [
        _forms(vectors, matrix.products(vectors, tick))
        for vectors in _probes(key, count, matrix)
    ]
    return mean_and_error(np.concatenate(forms))


def _range(vectors: Array) -> tuple[Array, Array]:
    """Rows ``[k, P]`` that span those given, and ``R`` with ``rowsᵀ R = givenᵀ``."""
    columns, upper = jnp.linalg.qr(vectors.T)
    return columns.T, upper


def _hutch_plus_plus(matrix: Flat, key: Array, count: int, tick: Tick) -> Estimate:
    first, second = jax.random.split(key)
    rank = min(count // 3, matrix.size)
    basis, _ = _range(matrix.products(signs(first, rank, matrix), tick))
    inside = _forms(basis, matrix.products(basis, tick)).sum()
    forms = []
    for vectors in _probes(second, count - 2 * rank, matrix):
        for _ in range(2):  # the second pass removes what rounding left
            vectors = vectors - dot(dot(vectors, basis.T), basis)
        forms.append(_forms(vectors, matrix.products(vectors, tick)))
    rest = mean_and_error(np.concatenate(forms))
    return Estimate(inside + rest.value, rest.error)


def _xtrace(matrix: Flat, key: Array, count: int, tick: Tick) -> Estimate:
    """XTrace with rescaled residuals (Sec. 2.3)."""
    k = min(count // 2, matrix.size)
    vectors = normals(key, k, matrix)
    vectors *= math.sqrt(matrix.size) / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    basis, upper = _range(matrix.products(vectors, tick))
    images = matrix.products(basis, tick)
    inner = finite(dot(basis, images.T), "Qᵀ M Q")
    if k == matrix.size:  # Q is square: nothing was left to chance
        return Estimate(np.trace(inner), np.float64(0))
    upper = finite(upper, "R of M Ω = Q R")
    inside = finite(dot(basis, vectors.T), "Qᵀ Ω")
    return leave_one_out((inner + inner.T) / 2, upper, inside, matrix)


def leave_one_out(
    inner: np.ndarray, upper: np.ndarray, inside: np.ndarray, matrix: Flat
) -> Estimate:
    """XTrace and its error from the small matrices.

    The span of the images but those of ``i`` and ``j`` is that of ``Q (I − E Eᵀ)``,
    ``E`` an orthonormal basis of ``s_i, s_j``, where ``s_i`` is the unit vector
    orthogonal to the other columns of ``R``: column ``i`` of ``R^-T``, normalised. So
    the estimate without sample ``j`` needs no product either.

    Args:
        inner: ``H = Qᵀ M Q``, ``[k, k]``.
        upper: ``R``, with ``M Ω = Q R``.
        inside: ``W = Qᵀ Ω``.
    """
    k, size = len(inner), matrix.size
    # A column that depends on those before it, but for rounding, counts as such.
    pivots = np.diag(upper)
    floor = max(matrix.eps * np.abs(upper).max(), 1e-100)
    solved = upper + np.diag(np.where(np.abs(pivots) < floor, floor - pivots, 0.0))
    s = scipy.linalg.solve_triangular(solved.T, np.eye(k), lower=True)
    s /= np.linalg.norm(s, axis=0)
    curved = inner @ inside

    def terms(directions: Sequence[Any], left_out: int):
        # Terms of samples i (last axis), so many directions projected out: of each, its
        # products with w_i, r_i and H w_i, and with H and all of them.
        known, length = np.trace(inner), size - (inside**2).sum(0)
        residual = -(inside * upper).sum(0) + (inside * curved).sum(0)
        for one, (w, r, hw, h) in enumerate(directions):
            known = known - h[one]
            length = length + w**2
            residual = residual + 2 * w * r - 2 * w * hw
            for other, pair in enumerate(h):
                residual = residual + w * directions[other][0] * pair
        length = np.maximum(length, matrix.eps * size)
        return known + residual * (size - k + left_out) / length

    w, r, hw, h, cosine = (s.T @ x for x in (inside, upper, curved, inner @ s, s))
    own = [np.diag(x) for x in (w, r, hw, h)]
    single = terms([(*own[:3], [own[3]])], 1)
    # s_j in rows, and what is new in s_i: (s_i − c s_j) / √(1 − c²).
    sine = np.sqrt(np.maximum(1 - cosine**2, 1e-12))
    new = [
        (one - cosine * row) / sine for one, row in zip(own, (w, r, hw), strict=False)
    ]
    first, cross = own[3][:, None], (h - cosine * own[3][:, None]) / sine
    second = (own[3] - 2 * cosine * h + cosine**2 * first) / sine**2
    pairs = terms([(w, r, hw, [first, cross]), (*new, [cross, second])], 2)
    return Estimate(single.mean(), error_of_terms(single, pairs))


def error_of_terms(single: np.ndarray, pairs: np.ndarray) -> np.float64:
    """Standard error of the mean of XTrace's terms, which are not independent.

    Given all vectors but ``ω_i``, both its term ``t_i`` and ``t_ij``, the term with
    ``ω_j`` left out of the basis too, have the mean ``tr M``. Of the two, ``t_ij`` does
    not depend on ``ω_j``, so ``t_ij − tr M`` is uncorrelated with ``t_j`` and ``t_ji``:

        ``Cov(t_i, t_j) = E (t_i − t_ij)(t_j − t_ji)``
        ``Var mean = E s² / k + Cov(t_i, t_j)``, ``s²`` the terms' sample variance.

    The means over samples and pairs are without bias, for any matrix and any ``k``.
    Where errors fall fast with ``k``, the differences ``t_i − t_ij`` are larger than
    what they estimate, so that the covariance's mean over pairs ``C`` is lost in noise
    and often negative. No less than the standard error of ``C`` itself (Hoeffding,
    1948) is then counted: the error is too large, rather than too small.

    Args:
        single: ``t_i [k]``.
        pairs: ``t_ij`` in row ``j`` and column ``i``, ``[k, k]``; the diagonal is not
            read.
    """
    k = len(single)
    apart = np.where(np.eye(k, dtype=bool), 0, single - pairs)
    means = (apart * apart.T).sum(1) / (k - 1)
    noise = 2 * means.std(ddof=1) / math.sqrt(k)
    return np.sqrt(single.var(ddof=1) / k + max(means.mean(), noise))


METHODS = {
    "hutchinson": (_hutchinson, 2),
    "hutch++": (_hutch_plus_plus, 4),
    "xtrace": (_xtrace, 6),
}


def diagonal(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    num_samples: int,
    *,
    mm: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates the diagonal of ``M`` without bias: the mean of ``v ⊙ M v``.

    With vectors of signs the variance of entry ``i`` is ``Σ_{j≠i} M_ij² / n``: zero
    for a diagonal matrix.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: ``n``, products with ``M``, at least 2.
        mm: The product with several trees at once, leading axis on every leaf.
        progress: Called as ``progress(done, total)`` after each product or block.

    Returns:
        The diagonal and each entry's standard error, two trees shaped like ``like``.

    Raises:
        ValueError: Fewer than 2 samples, or leaves that are neither float32 nor
            float64.
    """
    whole_number("num_samples", num_samples, 2)
    matrix = flatten(mv, like, mm)
    tick = counter(progress, num_samples)
    mean = square = jnp.zeros(matrix.size, matrix.dtype)
    done = 0
    for vectors in _probes(key, num_samples, matrix):
        samples = vectors * matrix.products(vectors, tick)
        many = len(samples)
        gap = samples.mean(0) - mean
        # Chan, Golub & LeVeque, 1979: sums of squares around a mean that moves.
        square += samples.var(0) * many + gap**2 * (done * many / (done + many))
        done += many
        mean += gap * (many / done)
    finite(mean.sum(), "the diagonal's sum")
    error = jnp.sqrt(square / (done - 1) / done)
    return Estimate(matrix.tree(mean), matrix.tree(error))


def frobenius(
    mv: Callable[[Any], Any],
    like: Any,
    key: Array,
    num_samples: int,
    *,
    mm: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates ``‖M‖_F² = tr Mᵀ M``, the square, without bias: the mean of ``‖M v‖²``.

    The root of the estimate has bias; its error is ``error / (2 sqrt(value))`` to first
    order.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: Products with ``M``, at least 2.
        mm: The product with several trees at once, leading axis on every leaf.
        progress: Called as ``progress(done, total)`` after each product or block.

    Returns:
        The squared norm and its standard error, float64.

    Raises:
        ValueError: Fewer than 2 samples, or leaves that are neither float32 nor
            float64.
    """
    whole_number("num_samples", num_samples, 2)
    matrix = flatten(mv, like, mm)
    tick = counter(progress, num_samples)
    forms = []
    for vectors in _probes(key, num_samples, matrix):
        images = matrix.products(vectors, tick)
        forms.append(_forms(images, images))
    return mean_and_error(np.concatenate(forms))


# --------------------------------------------------------------------------- quadrature


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
