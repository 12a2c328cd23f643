"""A matrix over a data set: batches one after the other, sums kept outside.

Every batch goes through the same compiled program (one per shape of batch); the sums
and the number of rows are added up as they come.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature import products
from kfac_jax_lite.curvature.flat import split
from kfac_jax_lite.curvature.laws import Law
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

# Entries of the vectors that travel together, where their number is not given.
AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Stream:
    """A matrix that is known by its products.

    Attributes:
        tagged: The tagged loss.
        law: Which matrix.
        params: The point.
        batches: Tuples of the loss's other arguments.
        key: PRNG key of sampled labels, or None.
        progress: Whether to show a bar over the batches.
        chunk: How many vectors, or backward passes, are computed together.
        keys: Those of the batches, or None for each.
    """

    tagged: TaggedLoss
    law: Law
    params: Any
    batches: Any
    key: Any
    progress: bool
    chunk: int | None
    keys: tuple[Any, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Makes the keys now, not at every product."""
        numbers = range(len(self.batches))
        keys = (
            None if self.key is None else jax.random.fold_in(self.key, number)
            for number in numbers
        )
        object.__setattr__(self, "keys", tuple(keys))

    @property
    def size(self) -> int:
        """``P``."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def total(
        self, function: Callable[[int, tuple[Any, ...]], Any], what: str
    ) -> tuple[Any, Any]:
        """``Σ function(number, batch)`` over the batches; a pair of sum and ``N``."""
        total = None
        for number, args in enumerate(self.shown(what)):
            found = function(number, tuple(args))
            total = found if total is None else add(total, found)
        assert total is not None  # refused when the operator was made
        return total

    def mean(self, function: Callable[[int, tuple[Any, ...]], Any], what: str) -> Any:
        """The sum over ``N``."""
        total, n = self.total(function, what)
        return jax.tree.map(lambda x: x / jnp.asarray(n, x.dtype), total)

    def shown(self, what: str) -> Iterable[tuple[Any, ...]]:
        """The batches, behind a bar if one is wanted."""
        if not self.progress:
            return self.batches
        from rich.progress import track  # only where it is asked for

        count = len(self.batches)
        return track(self.batches, f"{self.law.name}: {what}", count, transient=True)

    def batch_key(self, number: int) -> Any:
        """The key of one batch: the same for every product."""
        return self.keys[number]

    def batch_of(self, number: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What every program on a batch is given first."""
        return self.tagged, self.law, self.params, args, self.batch_key(number)

    def centre(self) -> Array | None:
        """``ḡ``, ravelled, where the matrix is centred."""
        if not self.law.centred:
            return None

        def one(number: int, args: tuple[Any, ...]):
            del number
            return products.gradient(self.tagged, self.params, args)

        return ravel(self.mean(one, "mean gradient"))

    def num_examples(self) -> Any:
        """``N`` over all batches."""
        counts = [products.count(self.tagged, self.params, b) for b in self.batches]
        return sum(counts)

    def mv(self, v: Any) -> Any:
        """``M v``, but for ``ḡ ḡᵀ v``."""

        def one(number: int, args: tuple[Any, ...]):
            return products.product(*self.batch_of(number, args), v)

        return self.mean(one, "product")

    def mm(self, vs: Any, chunk: int | None) -> Any:
        """``M v_i`` along a leading axis, but for ``ḡ ḡᵀ v_i``."""

        def one(number: int, args: tuple[Any, ...]):
            return products.products(*self.batch_of(number, args), vs, chunk=chunk)

        return self.mean(one, "products")

    def block_mv(self, v: Any, owners: Any, blocks: int) -> Any:
        """The same with the diagonal blocks only."""

        def one(number: int, args: tuple[Any, ...]):
            own = self.batch_of(number, args)
            return products.block_product(*own, v, owners, jnp.arange(blocks))

        return self.mean(one, "block products")

    @property
    def at_once(self) -> int:
        """How many vectors of ``P`` entries travel together."""
        return self.chunk or max(1, min(64, AT_ONCE // max(self.size, 1)))

    def moments(self, indices: Sequence[np.ndarray]) -> list[Array]:
        """Diagonal blocks ``[n, k, k]`` at positions ``[n, k]`` of the whole matrix.

        Of a matrix that has row roots they come from all of its rows, of the Hessian
        from products with the unit vectors of all positions.
        """
        if not indices:
            return []
        chunk = self.at_once
        if not self.law.rooted:
            return [self.columns(index, chunk) for index in indices]

        def one(number: int, args: tuple[Any, ...]):
            own = self.batch_of(number, args)
            arrays = [jnp.asarray(i) for i in indices]
            return products.row_moments(*own, arrays, chunk=chunk)

        found, centre = self.mean(one, "rows"), self.centre()
        if centre is None:
            return found
        parts = [centre[index] for index in indices]
        pairs = zip(found, parts, strict=True)
        return [m - jnp.einsum("nk,nl->nkl", g, g).astype(m.dtype) for m, g in pairs]

    def columns(self, index: np.ndarray, chunk: int) -> Array:
        """The blocks from products with unit vectors, ``chunk`` at once."""
        blocks, k = index.shape

        def product(units: Any):
            return self.mm(units, None)

        images = unit_images(product, self.params, index.ravel(), chunk)
        rows = [
            image[np.arange(chunk)[:, None], index[np.minimum(q, index.size - 1) // k]]
            for q, image in images
        ]
        return jnp.concatenate(rows)[: index.size].reshape(blocks, k, k)


@jax.jit
def add(left: Any, right: Any) -> Any:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, left, right)


def ravel(tree: Any) -> Array:
    """A tree as one vector."""
    return jax.flatten_util.ravel_pytree(tree)[0]


def unraveller(params: Any) -> tuple[jax.ShapeDtypeStruct, Callable[[Array], Any]]:
    """The ravelled parameters' shape, and ``[k, P] -> tree`` with a leading axis."""
    leaves, structure = jax.tree.flatten(params)
    dtype = jnp.result_type(*[leaf.dtype for leaf in leaves])
    shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)

    def unravel(vectors: Array):
        return jax.tree.unflatten(structure, split(vectors, shapes))

    return jax.ShapeDtypeStruct((size,), dtype), unravel


def unit_images(
    product: Callable[[Any], Any], params: Any, positions: np.ndarray, chunk: int
) -> Iterator[tuple[np.ndarray, Array]]:
    """Products with unit vectors, ``chunk`` of them at once.

    Args:
        positions: Of the ones in the ravelled parameters, ``[n]``.

    Yields:
        Numbers ``[chunk]`` of the positions, beyond ``n`` where it is filled up, and
        the images ``[chunk, P]``.
    """
    flat, unravel = unraveller(params)
    for start in range(0, len(positions), chunk):
        q = np.arange(start, start + chunk)
        at = positions[np.minimum(q, len(positions) - 1)]
        unit = jnp.zeros((chunk, flat.size), flat.dtype)
        image = product(unravel(unit.at[np.arange(chunk), at].set(1)))
        yield q, jax.vmap(ravel)(image)
