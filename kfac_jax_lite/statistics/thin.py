"""Gradients of layers that are wider than their batch, kept as rows.

The gradient of a dense layer is a product, ``V = Σ_r ā_r c_rᵀ = Xᵀ C``. With fewer
rows than units ``A⁻¹ V G⁻¹ = (X A⁻¹)ᵀ (C G⁻¹)`` takes ``2 R (a² + g² + a g)``
operations instead of ``2 a g (a + g)``. The rows exist anyway: ``X`` is the layer's
input and ``C`` the cotangent of its output.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.types import Array, GradientRows, LayerTag
from kfac_jax_lite.kronecker.factors import forms_of
from kfac_jax_lite.statistics import dense
from kfac_jax_lite.tagging.interpreter import in_line
from kfac_jax_lite.tagging.sites import DenseGeometry, Site
from kfac_jax_lite.tagging.trace import Trace

# What must be gained: rows have to be copied for the ones of a bias.
GAIN = 0.9


def few(rows: int, n_in: int, n_out: int) -> bool:
    """Whether the order by rows is clearly the cheaper one."""
    by_rows = rows * (n_in**2 + n_out**2 + n_in * n_out)
    return by_rows < GAIN * n_in * n_out * (n_in + n_out)


def thin_layers(found: Trace) -> dict[str, tuple[Site, jax.ShapeDtypeStruct]]:
    """The layers with few rows.

    Their gradient must be the product of these rows and nothing else: no other use of
    their parameters, no scaled weight, no loop.
    """
    outputs = {id(s): x for s, x in in_line(found.plan, found.closed.jaxpr)}
    thin = {}
    for layer in found.layers:
        sites = found.sites.get(layer.name, [])
        if len(sites) == 1 and id(sites[0]) in outputs and is_thin(layer, sites[0]):
            thin[layer.name] = sites[0], outputs[id(sites[0])]
    return thin


def is_thin(layer: LayerTag, site: Site) -> bool:
    """Whether a layer's gradient is the product of a site's rows, and these are few."""
    geometry = site.geometry
    if layer.kind != "dense" or not isinstance(geometry, DenseGeometry):
        return False
    plain = not (layer.note or layer.stack or layer.blocks or geometry.scales)
    once = site.repeat == 1 and not (site.branch or site.by_hand or site.reverse)
    once = once and not (site.complex or site.spread)
    full = all(form.whole for form in forms_of(layer))
    rows = math.prod(geometry.rows)
    return plain and once and full and few(rows, *layer.sizes)


def gradient_rows(
    layer: LayerTag, site: Site, inputs: list[Any], cotangent: Array, leaves: list[Any]
) -> GradientRows:
    """The rows of a layer's gradient."""
    geometry: Any = site.geometry
    x = dense.input_rows(geometry, inputs)
    if layer.bias:
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], -1)
    own = tuple(leaves[view.leaf] for view in layer.views)
    return GradientRows(x, dense.output_rows(geometry, inputs, cotangent), own)
