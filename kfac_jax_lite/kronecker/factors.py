"""One Kronecker factor in one of three forms: full, block-diagonal or diagonal.

========================  =======================  ==================================
form                      shape                    stands for
========================  =======================  ==================================
``"full"``                ``[*blocks, d, d]``      the matrix
``"block_diagonal"``      ``[*blocks, k, s, s]``   ``k`` blocks on its diagonal; the
                                                   last is filled up with zeros
``"diagonal"``            ``[*blocks, d]``         its diagonal
========================  =======================  ==================================

A vector the factor acts on has ``width`` entries: ``d``, or ``k s`` with zeros at the
end. All functions work on rows (the last axis of ``x``).
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core import linalg
from kfac_jax_lite.core.linalg import (
    BLOCK,
    add_diagonal,
    newton_schulz_inverse,
    spd_inverse,
)
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, LayerTag, accumulation_dtype

FULL, BLOCKS, DIAGONAL = "full", "block_diagonal", "diagonal"
# A factor too large by more than this many times keeps its diagonal only.
MOST_BLOCKS = 4
# From this size on a block of a symmetric product is worth sparing.
LEAST_SPLIT = 768


def form_of(size: int, limit: int) -> str:
    """The form of a ``size × size`` factor of which at most ``limit`` may be full."""
    if size <= limit:
        return FULL
    return BLOCKS if size <= MOST_BLOCKS * limit else DIAGONAL


def factor_shape(form: str, blocks: Shape, size: int, limit: int) -> Shape:
    """The shape of a factor in that form."""
    if form == DIAGONAL:
        return (*blocks, size)
    if form == FULL:
        return (*blocks, size, size)
    k = math.ceil(size / limit)
    s = math.ceil(size / k)
    return (*blocks, k, s, s)


def width(form: str, shape: Shape) -> int:
    """How many entries a vector has that a factor of that shape acts on."""
    return shape[-1] * (shape[-3] if form == BLOCKS else 1)


def widths(layer: LayerTag) -> tuple[int, int]:
    """The widths of a Kronecker layer's two factors."""
    return width(layer.a_form, layer.a_shape), width(layer.g_form, layer.g_shape)


def widened(x: Array, entries: int) -> Array:
    """Rows filled up with zeros to that many entries."""
    missing = entries - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def second_moment(x: Array, form: str, shape: Shape) -> Array:
    """``Σ_r x_r x_rᵀ`` of rows ``[*blocks, R, d]``, in float32 or better."""
    dtype = accumulation_dtype(x.dtype)
    if form == DIAGONAL:
        return jnp.sum(jnp.square(x.astype(dtype)), -2)
    if form == BLOCKS:
        x = widened(x, width(form, shape))
        x = x.reshape(*x.shape[:-1], *shape[-3:-1])
        return jnp.einsum("...rki,...rkj->...kij", x, x, preferred_element_type=dtype)
    return symmetric_product(x, dtype)


def symmetric_product(x: Array, dtype: Any) -> Array:
    """``xᵀ x`` of rows ``[*blocks, R, d]``; large ones by three of four blocks."""

    def product(left: Array, right: Array):
        return jnp.einsum(
            "...ri,...rj->...ij", left, right, preferred_element_type=dtype
        )

    if x.shape[-1] < LEAST_SPLIT:
        return product(x, x)
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    corner = product(left, right)
    mirrored = jnp.swapaxes(corner, -1, -2)
    first, last = product(left, left), product(right, right)
    return jnp.block([[first, corner], [mirrored, last]])


def symmetric_product_flops(rows: int, size: int) -> int:
    """``2 R d²``, or what the blocks of a large ``symmetric_product`` take."""
    half = size // 2
    spared = half * (size - half) if size >= LEAST_SPLIT else 0
    return 2 * rows * (size**2 - spared)


def mean_diagonal(factor: Array, form: str, size: int) -> Array:
    """``tr M / size``, ``[*blocks]``."""
    if form == DIAGONAL:
        return factor.sum(-1) / size
    trace = jnp.trace(factor, axis1=-2, axis2=-1)
    return (trace.sum(-1) if form == BLOCKS else trace) / size


