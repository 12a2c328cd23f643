"""Statistics of a layer as one vector: what travels between devices.

A symmetric matrix is sent as its upper triangle. Where norms are taken of the vector
itself, off-diagonal entries carry a factor ``√2``: the vector's Euclidean norm is then
the matrix's Frobenius norm.
"""

import math

import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.kronecker.factors import FULL, Form, forms_of, widths


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
    if layer.kind == "scale_shift":
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
