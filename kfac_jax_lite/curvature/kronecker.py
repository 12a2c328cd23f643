"""K-FAC and EKFAC blocks of every matrix.

Where K-FAC has statistics of a matrix (the exact, the sampled and the empirical
Fisher), ``A`` and ``G`` are the package's own, as ``kfac.tag`` was asked for them
(weight sharing, subsampling, largest factor), averaged over the batches with weight
``N``; scales and shifts have the package's unit-wise blocks. EKFAC keeps the factors'
eigenbases and measures second moments of the rows' gradients in them, in a second pass.

The Hessian and the centred covariance have no such statistics: there a layer's block is
formed and the nearest Kronecker product in Frobenius norm taken. In its eigenbases
EKFAC then keeps the block's diagonal, the nearest matrix that these bases allow. *The
two are different approximations*: the first estimates ``A`` and ``G`` apart, as an
optimiser would, and is not the nearest product.

Entries without a rule have the exact diagonal.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Sec. 3; George et al., 2018,
    arXiv:1806.03884, Sec. 3; Van Loan & Pitsianis, 1993, "Approximation with Kronecker
    products", in Linear Algebra for Large Scale and Real-Time Applications, 293-314.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.linalg import one_by_one
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.curvature import products
from kfac_jax_lite.curvature.blocks import (
    DensePart,
    EigenPart,
    KroneckerPart,
    Part,
)
from kfac_jax_lite.curvature.layout import Layout, units
from kfac_jax_lite.curvature.stream import Stream
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.inverses import Eigenbases, eigenbases
from kfac_jax_lite.kronecker.state import curvature
from kfac_jax_lite.optimizer.transform import scale_by_kfac

# Largest layer, in parameters, of which a dense block is formed.
LARGEST_BLOCK = 4096


def kronecker_parts(stream: Stream, layout: Layout, moments: bool) -> list[Part]:
    """The blocks of ``kronecker``, or of ``ekfac`` with second moments."""
    dense = nearest_parts if stream.law.fisher is None else estimated_parts
    parts = dense(stream, layout, moments)
    alone = [units(layer, index) for layer, index in layout.layers if layer.fallback]
    alone += [rest.reshape(-1, 1) for rest in layout.rest]
    found = stream.moments(alone)
    return parts + [
        DensePart(jnp.asarray(i), m) for i, m in zip(alone, found, strict=True)
    ]


def estimated_parts(stream: Stream, layout: Layout, moments: bool) -> list[Part]:
    """Blocks from the package's statistics."""
    assert stream.law.fisher is not None
    tagged = dataclasses.replace(stream.tagged, fisher=stream.law.fisher)
    stream = dataclasses.replace(stream, tagged=tagged)
    found, bases = statistics(stream, None), {}
    if moments:
        state: Any = scale_by_kfac(tagged.layers, inverse="ekfac").init(stream.params)
        bases = {
            layer.name: eigenbases(layer, found[layer.name])
            for layer in tagged.layers
            if layer.kronecker
        }
        state = state._replace(inverses={**state.inverses, **bases})
        found = statistics(stream, state)
    parts = []
    for layer, index in layout.layers:
        if layer.kronecker:
            basis = bases.get(layer.name)
            parts.append(factored(layer, index, found[layer.name], basis))
        elif layer.unitwise:
            blocks = found[layer.name].blocks
            shape = (-1, *blocks.shape[-2:])
            parts.append(DensePart(jnp.asarray(index), blocks.reshape(shape)))
    return parts


def statistics(stream: Stream, opt_state: Any) -> dict[str, Any]:
    """Statistics of the layers, averaged over the batches."""

    def one(number: int, args: tuple[Any, ...]):
        key, keys = stream.batch_key(number), None
        if stream.law.kernel == "mc":
            numbers = jnp.arange(stream.law.num_samples)
            keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(numbers)
        return products.statistics(stream.tagged, stream.params, args, keys, opt_state)

    found = stream.mean(one, "factors")
    layers = {layer.name: layer for layer in stream.tagged.layers}
    return {name: curvature(layers[name], value) for name, value in found.items()}


def factored(
    layer: LayerTag, index: np.ndarray, found: Any, basis: Eigenbases | None
) -> Part:
    """One layer's block from its statistics."""
    (size_a, size_g), place = layer.sizes, jnp.asarray(index)
    form_a, form_g = forms.forms_of(layer)
    if basis is None:
        a = plain(found.a, form_a, layer.a_shape, size_a)
        g = plain(found.g, form_g, layer.g_shape, size_g)
        return KroneckerPart(place, a, g)
    n = len(index)
    s = found.s.reshape(n, *found.s.shape[-2:])
    q_a = rotation(basis.q_a, form_a, layer.a_shape, n, s.shape[1])
    q_g = rotation(basis.q_g, form_g, layer.g_shape, n, s.shape[2])
    if s.shape[1:] == (size_a, size_g):
        return EigenPart(place, q_a, q_g, s)
    # A last block that is filled up: the basis turns entries that there are not.
    wide = jnp.zeros((n, s.shape[1], s.shape[2]), place.dtype)
    block = EigenPart(wide, q_a, q_g, s).dense()
    block = block.reshape(n, *s.shape[1:], *s.shape[1:])
    block = block[:, :size_a, :size_g, :size_a, :size_g]
    flat = size_a * size_g
    return DensePart(place.reshape(n, flat), block.reshape(n, flat, flat))


