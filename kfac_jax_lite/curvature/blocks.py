"""Matrices that are kept: disjoint diagonal blocks, and their closed forms.

Each part holds ``n`` blocks of one size, at positions ``place [n, …]`` of the ravelled
parameters. A vector of a block is shaped like ``place[i]``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.linalg import eigh
from kfac_jax_lite.core.types import Array


class DensePart(NamedTuple):
    """Blocks ``M [n, k, k]`` at ``place [n, k]``."""

    place: Array
    matrix: Array

    def apply(self, x: Array) -> Array:
        """``M x``."""
        return jnp.einsum("nij,nj->ni", self.matrix, x.astype(self.matrix.dtype))

    def dense(self) -> Array:
        """``[n, k, k]``."""
        return self.matrix

    def diagonal(self) -> Array:
        """``[n, k]``."""
        return jnp.diagonal(self.matrix, axis1=-2, axis2=-1)

    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues ``[n, k]`` and vectors ``[n, k, k]``, in columns."""
        if self.matrix.shape[-1] == 1:
            return self.matrix[..., 0], jnp.ones_like(self.matrix)
        return eigh(self.matrix)

    def vector(self, eigen: tuple[Any, ...], block: Any, number: Any) -> Array:
        """One eigenvector, shaped like a block."""
        return eigen[1][block, :, number]


class KroneckerPart(NamedTuple):
    """Blocks ``A ⊗ G`` at ``place [n, in, out]``.

    ``A`` is ``[n, in, in]``, or ``[n, in]`` where it is diagonal; ``G`` likewise.
    """

    place: Array
    a: Array
    g: Array

    def apply(self, x: Array) -> Array:
        """``A X G``."""
        x = x.astype(self.a.dtype)
        left = self.a[..., None] * x if self.a.ndim == 2 else self.a @ x
        return left * self.g[:, None] if self.g.ndim == 2 else left @ self.g

    def dense(self) -> Array:
        """``[n, in · out, in · out]``."""
        a, g = full(self.a), full(self.g)
        size = a.shape[-1] * g.shape[-1]
        return jnp.einsum("nik,njl->nijkl", a, g).reshape(-1, size, size)

    def diagonal(self) -> Array:
        """``[n, in, out]``."""
        return diagonal_of(self.a)[:, :, None] * diagonal_of(self.g)[:, None]

    def eigen(self) -> tuple[Array, Array, Array]:
        """Eigenvalues ``[n, in · out]`` and the factors' bases."""
        (d_a, q_a), (d_g, q_g) = (eigh(full(x)) for x in (self.a, self.g))
        values = d_a[:, :, None] * d_g[:, None]
        return values.reshape(len(values), -1), q_a, q_g

    def vector(self, eigen: tuple[Any, ...], block: Any, number: Any) -> Array:
        """One eigenvector, shaped like a block."""
        return product_vector(eigen[1], eigen[2], block, number)


class EigenPart(NamedTuple):
    """Blocks ``(Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ`` at ``place [n, in, out]``.

    The bases are orthogonal, ``[n, in, in]`` and ``[n, out, out]``; ``s [n, in, out]``.
    """

    place: Array
    q_a: Array
    q_g: Array
    s: Array

    def apply(self, x: Array) -> Array:
        """``Q_A (s ∘ (Q_Aᵀ X Q_G)) Q_Gᵀ``."""
        x = x.astype(self.s.dtype)
        turned = jnp.swapaxes(self.q_a, -1, -2) @ x @ self.q_g
        return self.q_a @ (self.s * turned) @ jnp.swapaxes(self.q_g, -1, -2)

    def dense(self) -> Array:
        """``[n, in · out, in · out]``."""
        size = self.s.shape[1] * self.s.shape[2]
        q = KroneckerPart(self.place, self.q_a, self.q_g).dense()
        return jnp.einsum("nij,nj,nkj->nik", q, self.s.reshape(-1, size), q)

    def diagonal(self) -> Array:
        """``[n, in, out]``."""
        squares = jnp.square(self.q_a), jnp.square(self.q_g)
        return squares[0] @ self.s @ jnp.swapaxes(squares[1], -1, -2)

    def eigen(self) -> tuple[Array, Array, Array]:
        """Eigenvalues ``[n, in · out]`` and the bases."""
        return self.s.reshape(len(self.s), -1), self.q_a, self.q_g

    def vector(self, eigen: tuple[Any, ...], block: Any, number: Any) -> Array:
        """One eigenvector, shaped like a block."""
        return product_vector(eigen[1], eigen[2], block, number)


