"""A curvature matrix as a linear operator on parameter-shaped trees.

Two kinds: ``Streamed`` matrices are known by their products (``full`` and
``block_diagonal``), ``Kept`` ones by their blocks, computed when the operator is made.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature import blocks, spectra
from kfac_jax_lite.curvature.blocks import DensePart, Part
from kfac_jax_lite.curvature.layout import Layout
from kfac_jax_lite.curvature.spectra import Eigenpairs, Estimate
from kfac_jax_lite.curvature.stream import Stream, ravel, unit_images, unraveller


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A matrix that is applied batch by batch.

    Attributes:
        stream: Its products.
        size: ``P``.
        centre: ``ḡ [P]``, whose square is taken off; or None.
        layout: Where the diagonal blocks are; None: the whole matrix.
        owners: Number of the block of every entry, shaped like the parameters.
    """

    stream: Stream
    size: int
    centre: Array | None
    layout: Layout | None = None
    owners: Any = None

    def mv(self, v: Any) -> Any:
        """``M v``."""
        if self.layout is None:
            image = self.stream.mv(v)
        else:
            image = self.stream.block_mv(v, self.owners, len(self.layout))
        return self.centred(v, image)

    def mm(self, vs: Any, chunk: int | None) -> Any:
        """``M v_i``."""
        if self.layout is not None:
            leading = len(jax.tree.leaves(vs)[0])
            rows = [jax.tree.map(lambda x, i=i: x[i], vs) for i in range(leading)]
            images = [self.mv(row) for row in rows]
            return jax.tree.map(lambda *xs: jnp.stack(xs), *images)
        return jax.vmap(self.centred)(vs, self.stream.mm(vs, chunk))

    def centred(self, v: Any, image: Any) -> Any:
        """``M v − ḡ ḡᵀ v``, within the blocks."""
        if self.centre is None:
            return image
        flat = ravel(v).astype(self.centre.dtype)
        if self.layout is None:
            off = self.centre * (self.centre @ flat)
        else:
            owner = ravel(self.owners)
            dots = jax.ops.segment_sum(self.centre * flat, owner, len(self.layout))
            off = self.centre * dots[owner]
        _, unravel = unraveller(image)
        return jax.tree.map(jnp.subtract, image, unravel(off))

    def parts(self) -> list[Part]:
        """The dense blocks of ``block_diagonal``."""
        assert self.layout is not None
        places = [index.reshape(1, -1) for index in self.layout.blocks]
        found = self.stream.moments(places)
        pairs = zip(places, found, strict=True)
        return [DensePart(jnp.asarray(i), m) for i, m in pairs]

    def diagonal(self) -> Array:
        """The exact diagonal, ``[P]``."""
        index = np.arange(self.size)[:, None]
        return self.stream.moments([index])[0][:, 0, 0]

    def dense(self) -> Array:
        """``[P, P]``."""
        size = self.size
        if self.layout is not None:
            parts = self.parts()
            return blocks.dense(parts, size, parts[0].dense().dtype)

        def product(units: Any):
            return self.mm(units, None)

        images = unit_images(
            product, self.stream.params, np.arange(size), self.stream.at_once
        )
        rows = [image for _, image in images]
        return jnp.concatenate(rows)[:size]


@dataclasses.dataclass(frozen=True)
class Kept:
    """A matrix of disjoint diagonal blocks.

    Attributes:
        parts: Its blocks.
        size: ``P``.
    """

    parts: list[Part]
    size: int

    def mv(self, v: Any) -> Any:
        """``M v``."""
        return kept_product(self.parts, v)

    def mm(self, vs: Any, chunk: int | None) -> Any:
        """``M v_i``."""
        return kept_products(self.parts, vs, chunk)

    def diagonal(self) -> Array:
        """The diagonal, ``[P]``."""
        return blocks.diagonal(self.parts, self.size, self.dtype)

    def dense(self) -> Array:
        """``[P, P]``."""
        return blocks.dense(self.parts, self.size, self.dtype)

    @property
    def dtype(self) -> Any:
        """That of the blocks."""
        return jnp.result_type(*[part.diagonal().dtype for part in self.parts])


@jax.jit
def kept_product(parts: list[Part], v: Any) -> Any:
    """``M v``; compiled once for all operators with blocks of the same shapes."""
    _, unravel = unraveller(v)
    return unravel(blocks.apply(parts, ravel(v)))


