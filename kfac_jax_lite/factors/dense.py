"""Kronecker factors of dense layers, and what convolutions share with them.

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

from kfac_jax_lite.tagging.layers import DenseGeometry, positions_per_example
from kfac_jax_lite.types import Array, Shape, accumulation_dtype


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Static numbers of one layer's statistics.

    Attributes:
        num_examples: ``N``, terms of the mean loss.
        num_rows: ``R``, rows of the layer over all its sites (after reduction).
        bias: Whether the layer has a bias.
        reduce: Whether rows of one example are reduced first.
    """

    num_examples: int
    num_rows: int
    bias: bool
    reduce: bool

    def positions(self, rows: Shape) -> int:
        """How many consecutive rows are reduced to one."""
        return positions(rows, self.num_examples) if self.reduce else 1


def positions(rows: Shape, num_examples: int) -> int:
    """Rows per example under ``reduce``; 1 where rows are not grouped by example."""
    return positions_per_example(rows, num_examples) or 1


def input_rows(geometry: DenseGeometry, inputs: list[Array]) -> Array:
    """The layer's input as ``[*blocks, R, in]``, times scalars in front of its weight.

    Args:
        geometry: The site's axis orders.
        inputs: The input and the scalars.

    Returns:
        Rows in the order of the output's rows.
    """
    x = functools.reduce(operator.mul, inputs[1:], inputs[0])
    x = lax.transpose(x, geometry.input_order)
    return x.reshape(*geometry.blocks, math.prod(geometry.rows), geometry.n_in)


def output_rows(geometry: DenseGeometry, cotangent: Array) -> Array:
    """The cotangent as ``[*blocks, R, out]``."""
    c = lax.transpose(cotangent, geometry.output_order)
    return c.reshape(*geometry.blocks, math.prod(geometry.rows), geometry.n_out)


def homogeneous(x: Array, scaling: Scaling, rows: Shape) -> Array:
    """Averages positions and appends 1 for the bias: ``[*blocks, R, in+1]``."""
    k = scaling.positions(rows)
    if k > 1:
        x = x.reshape(*x.shape[:-2], -1, k, x.shape[-1])
        x = x.mean(-2, dtype=accumulation_dtype(x.dtype))
    if scaling.bias:
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], -1)
    return x


def summed(c: Array, scaling: Scaling, rows: Shape) -> Array:
    """Reduces positions by their sum: ``[*blocks, R, out]``."""
    k = scaling.positions(rows)
    if k > 1:
        c = c.reshape(*c.shape[:-2], -1, k, c.shape[-1])
        c = c.sum(-2, dtype=accumulation_dtype(c.dtype))
    return c


def second_moment(x: Array) -> Array:
    """``Σ_r x_r x_rᵀ`` of rows ``[*blocks, R, d]``, in float32 or better."""
    dtype = accumulation_dtype(x.dtype)
    return jnp.einsum("...ri,...rj->...ij", x, x, preferred_element_type=dtype)


def input_factor(x: Array, scaling: Scaling, rows: Shape) -> Array:
    """``A = (1/N) Σ_r ā āᵀ`` of rows ``[*blocks, R, in]``."""
    return second_moment(homogeneous(x, scaling, rows)) / scaling.num_examples


def output_factor(c: Array, scaling: Scaling, rows: Shape) -> Array:
    """``G = (N²/R) Σ_r c cᵀ`` of rows ``[*blocks, R, out]``."""
    weight = scaling.num_examples**2 / scaling.num_rows
    return second_moment(summed(c, scaling, rows)) * weight


def eigenbasis_moment(
    x: Array, c: Array, basis: tuple[Any, ...], scaling: Scaling, rows: Shape
) -> Array:
    """``S = N Σ_r (Q_Aᵀ ā)² ⊗ (Q_Gᵀ c)²``, ``[*blocks, in(+1), out]``."""
    q_a, q_g = basis
    a = homogeneous(x, scaling, rows).astype(q_a.dtype) @ q_a
    g = summed(c, scaling, rows).astype(q_g.dtype) @ q_g
    return scaling.num_examples * jnp.einsum("...ri,...rj->...ij", a**2, g**2)
