"""Factors as a few leading eigenpairs and a flat tail.

``M ≈ U diag(e) Uᵀ + τ (I − U Uᵀ)`` with ``U [d, r]`` orthonormal and ``τ`` such that
the trace is ``tr M``. Spectra of Kronecker factors fall fast, so that a small ``r``
keeps most of the trace, at a cost of ``d² r`` instead of ``d³`` for a refresh and
``d r`` instead of ``d²`` for a product with a column.

Three kinds of factor, told apart by their arrays:

=============  =============  ==========  ===========
kind           ``u``          ``e``       ``tau``
=============  =============  ==========  ===========
low-rank       ``[.., d, r]`` ``[.., r]`` ``[..]``
complete       ``[.., d, d]`` ``[.., d]`` empty
diagonal       empty          ``[.., d]`` empty
=============  =============  ==========  ===========

References:
    Halko, Martinsson & Tropp, 2011, arXiv:0909.4061, Secs. 4.5, 5.5 (subspace
    iteration, Nyström); Tropp, Yurtsever, Udell & Cevher, 2017, arXiv:1706.05736,
    Alg. 3 (its stable form); Puiu, 2022, arXiv:2206.15397 (K-FAC with randomised
    factorisations).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from kfac_jax_lite.core.linalg import eigh, one_by_one
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.kronecker.factors import BLOCKS, Basis, Form, forms_of

# Iterations of the first refresh, whose start knows nothing of the matrix.
FIRST_ITERATIONS = 4


class LowRankInverses(NamedTuple):
    """Both factors' leading eigenpairs and tails; damping comes later."""

    u_a: Basis
    e_a: Array
    tau_a: Basis
    u_g: Basis
    e_g: Array
    tau_g: Basis

    @property
    def input_width(self) -> int:
        """Entries of the vectors on which the input's factor acts."""
        u = self.u_a
        return self.e_a.shape[-1] if isinstance(u, tuple) else u.shape[-2]

    def solve(self, layer: LayerTag, v: Array, moments: Any, damping: Array) -> Array:
        """``(Â ⊗ Ĝ + λ I)⁻¹ v`` of a block that is as wide as its factors."""
        del moments
        form_a, form_g = forms_of(layer)
        a, g = sides(self, form_a, form_g)
        if BLOCKS not in (form_a, form_g):
            return solve(a, g, v, damping)
        # Every block of a factor has its own tail: each pair of blocks is solved alone.
        k_a, k_g = form_a.count(layer.a_shape), form_g.count(layer.g_shape)
        *blocks, rows, columns = v.shape
        pairs = v.reshape(*blocks, k_a, rows // k_a, k_g, columns // k_g)
        u = solve(a, g, jnp.swapaxes(pairs, -3, -2), damping)
        return jnp.swapaxes(u, -3, -2).reshape(v.shape)


class Side(NamedTuple):
    """One factor as the solve wants it.

    Attributes:
        rotation: Basis ``[.., d, d]`` of a complete factor, or None.
        u: Leading eigenvectors ``[.., d, r]`` of a low-rank factor, or None.
        e: Their eigenvalues ``[.., r]``, or None.
        tail: What it multiplies all else by, ``[.., 1]``; of other factors all
            eigenvalues, ``[.., d]``.
    """

    rotation: Array | None
    u: Array | None
    e: Array | None
    tail: Array


def sketch(size: int, rank: int, dtype: Any) -> Array:
    """A fixed ``[size, rank]`` matrix, nearly orthonormal.

    Its entries are a hash of their place, uniform in ``±√(3 / size)``: eigenvectors are
    hardly ever orthogonal to all columns, as the vector of ones is to columns of signs,
    and no random key is needed.
    """
    x = lax.iota(jnp.uint32, size)[:, None] * jnp.uint32(rank)
    x = x + lax.iota(jnp.uint32, rank)[None, :] + jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    uniform = (x >> 8).astype(dtype) * 2.0**-23 - 1
    return uniform * jnp.sqrt(jnp.asarray(3 / size, dtype))


def initial(
    blocks: tuple[int, ...], size: int, rank: int, dtype: Any
) -> tuple[Array, Array, Array | tuple[()]]:
    """``(u, e, tau)`` of the identity; ``u`` is where the iteration starts."""
    complete = rank >= size
    u = jnp.eye(size, dtype=dtype) if complete else sketch(size, rank, dtype)
    u = jnp.array(jnp.broadcast_to(u, (*blocks, size, min(rank, size))))
    ones = jnp.ones((*blocks, min(rank, size)), dtype)
    return u, ones, () if complete else jnp.ones(blocks, dtype)


def refreshed(
    matrix: Array, u: Array, first: Array
) -> tuple[Array, Array, Array | tuple[()]]:
    """Leading eigenpairs and tail of a matrix, from the last basis.

    One step of subspace iteration in Nyström form, a few at the first time: with
    ``Y = M U``, ``C = Uᵀ Y = L Lᵀ`` and ``B = Y L⁻ᵀ``, ``B Bᵀ`` is the best
    approximation of ``M`` from ``Y`` that is below it, and its eigenpairs are those of
    ``Bᵀ B``. The matrix is read once per step.

    Args:
        matrix: ``M [*blocks, d, d]``, positive semi-definite.
        u: The last basis ``[*blocks, d, r]``; if ``r = d`` it is not used: all
            eigenpairs are computed.

    Returns:
        ``(u, e, tau)``; not finite where ``M`` is not, or clearly indefinite.
    """
    d, rank = u.shape[-2:]
    if rank == d:
        e, u = eigh(matrix)
        return u, jnp.maximum(e, 0), ()
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)
    scale = jnp.where(trace > 0, trace, 1)

    def improve(_: Any, carry: tuple[Array, Array]):
        return one_by_one(nystrom, matrix, carry[0], scale, lead=scale.ndim)

    start = u, jnp.zeros((*u.shape[:-2], rank), u.dtype)
    start = vary(start, varying_axes((matrix, u)))
    turns = jnp.where(first, FIRST_ITERATIONS, 1)
    u, e = lax.fori_loop(0, turns, improve, start)
    e = jnp.maximum(trace, 0)[..., None] * e
    return u, e, jnp.maximum(trace - e.sum(-1), 0) / (d - rank)


