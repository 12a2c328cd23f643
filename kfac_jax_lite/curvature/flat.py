"""Products with a symmetric matrix, on flat vectors, driven from the host.

A matrix is known by ``mv``: parameter-shaped pytree -> pytree of the same shape. It may
be any Python function, one that streams batches in a loop included, so nothing here
traces it: every loop over products runs on the host, while the vectors stay on the
device as ``[P]`` or ``[k, P]``, the leaves flattened and joined in the order of
``jax.flatten_util.ravel_pytree``.

The algorithms are this package's own because the peers need more of ``mv``: matfree
0.6 runs its decompositions in ``fori_loop`` and its estimators under ``vmap``, which
wants a traceable product, and ARPACK (scipy) keeps its vectors on the host. LOBPCG is
JAX's own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.types import Array

# Of the counts: products done, products to do (the most there can be).
Progress = Callable[[int, int], None]
# How many vectors travel together where a product takes several.
BLOCK = 8


class Estimate(NamedTuple):
    """A stochastic figure.

    Attributes:
        value: The estimate.
        error: Its standard error (one standard deviation of the mean), shaped like
            ``value``. It is itself estimated from the samples: with few of them take
            intervals from Student's t with one degree of freedom less than samples.
    """

    value: Any
    error: Any


@dataclasses.dataclass(frozen=True)
class Flat:
    """A symmetric matrix ``M [P, P]`` that multiplies flat vectors; see ``flatten``.

    Attributes:
        mv: Product with one parameter-shaped tree.
        mm: Product with trees whose leaves have a leading axis ``k``, or None.
        structure: The tree's structure.
        shapes: Shape and dtype of each leaf.
        dtype: That of the flat vectors.
    """

    mv: Callable[[Any], Any]
    mm: Callable[[Any], Any] | None
    structure: Any
    shapes: tuple[tuple[Shape, Any], ...]
    dtype: Any

    @property
    def size(self) -> int:
        """``P``."""
        return sum(math.prod(shape) for shape, _ in self.shapes)

    @property
    def eps(self) -> float:
        """Rounding unit of the vectors."""
        return float(jnp.finfo(self.dtype).eps)

    def tree(self, vectors: Array) -> Any:
        """``[*k, P]`` as a tree whose leaves have the leading axes ``k``."""
        return jax.tree.unflatten(self.structure, split(vectors, self.shapes))

    def flat(self, tree: Any, lead: int = 0) -> Array:
        """A tree as ``[P]``, or ``[k, P]`` with one leading axis."""
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            raise ValueError(
                f"the product returned the structure {structure}, wanted that of "
                f"`like`: {self.structure}"
            )
        for leaf, (shape, _) in zip(leaves, self.shapes, strict=True):
            if np.shape(leaf)[lead:] != shape:
                raise ValueError(
                    f"the product returned a leaf of shape {np.shape(leaf)[lead:]}, "
                    f"wanted {shape}"
                )
        return join(leaves, lead, self.dtype)

    def product(self, vector: Array) -> Array:
        """``M v`` for ``v [P]``."""
        return self.flat(self.mv(self.tree(vector)))

    def products(self, vectors: Array, tick: Callable[[int], None]) -> Array:
        """``M v_i`` for vectors ``[k, P]``, a block at a time where ``mm`` is given."""
        images = []
        for start in range(0, len(vectors), 1 if self.mm is None else BLOCK):
            if self.mm is None:
                images.append(self.product(vectors[start])[None])
            else:
                block = vectors[start : start + BLOCK]
                images.append(self.flat(self.mm(self.tree(block)), 1))
            tick(len(images[-1]))
        return jnp.concatenate(images)


@functools.partial(jax.jit, static_argnums=1)
def split(vectors: Array, shapes: tuple[tuple[Shape, Any], ...]) -> list[Array]:
    """Flat vectors ``[*k, P]`` as leaves ``[*k, *shape]``."""
    sizes = [math.prod(shape) for shape, _ in shapes]
    parts = jnp.split(vectors, np.cumsum(sizes)[:-1], axis=-1)
    lead = vectors.shape[:-1]
    pairs = zip(parts, shapes, strict=True)
    return [part.reshape(*lead, *shape).astype(dtype) for part, (shape, dtype) in pairs]


@functools.partial(jax.jit, static_argnums=(1, 2))
def join(leaves: list[Any], lead: int, dtype: Any) -> Array:
    """Leaves with ``lead`` leading axes, flattened and joined along the last."""
    rows = [
        jnp.asarray(x).reshape(*np.shape(x)[:lead], -1).astype(dtype) for x in leaves
    ]
    return jnp.concatenate(rows, axis=-1)


def flatten(
    mv: Callable[[Any], Any], like: Any, mm: Callable[[Any], Any] | None = None
) -> Flat:
    """A product with trees as one with flat vectors.

    Args:
        mv: ``v -> M v`` for trees shaped like ``like``; ``M`` symmetric.
        like: Parameter-shaped tree of arrays or ``ShapeDtypeStruct``s, of float32 or
            float64 leaves.
        mm: ``[v_1 … v_k] -> [M v_1 … M v_k]``, with a leading axis on every leaf.

    Returns:
        The product with vectors ``[P]`` of the widest of the leaves' dtypes.

    Raises:
        ValueError: No parameters, or leaves of another dtype.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    shapes = []
    for path, leaf in paths:
        dtype = jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", np.float64))
        if dtype not in (np.dtype("float32"), np.dtype("float64")):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} is {dtype}, wanted float32 or float64")
        shapes.append((tuple(np.shape(leaf)), dtype))
    if not sum(math.prod(shape) for shape, _ in shapes):
        raise ValueError("`like` has no parameters, wanted at least one")
    dtype = jnp.result_type(*[dtype for _, dtype in shapes])
    return Flat(mv, mm, structure, tuple(shapes), dtype)


def counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that counts products and tells ``progress`` after each block.

    With rich, for instance: ``with rich.progress.Progress() as bar: task =
    bar.add_task("products"); trace(…, progress=lambda done, total:
    bar.update(task, completed=done, total=total))``.

    Args:
        progress: Called as ``progress(done, total)``, or None.
    """
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return tick


def whole_number(name: str, value: Any, least: int) -> int:
    """An integer of at least ``least``, or a ``ValueError`` that says what came."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}, wanted an integer of at least {least}")
    return int(value)


def signs(key: Array, count: int, matrix: Flat) -> Array:
    """``[count, P]`` independent entries of ±1 (Rademacher)."""
    return _draw(key, "rademacher", (count, matrix.size), matrix.dtype)


def normals(key: Array, count: int, matrix: Flat) -> Array:
    """``[count, P]`` independent standard normal entries."""
    return _draw(key, "normal", (count, matrix.size), matrix.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Array, name: str, shape: Shape, dtype: Any) -> Array:
    return getattr(jax.random, name)(key, shape, dtype)


def finite(value: Any, what: str) -> Any:
    """The value as a float64 array, if all of it is finite."""
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise FloatingPointError(f"{what} is not finite: {array}")
    return array


def mean_and_error(samples: Any) -> Estimate:
    """Mean and standard error of independent samples ``[n, …]``."""
    values = np.asarray(samples, np.float64)
    return Estimate(values.mean(0), values.std(0, ddof=1) / math.sqrt(values.shape[0]))
