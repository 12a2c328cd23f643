"""Statistics of embeddings: the rows are one-hot, so they are counted, never built.

Row ``r`` looks up the token ``i_r``, ``ā_r = e_{i_r}``: the input factor
``A = (1/N) Σ_r e eᵀ`` is diagonal, the token counts over ``N``.

Under ``reduce`` the average of one-hot rows has off-diagonal entries; the diagonal is
kept, ``(1/N) Σ_n (count_n / T)²``.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.statistics.dense import counted
from kfac_jax_lite.statistics.estimators import Recipe
from kfac_jax_lite.tagging.sites import EmbeddingGeometry, moved


def token_rows(
    geometry: EmbeddingGeometry, inputs: list[Array], live: Array | None
) -> tuple[Array, Array]:
    """Tokens and weights, ``[*blocks, R]`` each.

    The weight is the product of the scalars that multiply the table; 0 where an index
    is out of range (unless it is clipped) or the row is masked.

    Returns:
        ``(token, weight)``.
    """
    index = lax.transpose(inputs[0], geometry.index_order)
    token = jnp.zeros(index.shape[:-1], jnp.int32)
    valid = jnp.ones(index.shape[:-1], bool)
    for coordinate, size in geometry.coordinates:
        at = index[..., coordinate].astype(jnp.int32)
        valid &= geometry.clip | ((at >= 0) & (at < size))
        token = token * size + jnp.clip(at, 0, size - 1)
    pairs = zip(geometry.scales, inputs[1:], strict=True)
    scale = math.prod((moved(s.steps, v) for s, v in pairs), start=jnp.ones(()))
    weight = jnp.where(valid, scale, 0)
    unit = (*geometry.blocks, *geometry.unit_rows)
    token, weight = token.reshape(unit), jnp.broadcast_to(weight, token.shape)
    shape = (*geometry.blocks, *geometry.rows)
    weight = weight.reshape(unit)
    flat = (*geometry.blocks, math.prod(geometry.rows))
    token, weight = (jnp.broadcast_to(x, shape).reshape(flat) for x in (token, weight))
    return token, weight if live is None else jnp.where(live, weight, 0)


def input_factor(
    geometry: EmbeddingGeometry,
    inputs: list[Array],
    recipe: Recipe,
    live: Array | None,
) -> Array:
    """``A``'s diagonal, ``[*blocks, vocabulary]``."""
    token, weight = token_rows(geometry, inputs, live)
    value = jnp.square(weight.astype(accumulation_dtype(weight.dtype)))
    k = recipe.positions
    if k > 1:  # Σ_t of the example's count of token i_t is that count squared
        pairs = token.reshape(*token.shape[:-1], -1, k)
        same = pairs[..., :, None] == pairs[..., None, :]
        w = weight.reshape(pairs.shape)
        counts = jnp.where(same, w[..., None, :], 0).sum(-1) * w / counted(live, k) ** 2
        value = counts.reshape(token.shape).astype(value.dtype)
    return scattered(token, value[..., None], geometry)[..., 0] / recipe.num_examples


def example_sums(
    geometry: EmbeddingGeometry,
    inputs: list[Array],
    recipe: Recipe,
    live: Array | None,
) -> Array:
    """``Σ_t e_{i_nt}``: token counts of each example, ``[*blocks, N, vocabulary]``."""
    token, weight = token_rows(geometry, inputs, live)
    shape = (*token.shape[:-1], recipe.num_examples, -1)
    token, weight = token.reshape(shape), weight.reshape(shape)
    weight = weight.astype(accumulation_dtype(weight.dtype))
    return scattered(token, weight[..., None], geometry)[..., 0]


def example_gradients(
    geometry: EmbeddingGeometry, found: tuple[Array, Array, Array], examples: int
) -> Array:
    """The table's gradient of every example, ``[*blocks, N, vocabulary, out]``.

    Args:
        found: Tokens and weights ``[*blocks, R]``, cotangents ``[*blocks, R, out]``.
    """
    token, weight, c = found
    value = weight.astype(accumulation_dtype(c.dtype))[..., None] * c
    value = value.reshape(*value.shape[:-2], examples, -1, value.shape[-1])
    return scattered(token.reshape(value.shape[:-1]), value, geometry)


def eigenbasis_moment(
    geometry: EmbeddingGeometry, found: tuple[Array, Array], c: Array, recipe: Recipe
) -> Array:
    """``S = N Σ_r e_{i_r} ⊗ (Q_Gᵀ c)²`` of turned rows ``c`` and ``token_rows``."""
    token, weight = found
    value = jnp.square(weight.astype(c.dtype))[..., None] * c
    return recipe.num_examples * scattered(token, value, geometry)


def scattered(token: Array, value: Array, geometry: EmbeddingGeometry) -> Array:
    """Adds rows ``[…, R, d]`` up by token: ``[…, vocabulary, d]``."""

    def add(token: Array, value: Array):
        zeros = jnp.zeros((geometry.n_in, value.shape[-1]), value.dtype)
        return zeros.at[token].add(value)

    for _ in token.shape[:-1]:
        add = jax.vmap(add)
    return add(token, value)


def output_rows(geometry: EmbeddingGeometry, c: Array) -> Array:
    """The cotangent as ``[*blocks, R, out]``."""
    c = lax.transpose(c, geometry.output_order)
    return c.reshape(*geometry.blocks, math.prod(geometry.rows), geometry.n_out)
