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
from kfac_jax_lite.core.types import (
    Array,
    DiagonalStatistics,
    GradientRows,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
    Statistics,
    accumulation_dtype,
)
from kfac_jax_lite.kronecker.factors import widened, widths
from kfac_jax_lite.kronecker.inverses import FactorInverses


class KroneckerBlock:
    """A layer whose block of the curvature is ``A ⊗ G``.

    It knows how the entries are laid out, what is kept and how that is solved with.
    """

    def gather(self, layer: LayerTag, parts: list[Array]) -> Array:
        """Views of parameter-shaped leaves as the block ``[*blocks, in(+1), out]``."""
        del layer
        return jnp.concatenate(parts, -2)

    def scatter(self, layer: LayerTag, block: Array) -> list[Array]:
        """Adjoint of ``gather``."""
        if len(layer.views) == 1:
            return [block]
        return [block[..., :-1, :], block[..., -1:, :]]

    def zeros(self, layer: LayerTag, dtype: Any, moments: bool) -> Statistics:
        """Averages before the first refresh; ``moments`` adds EKFAC's ``s``."""
        shape = (*layer.stack, *layer.blocks, *widths(layer))
        s = jnp.zeros(shape, dtype) if moments else None
        a, g = jnp.zeros(layer.a_shape, dtype), jnp.zeros(layer.g_shape, dtype)
        return KroneckerStatistics(a, g, s)

    def solve(
        self, layer: LayerTag, v: Array, factors: Any, inverse: Any, damping: Array
    ) -> Array:
        """``(F + λ I)⁻¹ v`` with a layer's damped curvature."""
        (n_in, n_out), (rows, columns) = v.shape[-2:], widths(layer)
        v = jnp.swapaxes(widened(v, columns), -1, -2)
        v = jnp.swapaxes(widened(v, rows), -1, -2)
        u = inverse.solve(layer, v, getattr(factors, "s", None), damping)
        return u[..., :n_in, :n_out]


class UnitBlocks(KroneckerBlock):
    """Scales and shifts: a block ``[units, k]`` for every unit."""

    def gather(self, layer: LayerTag, parts: list[Array]) -> Array:
        # Scalars and parameters with further unit axes are units like any other.
        return jnp.stack([x.reshape(layer.a_shape[:-2]) for x in parts], -1)

    def scatter(self, layer: LayerTag, block: Array) -> list[Array]:
        return [
            block[..., i].reshape(*view.stack, *view.core)
            for i, view in enumerate(layer.views)
        ]

    def zeros(self, layer: LayerTag, dtype: Any, moments: bool) -> Statistics:
        del moments
        return ScaleShiftStatistics(jnp.zeros(layer.a_shape, dtype))

    def solve(
        self, layer: LayerTag, v: Array, factors: Any, inverse: Any, damping: Array
    ) -> Array:
        del layer, inverse
        return solve_units(factors.blocks, v, damping)


class DiagonalBlock(KroneckerBlock):
    """A parameter that no rule recognises: one entry at a time."""

    def gather(self, layer: LayerTag, parts: list[Array]) -> Array:
        del layer
        return parts[0]

    def zeros(self, layer: LayerTag, dtype: Any, moments: bool) -> Statistics:
        del moments
        gradient = jnp.zeros(layer.a_shape, dtype)
        return DiagonalStatistics(gradient, jnp.zeros((), jnp.float32))

    def solve(
        self, layer: LayerTag, v: Array, factors: Any, inverse: Any, damping: Array
    ) -> Array:
        del layer, inverse
        return v / (factors.gradient + damping.astype(v.dtype))


KRONECKER = KroneckerBlock()
BLOCKS = {"scale_shift": UnitBlocks(), "diagonal": DiagonalBlock()}


def block_of(layer: LayerTag) -> KroneckerBlock:
    """How a layer's block is laid out and solved with, by its kind."""
    return BLOCKS.get(layer.kind, KRONECKER)


def gather(layer: LayerTag, leaves: dict[str, Array]) -> Array:
    """A layer's entries of a parameter-shaped tree, given by path, as its block.

    Returns:
        ``V [*blocks, in(+1), out]``, ``[units, k]``, or the leaf.
    """
    pairs = zip(layer.views, layer.params, strict=True)
    parts = [view.read(leaves[path]) for view, path in pairs]
    return block_of(layer).gather(layer, parts)


def scatter(layer: LayerTag, block: Array, leaves: dict[str, Any]) -> dict[str, Array]:
    """Adjoint of ``gather``: the block as parameter-shaped arrays, by path."""
    parts = block_of(layer).scatter(layer, block)
    triples = zip(layer.views, layer.params, parts, strict=True)
    return {path: view.write(part, leaves[path]) for view, path, part in triples}


def zero_statistics(layer: LayerTag, dtype: Any, moments: bool = False) -> Statistics:
    """Zeros in the shape of a layer's curvature; ``moments`` adds EKFAC's ``s``."""
    return block_of(layer).zeros(layer, accumulation_dtype(dtype), moments)


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
    layer: LayerTag, v: Array, factors: Any, inverse: Any, damping: Array
) -> Array:
    """``(F + λ I)⁻¹ v`` with a layer's damped curvature.

    Args:
        v: Its block of the gradient, as ``gather`` returns it ``[*blocks, …]``.
    """
    return block_of(layer).solve(layer, v, factors, inverse, damping)


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