@functools.partial(jax.jit, static_argnames="chunk")
def kept_products(parts: list[Part], vs: Any, chunk: int | None) -> Any:
    """``M v_i`` along a leading axis, all at once or in chunks."""
    if chunk is None:
        return jax.vmap(kept_product, (None, 0))(parts, vs)
    return jax.lax.map(functools.partial(kept_product, parts), vs, batch_size=chunk)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A symmetric matrix ``M [P, P]`` over the parameters.

    ``mv`` can be passed as it is to ``jax.scipy.sparse.linalg.cg`` and
    ``lineax.FunctionLinearOperator(op.mv, op.structure, tags)``. It may be traced in a
    ``jax.jit`` of yours, which then holds the batches as constants and repeats its
    program for every batch: outside, one program serves all of them.

    Where a method takes ``key``, it returns the exact figure without a key, and with
    one an ``Estimate(value, error)``, stochastic where no closed form is known (error 0
    where one is).

    Attributes:
        law: ``"hessian"``, ``"ggn"``, ``"fisher"``, ``"mc_fisher"``,
            ``"empirical_fisher"`` or ``"gradient_covariance"``.
        approximation: ``"full"``, ``"block_diagonal"``, ``"kronecker"``, ``"ekfac"``,
            ``"diagonal"`` or ``"unit_wise"``.
        structure: The parameters as ``jax.ShapeDtypeStruct``.
        form: How it is applied.
        stream: The batches.
    """

    law: str
    approximation: str
    structure: Any
    form: Streamed | Kept
    stream: Stream

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.structure))
        return size, size

    @functools.cached_property
    def num_examples(self) -> int:
        """``N``: rows (terms of the mean loss) that count, over all batches."""
        return int(self.stream.num_examples())

    def __repr__(self) -> str:
        """What it is: matrix, approximation, shape, batches."""
        count = len(self.stream.batches)
        return (
            f"<{self.law}, {self.approximation}, {self.shape[0]:,} × "
            f"{self.shape[1]:,}, over {count} batch{'es' * (count != 1)}>"
        )

    def mv(self, v: Any) -> Any:
        """``M v``.

        Args:
            v: Shaped like the parameters.

        Returns:
            The product, of the same shapes and dtypes.
        """
        self.check(v, 0)
        return cast(self.form.mv(v), v)

    def mm(self, vs: Any, chunk: int | None = None) -> Any:
        """``M v_1 … M v_k``.

        Args:
            vs: Shaped like the parameters, with a leading axis ``k`` on every leaf.
            chunk: How many products are computed at once; None: all.

        Returns:
            The products, shaped like ``vs``.
        """
        self.check(vs, 1)
        return cast(self.form.mm(vs, chunk), vs)

    def to_dense(self) -> Array:
        """``M [P, P]``, rows and columns as in ``jax.flatten_util.ravel_pytree``."""
        return self.form.dense()

    def diagonal(self, key: Any = None, num_samples: int = 32) -> Any:
        """The diagonal, shaped like the parameters.

        Exact for a streamed Hessian it takes ``P`` products, for the others one
        backward pass for every row and column of its root (see ``row_moments``).

        Args:
            key: PRNG key, for an estimate of a streamed matrix by products with random
                signs (see ``spectra.diagonal``).
            num_samples: Products of that estimate.

        Returns:
            The diagonal; with ``key``, an ``Estimate`` of two such trees.
        """
        if key is not None and isinstance(self.form, Streamed):
            return spectra.diagonal(
                self.mv, self.structure, key, num_samples, mm=self.mm
            )
        _, unravel = unraveller(self.structure)
        exact = unravel(self.form.diagonal())
        if key is None:
            return exact
        return Estimate(exact, jax.tree.map(jnp.zeros_like, exact))

    def trace(self, key: Any = None, num_samples: int = 32, **options: Any) -> Any:
        """``tr M``.

        Args:
            key: PRNG key, for an estimate where no closed form is known.
            num_samples: Products of that estimate.
            **options: Further ones of ``spectra.trace``, such as ``method``.

        Returns:
            The trace; with ``key``, an ``Estimate``.
        """
        if key is not None and isinstance(self.form, Streamed):
            return spectra.trace(
                self.mv, self.structure, key, num_samples, mm=self.mm, **options
            )
        return exact_or_estimate(jnp.sum(self.form.diagonal()), key)

    def eigsh(
        self, k: int, key: Any = None, which: str = "largest", **options: Any
    ) -> Eigenpairs:
        """``k`` extreme eigenvalues and their vectors.

        Closed forms for matrices of kept blocks; else ``spectra.eigsh``.

        Args:
            k: How many.
            key: PRNG key of the first vectors; not needed for kept blocks.
            which: ``"largest"``, ``"smallest"`` (both by value) or ``"magnitude"``.
            **options: Further ones of ``spectra.eigsh``.

        Returns:
            Values ``[k]``, descending (by ``|λ|`` for ``"magnitude"``); vectors,
            parameter-shaped trees with a leading axis ``k``; residuals
            ``‖M q − λ q‖ [k]``.

        Raises:
            ValueError: ``k`` out of range; no key where one is needed.
        """
        if not 1 <= k <= self.shape[0]:
            raise ValueError(f"eigsh wants 1 <= k <= {self.shape[0]}, got {k!r}.")
        if isinstance(self.form, Streamed):
            self.want_key(key, "eigsh")
            return spectra.eigsh(
                self.mv, self.structure, k, key, which=which, mm=self.mm, **options
            )
        parts = self.form.parts
        values, flat = blocks.eigenpairs(parts, self.form.size, k, which)
        image = jax.vmap(lambda x: blocks.apply(parts, x))(flat)
        rests = jnp.linalg.norm(image - jnp.asarray(values)[:, None] * flat, axis=-1)
        vectors = unraveller(self.structure)[1](flat)
        return Eigenpairs(values, vectors, np.asarray(rests))

    def eigenvalues(self) -> np.ndarray:
        """All eigenvalues, descending, ``[P]`` float64; of streamed ones by ``eigh``.

        Returns:
            Of kept blocks from their closed forms, else from ``to_dense()`` or, for
            ``block_diagonal``, from the dense blocks.
        """
        if isinstance(self.form, Kept):
            return blocks.eigenvalues(self.form.parts)
        if self.form.layout is not None:
            return blocks.eigenvalues(self.form.parts())
        return np.linalg.eigvalsh(np.asarray(self.to_dense(), np.float64))[::-1]

    def logdet(
        self,
        damping: float,
        key: Any = None,
        num_samples: int = 16,
        num_steps: int = 64,
        **options: Any,
    ) -> Any:
        """``log det (M + λ I)``.

        Args:
            damping: ``λ``.
            key: PRNG key, for an estimate by stochastic Lanczos quadrature where no
                closed form is known; without one a streamed matrix is formed.
            num_samples: Vectors of that estimate.
            num_steps: Products for every vector.
            **options: Further ones of ``spectra.logdet``.

        Returns:
            The figure; with ``key``, an ``Estimate``.

        Raises:
            ValueError: ``M + λ I`` is not positive definite.
        """
        if key is not None and isinstance(self.form, Streamed):
            return spectra.logdet(
                self.mv, self.structure, key, damping, num_samples, num_steps, **options
            )
        values = self.eigenvalues() + damping
        if not values[-1] > 0:
            raise ValueError(
                f"{self!r}: the least eigenvalue of M + {damping} I is {values[-1]:.3g}"
                ", wanted a positive one: use more damping."
            )
        return exact_or_estimate(jnp.asarray(np.log(values).sum()), key)

    def solve(self, b: Any, damping: float, **options: Any) -> Any:
        """``(M + λ I)⁻¹ b`` by conjugate gradients.

        Args:
            b: Shaped like the parameters.
            damping: ``λ``; ``M + λ I`` must be positive definite.
            **options: Those of ``jax.scipy.sparse.linalg.cg``: ``tol``, ``maxiter``, …

        Returns:
            The solution.
        """
        self.check(b, 0)

        def damped(v: Any):
            return jax.tree.map(lambda x, y: x + damping * y, self.mv(v), v)

        return jax.scipy.sparse.linalg.cg(damped, b, **options)[0]

    def want_key(self, key: Any, method: str) -> None:
        """A key must be there."""
        if key is None:
            raise ValueError(
                f"{method} of a {self.approximation} {self.law} is iterative: pass "
                "key=jax.random.key(…)."
            )

    def check(self, v: Any, lead: int) -> None:
        """A vector must be shaped like the parameters."""
        want, seen = jax.tree.structure(self.structure), jax.tree.structure(v)
        if want != seen:
            raise ValueError(f"{self!r} wants a vector like {want}, got {seen}.")
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(v),
            jax.tree.leaves(self.structure),
            strict=True,
        )
        for (path, leaf), like in pairs:
            if tuple(jnp.shape(leaf)[lead:]) != tuple(like.shape):
                name = jax.tree_util.keystr(path)
                axes = "a leading axis and " if lead else ""
                raise ValueError(
                    f"{self!r}: {name} has shape {jnp.shape(leaf)}, wanted "
                    f"{axes}{tuple(like.shape)}."
                )


def cast(tree: Any, like: Any) -> Any:
    """The tree with the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def exact_or_estimate(value: Array, key: Any) -> Any:
    """A figure known exactly, in the form that the caller's key asks for."""
    return value if key is None else Estimate(value, jnp.zeros_like(value))
