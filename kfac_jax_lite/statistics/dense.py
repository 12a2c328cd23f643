"""Rows of dense layers, and the factors that dense layers and convolutions share.

With rows ``r = 1..R`` of inputs ``ā`` and cotangents ``c`` of the mean loss over ``N``
terms: ``A = (1/N) Σ_r ā āᵀ`` and ``G = (N²/R) Σ_r c cᵀ``.

Weight sharing (``R > N``): ``"expand"`` takes every position as a row; ``"reduce"``
first averages ``ā`` and sums ``c`` over the positions of an example.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Sec. 3.
    Eschenhagen et al., 2023, arXiv:2311.00636, Secs. 3.2-3.3.
    George et al., 2018, arXiv:1806.03884, Sec. 3 (second moments in the eigenbasis).
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.factors import Form
from kfac_jax_lite.statistics.estimators import Recipe
from kfac_jax_lite.tagging.sites import ConvGeometry, DenseGeometry, moved

Kept = tuple[Form, Shape]


def input_rows(geometry: DenseGeometry, inputs: list[Array]) -> Array:
    """The layer's input as ``[*blocks, R, in]``, times what multiplies its weight."""
    rows = math.prod(geometry.rows)
    x = scalars(geometry, inputs)
    x = lax.transpose(x, geometry.input_order)
    shape = (*geometry.blocks, rows, geometry.n_in)
    x = jnp.broadcast_to(x.reshape(shape[-2:]), shape) if geometry.shared else x
    return along(geometry, inputs, "in", x.reshape(shape))


def output_rows(geometry: DenseGeometry, inputs: list[Array], c: Array) -> Array:
    """The cotangent as ``[*blocks, R, out]``."""
    c = lax.transpose(c, geometry.output_order)
    c = c.reshape(*geometry.blocks, math.prod(geometry.rows), -1)
    if geometry.span:
        c = c[..., slice(*geometry.span)]
    return along(geometry, inputs, "out", c)


def scalars(geometry: DenseGeometry | ConvGeometry, inputs: list[Array]) -> Array:
    """The input times the scalars that multiply the weight."""
    pairs = zip(geometry.scales, inputs[1:], strict=True)
    found = [moved(s.steps, value) for s, value in pairs if s.side == "all"]
    return functools.reduce(operator.mul, found, inputs[0])


def along(
    geometry: DenseGeometry | ConvGeometry, inputs: list[Array], side: str, rows: Array
) -> Array:
    """Rows times the vectors that multiply the weight along that side."""
    for vector in vectors(geometry, inputs, side):
        rows = rows * vector[..., None, :].astype(rows.dtype)
    return rows


def vectors(
    geometry: DenseGeometry | ConvGeometry, inputs: list[Array], side: str
) -> list[Array]:
    """What multiplies the weight along one side, ``[*blocks, in]`` or ``…, out]``."""
    pairs = list(zip(geometry.scales, inputs[1:], strict=True))
    found = [moved(s.steps, value) for s, value in pairs if s.side == side]
    if any(s.side == "both" for s, _ in pairs):
        parts = rank_one(derivative(geometry, inputs)[-1])
        found.append(parts[0 if side == "in" else 1])
    return found


def derivative(
    geometry: DenseGeometry | ConvGeometry, inputs: list[Array]
) -> tuple[Any, list[Array], Any]:
    """What multiplies the weight along both sides, and the site without it.

    Returns:
        Geometry, inputs, and ``D [*blocks, in, out]`` or None.
    """
    pairs = list(zip(geometry.scales, inputs[1:], strict=True))
    rest = [(s, value) for s, value in pairs if s.side != "both"]
    matrices = [moved(s.steps, value) for s, value in pairs if s.side == "both"]
    geometry = dataclasses.replace(geometry, scales=tuple(s for s, _ in rest))
    whole = functools.reduce(operator.mul, matrices) if matrices else None
    return geometry, [inputs[0], *(value for _, value in rest)], whole


