"""Which estimators a site is tapped with: one for every probe that the site feeds."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.factors import forms_of, turned, widths
from kfac_jax_lite.statistics import (
    conv,
    dense,
    embedding,
    ragged,
    squares,
)
from kfac_jax_lite.statistics.estimators import Recipe, site_rows, unit_blocks
from kfac_jax_lite.statistics.subsample import Lattice
from kfac_jax_lite.tagging.interpreter import Estimator
from kfac_jax_lite.tagging.sites import (
    ConvGeometry,
    EmbeddingGeometry,
    RaggedGeometry,
    ScaleShiftGeometry,
    Site,
    moved,
)


def among_copies(estimate: Estimator, copies: int) -> Estimator:
    """An estimator that several devices run, each with a part of the cotangent."""
    if copies == 1:
        return estimate

    def part(inputs: Any, c: Array):
        return estimate(inputs, c * copies) / copies

    return part


def estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """Functions ``((inputs, basis, phase), cotangent) -> statistic`` by probe."""
    geometry, layer = site.geometry, recipe.layer
    if isinstance(geometry, ScaleShiftGeometry):

        def s_sum(inputs: Any, c: Array):
            return unit_gradients(site, inputs[0], c, layer.roles)

        def blocks(inputs: Any, c: Array):
            return unit_blocks(s_sum(inputs, c), recipe.num_examples)

        return {"blocks": blocks, "s_sum": s_sum}
    if isinstance(geometry, RaggedGeometry):
        return ragged.estimators(recipe, site)
    if recipe.squares:
        return square_estimators(recipe, site)
    if recipe.by_example:
        return example_estimators(recipe, site)
    a, g, rows, num_rows = "a", "g", "rows", recipe.num_rows
    shape_a, shape_g = layer.site_shapes
    form_a, form_g = zip(forms_of(layer), (shape_a, shape_g), strict=True)
    if site.reverse:
        a, g, rows, num_rows = "a_out", "g_out", "rows_out", recipe.rows_out
        form_a, form_g = form_g, form_a
    lattice = recipe.lattice(site)
    share = lattice.share if lattice else 1

    def input_factor(inputs: Any, c: Array):
        if isinstance(geometry, EmbeddingGeometry):
            live = live_of(recipe, site)(inputs, c)
            part = recipe.at(site)
            return embedding.input_factor(geometry, inputs[0], part, live)
        if isinstance(geometry, ConvGeometry) and geometry.n_in and not site.complex:
            part, own, x = conv_sample(recipe, site, inputs)
            live = taken_live(recipe, site, inputs, c)
            a = conv.conv_input_factor(own, inputs[0], x, part, live)
            return a * (share * part.num_examples / recipe.num_examples)
        x = real_rows(site, input_rows(recipe, site, inputs, c))
        return dense.input_factor(x, recipe, form_a) * share

    def output_factor(inputs: Any, c: Array):
        c = summed_rows(recipe, site, inputs, c)
        return dense.output_factor(c, recipe, form_g, num_rows) * share

    def live_rows(inputs: Any, c: Array):
        live = live_of(recipe, site)(inputs, c)
        if live is None:
            return jnp.full(geometry.blocks, site_rows(site, recipe.reduce))
        count = dense.reduced_live(live, recipe.at(site).positions).sum(-1)
        return jnp.broadcast_to(count * (2 if site.complex else 1), geometry.blocks)

    def moment(inputs: Any, c: Array):
        return eigenbasis_moment(recipe, site, inputs, c) * share

    return {a: input_factor, g: output_factor, rows: live_rows, "s": moment}


def unit_gradients(
    site: Site, factors: list[Array], cotangent: Array, roles: tuple[str, ...]
) -> Array:
    """Gradients of ``y = γ x̂ + β`` by unit, ``[examples, units, k]``.

    ``s_n = (Σ_t c_tu x̂_tu, Σ_t c_tu)``, summed over the example's positions ``t``.

    References:
        Osawa et al., 2020, arXiv:2002.06015, Sec. 4.2 (unit-wise natural gradient).
    """
    geometry: Any = site.geometry
    dtype = accumulation_dtype(cotangent.dtype)
    c = cotangent.astype(dtype)
    parts_of_x = [
        moved(steps, f).astype(dtype)
        for steps, f in zip(geometry.factor_ops, factors, strict=True)
    ]
    x_hat = functools.reduce(operator.mul, parts_of_x, jnp.ones((), dtype))

    def per_example(value: Array):
        value = lax.transpose(value.real, geometry.order)
        shape = (site.examples, site.positions or 1, geometry.units)
        return value.reshape(shape).sum(1)

    parts = {"scale": lambda: per_example(c * x_hat), "shift": lambda: per_example(c)}
    return jnp.stack([parts[role]() for role in roles], -1)


def example_estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """Sums over the positions of each example (see ``recipe``)."""
    geometry, live = site.geometry, live_of(recipe, site)

    def x_sum(inputs: Any, c: Array):
        if isinstance(geometry, EmbeddingGeometry):
            return embedding.example_sums(geometry, inputs[0], recipe, live(inputs, c))
        x = dense.example_sums(input_rows(recipe, site, inputs, c), recipe)
        return whole(real_rows(site, x))

    def c_sum(inputs: Any, c: Array):
        c = dense.example_sums(output_rows(site, inputs, c), recipe)
        return whole(real_rows(site, c, cotangents=True))

    def whole(rows: Array):
        if site.complex or recipe.parts == 1:
            return rows
        # Beside the rows of complex sites: the imaginary parts, which are zero.
        pairs = jnp.stack([rows, jnp.zeros_like(rows)], -2)
        return pairs.reshape(*rows.shape[:-2], -1, rows.shape[-1])

    def count(inputs: Any, c: Array):
        seen = live(inputs, c)
        if seen is None:
            seen = jnp.ones(math.prod(geometry.rows))
        counts = dense.example_sums(seen[..., None], recipe)[..., 0]
        return jnp.broadcast_to(counts, (*geometry.blocks, recipe.num_examples))

    return {"x_sum": x_sum, "c_sum": c_sum, "count": count}


def square_estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """Squares of the examples' gradients, or the gradients (see ``recipe``)."""
    geometry, n = site.geometry, recipe.num_examples
    here = recipe.on_device(site).num_examples

    def rows(inputs: Any, c: Array):
        """Inputs, cotangents, and what multiplies the weight entry by entry."""
        values, *rest = inputs
        plain, values, d = dense.derivative(geometry, values)  # type: ignore[arg-type]
        own, inputs = dataclasses.replace(site, geometry=plain), (values, *rest)
        x = real_rows(site, input_rows(recipe, own, inputs, c))
        c = real_rows(site, output_rows(own, inputs, c), cotangents=True)
        d = jnp.ones((1, 1), c.dtype) if d is None else d
        return (c, x, jnp.swapaxes(d, -1, -2)) if site.reverse else (x, c, d)

    if isinstance(geometry, EmbeddingGeometry):

        def found(inputs: Any, c: Array):
            pairs = embedding.token_rows(geometry, inputs[0], None)
            return *pairs, real_rows(site, output_rows(site, inputs, c), True)

        def gradients(inputs: Any, c: Array) -> Array:
            return embedding.example_gradients(geometry, found(inputs, c), n)

        def square(inputs: Any, c: Array) -> Array:
            token, share = squares.token_square_sums(*found(inputs, c), here)
            return n * embedding.scattered(token, share, geometry)

    else:

        def gradients(inputs: Any, c: Array) -> Array:
            x, c, d = rows(inputs, c)
            return squares.example_gradients(x, c, n) * d[..., None, :, :]

        def square(inputs: Any, c: Array) -> Array:
            x, c, d = rows(inputs, c)
            return n * squares.square_sums(x, c, here) * jnp.square(d)

    return {"gradients": gradients, "squares": square}


