"""Experts' weights that meet the rows sent to them: ``jax.lax.ragged_dot``.

Rows stand in the order of their experts, ``R_e`` of them for expert ``e``. With sums
over these rows alone ``A_e = (1/N) Σ_r ā āᵀ`` and ``G_e = (N²/R_e) Σ_r c cᵀ``, so that
``A_e ⊗ G_e`` approximates the expert's own block of the mean loss. ``R_e`` is known
only at run time: taps return sums over the static ``R`` and the number of rows, and
``recipe.rescaled`` puts them together. An expert without rows has zero factors.

References:
    Gale et al., 2023, arXiv:2211.15841 (grouped products instead of capacities).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.factors import BLOCKS, FULL, Form, forms_of, widened
from kfac_jax_lite.statistics import dense
from kfac_jax_lite.statistics.estimators import Recipe
from kfac_jax_lite.tagging.interpreter import Estimator
from kfac_jax_lite.tagging.sites import RaggedGeometry, Site

BY_GROUP = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which rows are whose.

    Attributes:
        sizes: Number of rows of each group ``[E]``; they follow each other.
        group: Number of each row's group ``[R]``; ``E`` for rows that do not count.
    """

    sizes: Array
    group: Array

    @property
    def counts(self) -> Array:
        """How many rows of each group count."""
        every = jnp.arange(self.sizes.shape[0])
        return jnp.sum(self.group[:, None] == every, 0)

    def live(self, x: Array) -> Array:
        """Rows ``[R, d]``, zero where they do not count."""
        return jnp.where((self.group < self.sizes.shape[0])[:, None], x, 0)

    def products(self, x: Array, y: Array) -> Array:
        """``Σ_r x_r y_rᵀ`` over the rows of each group, ``[E, d, e]``."""
        dtype = accumulation_dtype(x.dtype)
        return lax.ragged_dot_general(
            x, y, self.sizes, BY_GROUP, preferred_element_type=dtype
        )

    def second_moment(self, x: Array, form: Form, shape: Shape) -> Array:
        """``Σ_r x_r x_rᵀ`` over the rows of each group, in some form."""
        if not form.matrix:
            square = jnp.square(x.astype(accumulation_dtype(x.dtype)))
            return jax.ops.segment_sum(square, self.group, self.sizes.shape[0])
        if form is FULL:
            return self.products(x, x)
        parts = split(x, form, shape)
        return jnp.stack([self.products(part, part) for part in parts], 1)

    def turned(self, x: Array, basis: Any, form: Form, shape: Shape) -> Array:
        """``(Qᵀ x)²`` with the eigenbasis of each row's own group, widened."""
        x = widened(x, form.width(shape))
        if not isinstance(basis, tuple):
            x = x.astype(basis.dtype)
            bases = jnp.moveaxis(basis, 1, 0) if form is BLOCKS else basis[None]
            pairs = zip(split(x, form, shape), bases, strict=True)
            parts = [lax.ragged_dot(part, q, self.sizes) for part, q in pairs]
            x = jnp.concatenate(parts, -1)
        return self.live(jnp.square(x))


def split(x: Array, form: Form, shape: Shape) -> list[Array]:
    """Rows cut into the parts that the blocks of a factor act on."""
    return jnp.split(widened(x, form.width(shape)), form.count(shape), -1)


def groups_of(geometry: RaggedGeometry, sizes: Array) -> Groups:
    """The groups of rows; some at the end may be nobody's."""
    rows = jnp.arange(geometry.num_rows)
    each = sizes.astype(jnp.int32) * math.prod(geometry.rows[1:])
    return Groups(each, jnp.searchsorted(jnp.cumsum(each), rows, side="right"))


def rows_of(
    recipe: Recipe, site: Site, inputs: list[Any], c: Array
) -> tuple[Array, Array, Groups]:
    """Homogeneous inputs ``[R, in(+1)]``, cotangents ``[R, out]``, and their groups."""
    geometry: Any = site.geometry
    *inputs, sizes = inputs
    groups, n = groups_of(geometry, sizes), geometry.num_rows
    x = lax.transpose(dense.scalars(geometry, inputs), geometry.input_order)
    x = x.reshape(n, geometry.n_in)
    c = lax.transpose(c, geometry.output_order).reshape(n, geometry.n_out)
    for vector in dense.vectors(geometry, inputs, "in"):
        x = x * vector.at[groups.group].get(mode="clip").astype(x.dtype)
    for vector in dense.vectors(geometry, inputs, "out"):
        c = c * vector.at[groups.group].get(mode="clip").astype(c.dtype)
    if recipe.layer.bias:
        x = jnp.concatenate([x, jnp.ones((n, 1), x.dtype)], -1)
    if recipe.masked:
        seen = jnp.any(c != 0, -1)
        groups = dataclasses.replace(
            groups, group=jnp.where(seen, groups.group, geometry.blocks[0])
        )
    return groups.live(x), groups.live(c), groups


def estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """The taps of one site (see ``sites.estimators``)."""
    layer, n = recipe.layer, recipe.num_examples
    shape_a, shape_g = layer.site_shapes
    form_a, form_g = forms_of(layer)
    a, g, rows, num_rows = "a", "g", "rows", recipe.num_rows
    if site.reverse:
        a, g, rows, num_rows = "a_out", "g_out", "rows_out", recipe.rows_out
        form_a, form_g = form_g, form_a

    def pair(inputs: Any, c: Array):
        x, c, groups = rows_of(recipe, site, inputs[0], c)
        return (c, x, groups) if site.reverse else (x, c, groups)

    def input_factor(inputs: Any, c: Array):
        x, _, groups = rows_of(recipe, site, inputs[0], c)
        return groups.second_moment(x, form_a, shape_a) / n

    def output_factor(inputs: Any, c: Array):
        _, c, groups = rows_of(recipe, site, inputs[0], c)
        return groups.second_moment(c, form_g, shape_g) * (n**2 / num_rows)

    def count(inputs: Any, c: Array):
        return rows_of(recipe, site, inputs[0], c)[-1].counts

    def moment(inputs: Any, c: Array):
        x, c, groups = pair(inputs, c)
        q_a, q_g = inputs[1]
        x = groups.turned(x, q_a, form_a, shape_a)
        return n * groups.products(x, groups.turned(c, q_g, form_g, shape_g))

    def squares(inputs: Any, c: Array):
        x, c, groups = pair(inputs, c)
        x, c = (jnp.square(v.astype(accumulation_dtype(v.dtype))) for v in (x, c))
        return n * groups.products(x, c)

    def gradients(inputs: Any, c: Array):
        x, c, groups = pair(inputs, c)
        chosen = groups.group == jnp.arange(groups.sizes.shape[0])[:, None]
        return jnp.einsum("er,ri,ro->erio", chosen.astype(c.dtype), x, c)

    if recipe.squares:
        return {"gradients": gradients, "squares": squares}
    return {a: input_factor, g: output_factor, rows: count, "s": moment}