def rank_one(d: Array) -> tuple[Array, Array]:
    """Vectors with ``a bᵀ ≈ D``, exactly where ``D`` has rank one.

    A weight ``φ(w)`` has the block ``diag(D) (A ⊗ G) diag(D)`` with ``D = φ'(w)``,
    which is a Kronecker product if ``D`` has rank one. Of others, squares keep their
    means by row and by column, ``a_i² = mean_j D²_ij`` and ``b_j² = mean_i D²_ij /
    mean D²``, and with them the trace of the block as far as ``D²`` is independent of
    the factors' diagonals. Signs are those of the largest row.

    Args:
        d: ``D [*blocks, in, out]``.

    Returns:
        ``(a, b)``.
    """
    d = d.astype(accumulation_dtype(d.dtype))
    square = jnp.square(d)
    rows, columns = square.mean(-1), square.mean(-2)
    mean = rows.mean(-1, keepdims=True)
    columns = columns / jnp.where(mean > 0, mean, 1)
    largest = jnp.argmax(rows, -1)[..., None, None]
    leading = jnp.take_along_axis(d, largest, -2)
    a_sign = jnp.where((d * leading).sum(-1) < 0, -1, 1)
    b_sign = jnp.where(leading[..., 0, :] < 0, -1, 1)
    return a_sign * jnp.sqrt(rows), b_sign * jnp.sqrt(columns)


def homogeneous(x: Array, recipe: Recipe, live: Array | None = None) -> Array:
    """Averages positions and appends 1 for the bias: ``[*blocks, R, in+1]``.

    Args:
        x: Rows ``[*blocks, R, in]``.
        live: Which rows count, ``[*blocks, R]`` or ``[R]``; None: all.
    """
    k = 1 if recipe.by_example else recipe.positions
    if k > 1:
        x = x.reshape(*x.shape[:-2], x.shape[-2] // k, k, x.shape[-1])
        if live is not None:
            x = jnp.where(live.reshape(*live.shape[:-1], -1, k, 1), x, 0)
        x = x.sum(-2, dtype=accumulation_dtype(x.dtype)) / counted(live, k)
        live = None if live is None else reduced_live(live, k)
    if recipe.layer.bias:
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], -1)
    return x if live is None else jnp.where(live[..., None], x, 0)


def counted(live: Array | None, k: int) -> Any:
    """How many of every ``k`` rows count, one at least: ``[*blocks, R/k, 1]``, or k."""
    if live is None:
        return k
    each = live.reshape(*live.shape[:-1], -1, k)
    return jnp.maximum(each.sum(-1, keepdims=True), 1)


def reduced_live(live: Array, k: int) -> Array:
    """Which examples have a row that counts, of ``k`` rows each: ``[*blocks, R/k]``."""
    return live.reshape(*live.shape[:-1], -1, k).any(-1)


def summed(c: Array, recipe: Recipe) -> Array:
    """Reduces positions by their sum: ``[*blocks, R, out]``."""
    k = recipe.positions
    if k > 1:
        c = c.reshape(*c.shape[:-2], -1, k, c.shape[-1])
        c = c.sum(-2, dtype=accumulation_dtype(c.dtype))
    return c


def input_factor(x: Array, recipe: Recipe, kept: Kept) -> Array:
    """``A = (1/N) Σ_r ā āᵀ`` of homogeneous rows."""
    form, shape = kept
    return form.second_moment(x, shape) / recipe.num_examples


def output_factor(c: Array, recipe: Recipe, kept: Kept, num_rows: int) -> Array:
    """``G = (N²/R) Σ_r c cᵀ`` of summed rows."""
    form, shape = kept
    return form.second_moment(c, shape) * (recipe.num_examples**2 / num_rows)


def example_sums(x: Array, recipe: Recipe) -> Array:
    """``Σ_t x_nt`` over the positions of each example: ``[*blocks, N, d]``."""
    x = x.reshape(*x.shape[:-2], recipe.num_examples, -1, x.shape[-1])
    return x.sum(-2, dtype=accumulation_dtype(x.dtype))


def eigenbasis_moment(x: Array, c: Array, recipe: Recipe) -> Array:
    """``S = N Σ_r (Q_Aᵀ ā)² ⊗ (Q_Gᵀ c)²`` of rows that are turned and squared."""
    return recipe.num_examples * jnp.einsum("...ri,...rj->...ij", x, c)