def times(x: Array, factor: Array | tuple[()], form: str) -> Array:
    """``x M`` for rows ``[*blocks, R, width]``; an empty ``M`` is the identity."""
    if isinstance(factor, tuple):
        return x
    if form == DIAGONAL:
        return x * factor[..., None, :]
    if form == FULL:
        return x @ factor
    split = x.reshape(*x.shape[:-1], *factor.shape[-3:-1])
    return jnp.einsum("...rki,...kij->...rkj", split, factor).reshape(x.shape)


def turned(x: Array, basis: Array | tuple[()], form: str, entries: int) -> Array:
    """``(Qᵀ x)²`` of rows, widened, in the dtype of the basis."""
    if not isinstance(basis, tuple):
        x = x.astype(basis.dtype)
    return jnp.square(times(widened(x, entries), basis, form))


def columns(factor: Array | tuple[()], x: Array, form: str) -> Array:
    """``Mᵀ x`` for columns ``[*blocks, width, C]``."""
    if form == FULL and not isinstance(factor, tuple):
        return jnp.swapaxes(factor, -1, -2) @ x
    return jnp.swapaxes(times(jnp.swapaxes(x, -1, -2), factor, form), -1, -2)


def transposed(factor: Array | tuple[()], form: str) -> Array | tuple[()]:
    """``Mᵀ``."""
    matrix = form != DIAGONAL and not isinstance(factor, tuple)
    return jnp.swapaxes(factor, -1, -2) if matrix else factor  # type: ignore[arg-type]


def damped(factor: Array, form: str, value: Array) -> Array:
    """``M + v I`` with one value ``[*blocks]`` for every factor."""
    if form == DIAGONAL:
        return factor + value[..., None]
    return add_diagonal(factor, value[..., None] if form == BLOCKS else value)


def inverse(factor: Array, form: str) -> Array:
    """``M⁻¹``; not finite where ``M`` is not positive definite."""
    if form == DIAGONAL:
        return jnp.where(factor > 0, 1 / factor, jnp.nan)
    return spd_inverse(factor)


def iterated_inverse(factor: Array, form: str, start: Array, tolerance: float) -> Array:
    """``M⁻¹`` by Newton-Schulz iteration from ``start``."""
    if form == DIAGONAL:
        return inverse(factor, form)
    return newton_schulz_inverse(factor, start, tolerance)


def fastest_inverse(factor: Array, form: str, start: Array, tolerance: float) -> Array:
    """``M⁻¹`` by elimination, or by Newton-Schulz where that is faster.

    Measured on a CPU (``experiments.benchmarks.inverses``), elimination by blocks is
    the fastest at every size. Elsewhere nothing was measured; the choice rests on an
    assumption: products run at ten times the rate of factorisations. A matrix of one
    block then takes longer than the ``16 d³`` of products that Newton-Schulz needs from
    a good start; a larger one is mostly products either way.
    """
    if form == DIAGONAL or factor.shape[-1] > 2 * BLOCK:
        return inverse(factor, form)

    def by_products(factor: Array, start: Array):
        return newton_schulz_inverse(factor, start, tolerance)

    def by_blocks(factor: Array, start: Array):
        del start
        return spd_inverse(factor)

    return lax.platform_dependent(factor, start, cpu=by_blocks, default=by_products)


def eigh(factor: Array, form: str) -> tuple[Array | tuple[()], Array]:
    """``(Q, d)`` with ``M = Q diag(d) Qᵀ``, ``d [*blocks, width]``.

    ``Q`` is empty for a diagonal. Rounding makes the smallest eigenvalues of a singular
    factor slightly negative; they are returned as 0.

    Returns:
        ``(Q, d)``.
    """
    if form == DIAGONAL:
        return (), factor
    d, q = linalg.eigh(factor)
    d = jnp.maximum(d, 0)
    return q, d.reshape(*d.shape[:-2], -1) if form == BLOCKS else d
