"""Kronecker factors of convolutions, by matrix products over patches.

The input rows of a convolution are its patches (``Ω`` below), one row for every output
position; the entries of a row are ordered (kernel axes, input channel), the order of an
``HWIO`` kernel reshaped to a matrix.

Two ways to ``A``, chosen by ``shift_axis`` from the shapes:

* all patches, and one matrix product of them (``im2col``);
* patches along all axes but one, ``P [.., y, .., m]``, and products with themselves
  shifted along that one: with stride 1 the block of kernel offsets ``(i, j)`` depends
  on ``j - i`` alone but for the rows at the edges,

  ``A_ij = Σ_{y<Y} P_{y+i}ᵀ P_{y+j},  A_{i+1,j+1} = A_ij - P_iᵀ P_j + P_{Y+i}ᵀ P_{Y+j}``

  so that ``k`` products stand for ``k²``, and patches are ``k`` times smaller.

References:
    Grosse & Martens, 2016, arXiv:1602.01407, Secs. 3-4 (Kronecker factors for
    convolution; here with this library's scaling in ``N`` and ``R``).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.pytree import vary, varying_axes
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.factors import forms_of, symmetric_product_flops
from kfac_jax_lite.statistics import dense
from kfac_jax_lite.statistics.estimators import Recipe
from kfac_jax_lite.statistics.subsample import Lattice
from kfac_jax_lite.tagging.sites import ConvGeometry

# Patches are never held beyond this many elements at a time (256 MiB in float32).
MAX_PATCH_ELEMENTS = 1 << 26
# On a CPU they should stay in its cache (4 MiB): experiments.benchmarks.conv_factor.
CACHED_PATCH_ELEMENTS = 1 << 20
# Shifted products must save this part of the flops to be worth their edges.
LEAST_SAVING = 0.25


def channels_last(geometry: ConvGeometry, inputs: list[Array]) -> Array:
    """The input as ``[batch, *space, channel]``, times scalars of its kernel."""
    batch, feature, *space = geometry.lhs_spec
    return lax.transpose(dense.scalars(geometry, inputs), (batch, *space, feature))


def patches(geometry: ConvGeometry, x: Array, without: int | None = None) -> Array:
    """Patches of ``[batch, *space, channel]`` as ``[groups?, rows, in]``.

    Axis by axis, the last first: slices at the kernel's offsets along one spatial axis,
    side by side on the channel axis. Short programs compile faster than one slice for
    every point of the kernel.

    Returns:
        The rows; with an axis left out ``[batch, *space, in / its kernel]``.
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
        if axis == without:
            continue
        columns = [
            lax.slice_in_dim(x, k * steps[1], k * steps[1] + reach, steps[0], 1 + axis)
            for k in range(geometry.kernel[axis])
        ]
        x = jnp.concatenate(columns, -2)
    if without is not None:
        return x.reshape(*x.shape[:-3], -1)
    rows = x.shape[0] * math.prod(geometry.rows[1:])
    if groups == 1:
        return x.reshape(rows, geometry.n_in)
    return jnp.moveaxis(x.reshape(rows, groups, geometry.n_in), 1, 0)


def _pads(geometry: ConvGeometry):
    return zip(geometry.padding, geometry.lhs_dilation, strict=True)


def shift_axis(geometry: ConvGeometry) -> int | None:
    """The spatial axis along which products of shifted patches are cheaper, or None.

    It is the outermost axis along which the kernel extends: its blocks of ``A`` lie
    side by side.
    """
    wide = [axis for axis, k in enumerate(geometry.kernel) if k > 1]
    if not wide or geometry.groups > 1:
        return None
    axis = wide[0]
    if geometry.window_strides[axis] > 1 or geometry.rhs_dilation[axis] > 1:
        return None
    large = geometry.n_in**2 > CACHED_PATCH_ELEMENTS
    if large and math.prod(geometry.rows) < geometry.n_in:
        return None  # Putting the blocks together costs more than the products.
    part = shifted_flops(geometry, axis) / patch_flops(geometry)
    return axis if part <= 1 - LEAST_SAVING else None


def chosen_axis(geometry: ConvGeometry, recipe: Recipe) -> int | None:
    """``shift_axis`` where every row of a full factor counts by itself, else None."""
    all_rows = not recipe.masked and recipe.positions == 1
    full = forms_of(recipe.layer)[0].whole
    return shift_axis(geometry) if all_rows and full else None


