"""Averaging statistics over devices, and how many bytes that moves.

Every statistic is a mean over examples, so devices with equal shares of the batch
average theirs (``lax.pmean``); the number of examples adds up. The caller puts this
inside the gate of a layer: a layer that is not due sends nothing.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from kfac_jax_lite import forms
from kfac_jax_lite.tree import varying_axes
from kfac_jax_lite.types import (
    Array,
    DiagonalStatistics,
    LayerTag,
    Statistics,
)
from kfac_jax_lite.views import Shape

MODES = ("all",)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How statistics travel between the devices of ``axis_name``.

    Attributes:
        mode: ``"all"``: all-reduce, every device inverts every layer.
        pack: Send only the upper triangle of symmetric matrices.
        dtype: Precision on the wire, or None for the statistics' own.
    """

    mode: str = "all"
    pack: bool = True
    dtype: Any = None

    def __post_init__(self):
        """Checks the values."""
        if self.mode not in MODES:
            raise ValueError(f"Reduction.mode must be one of {MODES}: {self.mode!r}.")
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"Reduction.dtype must be floating, got {self.dtype}.")


def reduce_statistics(
    layer: LayerTag, statistics: Statistics, axis_name: Any, reduction: Reduction
) -> Statistics:
    """Mean of a layer's statistics over the devices of ``axis_name``.

    Args:
        layer: The layer.
        statistics: This device's.
        axis_name: Name(s) of the mapped axes.
        reduction: How they travel.

    Returns:
        The same on every device.
    """

    def mean(x: Array, symmetric: bool) -> Array:
        packed = symmetric and reduction.pack and x.shape[-1] > 1
        wire = pack(x) if packed else x
        if reduction.dtype is not None:
            wire = wire.astype(reduction.dtype)
        wire = lax.pmean(wire, axis_name).astype(x.dtype)
        return unpack(wire, x.shape[-1]) if packed else wire

    if isinstance(statistics, DiagonalStatistics):
        gradient = mean(statistics.gradient, False)
        if summed_already(statistics.gradient, axis_name):
            gradient = gradient / lax.axis_size(axis_name)
        total = lax.psum(statistics.num_examples, axis_name)
        return DiagonalStatistics(gradient, total)
    means = {
        name: mean(x, name != "s" and field_form(layer, name) != forms.DIAGONAL)
        for name, x in statistics._asdict().items()
        if x is not None
    }
    return statistics._replace(**means)


def summed_already(gradient: Array, axis_name: Any) -> bool:
    """Whether autodiff has summed a gradient over the devices.

    Under ``shard_map`` with ``check_vma`` it does so for replicated parameters.

    Args:
        gradient: The gradient.
        axis_name: Name(s) of the mapped axes.

    Returns:
        True where the gradient's type does not vary along these axes and the type
        system says so.
    """
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    checked = varying_axes(lax.axis_index(axis_name))
    return bool(checked) and not names & varying_axes(gradient)


def field_form(layer: LayerTag, field: str) -> str:
    """The form of a statistic: ``a`` and ``g_out`` are of the input side."""
    if field == "blocks":
        return forms.FULL
    return layer.a_form if field in ("a", "g_out") else layer.g_form


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


def wire_elements(layer: LayerTag, reduction: Reduction, moments: bool) -> int:
    """Elements that one refresh of a layer sends per device and direction."""
    if layer.kind == "diagonal":
        return math.prod(layer.a_shape) + 1
    if layer.kind == "scale_shift":
        return wire_size(layer.a_shape, forms.FULL, reduction.pack)
    total = wire_size(layer.a_shape, layer.a_form, reduction.pack)
    total += wire_size(layer.g_shape, layer.g_form, reduction.pack)
    total *= 2 if layer.tied else 1
    if moments:
        total += math.prod((*layer.stack, *layer.blocks, *forms.widths(layer)))
    return total


def wire_size(shape: Shape, form: str, packed: bool) -> int:
    """Elements of one factor on the wire."""
    if form == forms.DIAGONAL or not packed:
        return math.prod(shape)
    d = shape[-1]
    return math.prod(shape[:-2]) * (d * (d + 1) // 2)
