"""Small matrix functions, batched over leading axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.types import Array, accumulation_dtype

# Stands for "infinite" and "none" in states, which hold no NaN and no Inf: JAX's debug
# switches (jax_debug_nans, jax_debug_infs) have nothing to report.
LARGEST = float(jnp.finfo(jnp.float32).max)
# Up to which size ``spd_inverse`` factorises matrices; on a CPU 64 to 192 are alike.
LEAF, SMALLEST = 128, 16
# Of larger matrices it factorises blocks of this part, for the length of programs.
PARTS = 8


def add_diagonal(matrix: Array, value: Array) -> Array:
    """``M + v I`` for matrices ``[*blocks, d, d]`` and values ``[*blocks]``."""
    return matrix + value[..., None, None] * identity(matrix)


def identity(matrix: Array) -> Array:
    """``I``, as often as there are matrices ``[*blocks, d, d]``."""
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return jnp.broadcast_to(eye, matrix.shape)


def expanded(value: Array, rank: int) -> Array:
    """``[*blocks]`` with unit axes at the end, to multiply arrays of that rank."""
    return value.reshape(value.shape + (1,) * (rank - value.ndim))


def padded_size(size: int, block: int = LEAF) -> int:
    """The size to which ``spd_inverse`` fills a matrix up, so that few sizes occur.

    Equal kernels are compiled once for a whole program: factors of all layers share
    those of a handful of sizes.

    Args:
        size: ``d``.
        block: What sizes are multiples of.

    Returns:
        A multiple of ``block``; below, a power of two.
    """
    if size > block:
        return -(-size // block) * block
    return min(block, max(SMALLEST, 1 << (size - 1).bit_length()))


def spd_inverse(matrix: Array, block: int = LEAF) -> Array:
    """Inverse of positive definite matrices; NaN where a Cholesky factorisation fails.

    Fills ``M`` up with the identity to ``padded_size(d)``, halves
    ``M = [[A, B], [Bᵀ, D]]`` until blocks are at most ``block`` wide (or an eighth of
    ``M``) and inverts those by Cholesky: with ``S = D − Bᵀ A⁻¹ B`` and
    ``X = −A⁻¹ B S⁻¹``,

    ``M⁻¹ = [[A⁻¹ − X Bᵀ A⁻¹, X], [Xᵀ, S⁻¹]]``.

    ``M`` is positive definite exactly if ``A`` and ``S`` are, so failures are seen, and
    nearly all of the work is matrix products: on a CPU several times faster than
    LAPACK's triangular solves.

    Args:
        matrix: ``[*blocks, d, d]``, symmetric.
        block: What sizes of blocks are multiples of; up to there they are factorised.

    Returns:
        ``[*blocks, d, d]``.

    References:
        Higham, 2002, "Accuracy and Stability of Numerical Algorithms", Ch. 14.
    """
    d = matrix.shape[-1]
    if not d:  # of a weight of zero width
        return matrix
    size = padded_size(d, block)
    if size > d:
        more = [(0, 0)] * (matrix.ndim - 2) + [(0, size - d)] * 2
        ones = (jnp.arange(size) >= d).astype(matrix.dtype)
        matrix = jnp.pad(matrix, more)
        matrix += jnp.broadcast_to(jnp.diag(ones), matrix.shape)
    return inverse_by_halves(matrix, block, leaf_size(size, block))[..., :d, :d]


def leaf_size(size: int, block: int = LEAF) -> int:
    """Up to which size blocks of a matrix of a padded size are factorised."""
    return max(block, size // PARTS)


def inverse_by_halves(matrix: Array, block: int, leaf: int) -> Array:
    """``spd_inverse`` of a matrix of a padded size."""
    d = matrix.shape[-1]
    if d <= leaf:
        # The transpose of a symmetric matrix: LAPACK wants columns, XLA keeps rows.
        chol = jnp.linalg.cholesky(jnp.swapaxes(matrix, -1, -2), symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(d, dtype=matrix.dtype), matrix.shape)
        half = lax.linalg.triangular_solve(chol, eye, left_side=True, lower=True)
        return jnp.swapaxes(half, -1, -2) @ half
    k = first_half(d, block)
    b = -matrix[..., :k, k:]  # The sign goes with the copy of the block.
    a_inverse = inverse_by_halves(matrix[..., :k, :k], block, leaf)
    ab = a_inverse @ b
    schur = matrix[..., k:, k:] - jnp.swapaxes(b, -1, -2) @ ab
    s_inverse = inverse_by_halves(schur, block, leaf)
    x = ab @ s_inverse
    first = a_inverse + x @ jnp.swapaxes(ab, -1, -2)
    return jnp.block([[first, x], [jnp.swapaxes(x, -1, -2), s_inverse]])


def first_half(size: int, block: int = LEAF) -> int:
    """The size of ``A``, a multiple of ``block``."""
    return -(-(size // block) // 2) * block


def newton_schulz_inverse(
    matrix: Array, start: Array, tolerance: float, max_iterations: int = 100
) -> Array:
    """Inverse of positive definite matrices by matrix products only.

    ``X ← X (2I − M X)`` squares the residual ``‖I − M X‖`` at every step. It starts
    from ``start`` where that residual is below 1, else from ``I / ‖M‖_∞``, which always
    converges, and stops at ``tolerance`` or when the residual no longer falls.

    Args:
        matrix: ``[*blocks, d, d]``, symmetric positive definite.
        start: A guess, for example the inverse of a similar matrix.
        tolerance: Largest Frobenius norm of ``I − M X`` over ``√d`` that is accepted.
        max_iterations: Bound on the number of steps.

    Returns:
        The inverses; NaN where the iteration does not converge.

    References:
        Schulz, 1933, ZAMM 13(1); Higham, 2008, "Functions of Matrices", Sec. 5.3.
    """
    d = matrix.shape[-1]
    if not d:  # of a weight of zero width
        return matrix
    eye = identity(matrix)

    def residual(x: Array):
        r = eye - matrix @ x
        return r, jnp.sqrt(jnp.mean(jnp.sum(r * r, -1), -1))

    bound = jnp.max(jnp.sum(jnp.abs(matrix), -1), -1)[..., None, None]
    _, warm = residual(start)
    usable = (warm * jnp.sqrt(1.0 * d) < 0.9)[..., None, None]
    x = jnp.where(usable, start, eye / bound)
    r, error = residual(x)

    def unfinished(carry: tuple[Any, ...]):
        _, _, error, best, steps = carry
        falling = (error < 0.999 * best) | (error > 0.1)
        return jnp.any((error > tolerance) & falling) & (steps < max_iterations)

    def improve(carry: tuple[Any, ...]):
        x, r, error, _, steps = carry
        x = x + x @ r
        r, new = residual(x)
        return x, r, new, error, steps + 1

    first = (x, r, error, jnp.full_like(error, LARGEST), 0)
    x, _, error, _, _ = lax.while_loop(unfinished, improve, first)
    x = (x + jnp.swapaxes(x, -1, -2)) / 2
    converged = error <= jnp.maximum(tolerance, 1e-2)
    return jnp.where(converged[..., None, None], x, jnp.nan)


def relative_change(new: Array, old: Array) -> Array:
    """``‖X − Y‖_F / ‖Y‖_F``; 0 where both are 0, ``LARGEST`` where ``Y`` is."""
    return safe_ratio(
        jnp.linalg.norm((new - old).ravel()), jnp.linalg.norm(old.ravel())
    )


def safe_ratio(change: Array, scale: Array) -> Array:
    """``change / scale``; 0 where both are 0, ``LARGEST`` where the scale is."""
    ratio = jnp.minimum(change / jnp.where(scale > 0, scale, 1), LARGEST)
    return jnp.where(scale > 0, ratio, jnp.where(change > 0, LARGEST, 0.0))


def is_known(number: Any) -> bool:
    """Whether a number of a state, on the host, is one, not what stands for none."""
    return bool(abs(float(number)) < LARGEST)


def all_finite(tree: Any) -> Array:
    """Whether every entry of every leaf is finite, and so are their sums; a scalar."""
    # A sum is NaN or infinite if any entry is, and found in one pass without a copy.
    leaves = jax.tree.leaves(tree)
    sums = [jnp.sum(x, dtype=accumulation_dtype(x.dtype)) for x in leaves]
    flags = [jnp.isfinite(total) for total in sums]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def norms_finite(tree: Any) -> Array:
    """Whether the squared norm of every leaf is finite; a scalar."""
    # Entries beyond 1.8e19 in float32 count as broken: their products with inverses,
    # and with themselves, overflow.
    squares = [jnp.square(widened(x)) for x in jax.tree.leaves(tree)]
    return all_finite(squares)


def widened(x: Array) -> Array:
    """In the precision that sums are taken in."""
    return x.astype(accumulation_dtype(x.dtype))
