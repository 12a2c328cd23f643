"""A Kronecker factor in one of three forms: full, block-diagonal or diagonal.

====================  =======================  ======================================
form                  shape                    stands for
====================  =======================  ======================================
``"full"``            ``[*blocks, d, d]``      the matrix
``"block_diagonal"``  ``[*blocks, k, s, s]``   ``k`` blocks on its diagonal; the last
                                               is filled up with zeros
``"diagonal"``        ``[*blocks, d]``         its diagonal
====================  =======================  ======================================

A vector the factor acts on has ``width`` entries: ``d``, or ``k s`` with zeros at the
end. All functions work on rows (the last axis of ``x``).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
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

# A factor too large by more than this many times keeps its diagonal only.
MOST_BLOCKS = 4
# From this size on a block of a symmetric product is worth sparing.
LEAST_SPLIT = 768
Basis = Array | tuple[()]


class Full:
    """The matrix itself, and what the other forms have in common with it.

    Attributes:
        name: What ``LayerTag.a_form`` and ``g_form`` say.
        axes: How many axes a factor has after those of the blocks.
        matrix: Whether it is made of matrices, which travel as triangles.
        whole: Whether it keeps every entry.
    """

    name = "full"
    axes = 2
    matrix = True
    whole = True

    def __repr__(self) -> str:
        """The name."""
        return self.name

    def shape(self, blocks: Shape, size: int, limit: int) -> Shape:
        """The shape of a factor of that size."""
        del limit
        return (*blocks, size, size)

    def count(self, shape: Shape) -> int:
        """How many blocks are on its diagonal."""
        del shape
        return 1

    def width(self, shape: Shape) -> int:
        """How many entries a vector has that a factor of that shape acts on."""
        return shape[-1] * self.count(shape)

    def second_moment(self, x: Array, shape: Shape) -> Array:
        """``Σ_r x_r x_rᵀ`` of rows ``[*blocks, R, d]``, in float32 or better."""
        del shape
        return symmetric_product(x, accumulation_dtype(x.dtype))

    def mean_diagonal(self, factor: Array, size: int) -> Array:
        """``tr M / size``, ``[*blocks]``."""
        return jnp.trace(factor, axis1=-2, axis2=-1) / size

    def times(self, x: Array, factor: Basis) -> Array:
        """``x M`` for rows ``[*blocks, R, width]``; an empty ``M`` is the identity."""
        return x if isinstance(factor, tuple) else self.product(x, factor)

    def product(self, x: Array, factor: Array) -> Array:
        """``x M``."""
        return x @ factor

    def columns(self, factor: Basis, x: Array) -> Array:
        """``Mᵀ x`` for columns ``[*blocks, width, C]``."""
        if self.whole and not isinstance(factor, tuple):
            return jnp.swapaxes(factor, -1, -2) @ x
        return jnp.swapaxes(self.times(jnp.swapaxes(x, -1, -2), factor), -1, -2)

    def transposed(self, factor: Basis) -> Basis:
        """``Mᵀ``."""
        return factor if isinstance(factor, tuple) else jnp.swapaxes(factor, -1, -2)

    def damped(self, factor: Array, value: Array) -> Array:
        """``M + v I`` with one value ``[*blocks]`` for every factor."""
        return add_diagonal(factor, value)

    def inverse(self, factor: Array) -> Array:
        """``M⁻¹``; not finite where ``M`` is not positive definite."""
        return spd_inverse(factor)

    def iterated_inverse(self, factor: Array, start: Array, tolerance: float) -> Array:
        """``M⁻¹`` by Newton-Schulz iteration from ``start``."""
        return newton_schulz_inverse(factor, start, tolerance)

    def fastest_inverse(self, factor: Array, start: Array, tolerance: float) -> Array:
        """``M⁻¹`` by elimination, or by Newton-Schulz where that is faster.

        Measured on a CPU (``experiments.benchmarks.inverses``), elimination by blocks
        is the fastest at every size. Elsewhere nothing was measured; the choice rests
        on an assumption: products run at ten times the rate of factorisations. A matrix
        of one block then takes longer than the ``16 d³`` of products that Newton-Schulz
        needs from a good start; a larger one is mostly products either way.
        """
        if factor.shape[-1] > 2 * BLOCK:
            return spd_inverse(factor)
        return lax.platform_dependent(
            factor, start,
            cpu=lambda factor, start: spd_inverse(factor),
            default=lambda factor, start: self.iterated_inverse(
                factor, start, tolerance
            ),
        )  # fmt: skip

    def eigh(self, factor: Array) -> tuple[Basis, Array]:
        """``(Q, d)`` with ``M = Q diag(d) Qᵀ``, ``d [*blocks, width]``.

        ``Q`` is empty for a diagonal. Rounding makes the smallest eigenvalues of a
        singular factor slightly negative; they are returned as 0.
        """
        d, q = linalg.eigh(factor)
        d = jnp.maximum(d, 0)
        return q, d.reshape(*q.shape[: q.ndim - self.axes], -1)

    def identity(self, shape: Shape, dtype: Any) -> Array:
        """The identity."""
        return jnp.array(jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape))

    def standard_basis(self, shape: Shape, dtype: Any) -> tuple[Basis, Array]:
        """``eigh`` of the identity."""
        lead = shape[: len(shape) - self.axes]
        ones = jnp.ones((*lead, self.width(shape)), dtype)
        return (self.identity(shape, dtype) if self.matrix else ()), ones

    def without_bias(self, shape: Shape) -> Shape:
        """The shape without the last entry of homogeneous coordinates."""
        return shape[: -self.axes] + (shape[-1] - 1,) * self.axes

    def leading(self, factor: Array, size: int) -> Array:
        """The part of the first ``size`` entries."""
        return factor[..., :size, :size]


class BlockDiagonal(Full):
    """Blocks on the diagonal."""

    name = "block_diagonal"
    axes = 3
    whole = False

    def shape(self, blocks: Shape, size: int, limit: int) -> Shape:
        k = math.ceil(size / limit)
        s = math.ceil(size / k)
        return (*blocks, k, s, s)

    def count(self, shape: Shape) -> int:
        return shape[-3]

    def second_moment(self, x: Array, shape: Shape) -> Array:
        x = widened(x, self.width(shape))
        x = x.reshape(*x.shape[:-1], *shape[-3:-1])
        dtype = accumulation_dtype(x.dtype)
        return jnp.einsum("...rki,...rkj->...kij", x, x, preferred_element_type=dtype)

    def mean_diagonal(self, factor: Array, size: int) -> Array:
        return super().mean_diagonal(factor, 1).sum(-1) / size

    def product(self, x: Array, factor: Array) -> Array:
        split = x.reshape(*x.shape[:-1], *factor.shape[-3:-1])
        return jnp.einsum("...rki,...kij->...rkj", split, factor).reshape(x.shape)

    def damped(self, factor: Array, value: Array) -> Array:
        return add_diagonal(factor, value[..., None])

    def without_bias(self, shape: Shape) -> Shape:
        return shape

    def leading(self, factor: Array, size: int) -> Array:
        k, s = factor.shape[-3:-1]
        keep = (jnp.arange(k * s) < size).reshape(-1, s)
        return jnp.where(keep[:, :, None] & keep[:, None, :], factor, 0)


class Diagonal(Full):
    """The diagonal alone."""

    name = "diagonal"
    axes = 1
    matrix = False
    whole = False

    def shape(self, blocks: Shape, size: int, limit: int) -> Shape:
        del limit
        return (*blocks, size)

    def second_moment(self, x: Array, shape: Shape) -> Array:
        del shape
        return jnp.sum(jnp.square(x.astype(accumulation_dtype(x.dtype))), -2)

    def mean_diagonal(self, factor: Array, size: int) -> Array:
        return factor.sum(-1) / size

    def product(self, x: Array, factor: Array) -> Array:
        return x * factor[..., None, :]

    def transposed(self, factor: Basis) -> Basis:
        return factor

    def damped(self, factor: Array, value: Array) -> Array:
        return factor + value[..., None]

    def inverse(self, factor: Array) -> Array:
        return jnp.where(factor > 0, 1 / factor, jnp.nan)

    def iterated_inverse(self, factor: Array, start: Array, tolerance: float) -> Array:
        del start, tolerance
        return self.inverse(factor)

    fastest_inverse = iterated_inverse

    def eigh(self, factor: Array) -> tuple[Basis, Array]:
        return (), factor

    def identity(self, shape: Shape, dtype: Any) -> Array:
        return jnp.ones(shape, dtype)

    def leading(self, factor: Array, size: int) -> Array:
        return factor[..., :size]


Form = Full
FULL, BLOCKS, DIAGONAL = Full(), BlockDiagonal(), Diagonal()
FORMS: dict[str, Form] = {form.name: form for form in (FULL, BLOCKS, DIAGONAL)}


def form_for(size: int, limit: int) -> Form:
    """The form of a ``size × size`` factor of which at most ``limit`` may be full."""
    if size <= limit:
        return FULL
    return BLOCKS if size <= MOST_BLOCKS * limit else DIAGONAL


def forms_of(layer: LayerTag) -> tuple[Form, Form]:
    """The forms of a Kronecker layer's ``A`` and ``G``."""
    return FORMS[layer.a_form], FORMS[layer.g_form]