def nystrom(matrix: Array, u: Array, scale: Array) -> tuple[Array, Array]:
    """One step of subspace iteration.

    A small multiple of the identity goes in, so that ``C`` has a Cholesky factor
    whatever the rank of ``M``, and is taken off the eigenvalues.

    Args:
        matrix: ``M [*blocks, d, d]``.
        u: ``[*blocks, d, r]``, nearly orthonormal.
        scale: What to divide ``M`` by, ``[*blocks]``.

    Returns:
        ``(u, e)``: orthonormal, eigenvalues of ``M / scale`` from the largest down.
    """
    d = u.shape[-2]
    shift = jnp.finfo(u.dtype).eps * jnp.sqrt(jnp.asarray(d, u.dtype)) * 4
    y = (matrix @ u) / scale[..., None, None] + shift * u
    half = jnp.linalg.cholesky(transposed(u) @ y, symmetrize_input=True)
    inner = solve_lower(half, transposed(y) @ y)
    inner = solve_lower(half, transposed(inner))
    values, vectors = jnp.linalg.eigh(inner)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    values = jnp.maximum(values, shift / 2)
    turn = vectors / jnp.sqrt(values)[..., None, :]
    turn = solve_lower(half, turn, transpose=True)
    u = y @ turn
    # Rounding leaves small eigenvectors slightly askew.
    half = jnp.linalg.cholesky(transposed(u) @ u, symmetrize_input=True)
    u = lax.linalg.triangular_solve(half, u, lower=True, transpose_a=True)
    return u, jnp.maximum(values - shift, 0)


def retained_trace(e: Any, tau: Any, size: int) -> float:
    """The share of the trace that the eigenpairs have; of several matrices the least.

    Args:
        e: Eigenvalues ``[.., r]``.
        tau: Tails ``[..]``, or empty.
    """
    if isinstance(tau, tuple):
        return 1.0
    kept = np.sum(np.asarray(e, np.float64), -1)
    rest = np.asarray(tau, np.float64) * (size - e.shape[-1])
    whole = kept + rest
    return float(np.min(np.where(whole > 0, kept / np.where(whole > 0, whole, 1), 1)))


def solve_lower(half: Array, x: Array, transpose: bool = False) -> Array:
    """``L⁻¹ x``, or ``L⁻ᵀ x``."""
    return lax.linalg.triangular_solve(
        half, x, left_side=True, lower=True, transpose_a=transpose
    )


def transposed(x: Array) -> Array:
    """Matrices with rows and columns exchanged."""
    return jnp.swapaxes(x, -1, -2)


