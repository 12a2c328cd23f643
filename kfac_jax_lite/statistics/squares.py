"""Squared gradients of single examples, summed: the empirical Fisher's exact diagonal.

``h = (1/N) Σ_n g_n²`` with ``g_n`` the gradient of example ``n``'s own loss. A layer
with one row per example has ``g_n = ā_n c_nᵀ``, so that one product of squares will do,
``Σ_n g_n² = (ā²)ᵀ (c²)``. With several rows (positions of a convolution, tokens of a
sequence) ``g_n = Σ_p ā_np c_npᵀ`` is formed, a few examples at a time.

References:
    Goodfellow, 2015, arXiv:1510.01799 (squares from inputs and cotangents); Osawa et
    al., 2019, arXiv:1906.02506, App. D.
"""

import jax.numpy as jnp

from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.statistics.conv import by_chunks


def example_gradients(x: Array, c: Array, examples: int) -> Array:
    """``Σ_p x_np c_npᵀ [*blocks, N, in, out]``; rows of an example are side by side."""
    return products(split(x, examples), split(c, examples))


def products(x: Array, c: Array) -> Array:
    """The same of rows ``[*blocks, N, P, d]`` by example."""
    dtype = accumulation_dtype(c.dtype)
    return jnp.einsum("...npi,...npo->...nio", x, c, preferred_element_type=dtype)


def split(rows: Array, examples: int) -> Array:
    """Rows ``[*blocks, R, d]`` by example, ``[*blocks, N, P, d]``."""
    return rows.reshape(*rows.shape[:-2], examples, -1, rows.shape[-1])


def square_sums(x: Array, c: Array, examples: int) -> Array:
    """``Σ_n (Σ_p x_np c_npᵀ)² [*blocks, in, out]``, see ``example_gradients``."""
    dtype = accumulation_dtype(c.dtype)
    if x.shape[-2] == examples:
        x, c = (jnp.square(v.astype(dtype)) for v in (x, c))
        return jnp.einsum("...ni,...no->...io", x, c)

    def part(chunk: tuple[Array, ...]):
        x, c = (jnp.moveaxis(v, 0, -3) for v in chunk)
        return jnp.square(products(x, c)).sum(-3)

    chunks = tuple(jnp.moveaxis(split(v, examples), -3, 0) for v in (x, c))
    elements = examples * x.shape[-1] * c.shape[-1]
    return by_chunks(part, chunks, elements)


def token_square_sums(
    token: Array, weight: Array, c: Array, examples: int
) -> tuple[Array, Array]:
    """What each row of an embedding adds to the squares of its token's entries.

    A token that occurs several times in an example has the sum of its rows' cotangents
    for a gradient: with ``y_p = Σ_q [i_q = i_p] w_q c_q`` its square is the sum of
    ``w_p c_p y_p [*blocks, R, out]`` over the rows ``p`` where it occurs.
    """
    value = weight.astype(accumulation_dtype(c.dtype))[..., None] * c
    if value.shape[-2] == examples:
        return token, jnp.square(value)
    shape, value = value.shape, split(value, examples)
    groups = token.reshape(*token.shape[:-1], examples, -1)
    same = groups[..., :, None] == groups[..., None, :]
    sums = jnp.einsum("...npq,...nqo->...npo", same.astype(value.dtype), value)
    return token, (value * sums).reshape(shape)
