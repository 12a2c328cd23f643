"""The Jacobian of a batch's marked outputs, its tangent kernel and their spectrum."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.likelihoods import (
    masked_rows,
    row_shape,
    square_root_column,
    weighted_rows,
)
from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.statistics.outputs import MarkedLoss, marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

CHUNK = 256


def kernel(
    tagged: TaggedLoss,
    params: Any,
    batch: tuple[Any, ...],
    other: tuple[Any, ...] | None = None,
    *,
    trace: bool = False,
    independent: bool = False,
    chunk: int | None = None,
) -> Array:
    """The empirical neural tangent kernel ``J(x) J(x')ᵀ`` of the marked output.

    ``kernel[i, c, j, e] = ∂z_ic/∂θ · ∂z'_je/∂θ``, without the likelihood's ``Λ``. A
    normal output is marked as mean over standard deviation, and so enters here. Rows
    that a mask leaves out are zero. The Jacobian is never held as a whole.

    Args:
        tagged: The tagged loss; one output must be marked.
        params: Parameters.
        batch: The loss's arguments after ``params``; its output has ``n`` rows.
        other: A second batch, of ``m`` rows; None: the same one.
        trace: Whether to sum over ``c = e``.
        independent: Whether every row of the output depends only on the example, along
            the leading axis of all arguments, that it belongs to (no batch norm).
        chunk: Rows of ``J`` (examples if ``independent``) in memory at a time; 256 if
            None.

    Returns:
        ``[n, C, m, C]``, or ``[n, m]`` with ``trace``; float32 or float64. Rows are all
        axes of the output but the last, flattened.

    Raises:
        ValueError: No output is marked, or more than one; the widths of both batches
            differ; ``independent`` and the arguments do not share a leading axis.
    """
    options = independent, checked(chunk)

    def compute(params: Any, batch: tuple[Any, ...], other: Any):
        first = Batch(tagged, params, batch, *options)
        second = first if other is None else Batch(tagged, params, other, *options)
        (n, c), (m, e) = first.only_shape(), second.only_shape()
        if c != e:
            raise ValueError(
                f"kernel: the output of batch is {(n, c)} and that of other {(m, e)}; "
                "wanted as many columns."
            )
        gram = first.counted()[:, None] * products(first, second) * second.counted()
        return gram.reshape(n, c, m, c)

    gram = automatic(compute, params, batch, other)
    return jnp.einsum("icjc->ij", gram) if trace else gram


def eigenvalues(
    tagged: TaggedLoss,
    params: Any,
    batch: tuple[Any, ...],
    *,
    independent: bool = False,
    chunk: int | None = None,
) -> Array:
    """Eigenvalues of ``Sᵀ J Jᵀ S / n``: those of the Fisher matrix that are not zero.

    Where ``D > P`` the last ``D − P`` are zero, up to rounding, and where ``D < P`` the
    Fisher matrix has ``P − D`` zeros more.

    Args:
        tagged: The tagged loss.
        params: Parameters.
        batch: The loss's arguments after ``params``.
        independent: As in ``kernel``.
        chunk: As in ``kernel``.

    Returns:
        ``[D]``, descending, ``D`` the size of the square root's columns: ``n·C``.
    """
    options = independent, checked(chunk)

    def compute(params: Any, batch: tuple[Any, ...]) -> Array:
        dual = Batch(tagged, params, batch, *options).dual()
        return jnp.linalg.eigvalsh(dual)[::-1]

    return automatic(compute, params, batch)


def checked(chunk: Any) -> int:
    """``chunk``, or its default; it must be a whole number, at least 1."""
    if chunk is None:
        return CHUNK
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number >= 1, got {chunk!r}.")
    return chunk


class Batch:
    """A batch at given parameters: its outputs and what ``J`` does.

    Numbers of all outputs are one vector of ``size`` ``D``, output after output, row
    after row; ``terms`` is ``n``, ``examples`` the arguments if they are independent.
    """

    def __init__(
        self,
        tagged: TaggedLoss,
        params: Any,
        args: tuple[Any, ...],
        independent: bool,
        chunk: int,
    ) -> None:
        """Runs the network; products with ``J`` are made where they are used."""
        self.tagged, self.params, self.chunk = tagged, params, chunk
        self.model = marked_loss(tagged, params, args)

        def values(params: Any):
            return self.model.values(params)[1]

        self.marks, self.back = jax.vjp(values, params)
        self.forward = jax.linearize(values, params)[1]
        self.outputs = self.model.outputs(self.marks)
        self.size = sum(output.value.size for output in self.outputs)
        dtype = accumulation_dtype(self.marks[-1].dtype)
        self.terms = jnp.asarray(self.model.num_terms(self.marks), dtype)
        self.examples = args if independent else None
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(self.examples)]
        seen = [output.value.shape for output in self.outputs]
        leading = {shape[:1] for shape in shapes + seen}
        if independent and (len(leading) != 1 or () in leading):
            raise ValueError(
                "independent=True wants arguments and marked outputs that share their "
                f"leading axis; got arguments {shapes} and outputs {seen}."
            )

    def push(self, v: Any) -> Array:
        """``J v [D]`` of a parameter-shaped ``v``."""
        typed = jax.tree.map(lambda x, p: x.astype(p.dtype), v, self.params)
        return join(self.model.output_values(self.forward(typed)))

    def pull(self, y: Array) -> Any:
        """``Jᵀ y``, parameter-shaped, of ``y [D]``."""
        return self.back(cotangents(self.model, self.marks, y))[0]

    def rows_of(self, example: Any) -> Array:
        """The rows of one example ``[d, P]``."""
        one = jax.tree.map(lambda x: x[None], example)
        model = marked_loss(self.tagged, self.params, one)
        marks, back = jax.vjp(lambda p: model.values(p)[1], self.params)
        width = sum(output.value.size for output in model.outputs(marks))
        pulled = jax.vmap(lambda y: flat(back(cotangents(model, marks, y))[0]))
        return pulled(jnp.eye(width))

    def residuals(self) -> list[Array]:
        """``r = n ∂L/∂z`` of every output."""
        return self.model.residuals(self.params)

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

    def colour(self, y: Array) -> Array:
        """``S y`` along the first axis, ``[D', …] -> [D, …]``."""
        return self.by_rows(y, self.roots())

    def whiten(self, x: Array) -> Array:
        """``Sᵀ x`` along the first axis, ``[D, …] -> [D', …]``."""
        return self.by_rows(x, [jnp.swapaxes(root, 1, 2) for root in self.roots()])

    def by_rows(self, x: Array, matrices: list[Array]) -> Array:
        """Products of each row's matrix, ``[rows, i, j]`` of every output."""
        cuts = np.cumsum([m.shape[0] * m.shape[2] for m in matrices])[:-1]
        pairs = zip(matrices, jnp.split(x, cuts), strict=True)
        parts = [m @ part.reshape(len(m), m.shape[2], -1) for m, part in pairs]
        return jnp.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])

    def dual(self) -> Array:
        """``K Kᵀ = Sᵀ J Jᵀ S / n [D', D']``."""
        return self.whiten(self.whiten(products(self, self)).T) / self.terms


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