def sides(inverses: LowRankInverses, form_a: Form, form_g: Form) -> tuple[Side, Side]:
    """Both factors; with blocks, with axes for each pair of blocks."""
    u_a, e_a, tau_a, u_g, e_g, tau_g = inverses
    a, g = side(u_a, e_a, tau_a), side(u_g, e_g, tau_g)
    if BLOCKS not in (form_a, form_g):
        return a, g

    def spread(one: Any, form: Form, of_a: bool):
        # [*blocks, pairs, d, ..]: the axis of the own blocks, and one for the other's.
        def put(x: Array | None, tail: int) -> Any:
            if x is None:
                return None
            if form is not BLOCKS:
                x = jnp.expand_dims(x, x.ndim - tail)
            return jnp.expand_dims(x, x.ndim - tail if of_a else x.ndim - tail - 1)

        return Side(
            put(one.rotation, 2), put(one.u, 2), put(one.e, 1), put(one.tail, 1)
        )

    return spread(a, form_a, True), spread(g, form_g, False)


def side(u: Any, e: Array, tau: Any) -> Side:
    """A factor's arrays, by its kind."""
    if isinstance(u, tuple):
        return Side(None, None, None, e)
    if isinstance(tau, tuple):
        return Side(u, None, None, e)
    return Side(None, u, e, tau[..., None])


def solve(a: Side, g: Side, v: Array, damping: Array) -> Array:
    """``(Â ⊗ Ĝ + λ I)⁻¹ v``, exactly, for factors as they are kept.

    With ``X = U_Aᵀ V``, ``Y = V U_G``, ``W = X U_G`` and ``c = 1 / (τ_A τ_G + λ)``:

    ``c V + U_A (P ∘ X + (Z ∘ W) U_Gᵀ) + (Q ∘ Y) U_Gᵀ``,
    ``P_i = 1 / (e_i τ_G + λ) − c``, ``Q_j = 1 / (τ_A f_j + λ) − c``,
    ``Z_ij = 1 / (e_i f_j + λ) − 1 / (e_i τ_G + λ) − 1 / (τ_A f_j + λ) + c``.

    Complete factors are turned into their basis first, where they are diagonal.

    Args:
        v: ``[.., m, n]``.
        damping: ``λ``.

    Returns:
        ``[.., m, n]``.
    """
    shift = damping.astype(v.dtype)
    v = v if a.rotation is None else transposed(a.rotation) @ v
    v = v if g.rotation is None else v @ g.rotation
    u = corrected(a, g, v, shift)
    u = u if a.rotation is None else a.rotation @ u
    return u if g.rotation is None else u @ transposed(g.rotation)


def corrected(a: Side, g: Side, v: Array, shift: Array) -> Array:
    """``solve`` without complete factors."""
    # Differences of reciprocals are written as products, which do not cancel.
    tail_a, tail_g = a.tail[..., :, None], g.tail[..., None, :]
    base = 1 / (tail_a * tail_g + shift)
    u = base * v
    if a.u is None and g.u is None:
        return u
    if a.u is None:
        assert g.u is not None
        f = g.e[..., None, :]  # type: ignore[index]
        columns = (tail_g - f) * tail_a * base / (tail_a * f + shift) * (v @ g.u)
        return u + columns @ transposed(g.u)
    e = a.e[..., :, None]  # type: ignore[index]
    x = transposed(a.u) @ v
    rows = (tail_a - e) * tail_g * base / (e * tail_g + shift) * x
    if g.u is None:
        return u + a.u @ rows
    f, y = g.e[..., None, :], v @ g.u  # type: ignore[index]
    on_f = (tail_g - f) * tail_a * base / (tail_a * f + shift)
    z = (tail_g - f) * e / ((e * f + shift) * (e * tail_g + shift)) - on_f
    columns = on_f * y
    if v.shape[-1] <= v.shape[-2]:  # the narrower products
        rows = rows + (z * (x @ g.u)) @ transposed(g.u)
    else:
        columns = columns + a.u @ (z * (transposed(a.u) @ y))
    # One product for both: a result as large as the gradient is written once.
    blocks = columns.shape[:-2]
    left = jnp.broadcast_to(a.u, (*blocks, *a.u.shape[-2:]))
    right = jnp.broadcast_to(transposed(g.u), (*blocks, *transposed(g.u).shape[-2:]))
    left = jnp.concatenate([left, columns], -1)
    return u + left @ jnp.concatenate([rows, right], -2)