def mean_diagonals(layer: LayerTag, a: Array, g: Array) -> tuple[Array, Array]:
    """``tr A / dim A`` and ``tr G / dim G`` of a Kronecker layer, ``[*blocks]``."""
    (form_a, form_g), (size_a, size_g) = forms_of(layer), layer.sizes
    return form_a.mean_diagonal(a, size_a), form_g.mean_diagonal(g, size_g)


def widths(layer: LayerTag) -> tuple[int, int]:
    """The widths of a Kronecker layer's two factors."""
    a, g = forms_of(layer)
    return a.width(layer.a_shape), g.width(layer.g_shape)


def widened(x: Array, entries: int) -> Array:
    """Rows filled up with zeros to that many entries."""
    missing = entries - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def turned(x: Array, basis: Basis, form: Form, entries: int) -> Array:
    """``(Qᵀ x)²`` of rows, widened, in the dtype of the basis."""
    if not isinstance(basis, tuple):
        x = x.astype(basis.dtype)
    return jnp.square(form.times(widened(x, entries), basis))


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


def pack(matrix: Array) -> Array:
    """Upper triangles of ``[*blocks, d, d]`` as ``[*blocks, d (d + 1) / 2]``."""
    rows, columns = np.triu_indices(matrix.shape[-1])
    return matrix[..., rows, columns]


