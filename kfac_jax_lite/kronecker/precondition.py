"""``(F + λ I)⁻¹ v`` for every kind of layer.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Sec. 4.2 (``A⁻¹ V G⁻¹``); George et al.,
    2018, arXiv:1806.03884 (eigenbasis); Osawa et al., 2020, arXiv:2002.06015, Sec. 4.2
    (unit-wise blocks).
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.pytree import leaves_by_path, replace_leaves
from kfac_jax_lite.core.types import Array, GradientRows, LayerTag, Statistics
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import FactorInverses
from kfac_jax_lite.kronecker.low_rank import LowRankInverses, sides, solve


def gather(layer: LayerTag, leaves: dict[str, Array]) -> Array:
    """A layer's entries of a parameter-shaped tree, as its block.

    Returns:
        ``V [*blocks, in(+1), out]``, ``[units, k]``, or the leaf.
    """
    pairs = zip(layer.views, layer.params, strict=True)
    parts = [view.read(leaves[path]) for view, path in pairs]
    if layer.kind == "scale_shift":
        # Scalars and parameters with further unit axes are units like any other.
        return jnp.stack([x.reshape(layer.a_shape[:-2]) for x in parts], -1)
    return jnp.concatenate(parts, -2) if layer.kronecker else parts[0]


def scatter(layer: LayerTag, block: Array, leaves: dict[str, Any]) -> dict[str, Array]:
    """Adjoint of ``gather``: the block as parameter-shaped arrays, by path."""
    if layer.kind == "scale_shift":
        parts = [
            block[..., i].reshape(*view.stack, *view.core)
            for i, view in enumerate(layer.views)
        ]
    elif layer.kronecker and len(layer.views) == 2:
        parts = [block[..., :-1, :], block[..., -1:, :]]
    else:
        parts = [block]
    triples = zip(layer.views, layer.params, parts, strict=True)
    return {path: view.write(part, leaves[path]) for view, path, part in triples}


def assemble(layers: Sequence[LayerTag], blocks: dict[str, Array], tree: Any) -> Any:
    """Blocks of layers as a parameter-shaped tree."""
    leaves, parts = leaves_by_path(tree), {}
    for layer in layers:
        for path, part in scatter(layer, blocks[layer.name], leaves).items():
            parts[path] = parts[path] + part if path in parts else part
    return replace_leaves(
        tree, {path: x.astype(leaves[path].dtype) for path, x in parts.items()}
    )


def precondition(
    layer: LayerTag, v: Array, factors: Statistics, inverse: Any, damping: Array
) -> Array:
    """Solves with a layer's damped curvature.

    Args:
        damping: ``λ``.

    Returns:
        ``(F + λ I)⁻¹ v``, shaped like ``v``.
    """
    if layer.kind == "diagonal":
        return v / (factors.gradient + damping.astype(v.dtype))  # type: ignore
    if layer.kind == "scale_shift":
        return solve_units(factors.blocks, v, damping)  # type: ignore
    return precondition_kronecker(layer, v, factors, inverse, damping)


def precondition_kronecker(
    layer: LayerTag, v: Array, factors: Any, inverse: Any, damping: Array
) -> Array:
    """``A⁻¹ V G⁻¹``, or the same in the eigenbasis with the damping added there."""
    (n_in, n_out), form_a, form_g = v.shape[-2:], layer.a_form, layer.g_form
    rows = forms.width(form_a, layer.a_shape)
    v = forms.widened(v, forms.width(form_g, layer.g_shape))
    v = jnp.swapaxes(forms.widened(jnp.swapaxes(v, -1, -2), rows), -1, -2)
    if isinstance(inverse, FactorInverses):
        # In either order 2 a² g + 2 a g²: what lies between is as large as V, also for
        # blocks and diagonals. Only low-rank factors have something to choose.
        u = forms.times(forms.columns(inverse.a, v, form_a), inverse.g, form_g)
        return u[..., :n_in, :n_out]
    if isinstance(inverse, LowRankInverses):
        return solve_low_rank(layer, v, inverse, damping)[..., :n_in, :n_out]
    q_a, d_a, q_g, d_g = inverse
    s = getattr(factors, "s", None)
    if s is None:
        s = d_a[..., :, None] * d_g[..., None, :]
    turned = forms.times(forms.columns(q_a, v, form_a), q_g, form_g)
    turned = turned / (s + damping.astype(v.dtype))
    back_a, back_g = forms.transposed(q_a, form_a), forms.transposed(q_g, form_g)
    u = forms.times(forms.columns(back_a, turned, form_a), back_g, form_g)
    return u[..., :n_in, :n_out]


def precondition_thin(
    inverse: FactorInverses, rows: GradientRows, accepted: Array
) -> Array:
    """``A⁻¹ V G⁻¹ = (X A⁻ᵀ)ᵀ (C G⁻¹)`` of a gradient with few rows, ``V = Xᵀ C``.

    Args:
        rows: ``X [R, in(+1)]`` and ``C [R, out]``.

    Returns:
        The direction, ``[in(+1), out]``.
    """
    dtype = inverse.a.dtype
    x, c = (jnp.where(accepted, r, 0).astype(dtype) for r in (rows.x, rows.c))
    return (x @ inverse.a.T).T @ (c @ inverse.g)


def rows_of(
    layer: LayerTag, statistics: Any, inverse: Any, leaves: dict[str, Array]
) -> GradientRows | None:
    """The rows of a layer's gradient, if there are few and they are these leaves'."""
    rows = getattr(statistics, "rows", {}).get(layer.name)
    if rows is None or not isinstance(inverse, FactorInverses):
        return None
    own = [leaves[path] for path in layer.params]
    same = len(own) == len(rows.leaves) and all(map(operator.is_, own, rows.leaves))
    return rows if same else None


def solve_low_rank(
    layer: LayerTag, v: Array, inverse: LowRankInverses, damping: Array
) -> Array:
    """``(Â ⊗ Ĝ + λ I)⁻¹ v`` of a block that is as wide as its factors."""
    form_a, form_g = layer.a_form, layer.g_form
    a, g = sides(inverse, form_a, form_g)
    if forms.BLOCKS not in (form_a, form_g):
        return solve(a, g, v, damping)
    # Every block of a factor has its own tail: each pair of blocks is solved alone.
    k_a = layer.a_shape[-3] if form_a == forms.BLOCKS else 1
    k_g = layer.g_shape[-3] if form_g == forms.BLOCKS else 1
    *blocks, rows, columns = v.shape
    pairs = v.reshape(*blocks, k_a, rows // k_a, k_g, columns // k_g)
    u = solve(a, g, jnp.swapaxes(pairs, -3, -2), damping)
    return jnp.swapaxes(u, -3, -2).reshape(v.shape)


def solve_units(blocks: Array, v: Array, damping: Array) -> Array:
    """``(F_u + λ I)⁻¹ v_u`` for 1×1 and 2×2 blocks, in closed form.

    Args:
        blocks: ``[units, k, k]``.
        v: ``[units, k]``.
        damping: ``λ``.

    Returns:
        ``[units, k]``.
    """
    shift = jnp.asarray(damping, blocks.dtype)
    a, d = blocks[..., 0, 0] + shift, blocks[..., -1, -1] + shift
    if blocks.shape[-1] == 1:
        return v / a[..., None]
    b, x, y = blocks[..., 0, 1], v[..., 0], v[..., 1]
    # The undamped determinant of a block of rank one vanishes but for rounding.
    minor = blocks[..., 0, 0] * blocks[..., 1, 1] - b * b
    determinant = jnp.maximum(minor, 0) + shift * (a + d - shift)
    return jnp.stack([d * x - b * y, a * y - b * x], -1) / determinant[..., None]
