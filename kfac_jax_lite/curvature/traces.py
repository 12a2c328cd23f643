"""Trace, diagonal and Frobenius norm from products with random vectors.

``num_samples`` is the number of products with the matrix whatever the method, so that
equal numbers cost the same.

References:
    Hutchinson, 1990, Commun. Stat. Simul. 19, 433; Bekas, Kokiopoulou & Saad, 2007,
    Appl. Numer. Math. 57, 1214; Meyer, Musco, Musco & Woodruff, 2021,
    arXiv:2010.09649; Epperly, Tropp & Webber, 2024, arXiv:2301.07825.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

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
from kfac_jax_lite.curvature.lanczos import dot
from kfac_jax_lite.types import Array

Tick = Callable[[int], None]


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
      Its terms are exchangeable but not independent: the error is the standard error
      as if they were, which the authors find accurate.

    The last two keep ``n / 3`` and ``3 n / 2`` vectors.

    Args:
        mv: ``v -> M v`` on trees shaped like ``like``; need not be traceable.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s.
        key: PRNG key.
        num_samples: ``n``, products with ``M``: at least 2 for ``"hutchinson"``, 4
            for the others.
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
    # With M Ω = Q R the span of the other images is that of Q (I − s_i s_iᵀ), where s_i
    # is the unit vector orthogonal to the other columns of R: column i of R^-T,
    # normalised. So all that is left out one at a time is [k, k].
    k = min(count // 2, matrix.size)
    vectors = normals(key, k, matrix)
    vectors *= math.sqrt(matrix.size) / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    basis, upper = _range(matrix.products(vectors, tick))
    images = matrix.products(basis, tick)
    inner = finite(dot(basis, images.T), "Qᵀ M Q")
    if k == matrix.size:  # Q is square: nothing was left to chance
        return Estimate(np.trace(inner), np.float64(0))
    inner = (inner + inner.T) / 2
    upper = finite(upper, "R of M Ω = Q R")
    inside = finite(dot(basis, vectors.T), "Qᵀ Ω")

    # A column that depends on those before it, but for rounding, counts as such.
    pivots = np.diag(upper)
    floor = max(matrix.eps * np.abs(upper).max(), np.finfo(np.float64).tiny)
    solved = upper + np.diag(np.where(np.abs(pivots) < floor, floor - pivots, 0.0))
    left_out = scipy.linalg.solve_triangular(solved, np.eye(k), trans="T")
    left_out /= np.linalg.norm(left_out, axis=0)

    def kept(columns):
        return columns - left_out * (left_out * columns).sum(0)

    w, r = kept(inside), kept(upper)
    residual = (inside * upper).sum(0) - 2 * (w * r).sum(0) + (w * (inner @ w)).sum(0)
    lengths = matrix.size - (w**2).sum(0)
    share = (matrix.size - k + 1) / np.maximum(lengths, matrix.eps * matrix.size)
    known = np.trace(inner) - (left_out * (inner @ left_out)).sum(0)
    return mean_and_error(known + share * residual)


METHODS = {
    "hutchinson": (_hutchinson, 2),
    "hutch++": (_hutch_plus_plus, 4),
    "xtrace": (_xtrace, 4),
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
