"""Dense symmetric matrices as products with trees, for the tests of spectra."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Matrix:
    """``M [P, P]`` and its products with trees of three leaves."""

    dense: np.ndarray

    @property
    def size(self):
        return len(self.dense)

    @property
    def like(self):
        """Leaves ``[b]``, ``[rest]`` and ``[]``, by sorted keys; empty where P is 1."""
        b = (self.size - 1) // 2
        shape = jax.ShapeDtypeStruct
        dtype = self.dense.dtype
        return {
            "a": {"x": shape((b,), dtype), "y": shape((self.size - 1 - b, 1), dtype)},
            "b": shape((), dtype),
        }

    def flat(self, tree, lead=0):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        return np.concatenate(
            [leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1
        )

    def tree(self, vectors):
        b = (self.size - 1) // 2
        x, y, z = vectors[..., :b], vectors[..., b:-1, None], vectors[..., -1]
        return {"a": {"x": x, "y": y}, "b": z}

    def mv(self, tree):
        """On the host: cannot be traced."""
        return self.tree(self.dense @ self.flat(tree))

    def mm(self, tree):
        """The same for several."""
        return self.tree(self.flat(tree, 1) @ self.dense.T)

    def traced(self, tree):
        """The same, by JAX."""
        leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]
        return self.tree(jnp.asarray(self.dense) @ jnp.concatenate(leaves))


def matrix_of(eigenvalues, seed=0, dtype=np.float64):
    """A matrix of these eigenvalues with random eigenvectors."""
    values = np.asarray(eigenvalues, np.float64)
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(len(values),) * 2))[0]
    dense = (q * values) @ q.T
    return Matrix(((dense + dense.T) / 2).astype(dtype))


@st.composite
def spectra_lists(draw):
    """Spectra: continuous, clustered, repeated, rank-deficient, of either sign."""
    size = draw(st.integers(1, 24))
    kind = draw(st.sampled_from(["normal", "clusters", "repeated", "low rank", "zero"]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.normal(size=size)
    if kind == "clusters":
        values = rng.integers(-2, 4, size) + 1e-7 * values
    elif kind == "repeated":
        values = rng.integers(-2, 4, size).astype(float)
    elif kind == "low rank":
        values *= np.arange(size) < max(1, size // 4)
    elif kind == "zero":
        values *= 0
    return values
