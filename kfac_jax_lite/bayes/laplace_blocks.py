"""The blocks of a curvature in their eigenbases, where damping is exact.

``M = Q diag(λ) Qᵀ`` with ``Q = Q_A ⊗ Q_G`` gives ``(a M + p I)^(-1/2) = Q diag((a λ +
p)^(-1/2)) Qᵀ`` for every ``a`` and ``p``: another prior needs no factorisation.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.linalg import eigh
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature.blocks import DensePart, EigenPart, Part


class Eigenblocks(NamedTuple):
    """Blocks ``(Q_A ⊗ Q_G) diag(λ) (Q_A ⊗ Q_G)ᵀ`` of one size.

    Attributes:
        place: Positions in the ravelled uncertain leaves, ``[n, in, out]``.
        values: ``λ [n, in, out]``, not negative.
        q_a: ``[n, in, in]``, eigenvectors in columns; None: the identity.
        q_g: ``[n, out, out]``; None: the identity.
        group: Number of the layer that each block is in, ``[n]``.
    """

    place: Array
    values: Array
    q_a: Array | None
    q_g: Array | None
    group: Array

    def turn(self, x: Array) -> Array:
        """``Q_A X Q_Gᵀ``: from the eigenbasis, ``[*k, n, in, out]``."""
        x = x if self.q_a is None else self.q_a @ x
        return x if self.q_g is None else x @ jnp.swapaxes(self.q_g, -1, -2)

    def back(self, x: Array) -> Array:
        """``Q_Aᵀ X Q_G``: into the eigenbasis, ``[*k, n, in, out]``."""
        x = x if self.q_a is None else jnp.swapaxes(self.q_a, -1, -2) @ x
        return x if self.q_g is None else x @ self.q_g

    def deviations(self, scale: Any, precision: Array) -> Array:
        """``(a λ + p)^(-1/2)``, with ``p`` of every layer, ``[n, in, out]``."""
        added = precision[self.group][:, None, None].astype(self.values.dtype)
        return jax.lax.rsqrt(scale * self.values + added)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Which leaves of the parameters hold uncertain entries; hashable.

    Attributes:
        numbers: Their numbers among all leaves.
        paths: ``keystr`` of each.
        shapes: Shape of each.
        count: How many leaves the parameters have.
    """

    numbers: tuple[int, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    count: int

    @property
    def size(self) -> int:
        """Entries of all of them."""
        return sum(map(math.prod, self.shapes))

    def of(self, params: Any) -> list[Array]:
        """These leaves of parameters of the posterior's shapes."""
        leaves = jax.tree.leaves(params)
        if len(leaves) != self.count:
            raise ValueError(
                f"the posterior is of parameters of {self.count} leaves, got "
                f"{len(leaves)}."
            )
        found = [leaves[number] for number in self.numbers]
        for leaf, path, shape in zip(found, self.paths, self.shapes, strict=True):
            if tuple(jnp.shape(leaf)) != shape:
                raise ValueError(
                    f"params{path} has shape {jnp.shape(leaf)}, wanted {shape}, that "
                    "of the posterior."
                )
        return found

    def replaced(self, params: Any, values: Sequence[Array]) -> Any:
        """The parameters with other values of these leaves."""
        leaves, structure = jax.tree.flatten(params)
        for number, value in zip(self.numbers, values, strict=True):
            leaves[number] = value
        return jax.tree.unflatten(structure, leaves)

    def moved(self, params: Any, offset: Array) -> Any:
        """The parameters plus an offset of the ravelled leaves, in their dtypes."""
        cuts = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = jnp.split(offset, cuts)
        moved = [
            (leaf + part.reshape(leaf.shape)).astype(leaf.dtype)
            for leaf, part in zip(self.of(params), parts, strict=True)
        ]
        return self.replaced(params, moved)


def uncertain_leaves(params: Any, covered: np.ndarray) -> tuple[Leaves, np.ndarray]:
    """The leaves that hold covered entries, and where every entry goes.

    Args:
        covered: Which entries of the ravelled parameters are uncertain, bool ``[P]``.

    Returns:
        The leaves, and the position ``[P]`` of every entry of the ravelled parameters
        among the ravelled leaves that are kept (-1: in none).
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    moved, numbers, start, kept = np.full(len(covered), -1), [], 0, 0
    for number, (_, leaf) in enumerate(flat):
        stop = start + leaf.size
        if covered[start:stop].any():
            moved[start:stop] = np.arange(kept, kept + leaf.size)
            numbers.append(number)
            kept += leaf.size
        start = stop
    paths = tuple(jax.tree_util.keystr(flat[i][0]) for i in numbers)
    shapes = tuple(tuple(flat[i][1].shape) for i in numbers)
    return Leaves(tuple(numbers), paths, shapes, len(flat)), moved


def eigenblocks(part: Part, moved: np.ndarray, group: np.ndarray) -> Eigenblocks:
    """A part of a curvature in its eigenbasis.

    Args:
        moved: Where every entry goes, ``[P]``.
        group: Number of the layer of every block, ``[n]``.
    """
    at, q_g = np.asarray(part.place), None
    if isinstance(part, DensePart):
        at = at[..., None]
        values, q_a = part.eigen()
        q_a = None if at.shape[1] == 1 else q_a
    elif isinstance(part, EigenPart):
        values, q_a, q_g = part.eigen()
    else:
        (d_a, q_a), (d_g, q_g) = side(part.a), side(part.g)
        values = d_a[:, :, None] * d_g[:, None]
    values = jnp.maximum(values.reshape(at.shape), 0)
    return Eigenblocks(
        jnp.asarray(moved[at]), values, q_a, q_g, jnp.asarray(group, jnp.int32)
    )


def side(factor: Array) -> tuple[Array, Array | None]:
    """Eigenvalues ``[n, d]`` and basis of a factor; None where it is diagonal."""
    return (factor, None) if factor.ndim == 2 else eigh(factor)


def blocks_within(part: Part, covered: np.ndarray) -> Part | None:
    """The blocks of a part that lie in the covered entries; None: there are none."""
    place = np.asarray(part.place)
    inside = covered[place.reshape(len(place), -1)].all(1)
    if not inside.any():
        return None
    return jax.tree.map(lambda x: x[inside], part)
