"""Kronecker factors of convolutions: patches by slices, then one matrix product.

The input rows of a convolution are its patches (``Ω`` below), one row for every output
position; the entries of a row are ordered (kernel axes, input channel), the order of an
``HWIO`` kernel reshaped to a matrix.

References:
    Grosse & Martens, 2016, arXiv:1602.01407, Secs. 3-4 (Kronecker factors for
    convolution; here with this library's scaling in ``N`` and ``R``).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.factors import dense
from kfac_jax_lite.factors.recipe import Recipe
from kfac_jax_lite.tagging.layers import ConvGeometry
from kfac_jax_lite.tree import vary, varying_axes
from kfac_jax_lite.types import Array, accumulation_dtype

# Patches are never held beyond this many elements at a time (256 MiB in float32).
MAX_PATCH_ELEMENTS = 1 << 26


def channels_last(geometry: ConvGeometry, inputs: list[Array]) -> Array:
    """The input as ``[batch, *space, channel]``, times scalars of its kernel."""
    batch, feature, *space = geometry.lhs_spec
    return lax.transpose(dense.scalars(geometry, inputs), (batch, *space, feature))


def patches(geometry: ConvGeometry, x: Array) -> Array:
    """Patches of ``[batch, *space, channel]`` as ``[groups?, rows, in]``.

    Axis by axis, the last first: slices at the kernel's offsets along one spatial axis,
    side by side on the channel axis. Short programs compile faster than one slice for
    every point of the kernel.

    Args:
        geometry: Static shape facts.
        x: The input.

    Returns:
        The rows.
    """
    dilated = [(lo, hi, d - 1) for (lo, hi), d in _pads(geometry)]
    if any(any(config) for config in dilated):
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *dilated, (0, 0, 0)])
    groups, channels = geometry.groups, x.shape[-1] // geometry.groups
    x = x.reshape(*x.shape[:-1], groups, 1, channels)
    for axis in reversed(range(len(geometry.kernel))):
        steps = geometry.window_strides[axis], geometry.rhs_dilation[axis]
        reach = (geometry.rows[1 + axis] - 1) * steps[0] + 1
        if reach == x.shape[1 + axis] and steps[0] == geometry.kernel[axis] == 1:
            continue
        columns = [
            lax.slice_in_dim(x, k * steps[1], k * steps[1] + reach, steps[0], 1 + axis)
            for k in range(geometry.kernel[axis])
        ]
        x = jnp.concatenate(columns, -2)
    rows = x.shape[0] * math.prod(geometry.rows[1:])
    if groups == 1:
        return x.reshape(rows, geometry.n_in)
    return jnp.moveaxis(x.reshape(rows, groups, geometry.n_in), 1, 0)


def _pads(geometry: ConvGeometry):
    return zip(geometry.padding, geometry.lhs_dilation, strict=True)


def conv_input_factor(
    geometry: ConvGeometry, inputs: list[Array], recipe: Recipe, live: Array | None
) -> Array:
    """``A`` of a convolution, in chunks of examples when the patches are large."""
    x = channels_last(geometry, inputs)
    batch, *space = geometry.rows
    elements = math.prod(geometry.rows) * geometry.n_in * geometry.groups
    chunks = next(
        c
        for c in range(1, batch + 1)
        if batch % c == 0 and (elements // c <= MAX_PATCH_ELEMENTS or c == batch)
    )
    form = recipe.layer.a_form, recipe.layer.site_shapes[0]

    def factor(x, live):
        rows = dense.along(geometry, inputs, "in", patches(geometry, x))
        live = None if live is None else live.reshape(-1)
        rows = dense.homogeneous(rows, recipe, geometry.rows, live)
        return dense.input_factor(rows, recipe, form)

    if chunks == 1 or recipe.positions(geometry.rows) not in (1, math.prod(space)):
        return factor(x, live)

    def add(total, chunk):
        return total + factor(*chunk), None

    x = x.reshape(chunks, batch // chunks, *x.shape[1:])
    live = None if live is None else live.reshape(chunks, -1)
    zero = jnp.zeros(form[1], accumulation_dtype(x.dtype))
    zero = vary(zero, varying_axes((x, live)))
    return jax.lax.scan(add, zero, (x, live))[0]


def conv_output_rows(
    geometry: ConvGeometry, inputs: list[Array], cotangent: Array
) -> Array:
    """The cotangent as ``[groups?, rows, out]``."""
    batch, feature, *space = geometry.out_spec
    c = lax.transpose(cotangent, (batch, *space, feature))
    rows = math.prod(geometry.rows)
    c = c.reshape(rows, geometry.groups, geometry.n_out)
    c = c[:, 0] if geometry.groups == 1 else jnp.moveaxis(c, 1, 0)
    return dense.along(geometry, inputs, "out", c)
