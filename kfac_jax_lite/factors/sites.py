"""Which estimators a site is tapped with: one for every probe that the site feeds."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite import forms
from kfac_jax_lite.factors import conv, dense, embedding, scale_shift
from kfac_jax_lite.factors.recipe import Recipe, unit_blocks
from kfac_jax_lite.tagging.layers import (
    ConvGeometry,
    EmbeddingGeometry,
    ScaleShiftGeometry,
    Site,
)
from kfac_jax_lite.tagging.taps import Estimator, Slot, tap
from kfac_jax_lite.types import Array


def tap_site(
    recipes: dict[str, Recipe], site: Site, output: Array, inputs: list, slot: Slot
) -> Array:
    """Taps one site with the estimators of its layer's kind."""
    if not slot.probes:
        return output
    chosen = estimators(recipes[site.layer or ""], site)
    names = tuple(name for name in chosen if name in slot.probes)
    probes = {name: slot.probes[name] for name in names}
    pairs = tuple((name, chosen[name]) for name in names)
    return tap(pairs, output, (inputs, slot.basis), slot.due, probes)


def estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """Functions ``((inputs, basis), cotangent) -> statistic`` by probe."""
    geometry, layer = site.geometry, recipe.layer
    if isinstance(geometry, ScaleShiftGeometry):

        def s_sum(inputs, c):
            return scale_shift.example_gradients(geometry, inputs[0], c, layer.roles)

        def blocks(inputs, c):
            return unit_blocks(s_sum(inputs, c), recipe.num_examples)

        return {"blocks": blocks, "s_sum": s_sum}
    if recipe.by_example:
        return example_estimators(recipe, site)
    a, g, rows, num_rows = "a", "g", "rows", recipe.num_rows
    shape_a, shape_g = layer.site_shapes
    form_a, form_g = (layer.a_form, shape_a), (layer.g_form, shape_g)
    if site.reverse:
        a, g, rows, num_rows = "a_out", "g_out", "rows_out", recipe.rows_out
        form_a, form_g = form_g, form_a
    live = live_of(recipe, site)

    def input_factor(inputs, c):
        if isinstance(geometry, EmbeddingGeometry):
            return embedding.input_factor(geometry, inputs[0], recipe, live(inputs, c))
        if isinstance(geometry, ConvGeometry) and geometry.n_in:
            return conv.conv_input_factor(geometry, inputs[0], recipe, live(inputs, c))
        x = input_rows(recipe, site, inputs, c)
        return dense.input_factor(x, recipe, form_a)

    def output_factor(inputs, c):
        c = summed_rows(recipe, site, inputs, c)
        return dense.output_factor(c, recipe, form_g, num_rows)

    def live_rows(inputs, c):
        return jnp.sum(live(inputs, c), -1)

    def moment(inputs, c):
        return eigenbasis_moment(recipe, site, inputs, c)

    return {a: input_factor, g: output_factor, rows: live_rows, "s": moment}


def example_estimators(recipe: Recipe, site: Site) -> dict[str, Estimator]:
    """Sums over the positions of each example (see ``recipe``)."""
    geometry, live = site.geometry, live_of(recipe, site)

    def x_sum(inputs, c):
        if isinstance(geometry, EmbeddingGeometry):
            return embedding.example_sums(geometry, inputs[0], recipe, live(inputs, c))
        return dense.example_sums(input_rows(recipe, site, inputs, c), recipe)

    def c_sum(inputs, c):
        return dense.example_sums(output_rows(site, inputs, c), recipe)

    def count(inputs, c):
        return dense.example_sums(live(inputs, c)[..., None], recipe)[..., 0]

    return {"x_sum": x_sum, "c_sum": c_sum, "count": count}


def eigenbasis_moment(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """EKFAC's second moments at one site, ``[*blocks, in(+1), out]``."""
    geometry, layer = site.geometry, recipe.layer
    wide_a, wide_g = forms.widths(layer)
    q_a, q_g = inputs[1]
    rows = summed_rows(recipe, site, inputs, c)
    if isinstance(geometry, EmbeddingGeometry):
        rows = forms.turned(rows, q_g, layer.g_form, wide_g)
        live = live_of(recipe, site)(inputs, c)
        k = recipe.positions(geometry.rows)
        if k > 1:
            x = embedding.example_sums(geometry, inputs[0], recipe, live) / k
            return dense.eigenbasis_moment(jnp.square(x), rows, recipe)
        return embedding.eigenbasis_moment(geometry, inputs[0], rows, recipe, live)
    x = input_rows(recipe, site, inputs, c)
    if site.reverse:
        x, rows = rows, x
    x = forms.turned(x, q_a, layer.a_form, wide_a)
    rows = forms.turned(rows, q_g, layer.g_form, wide_g)
    return dense.eigenbasis_moment(x, rows, recipe)


def input_rows(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """Homogeneous rows ``[*blocks, R, in(+1)]`` of a dense layer or convolution."""
    geometry = site.geometry
    if not geometry.n_in:  # type: ignore[union-attr]
        # A bias alone: homogeneous coordinates without the rest.
        rows = (*geometry.blocks, math.prod(geometry.rows), 0)
        x = jnp.zeros(rows, c.dtype)
    elif isinstance(geometry, ConvGeometry):
        x = conv.patches(geometry, conv.channels_last(geometry, inputs[0]))
        x = dense.along(geometry, inputs[0], "in", x)
    else:
        x = dense.input_rows(geometry, inputs[0])  # type: ignore[arg-type]
    return dense.homogeneous(x, recipe, geometry.rows, live_of(recipe, site)(inputs, c))


def output_rows(site: Site, inputs: Any, c: Array) -> Array:
    """Cotangent rows ``[*blocks, R, out]``."""
    geometry = site.geometry
    if isinstance(geometry, ConvGeometry):
        return conv.conv_output_rows(geometry, inputs[0], c)
    if isinstance(geometry, EmbeddingGeometry):
        return embedding.output_rows(geometry, c)
    return dense.output_rows(geometry, inputs[0], c)  # type: ignore[arg-type]


def summed_rows(recipe: Recipe, site: Site, inputs: Any, c: Array) -> Array:
    """Cotangent rows after ``reduce``."""
    return dense.summed(output_rows(site, inputs, c), recipe, site.geometry.rows)


def live_of(recipe: Recipe, site: Site) -> Callable[[Any, Array], Any]:
    """``(inputs, cotangent) ->`` which rows the loss sees, None without masks."""
    if not recipe.masked:
        return lambda inputs, c: None

    def live(inputs, c):
        seen = jnp.any(output_rows(site, inputs, c) != 0, -1)
        # All groups of a convolution see the same positions.
        return (
            jnp.any(seen, 0)
            if isinstance(site.geometry, ConvGeometry) and (site.geometry.groups > 1)
            else seen
        )

    return live