def plain(factor: Array, form: forms.Form, shape: Shape, size: int) -> Array:
    """A factor as ``[n, d, d]``, or ``[n, d]`` if it is diagonal."""
    if not form.matrix:
        return factor.reshape(-1, size)
    if form.whole:
        return factor.reshape(-1, size, size)
    return joined(factor.reshape(-1, *shape[-3:]))[:, :size, :size]


def rotation(basis: Any, form: forms.Form, shape: Shape, n: int, width: int) -> Array:
    """An eigenbasis as ``[n, width, width]``."""
    if not form.matrix:
        return jnp.broadcast_to(jnp.eye(width), (n, width, width))
    if form.whole:
        return basis.reshape(n, width, width)
    return joined(basis.reshape(-1, *shape[-3:]))


def joined(blocks: Array) -> Array:
    """``[n, k, s, s]`` as block-diagonal matrices ``[n, k s, k s]``."""
    n, k, s, _ = blocks.shape
    spread = jnp.einsum("nkij,kl->nkilj", blocks, jnp.eye(k, dtype=blocks.dtype))
    return spread.reshape(n, k * s, k * s)


def nearest_parts(stream: Stream, layout: Layout, moments: bool) -> list[Part]:
    """Blocks from the nearest products of the layers' dense blocks."""
    parts = []
    for layer, index in layout.layers:
        if layer.unitwise:
            (block,) = stream.moments([index])
            parts.append(DensePart(jnp.asarray(index), block))
        elif layer.kronecker:
            n, size_a, size_g = index.shape
            if size_a * size_g > LARGEST_BLOCK:
                raise ValueError(
                    f"layer {layer.name}: the nearest Kronecker product of the "
                    f"{stream.law.name} wants its dense block, and {size_a} × {size_g}"
                    f" = {size_a * size_g:,} parameters are more than the "
                    f"{LARGEST_BLOCK:,} that are formed; "
                    "approximation='unit_wise' or 'diagonal' have no such limit."
                )
            flat = index.reshape(n, -1)
            (block,) = stream.moments([flat])
            a, g = nearest_product(block, size_a, size_g)
            part = KroneckerPart(jnp.asarray(index), a, g)
            parts.append(with_moments(part, block) if moments else part)
    return parts


def with_moments(part: KroneckerPart, block: Array) -> EigenPart:
    """The block's diagonal in the eigenbases of its nearest product.

    Args:
        block: ``M [n, in · out, in · out]``.
    """
    _, q_a, q_g = part.eigen()
    q = KroneckerPart(part.place, q_a, q_g).dense()
    s = jnp.einsum("nij,nik,nkj->nj", q, block, q).reshape(part.place.shape)
    return EigenPart(part.place, q_a, q_g, s)


def nearest_product(block: Array, size_a: int, size_g: int) -> tuple[Array, Array]:
    """The symmetric ``A, G`` with the least ``‖M − A ⊗ G‖_F``.

    The leading singular pair of the rearranged ``R[(i,k), (j,l)] = M[(i,j), (k,l)]``,
    among symmetric ``A``: an indefinite ``M`` may be nearer to the product of two skew
    matrices, which have no real eigenvalues. ``tr A ≥ 0``; both have the same norm.

    Args:
        block: ``M [n, in · out, in · out]``, symmetric.

    Returns:
        ``A [n, in, in]`` and ``G [n, out, out]``.

    References:
        Van Loan & Pitsianis, 1993, Secs. 2 and 4.
    """
    m = block.reshape(-1, size_a, size_g, size_a, size_g)
    r = m.transpose(0, 1, 3, 2, 4)
    r = (r + r.transpose(0, 2, 1, 3, 4)) / 2
    r = r.reshape(len(r), size_a**2, size_g**2)

    def decompose(r: Array) -> tuple[Array, ...]:
        return tuple(jnp.linalg.svd(r, full_matrices=False))

    u, s, v = one_by_one(decompose, r, lead=1)
    root = jnp.sqrt(s[:, :1, None])
    a = root * u[:, :, 0].reshape(-1, size_a, size_a)
    g = root * v[:, 0].reshape(-1, size_g, size_g)
    trace = jnp.trace(a, axis1=-2, axis2=-1)[:, None, None]
    sign = jnp.where(trace < 0, -1.0, 1.0).astype(a.dtype)
    a, g = ((x + jnp.swapaxes(x, -1, -2)) / 2 for x in (sign * a, sign * g))
    return a, g