def unpack(packed: Array, size: int) -> Array:
    """Symmetric matrices from their packed upper triangles."""
    rows, columns = np.triu_indices(size)
    index = np.zeros((size, size), np.int32)
    index[rows, columns] = np.arange(rows.size)
    index = np.maximum(index, index.T)
    return packed[..., index]


def packed_size(shape: Shape, symmetric: bool) -> int:
    """Entries of ``[*blocks, d, d]`` that travel."""
    if not symmetric:
        return math.prod(shape)
    d = shape[-1]
    return math.prod(shape[:-2]) * (d * (d + 1) // 2)


def to_vector(x: Array, symmetric: bool, isometric: bool = False) -> Array:
    """An array as a vector, symmetric matrices as triangles."""
    if not symmetric:
        return x.ravel()
    packed = pack(x)
    if isometric:
        packed = packed * weights(packed, x.shape[-1])
    return packed.ravel()


def from_vector(
    vector: Array, shape: Shape, symmetric: bool, isometric: bool = False
) -> Array:
    """The array that ``to_vector`` was given; trailing entries are ignored."""
    size = packed_size(shape, symmetric)
    if not symmetric:
        return vector[:size].reshape(shape)
    d = shape[-1]
    packed = vector[:size].reshape(*shape[:-2], d * (d + 1) // 2)
    if isometric:
        packed = packed / weights(packed, d)
    return unpack(packed, d)


def weights(packed: Array, size: int) -> Array:
    """1 for the diagonal entries of packed triangles, ``√2`` for the others."""
    rows, columns = np.triu_indices(size)
    row = jnp.where(rows == columns, 1, math.sqrt(2)).astype(packed.dtype)
    return jnp.broadcast_to(row, packed.shape)


def field_form(layer: LayerTag, field: str) -> Form:
    """The form of a statistic: ``a`` and ``g_out`` are of the input side."""
    form_a, form_g = forms_of(layer)
    of = {"blocks": FULL, "a": form_a, "g_out": form_a, "g": form_g, "a_out": form_g}
    return of[field]


def symmetric_field(layer: LayerTag, field: str, shape: Shape, packed: bool) -> bool:
    """Whether a statistic travels as triangles."""
    matrices = ("a", "g", "a_out", "g_out", "blocks")
    if not packed or field not in matrices or shape[-1] == 1:
        return False
    return field_form(layer, field).matrix


def field_shapes(layer: LayerTag, moments: bool) -> dict[str, Shape]:
    """Shapes of the statistics of a layer that is not ``diagonal``, by field."""
    if layer.unitwise:
        return {"blocks": layer.a_shape}
    shapes = {"a": layer.a_shape, "g": layer.g_shape}
    if layer.tied:
        shapes |= {"a_out": layer.g_shape, "g_out": layer.a_shape}
    if moments:
        shapes["s"] = (*layer.stack, *layer.blocks, *widths(layer))
    return shapes


def field_sizes(layer: LayerTag, packed: bool, moments: bool) -> dict[str, int]:
    """How many entries of each statistic travel."""
    shapes = field_shapes(layer, moments)
    return {
        name: packed_size(shape, symmetric_field(layer, name, shape, packed))
        for name, shape in shapes.items()
    }
