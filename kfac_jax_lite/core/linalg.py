"""Small matrix functions, batched over leading axes."""

import functools
import itertools
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
# ``spd_inverse`` takes small blocks, inside blocks whose inverses are written out,
# inside panels of at most so many of these.
SMALLEST, BLOCK, PANEL = 8, 64, 4


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


def block_sizes(size: int, block: int = BLOCK) -> tuple[int, ...]:
    """Widths of the blocks inside blocks that ``spd_inverse`` eliminates.

    The first is the size to which a matrix is filled up, the last 1; each is a multiple
    of the next. Few sizes occur, as equal kernels are compiled once in a program.
    """
    smallest = min(SMALLEST, block)
    if size <= 2 * block:
        width = smallest << (-(-size // smallest) - 1).bit_length()
        sizes = (width, smallest, 1)
    else:
        panels = -(-size // (block * PANEL))
        panel = -(-size // panels)
        turns = -(-panel // block)
        width = -(-panel // (turns * smallest)) * smallest
        sizes = (panels * turns * width, turns * width, width, smallest, 1)
    return tuple(dict.fromkeys(sizes))


def written_out(sizes: tuple[int, ...]) -> int:
    """Which of ``block_sizes`` are written out: all, or the blocks of panels."""
    return sizes[2] if len(sizes) == 5 else sizes[0]


def spd_inverse(matrix: Array, block: int = BLOCK) -> Array:
    """Inverse of positive definite matrices; NaN where a pivot is not positive.

    Gauss-Jordan elimination by blocks, in its symmetric form (the sweep operator), in
    loops: the program of a large matrix is as small as that of a small one, and nearly
    all of its work is matrix products. Panels of several blocks make these products
    large, while no inverse larger than a block is multiplied with, which would cost
    digits. On a CPU it makes no LAPACK call, whose threads XLA knows nothing of; a GPU
    factorises its blocks.

    Args:
        matrix: ``[*blocks, d, d]``, symmetric.

    Returns:
        ``[*blocks, d, d]``.

    References:
        Goodnight, 1979, "A Tutorial on the SWEEP Operator"; Higham, 2002, "Accuracy and
        Stability of Numerical Algorithms", Sec. 14.4 (stable without pivoting for
        these matrices).
    """
    d = matrix.shape[-1]
    if not d:  # of a weight of zero width
        return matrix
    sizes = block_sizes(d, block)
    if sizes[0] > d:
        more = [(0, 0)] * (matrix.ndim - 2) + [(0, sizes[0] - d)] * 2
        ones = (jnp.arange(sizes[0]) >= d).astype(matrix.dtype)
        matrix = jnp.pad(matrix, more)
        matrix += jnp.broadcast_to(jnp.diag(ones), matrix.shape)
    leaf, eliminate = written_out(sizes), pivoted
    for inside, width in itertools.pairwise(reversed(sizes)):
        eliminate = functools.partial(swept, width=inside, eliminate=eliminate)
        if width == leaf:
            invert = functools.partial(leaf_inverse, eliminate=eliminate)
            eliminate = functools.partial(explicit, invert=invert)
    return -eliminate(matrix)[..., :d, :d]


def swept(rows: Array, width: int, eliminate: Callable[[Array], Array]) -> Array:
    """``[−M⁻¹, M⁻¹ R]`` of rows ``[M, R]``, by blocks of that width."""
    # A turn takes the first rows [A, B], for which eliminate returns the same,
    # [−A⁻¹, V], subtracts Bᵀ V from all others and puts the block's rows and columns
    # last in M, which is positive definite exactly if all these A are. Bᵀ is not read
    # from below A: what rounding makes unsymmetric would grow.
    size = rows.shape[-2]
    times = jnp.matmul if width > 1 else jnp.multiply

    def turn(_: Any, m: Array) -> Array:
        done = eliminate(m[..., :width, :])
        inverse, v = done[..., :width], done[..., width:]
        left = jnp.swapaxes(m[..., :width, width:size], -1, -2)
        rest = m[..., width:, width:] - times(left, v)
        inner, outer = jnp.split(rest, [size - width], -1)
        v, right = jnp.split(v, [size - width], -1)
        above = jnp.concatenate([inner, jnp.swapaxes(v, -1, -2), outer], -1)
        return jnp.concatenate([above, jnp.concatenate([v, inverse, right], -1)], -2)

    return lax.fori_loop(0, size // width, turn, rows)


def pivoted(row: Array) -> Array:
    """``[−1 / p, r / p]`` of a row ``[p, r]``; NaN where ``p`` is not positive."""
    pivot = row[..., :1]
    pivot = jnp.where((pivot > 0) & (pivot < jnp.inf), pivot, jnp.nan)
    return jnp.concatenate([-1 / pivot, row[..., 1:] / pivot], -1)


def explicit(rows: Array, invert: Callable[[Array], Array]) -> Array:
    """``[−M⁻¹, M⁻¹ R]`` of rows ``[M, R]``, from ``−M⁻¹``."""
    size = rows.shape[-2]
    inverse = invert(rows[..., :size])
    if rows.shape[-1] == size:
        return inverse
    return jnp.concatenate([inverse, -inverse @ rows[..., size:]], -1)


def leaf_inverse(matrix: Array, eliminate: Callable[[Array], Array]) -> Array:
    """``−M⁻¹`` of a block: a GPU would take too many kernels for its small loops."""

    def factorised(matrix: Array) -> Array:
        half = inverse_half(matrix)
        return -jnp.swapaxes(half, -1, -2) @ half

    return lax.platform_dependent(
        matrix, cuda=factorised, rocm=factorised, default=eliminate
    )


def inverse_half(matrix: Array) -> Array:
    """``L⁻¹`` of ``M = L Lᵀ``; NaN where ``M`` is not positive definite."""
    half = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return lax.linalg.triangular_solve(half, eye, left_side=True, lower=True)


def spd_inverse_flops(size: int, block: int = BLOCK) -> int:
    """Operations of the products of ``spd_inverse``, of the matrix filled up.

    Of ``n`` columns and blocks of ``w`` in panels of ``k`` rows: ``2 w² (n − w)`` for
    the rows of a block, ``2 w (k − w) (n − w)`` for those of its panel, and
    ``2 k (n − k)²`` for all others; ``2 n³`` at most.
    """
    sizes = block_sizes(size, block)
    leaf = written_out(sizes)

    def flops(level: int, columns: int) -> int:
        rows = sizes[level]
        if rows == 1:
            return 0
        if rows == leaf and columns > rows:
            return flops(level, rows) + 2 * rows * rows * (columns - rows)
        width = sizes[level + 1]
        others = 2 * width * (rows - width) * (columns - width) if width > 1 else 0
        return rows // width * (flops(level + 1, columns) + others)

    return flops(0, sizes[0])


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
