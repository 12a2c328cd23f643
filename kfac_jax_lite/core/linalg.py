"""Small matrix functions, batched over leading axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.threads import limit_blas
from kfac_jax_lite.core.types import Array, accumulation_dtype

# Stands for "infinite" and "none" in states, which hold no NaN and no Inf: JAX's debug
# switches (jax_debug_nans, jax_debug_infs) have nothing to report.
LARGEST = float(jnp.finfo(jnp.float32).max)
# Greatest width of the blocks that ``spd_inverse`` eliminates.
BLOCK = 64


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


def block_size(size: int, block: int = BLOCK) -> tuple[int, int]:
    """``(b, n)``: width and number of the blocks that ``spd_inverse`` eliminates."""
    count = max(1, -(-size // block))
    return -(-size // count), count


def spd_inverse(matrix: Array, block: int = BLOCK) -> Array:
    """Inverse of positive definite matrices; NaN where a pivot is not positive.

    Gauss-Jordan elimination by blocks, in a loop: the program of a large matrix is as
    small as that of a small one, and nearly all of its work is matrix products. No
    inverse larger than a block is multiplied with, which would cost digits. On a CPU it
    makes no LAPACK call, whose threads XLA knows nothing of; a GPU factorises its
    blocks.

    Args:
        matrix: ``[*blocks, d, d]``, symmetric.
        block: Greatest width of a block.

    Returns:
        ``[*blocks, d, d]``.

    References:
        Higham, 2002, "Accuracy and Stability of Numerical Algorithms", Sec. 14.4
        (stable without pivoting for these matrices).
    """
    d = matrix.shape[-1]
    if not d:  # of a weight of zero width
        return matrix
    b, count = block_size(d, block)
    if count == 1:
        return block_inverse(matrix)
    matrix = filled_up(matrix, b * count)
    eye = jnp.broadcast_to(jnp.eye(b, dtype=matrix.dtype), (*matrix.shape[:-2], b, b))

    # With the rows [A, B] of a block, in whose columns the identity takes the place of
    # A, the block's rows become V = A⁻¹ [I, B] and the others lose Bᵀ V, zeros in the
    # place of their Bᵀ. It is read off the rows (of what was eliminated before, with
    # another sign): what rounding makes unsymmetric would grow.
    def turn(k: Any, m: Array) -> Array:
        at = k * b
        rows = lax.dynamic_slice_in_dim(m, at, b, -2)
        own = lax.dynamic_slice_in_dim(rows, at, b, -1)
        others = lax.dynamic_update_slice_in_dim(rows, jnp.zeros_like(eye), at, -1)
        left = jnp.swapaxes(mirrored(others, at), -1, -2)
        wanted = lax.dynamic_update_slice_in_dim(rows, eye, at, -1)
        inverse = block_inverse(own)
        v = inverse @ wanted
        v += inverse @ (wanted - own @ v)  # the digits that an explicit inverse costs
        rest = lax.dynamic_update_slice_in_dim(m, jnp.zeros_like(left), at, -1)
        return lax.dynamic_update_slice_in_dim(rest - left @ v, v, at, -2)

    return lax.fori_loop(0, count, turn, matrix)[..., :d, :d]


def places(x: Array, axis: int) -> Array:
    """The number of every entry along an axis, in the shape of the array."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)


def mirrored(rows: Array, done: Any) -> Array:
    """Rows ``[*blocks, b, d]`` with another sign in the first ``done`` columns."""
    return jnp.where(places(rows, -1) < done, -rows, rows)


def filled_up(matrix: Array, size: int) -> Array:
    """Matrices ``[*blocks, d, d]`` of that size, the identity at their end."""
    d = matrix.shape[-1]
    if d == size:
        return matrix
    padded = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, size - d)] * 2)
    row, column = places(padded, -2), places(padded, -1)
    return jnp.where((row == column) & (row >= d), 1, padded)


def block_inverse(matrix: Array) -> Array:
    """``M⁻¹`` of one block; a GPU would take too many kernels for the small loop."""

    def factorised(matrix: Array) -> Array:
        half = inverse_half(matrix)
        return jnp.swapaxes(half, -1, -2) @ half

    return lax.platform_dependent(
        matrix, cuda=factorised, rocm=factorised, default=eliminated
    )