def eigenbasis_moment(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """EKFAC's second moments at one site, ``[*blocks, in(+1), out]``."""
    geometry, layer = site.geometry, recipe.layer
    (wide_a, wide_g), (form_a, form_g) = widths(layer), forms_of(layer)
    q_a, q_g = inputs[1]
    rows = summed_rows(recipe, site, inputs, c)
    if isinstance(geometry, EmbeddingGeometry):
        rows = turned(rows, q_g, form_g, wide_g)
        live = live_of(recipe, site)(inputs, c)
        k = recipe.at(site).positions
        if k > 1:
            own = recipe.on_device(site)
            x = embedding.example_sums(geometry, inputs[0], own, live)
            x = x / dense.counted(live, k)
            x = jnp.square(taken(recipe, site, inputs, x))
            return dense.eigenbasis_moment(x, rows, recipe)
        token, weight = embedding.token_rows(geometry, inputs[0], live)
        pick = lambda x: taken(recipe, site, inputs, x[..., None])[..., 0]  # noqa: E731
        found = pick(token), pick(weight)
        return embedding.eigenbasis_moment(geometry, found, rows, recipe)
    x = real_rows(site, input_rows(recipe, site, inputs, c))
    if site.reverse:
        x, rows = rows, x
    x = turned(x, q_a, form_a, wide_a)
    rows = turned(rows, q_g, form_g, wide_g)
    return dense.eigenbasis_moment(x, rows, recipe)


def input_rows(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """Homogeneous rows ``[*blocks, R, in(+1)]`` of a dense layer or convolution."""
    geometry = site.geometry
    if not geometry.n_in:  # type: ignore[union-attr]
        # A bias alone: homogeneous coordinates without the rest.
        rows = (*geometry.blocks, math.prod(geometry.rows), 0)
        x = jnp.zeros(rows, c.dtype)
    elif isinstance(geometry, ConvGeometry):
        part, own, x = conv_sample(recipe, site, inputs)
        x = dense.along(own, inputs[0], "in", conv.patches(own, x))
        live = taken_live(recipe, site, inputs, c)
        return dense.homogeneous(x, part, live)
    else:
        x = dense.input_rows(geometry, inputs[0])  # type: ignore[arg-type]
    x = taken(recipe, site, inputs, x)
    live = taken_live(recipe, site, inputs, c)
    return dense.homogeneous(x, sample_of(recipe, site), live)


def conv_sample(
    recipe: Recipe, site: Site, inputs: Any
) -> tuple[Recipe, ConvGeometry, Array]:
    """Recipe, geometry and input of a convolution with the patches that are taken."""
    geometry: Any = site.geometry
    x, lattice = conv.channels_last(geometry, inputs[0]), recipe.lattice(site)
    if lattice is not None:
        geometry, x = conv.sampled(geometry, x, lattice, inputs[2])
    return sample_of(recipe, site), geometry, x


def sample_of(recipe: Recipe, site: Site) -> Recipe:
    """The recipe of the part that is taken at a site."""
    lattice = recipe.lattice(site)
    return recipe.at(site, lattice.kept[0] if lattice else None)


def taken(recipe: Recipe, site: Site, inputs: Any, rows: Array) -> Array:
    """The rows taken of all, or of one for each example, ``[*blocks, R, d]``."""
    lattice = recipe.lattice(site)
    if lattice is None:
        return rows
    if rows.shape[-2] != math.prod(lattice.sizes):
        lattice = Lattice(lattice.sizes[:1], lattice.strides[:1])
    return lattice.select(rows, inputs[2])


def taken_live(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array | None:
    """Which of the rows taken count: those that the loss sees and that there are."""
    live, lattice = live_of(recipe, site)(inputs, c), recipe.lattice(site)
    if live is None and lattice is not None and lattice.uneven:
        live = jnp.ones(math.prod(lattice.sizes), bool)
    if live is None:
        return None
    return taken(recipe, site, inputs, live[..., None])[..., 0]


def output_rows(site: Site, inputs: Any, c: Array) -> Array:
    """Cotangent rows ``[*blocks, R, out]``."""
    geometry = site.geometry
    if isinstance(geometry, ConvGeometry):
        return conv.conv_output_rows(geometry, inputs[0], c)
    if isinstance(geometry, EmbeddingGeometry):
        return embedding.output_rows(geometry, c)
    return dense.output_rows(geometry, inputs[0], c)  # type: ignore[arg-type]


def summed_rows(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """Cotangent rows that are taken, after ``reduce``, as real ones."""
    rows = taken(recipe, site, inputs, output_rows(site, inputs, c))
    rows = dense.summed(rows, sample_of(recipe, site))
    return real_rows(site, rows, cotangents=True)


def real_rows(site: Site, rows: Array, cotangents: bool = False) -> Array:
    """Complex rows as two real ones each, ``[*blocks, 2 R, d]``.

    A real weight's gradient is ``Re(x c) = Re x Re c − Im x Im c``: the product of the
    real parts, and that of the imaginary parts with the sign of ``c``'s turned. Of a
    real input the cotangent's real part is all that matters.
    """
    if not jnp.iscomplexobj(rows):
        return rows
    if not site.complex:
        return rows.real
    imaginary = -rows.imag if cotangents else rows.imag
    pairs = jnp.stack([rows.real, imaginary], -2)
    return pairs.reshape(*rows.shape[:-2], -1, rows.shape[-1])


def live_of(recipe: Recipe, site: Site) -> Callable[[Any, Array], Any]:
    """``(inputs, cotangent) ->`` which rows the loss sees, None without masks."""
    if not (recipe.masked or site.places):
        return lambda inputs, c: None

    def live(inputs: Any, c: Array):
        seen = jnp.any(output_rows(site, inputs, c) != 0, -1)
        # All groups of a convolution see the same positions.
        return (
            jnp.any(seen, 0)
            if isinstance(site.geometry, ConvGeometry) and (site.geometry.groups > 1)
            else seen
        )

    return live