def patch_flops(geometry: ConvGeometry) -> int:
    """``2 R in²`` per group: one ``symmetric_product`` of all patches."""
    rows = math.prod(geometry.rows)
    return symmetric_product_flops(rows, geometry.n_in) * geometry.groups


def shifted_flops(geometry: ConvGeometry, axis: int) -> int:
    """``2 R k m²`` with ``m = in/k``, ``4 R/Y (k-1)² m²`` for both edges, and sums."""
    # The sums are a product with ``diagonal_sums``.
    k, rows = geometry.kernel[axis], math.prod(geometry.rows)
    edge = 2 * (k - 1) ** 2 * rows // geometry.rows[1 + axis]
    sums = k**2 * (k + (k - 1) ** 2)
    return 2 * (rows * k + edge + sums) * (geometry.n_in // k) ** 2


def sampled(
    geometry: ConvGeometry, x: Array, lattice: Lattice, phase: Array
) -> tuple[ConvGeometry, Array]:
    """The convolution of the patches taken, of axes ``(examples, frames, *space)``."""
    kept, phase = lattice.kept, vary(phase, varying_axes(x))
    offsets = lattice.offsets(phase)
    frames = lattice.sizes[1] * math.prod(x.shape[1:])
    examples = lattice._replace(
        sizes=lattice.sizes[:1], strides=lattice.strides[:1]
    ).select(x.reshape(-1, frames), phase)
    x = examples.reshape(-1, *x.shape[1:])
    config, starts, reach = [(0, 0, 0)], [0], [x.shape[0]]
    steps = sampled_geometry(geometry, lattice).window_strides
    for axis, ((low, high), dilation) in enumerate(_pads(geometry)):
        k, d = geometry.kernel[axis], geometry.rhs_dilation[axis]
        stride = geometry.window_strides[axis]
        size = (x.shape[1 + axis] - 1) * dilation + 1 + low + high
        reach.append((kept[2 + axis] - 1) * steps[axis] + (k - 1) * d + 1)
        starts.append(offsets[2 + axis] * stride)
        short = reach[-1] + (lattice.strides[2 + axis] - 1) * stride - size
        config.append((low, high + max(short, 0), dilation - 1))
    x = lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
    corner = [jnp.asarray(start, jnp.int32) for start in (*starts, 0)]
    x = lax.dynamic_slice(x, corner, [*reach, x.shape[-1]])
    return sampled_geometry(geometry, lattice), x


def sampled_geometry(geometry: ConvGeometry, lattice: Lattice) -> ConvGeometry:
    """Of the convolution with the patches taken; its input is padded already."""
    kept, ones = lattice.kept, (1,) * len(geometry.kernel)
    strides = zip(geometry.window_strides, lattice.strides[2:], strict=True)
    return dataclasses.replace(
        geometry,
        window_strides=tuple(map(math.prod, strides)),
        padding=((0, 0),) * len(ones),
        lhs_dilation=ones,
        rows=(kept[0] * kept[1], *kept[2:]),
    )


def conv_input_factor(
    geometry: ConvGeometry,
    inputs: list[Array],
    x: Array,
    recipe: Recipe,
    live: Array | None,
) -> Array:
    """``A`` of a convolution, in chunks of examples where the patches are large."""
    axis = chosen_axis(geometry, recipe) if live is None else None
    if axis is None:
        return patch_factor(geometry, inputs, x, recipe, live)
    total = shifted_moment(geometry, x, axis)
    ones = jnp.ones((1, geometry.n_in), x.dtype)
    scale = dense.along(geometry, inputs, "in", ones).astype(total.dtype)
    total = total * scale * scale.T if geometry.scales else total
    if recipe.layer.bias:
        # Patches are linear: the sum over examples goes first.
        summed = x.sum(0, dtype=total.dtype, keepdims=True)
        sums = patches(geometry, summed).sum(0, keepdims=True) * scale
        count = jnp.full((1, 1), math.prod(geometry.rows), total.dtype)
        total = jnp.block([[total, sums.T], [sums, count]])
    return total / recipe.num_examples


def shifted_moment(geometry: ConvGeometry, x: Array, axis: int) -> Array:
    """``Σ_r x_r x_rᵀ [in, in]`` over all patches, shifted along one axis."""
    k, rows = geometry.kernel[axis], geometry.rows[1 + axis]
    dtype = accumulation_dtype(x.dtype)
    m = geometry.n_in // k

    def product(left: Array, right: Array, out: str):
        return jnp.einsum(out, left, right, preferred_element_type=dtype)

    def moments(x: Array):
        p = patches(geometry, x, without=axis)
        p = p.reshape(math.prod(p.shape[: 1 + axis]), rows + k - 1, -1, m)
        first = [
            product(p[:, :rows], p[:, s : s + rows], "byri,byrj->ij") for s in range(k)
        ]
        head, tail = (
            product(edge, edge, "byri,bzrj->yzij").reshape(-1, m, m)
            for edge in (p[:, : k - 1], p[:, rows:])
        )
        return jnp.concatenate([jnp.stack(first), tail - head])

    elements = math.prod(geometry.rows) // rows * (rows + k - 1) * m
    terms = by_chunks(moments, x, elements)
    place = jnp.asarray(diagonal_sums(k), dtype)
    upper = jnp.einsum("abp,pij->abij", place, terms, precision=lax.Precision.HIGHEST)
    total = jnp.transpose(upper, (0, 2, 1, 3)) + jnp.transpose(upper, (1, 3, 0, 2))
    return total.reshape(geometry.n_in, geometry.n_in)


def diagonal_sums(k: int) -> np.ndarray:
    """Which terms of ``shifted_moment`` a block of ``A`` is the sum of.

    Returns:
        Zeros and ones ``[k, k, k + (k-1)²]``: the first row of blocks, then the changes
        from ``A_ij`` to ``A_{i+1,j+1}``, row by row. A half on the diagonal and nothing
        below: with its transpose it makes the whole.
    """
    place = np.zeros((k, k, k + (k - 1) ** 2))
    for i in range(k):
        for j in range(i, k):
            place[i, j, j - i] = 1
            for t in range(i):
                place[i, j, k + t * (k - 1) + t + j - i] = 1
    return place / (1 + np.eye(k)[:, :, None])


def patch_factor(
    geometry: ConvGeometry,
    inputs: list[Array],
    x: Array,
    recipe: Recipe,
    live: Array | None,
) -> Array:
    """``A`` from all patches of the input ``[batch, *space, channel]``."""
    batch, *space = geometry.rows
    form = forms_of(recipe.layer)[0], recipe.layer.site_shapes[0]

    def factor(chunk: Any):
        x, live = chunk
        rows = dense.along(geometry, inputs, "in", patches(geometry, x))
        live = None if live is None else live.reshape(-1)
        rows = dense.homogeneous(rows, recipe, live)
        return dense.input_factor(rows, recipe, form)

    live = None if live is None else live.reshape(batch, -1)
    if recipe.positions not in (1, math.prod(space)):
        return factor((x, live))
    elements = math.prod(geometry.rows) * geometry.n_in * geometry.groups
    return by_chunks(factor, (x, live), elements)


def by_chunks(function: Callable[[Any], Array], argument: Any, elements: int) -> Any:
    """Adds a function up over chunks of examples, as large as the device likes them."""
    batch = len(jax.tree.leaves(argument)[0])

    def chunked(limit: int) -> Callable[[Any], Array]:
        split = split_of_batch(batch, elements, limit)
        return lambda x: sum_of_chunks(function, x, split)

    if elements <= CACHED_PATCH_ELEMENTS:
        return function(argument)
    return lax.platform_dependent(
        argument,
        cpu=chunked(CACHED_PATCH_ELEMENTS),
        default=chunked(MAX_PATCH_ELEMENTS),
    )


def split_of_batch(batch: int, elements: int, limit: int) -> tuple[int, int]:
    """``(shards, chunks)``: the fewest equal chunks within the limit, if there are any.

    Where the batch may be sharded over devices, every chunk takes a part of each shard,
    so that nothing moves; memory that would run out counts for more.
    """
    shards = math.gcd(batch, jax.device_count())
    if elements // (batch // shards) > MAX_PATCH_ELEMENTS:
        shards = 1
    most = batch // shards
    divisors = (c for c in range(1, most) if most % c == 0)
    return shards, next((c for c in divisors if elements // c <= limit), most)


def sum_of_chunks(function: Callable[[Any], Array], argument: Any, split: Shape) -> Any:
    """``Σ function(chunk)`` over chunks that take a part of every shard."""
    shards, chunks = split
    if chunks == 1:
        return function(argument)

    def cut(x: Array):
        x = x.reshape(shards, chunks, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    def add(total: Any, chunk: Any):
        chunk = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunk)
        return jax.tree.map(jnp.add, total, function(chunk)), None

    chunks_of = jax.tree.map(cut, argument)
    one = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), chunks_of)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, one)
    )
    zeros = vary(zeros, varying_axes(argument))
    return lax.scan(add, zeros, chunks_of)[0]


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
