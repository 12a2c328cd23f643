"""The Jacobian of a batch's marked outputs: products with it, its rows, ``J Jᵀ``."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.likelihoods import (
    Output,
    masked_rows,
    row_shape,
    square_root_column,
    weighted_rows,
)
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.statistics.outputs import MarkedLoss, marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

CHUNK = 256


def checked(chunk: Any) -> int:
    """``chunk``, or its default; it must be a whole number, at least 1."""
    if chunk is None:
        return CHUNK
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number >= 1, got {chunk!r}.")
    return chunk


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch at given parameters: its outputs and what ``J`` does.

    Numbers of all outputs are one vector of ``D``, output after output, row after row.

    Attributes:
        outputs: The marked outputs.
        residuals: ``r = n ∂L/∂z`` of each.
        terms: ``n``.
        push: ``J v [D]`` of a parameter-shaped ``v``.
        pull: ``Jᵀ y``, parameter-shaped, of ``y [D]``.
        examples: The arguments if examples are independent, else None.
        rows_of: The rows of one example ``[d, P]``.
        chunk: How many rows, or examples, to treat together.
    """

    outputs: list[Output]
    residuals: Callable[[], list[Array]]
    terms: Array
    push: Callable[[Any], Array]
    pull: Callable[[Array], Any]
    examples: tuple[Any, ...] | None
    rows_of: Callable[[tuple[Any, ...]], Array]
    chunk: int

    @property
    def size(self) -> int:
        """``D``."""
        return sum(output.value.size for output in self.outputs)

    def only_shape(self) -> tuple[int, int]:
        """Rows and columns of the only output."""
        if len(self.outputs) != 1:
            shapes = [output.value.shape for output in self.outputs]
            raise ValueError(f"kernel wants one marked output, got {shapes}.")
        (output,) = self.outputs
        n = math.prod(row_shape(output.value.shape, output.likelihood))
        return n, output.value.size // n

    def counted(self) -> Array:
        """``[D]``: one for every number that counts, else zero."""
        ones = [jnp.ones_like(output.value) for output in self.outputs]
        return join(map(masked_rows, self.outputs, ones))

    def order(self) -> np.ndarray:
        """Where each of the ``D`` numbers is, example after example."""
        count = len(jax.tree.leaves(self.examples)[0])
        places = np.arange(self.size).reshape(count, -1)
        ends = np.cumsum([output.value.size // count for output in self.outputs])
        parts = np.split(places, ends[:-1], axis=1)
        return np.concatenate([part.reshape(-1) for part in parts])

    def jacobian(self) -> Array:
        """``J [D, P]``."""
        if self.examples is not None:
            rows = jax.lax.map(self.rows_of, self.examples, batch_size=self.chunk)
            return rows.reshape(self.size, -1)[self.order()]

        def row(j: Array):
            return flat(self.pull(jnp.arange(self.size) == j))

        return jax.lax.map(row, jnp.arange(self.size), batch_size=self.chunk)

    def roots(self) -> list[Array]:
        """``S [rows, C, columns]`` of every output, zero in rows that do not count."""
        found = []
        for output in self.outputs:
            name, z = output.likelihood, output.value
            count, column = square_root_column(name, z)
            n = math.prod(row_shape(z.shape, name))
            root = jax.vmap(lambda j, o=output, c=column: weighted_rows(o, c(j), 0.5))
            root = root(jnp.arange(count)).reshape(count, n, -1)
            found.append(jnp.moveaxis(root, 0, -1).astype(accumulation_dtype(z.dtype)))
        return found

    def whiten(self, x: Array) -> Array:
        """``Sᵀ x`` along the first axis, ``[D, …] -> [D', …]``."""
        parts, start = [], 0
        for root in self.roots():
            n, c, _ = root.shape
            part = x[start : start + n * c].reshape(n, c, -1)
            part = jnp.einsum("nck,ncx->nkx", root, part)
            parts.append(part.reshape(-1, *x.shape[1:]))
            start += n * c
        return jnp.concatenate(parts)

    def colour(self, y: Array) -> Array:
        """``S y``, ``[D'] -> [D]``."""
        parts, start = [], 0
        for root in self.roots():
            n, _, k = root.shape
            part = y[start : start + n * k].reshape(n, k)
            parts.append(jnp.einsum("nck,nk->nc", root, part).ravel())
            start += n * k
        return jnp.concatenate(parts)

    def dual(self) -> Array:
        """``K Kᵀ = Sᵀ J Jᵀ S / n [D', D']``."""
        return self.whiten(self.whiten(products(self, self)).T) / self.terms


def make_batch(
    tagged: TaggedLoss,
    params: Any,
    args: tuple[Any, ...],
    independent: bool,
    chunk: int,
) -> Batch:
    """The outputs on a batch, and ``J``; passes are made where they are used."""
    model = marked_loss(tagged, params, args)

    def values(params: Any):
        return model.values(params)[1]

    marks, back = jax.vjp(values, params)
    forward = jax.linearize(values, params)[1]
    outputs = model.outputs(marks)

    def push(v: Any):
        typed = jax.tree.map(lambda x, p: x.astype(p.dtype), v, params)
        return join(model.output_values(forward(typed)))

    def pull(y: Array) -> Any:
        return back(cotangents(model, marks, y))[0]

    def rows_of(example: Any) -> Array:
        one = jax.tree.map(lambda x: x[None], example)
        alone = marked_loss(tagged, params, one)
        own, back = jax.vjp(lambda p: alone.values(p)[1], params)
        width = sum(output.value.size for output in alone.outputs(own))
        pulled = jax.vmap(lambda y: flat(back(cotangents(alone, own, y))[0]))
        return pulled(jnp.eye(width))

    terms = jnp.asarray(model.num_terms(marks), accumulation_dtype(marks[-1].dtype))
    found = Batch(
        outputs,
        lambda: model.residuals(params),
        terms,
        push,
        pull,
        args if independent else None,
        rows_of,
        chunk,
    )
    if independent:
        check_examples(found, args)
    return found


def check_examples(batch: Batch, args: tuple[Any, ...]) -> None:
    """All arguments and outputs must have their examples along the leading axis."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(args)]
    counts = {shape[0] if shape else None for shape in shapes}
    seen = [output.value.shape for output in batch.outputs]
    if len(counts) != 1 or any(s[:1] != tuple(counts) for s in seen):
        raise ValueError(
            "independent=True wants arguments and marked outputs that share their "
            f"leading axis; got arguments {shapes} and outputs {seen}."
        )


def cotangents(
    model: MarkedLoss, marks: tuple[Array, ...], y: Array
) -> tuple[Array, ...]:
    """``y [D]`` as cotangents of the marks; zero for masks."""
    shapes = [output.value.shape for output in model.outputs(marks)]
    pieces = jnp.split(y, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    pairs = zip(pieces, shapes, strict=True)
    return model.cotangents(marks, [piece.reshape(shape) for piece, shape in pairs])


def products(first: Batch, second: Batch) -> Array:
    """``J₁ J₂ᵀ [D₁, D₂]``, neither Jacobian held as a whole."""
    if first.examples is None or second.examples is None:

        def column(j: Array):
            return first.push(second.pull(jnp.arange(second.size) == j))

        found = jax.lax.map(column, jnp.arange(second.size), batch_size=second.chunk)
        return found.T

    def block(example: Any) -> Array:
        rows = second.rows_of(example)
        return jax.lax.map(
            lambda other: first.rows_of(other) @ rows.T,
            first.examples,
            batch_size=first.chunk,
        )

    found = jax.lax.map(block, second.examples, batch_size=second.chunk)
    found = jnp.transpose(found, (1, 2, 0, 3)).reshape(first.size, second.size)
    return found[first.order()][:, second.order()]


def join(arrays: Any) -> Array:
    """One vector of some arrays, in float32 or better."""
    parts = [array.ravel() for array in arrays]
    return jnp.concatenate([p.astype(accumulation_dtype(p.dtype)) for p in parts])


def flat(tree: Any) -> Array:
    """One vector of a tree, in float32 or better."""
    return join(jax.tree.leaves(tree))