def eliminated(matrix: Array) -> Array:
    """``M⁻¹`` by Gauss-Jordan elimination, a row at a time; see ``spd_inverse``."""

    def turn(k: Any, m: Array) -> Array:
        row = lax.dynamic_slice_in_dim(m, k, 1, -2)
        left = jnp.swapaxes(mirrored(row, k), -1, -2)
        pivot = lax.dynamic_slice_in_dim(row, k, 1, -1)
        pivot = jnp.where((pivot > 0) & (pivot < jnp.inf), pivot, jnp.nan)
        v = jnp.where(places(row, -1) == k, 1, row) / pivot
        rest = jnp.where(places(m, -1) == k, 0, m) - left * v
        return jnp.where(places(m, -2) == k, v, rest)

    return lax.fori_loop(0, matrix.shape[-1], turn, matrix)


def inverse_half(matrix: Array) -> Array:
    """``L⁻¹`` of ``M = L Lᵀ``; NaN where ``M`` is not positive definite."""
    half = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    return lax.linalg.triangular_solve(
        half, identity(matrix), left_side=True, lower=True
    )


def spd_inverse_flops(size: int, block: int = BLOCK) -> int:
    """Operations of the products of ``spd_inverse``: ``2 n³ + 6 n² b``, filled up."""
    b, count = block_size(size, block)
    n = b * count
    return 2 * n * n * (n + 3 * b) if count > 1 else 0


def newton_schulz_inverse(
    matrix: Array, start: Array, tolerance: float, max_iterations: int = 100
) -> Array:
    """Inverse of positive definite matrices by matrix products only.

    ``X ← X (2I − M X)`` squares the residual ``‖I − M X‖`` at every step. It starts
    from ``start`` where that residual is below 1, else from ``I / ‖M‖_∞``, which always
    converges, and stops at ``tolerance`` or when the residual no longer falls.

    Args:
        matrix: ``[*blocks, d, d]``, symmetric positive definite.

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


def one_by_one(function: Callable[..., Any], *arrays: Array, lead: int) -> Any:
    """A function that calls LAPACK, on a CPU one matrix after another; also in a vmap.

    jaxlib divides a *batch* of factorisations among XLA's threads, and waits for them
    in one of these. Where as many independent batches as there are threads wait, they
    wait for ever. A call with one matrix waits for nothing. Elsewhere all matrices are
    factorised in one call.
    """
    limit_blas()
    single = jax.custom_batching.sequential_vmap(function)

    def loop(*arrays: Array) -> Any:
        if not lead:
            return single(*arrays)
        blocks = arrays[0].shape[:lead]
        flat = [x.reshape(-1, *x.shape[lead:]) for x in arrays]
        found = lax.map(lambda xs: single(*xs), tuple(flat))
        return jax.tree.map(lambda x: x.reshape(*blocks, *x.shape[1:]), found)

    return lax.platform_dependent(*arrays, cpu=loop, default=function)


@jax.custom_jvp
def eigh(matrix: Array) -> tuple[Array, Array]:
    """``(d, Q)`` with ``M = Q diag(d) Qᵀ``, of matrices ``[*blocks, n, n]``."""

    def decompose(matrix: Array) -> tuple[Array, Array]:
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors

    return one_by_one(decompose, matrix, lead=matrix.ndim - 2)


@eigh.defjvp
def eigh_tangent(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The diagonal of ``S = Qᵀ dM Q``, and ``Q X`` with ``X_ij (d_j − d_i) = S_ij``."""
    # The loop of one_by_one has no reverse mode.
    (matrix,), (change,) = primals, tangents
    values, vectors = eigh(matrix)
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    change = (change + jnp.swapaxes(change, -1, -2)) / 2
    turned = jnp.swapaxes(vectors, -1, -2) @ change @ vectors
    gaps = values[..., None, :] - values[..., :, None] + eye
    inside = vectors @ ((1 - eye) * turned / gaps)
    return (values, vectors), (jnp.diagonal(turned, axis1=-2, axis2=-1), inside)


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