Part = DensePart | KroneckerPart | EigenPart


def full(factor: Array) -> Array:
    """A factor as matrices ``[n, d, d]``."""
    if factor.ndim == 3:
        return factor
    return factor[..., None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)


def diagonal_of(factor: Array) -> Array:
    """The diagonal of a factor, ``[n, d]``."""
    return factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=-2, axis2=-1)


def product_vector(q_a: Array, q_g: Array, block: Any, number: Any) -> Array:
    """Column ``number`` of ``Q_A ⊗ Q_G``, as ``[in, out]``."""
    i, j = number // q_g.shape[-1], number % q_g.shape[-1]
    return q_a[block, :, i, None] * q_g[block, None, :, j]


@jax.jit
def apply(parts: Sequence[Part], x: Array) -> Array:
    """``M x`` for ``x [P]``; entries in no part give zero."""
    y = jnp.zeros_like(x)
    for part in parts:
        y = y.at[part.place].set(part.apply(x[part.place]).astype(x.dtype))
    return y


def diagonal(parts: Sequence[Part], size: int, dtype: Any) -> Array:
    """The diagonal, ``[P]``."""
    y = jnp.zeros(size, dtype)
    for part in parts:
        y = y.at[part.place].set(part.diagonal().astype(dtype))
    return y


def dense(parts: Sequence[Part], size: int, dtype: Any) -> Array:
    """The matrix, ``[P, P]``."""
    y = jnp.zeros((size, size), dtype)
    for part in parts:
        index = part.place.reshape(len(part.place), -1)
        block = part.dense().astype(dtype)
        y = y.at[index[:, :, None], index[:, None, :]].set(block)
    return y


def eigenvalues(parts: Sequence[Part]) -> np.ndarray:
    """All eigenvalues of the blocks, descending, in float64."""
    found = [np.asarray(part.eigen()[0], np.float64).ravel() for part in parts]
    return np.sort(np.concatenate(found))[::-1]


def eigenpairs(
    parts: Sequence[Part], size: int, k: int, which: str = "largest"
) -> tuple[np.ndarray, Array]:
    """``k`` extreme eigenvalues and their vectors.

    Returns:
        Values ``[k]`` float64, descending (by ``|λ|`` for ``"magnitude"``), and vectors
        ``[k, P]``.
    """
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(
            f"which is {which!r}, wanted 'largest', 'smallest' or 'magnitude'."
        )
    eigens = [part.eigen() for part in parts]
    values = [np.asarray(e[0], np.float64).ravel() for e in eigens]
    cuts = np.cumsum([0, *map(len, values)])
    values = np.concatenate(values)
    size_of = np.abs(values) if which == "magnitude" else values
    order = np.argsort(-size_of, kind="stable")
    order = order[-k:] if which == "smallest" else order[:k]
    vectors = []
    for at in order:
        p = int(np.searchsorted(cuts, at, side="right")) - 1
        block, number = divmod(int(at - cuts[p]), eigens[p][0].shape[1])
        vector = parts[p].vector(eigens[p], block, number)
        place = parts[p].place[block]
        vectors.append(jnp.zeros(size, vector.dtype).at[place].set(vector))
    return values[order], jnp.stack(vectors)
